"""Device time of a function as the device itself records it: from the start of a call's first kernel to the end of its last.

The profiler notes every kernel with its start and its length, so that neither the host nor launches are counted, and no
overhead has to be guessed and subtracted. Only on GPUs; what cannot be taken apart into calls, because their number of kernels
varies, is not measured here.
"""

import collections
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

_WARM = 2  # first calls of a recording, left out
_MOST_CALLS = 256
_SLACK_NS = 1e3  # by which a call's last kernel may seem to outlast the start of the next call


class Kernel(NamedTuple):
    """A kernel, or a copy, on the device: when it began, and for how long it ran [ns]."""

    start: float
    length: float
    name: str


def call_times(
    fn: Callable[..., Any],
    inputs: Sequence[tuple[jax.Array, ...]],
    *,
    calls: int,
) -> list[float] | None:
    """Records calls of a compiled function on each of `inputs` in turn; returns the time of each [ms], or None.

    Args:
      fn: of arrays, compiled before; it has run on each of `inputs`.
      calls: that are wanted; made a multiple of the number of inputs.

    Returns:
      None where the profiler saw nothing, or calls that do not run the same kernels.
    """
    turns = -(-min(calls + _WARM, _MOST_CALLS) // len(inputs))
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="call_times_") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            results = None
            for _ in range(turns):
                for arguments in inputs:
                    results = fn(*arguments)
            jax.block_until_ready(results)
        [path] = pathlib.Path(folder).glob("**/*.xplane.pb")
        found = spans(_kernels(path), turns * len(inputs))
    return None if found is None else found[min(_WARM, len(found) - 1) :]


def _kernels(path: pathlib.Path) -> list[Kernel]:
    """Reads what ran on the first GPU."""
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    return [
        Kernel(event.start_ns, event.duration_ns, event.name)
        for plane in planes
        if plane.name == "/device:GPU:0"
        for line in plane.lines
        if "Stream" in line.name  # the other lines sum up what is in these
        for event in line.events
    ]


def spans(kernels: Iterable[Kernel], calls: int) -> list[float] | None:
    """Cuts kernels into calls, all of the same kernels; returns how long each lasted [ms], or None if they are not the same."""
    kernels = sorted(kernels)
    size, rest = divmod(len(kernels), calls)
    if rest or not size:
        return None
    parts = [kernels[i : i + size] for i in range(0, len(kernels), size)]
    names = [collections.Counter(kernel.name for kernel in part) for part in parts]
    if any(other != names[0] for other in names):
        return None
    end = lambda part: max(kernel.start + kernel.length for kernel in part)
    if any(
        end(part) > after[0].start + _SLACK_NS
        for part, after in zip(parts, parts[1:], strict=False)
    ):
        return None  # calls overlap, so that none has a time of its own
    return [1e-6 * (end(part) - part[0].start) for part in parts]
