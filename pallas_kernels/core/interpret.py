"""`interpret_mode()`: run the Mosaic kernels on a CPU, with the simulators that JAX ships.

The setting is a JAX user context, so it is part of the cache key of `jax.jit`: a function traced inside the context is
traced again outside of it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpretOptions:
    """How a kernel is interpreted.

    detect_races: use the simulator with race detection; a race raises `RaceError` when the context is left.
    simulate: use the device simulator (slow, models DMA, semaphores and uninitialised memory as NaN) rather than the
      plain interpreter where both exist (Mosaic TPU). Mosaic GPU has only the simulator.
    """

    detect_races: bool = False
    simulate: bool = False


class RaceError(RuntimeError):
    """The simulator saw two unordered accesses to one buffer."""


_context = jax.make_user_context(None)


def interpret_options() -> InterpretOptions | None:
    """Returns the options of the enclosing `interpret_mode()`, or None outside of one."""
    return _context.value


@contextlib.contextmanager
def interpret_mode(*, detect_races: bool = False, simulate: bool = False) -> Iterator[None]:
    """Runs `mosaic_tpu` and `mosaic_gpu` implementations on the CPU while the context is open.

    Args:
      detect_races: detect unordered accesses; implies `simulate`. Leaving the context waits for nothing: block on the
        results inside it, or the check comes too early.
      simulate: prefer the device simulator to the plain interpreter.

    Raises:
      RaceError: on leaving, if a race was detected.
    """
    # Imported here: the simulators pull in both Mosaic backends, which library users on a device never need.
    from pallas_kernels.core import compat

    options = InterpretOptions(detect_races=detect_races, simulate=simulate or detect_races)
    if not detect_races:
        with _context(options):
            yield
        return
    compat.reset_interpreters()
    with compat.watched_races() as race_seen:
        with _context(options):
            yield
        simulator = race_seen()
    if simulator is not None:
        raise RaceError(f"the {simulator} simulator detected a race; its report is printed above")
