"""Search of one workload's block sizes: one choice after the other, each candidate checked and then timed.

The search starts with the heuristic's sizes and goes through the choices once, in order; for each it tries the values, which
ascend, with the best of the choices before: from the middle one upwards and then downwards, each way until two in a row are no
faster than the best of its own. Sizes that give a program that was timed before, as more parts than there are tiles do, are not timed
again. A candidate replaces the best one only if it is faster by more than `_MARGIN`, and in the end has to be so once more,
timed together with the heuristic: else the heuristic stays, and the entry holds no size.

A candidate has to agree with "xla" on whole numbers, whose scores are the same in any order of summation: selections exactly,
outputs up to a rounding. One that refuses the size, fails to compile or is wrong is left out.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core import block_sizes
from pallas_kernels.core.block_sizes import Key
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.tuning import timer
from pallas_kernels.tuning.timer import Timing
from pallas_kernels.tuning.workloads import Workload

_MARGIN = 0.03
_SLOWER = 2  # values in a row that are no faster, after which a direction is left
_BEYOND_CACHE = (
    1 << 28
)  # bytes of arguments, so that a call finds nothing of the last one's in the cache
_MOST_CALLS = 4  # different arguments
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of functions, in the text of a program

type Sizes = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search.

    key: under which the op will look for it.
    sizes: the best ones; empty where the heuristic's are.
    best, heuristic: their times.
    tried, refused, wrong: candidates timed, not taken by the implementation at this size, and left out for their results.
    complete: False where the search was stopped, so that there may be better sizes.
    """

    key: Key
    sizes: Sizes
    best: Timing
    heuristic: Timing
    tried: int
    refused: int
    wrong: tuple[str, ...]
    complete: bool


def key_of(workload: Workload, implementation: str) -> Key | None:
    """Returns under which key the op looks for this workload's sizes, or None if it does not look.

    Raises:
      NotImplementedError: the implementation does not take this workload.
    """
    arguments = jax.eval_shape(lambda: workload.draw(jax.random.key(0), False))
    with block_sizes.watched() as asked:
        jax.eval_shape(workload.call(implementation, {}), *arguments)
    keys = [key for op, key in asked if (op, key.implementation) == (workload.op, implementation)]
    return keys[0] if keys else None


def search(
    workload: Workload,
    implementation: str,
    key: Key,
    *,
    rounds: int = 5,
    round_ms: float = 4.0,
    on_candidate: Callable[[Sizes, float, float], None] = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> Found:
    """Searches the block sizes of one workload.

    Args:
      key: of `key_of`.
      rounds, round_ms: of `timer.device_time`, for each candidate.
      on_candidate: told the sizes, their time and the best one before [ms]; NaN where there is none.
      stop: asked before each candidate after the heuristic; True ends the search with the best until then.

    Raises:
      ValueError: the implementation has no choice for this op.
      RuntimeError: the heuristic's sizes give a wrong result, or one that cannot be timed.
    """
    choices = workload.choices(implementation)
    if not choices:
        raise ValueError(
            f"implementation: got {implementation}, which has no choice in {workload.op}"
        )
    trials = _Trials(workload, implementation, rounds=rounds, round_ms=round_ms)
    heuristic = trials.time({})
    if heuristic is None:
        reason = trials.wrong[0] if trials.wrong else "a refusal"
        raise RuntimeError(f"{workload.name}: got {reason}, wanted the heuristic's sizes to work")
    on_candidate({}, heuristic.median, float("nan"))
    best = heuristic
    sizes: Sizes = {}
    complete = True
    for name, values in choices.items():
        fixed, least = sizes, float("inf")
        middle = len(values) // 2
        for direction in (values[middle:], values[:middle][::-1]):
            slower = 0
            for value in direction:
                complete = complete and not stop()
                if not complete or slower == _SLOWER:
                    break
                candidate = fixed | {name: value}
                timing = trials.time(candidate)
                on_candidate(candidate, _ms(timing), best.median)
                if timing is None:
                    continue
                if timing.median < (1 - _MARGIN) * best.median:
                    sizes, best = candidate, timing
                slower = 0 if timing.median < least else slower + 1
                least = min(least, timing.median)
    if sizes:
        heuristic, best = trials.again({}), trials.again(sizes)
        if best.median >= (1 - _MARGIN) * heuristic.median:
            sizes, best = {}, heuristic
    return Found(
        key=key,
        sizes=sizes,
        best=best,
        heuristic=heuristic,
        tried=trials.timed,
        refused=trials.refused,
        wrong=tuple(trials.wrong),
        complete=complete,
    )


class _Trials:
    """The candidates of one workload: their inputs, and what became of them.

    Args:
      rounds, round_ms: of `timer.device_time`.

    Attributes:
      timed, refused: how many; wrong: those left out for another reason, with it.
    """

    def __init__(self, workload: Workload, implementation: str, *, rounds: int, round_ms: float):
        self._call = functools.partial(workload.call, implementation)
        self._options = {"rounds": rounds, "round_ms": round_ms}
        draw = jax.jit(workload.draw, static_argnums=1)
        self._exact = draw(jax.random.key(1), True)
        self._wanted = jax.device_get(jax.jit(workload.call("xla", {}))(*self._exact))
        size = sum(x.nbytes for x in self._exact)
        calls = max(1, min(_MOST_CALLS, -(-_BEYOND_CACHE // max(size, 1))))
        self._inputs = [draw(jax.random.key(2 + call), False) for call in range(calls)]
        self._tried: dict[tuple, Timing | None] = {}
        self._found: dict[str, Timing | None] = {}  # by program
        self.timed, self.refused = 0, 0
        self.wrong: list[str] = []

    def time(self, sizes: Sizes) -> Timing | None:
        """Checks and times sizes, unless they or their program were tried before; None where they do not work."""
        place = tuple(sorted(sizes.items()))
        if place not in self._tried:
            self._tried[place] = self._try(sizes)
        return self._tried[place]

    def _try(self, sizes: Sizes) -> Timing | None:
        fn = jax.jit(self._call(sizes))
        try:
            program = _ADDRESS.sub("", str(fn.trace(*self._exact).jaxpr))
            if program in self._found:
                return self._found[program]
            self._found[program] = None
            _check_same(jax.device_get(fn(*self._exact)), self._wanted)
            self._found[program] = timing = timer.device_time(fn, self._inputs, **self._options)
        except (NotImplementedError, ValueError):  # sizes that this workload does not allow
            self.refused += 1
            return None
        except Exception as error:  # a wrong result, or whatever a compiler has to say
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.wrong.append(f"{sizes}: {lines[0]}")
            return None
        self.timed += 1
        return timing

    def again(self, sizes: Sizes) -> Timing:
        """Times sizes that work once more."""
        return timer.device_time(jax.jit(self._call(sizes)), self._inputs, **self._options)


def _ms(timing: Timing | None) -> float:
    return float("nan") if timing is None else timing.median


def _check_same(got: Any, wanted: Any) -> None:
    """Compares results of whole numbers: everything of a selection exactly, an output of floats up to a rounding.

    Raises:
      AssertionError: they differ.
    """
    if isinstance(wanted, TopKSelection) or not jnp.issubdtype(wanted.dtype, jnp.floating):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        return
    got, exact = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(np.where(finite, 0, exact), np.where(finite, 0, got))
    rounding = max(2e-5, 2 * float(jnp.finfo(wanted.dtype).eps))
    error = np.abs(got[finite] - exact[finite]).max(initial=0.0)
    bound = rounding * np.abs(exact[finite]).max(initial=0.0)
    assert error <= bound, f"error {error:.3g}, wanted at most {bound:.3g}"
