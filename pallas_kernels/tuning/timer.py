"""Device time of a function, without launches and the host: on GPUs as the profiler records it, elsewhere in a chain of calls.

See `profile` for the first. The second chains calls inside one compiled loop: every call waits for the one before it by its data: before each call one element of its smallest argument is rewritten with
its own value plus a number that is always 0, made of the previous call's results in a way that the compiler cannot see
through. A barrier alone would not do, as XLA drops barriers before it schedules, and independent calls then overlap. The
links of the chain take time themselves; a chain of links without calls is timed too, and subtracted. On GPUs that is too much
for short calls, since a link's own time is the host's, and passes while a call runs: 10 us were left of a call of 29.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import platform
from pallas_kernels.tuning import profile

_NEVER = 0x7FAB0000  # as float32 a NaN that no arithmetic makes, as int32 beyond any index
_INNER_S = 4e-3  # of calls between two looks of the host at the loop's counter, each of which costs some 10 us
_MOST_INNER = 64
_MOST_S = 6.0  # of rounds, after the first `_FEWEST_ROUNDS`
_FEWEST_ROUNDS = 3
_FEWEST_CALLS = 10  # that a median on the profiler is taken of
_ATTEMPTS = 4  # with longer and longer rounds, where the host's noise drowns the difference


class Timing(NamedTuple):
    """Of one call [ms].

    median, p10, p90: over the rounds, without the chain's own time.
    rounds: that were counted; calls, on the profiler.
    calls: in a round's difference; 1 on the profiler.
    chain_ms: of one link without a call, which was subtracted; 0 where there is no chain.
    clock: "profiler", "chain", or "events" of another library.
    """

    median: float
    p10: float
    p90: float
    rounds: int
    calls: int
    chain_ms: float
    clock: str


def summarise(
    found: Sequence[float], *, calls: int, chain_ms: float = 0.0, clock: str = "events"
) -> Timing:
    """Returns median and deciles of the rounds [ms]."""
    if len(found) == 1:
        low = high = found[0]
    else:
        deciles = statistics.quantiles(found, n=10, method="inclusive")
        low, high = deciles[0], deciles[-1]
    return Timing(statistics.median(found), low, high, len(found), calls, chain_ms, clock)


def device_time(
    fn: Callable[..., Any],
    inputs: Sequence[tuple[jax.Array, ...]],
    *,
    rounds: int = 7,
    round_ms: float = 5.0,
) -> Timing:
    """Times `fn`, called on each of `inputs` in turn many times.

    In a chain that is done a second time, half as often; the difference is free of overhead.

    Args:
      fn: of arrays, to a tree of arrays.
      inputs: arguments of a call each; several, so that what one call leaves in the cache does not serve the next. Arrays may
        be shared, but not the smallest of a call.
      rounds: differences taken; fewer, but at least three, where a call is slow. On the profiler, calls that last as long
        together, and ten at least, or three where those would take more than six seconds.
      round_ms: what a difference should last at least, since the host's clock is off by some 0.05 ms.

    Raises:
      ValueError: `inputs` is empty, or `fn` does not use its smallest argument, so that its calls would not be chained.
      RuntimeError: the calls took no longer than the chain without them, so there is no time to report.
    """
    if not inputs:
        raise ValueError("inputs: got none, wanted arguments of at least one call")
    fn = fn if hasattr(fn, "lower") else jax.jit(fn)  # a compiled one is not compiled again
    if platform.target_platform() == "gpu" and (timing := _profiled(fn, inputs, rounds * round_ms)):
        return timing
    place = min(range(len(inputs[0])), key=lambda i: inputs[0][i].size)
    touched = tuple(arguments[place] for arguments in inputs)
    others = tuple(
        tuple(array for i, array in enumerate(arguments) if i != place) for arguments in inputs
    )
    _check_used(fn, inputs[0], place)
    inner = _turns_inside(fn, inputs)
    link = tuple((array.shape, array.dtype.name) for array in touched)
    chain = _chain(fn, place, inner)
    attempt = 1
    while True:
        own = _empty_chain(link, inner, round_ms=round_ms)
        found, calls = _rounds(chain, touched, others, inner, rounds=rounds, round_ms=round_ms)
        timing = summarise([one - own for one in found], calls=calls, chain_ms=own, clock="chain")
        if timing.p10 > 0 or (attempt == _ATTEMPTS and timing.median > 0):
            return timing
        if attempt == _ATTEMPTS:
            raise RuntimeError(
                f"time: got {timing.median + own:.6f} ms a call, wanted more than the chain's own {own:.6f} ms"
            )
        attempt += 1
        round_ms *= 4  # the host was too busy for differences as short as these


def _profiled(
    fn: Callable[..., Any], inputs: Sequence[tuple[jax.Array, ...]], wanted_ms: float
) -> Timing | None:
    """Times calls that last `wanted_ms` in all, and some more; None where the profiler cannot tell them apart."""
    for arguments in inputs:
        jax.block_until_ready(fn(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(fn(*inputs[0]))
    ms = 1e3 * (time.perf_counter() - begin)
    fewest = _FEWEST_CALLS if _FEWEST_CALLS * ms < 1e3 * _MOST_S else _FEWEST_ROUNDS
    calls = max(fewest, round(wanted_ms / ms))
    found = profile.call_times(fn, inputs, calls=calls)
    return None if found is None else summarise(found, calls=1, clock="profiler")


def _chain(fn: Callable[..., Any], place: int, inner: int) -> Callable[..., jax.Array]:
    """Returns a compiled function of (turns, touched, others): `inner` x turns times, calls `fn` on every input."""

    @jax.jit
    def chain(turns, touched, others):
        values = [lax.slice(array, (0,) * array.ndim, (1,) * array.ndim) for array in touched]

        def turn(_, state):
            arrays, token = state
            after = []
            for array, value, rest in zip(arrays, values, others, strict=True):
                # Written without being read, so that it happens in place even where the smallest argument is large.
                linked = value + token.astype(value.dtype)
                array = lax.dynamic_update_slice(array, linked, (0,) * array.ndim)
                # Barriers keep work on the other arguments from being moved out of the loop, and results from being cut down
                # to the elements that are looked at.
                array, rest, token = lax.optimization_barrier((array, rest, token))
                results = lax.optimization_barrier(fn(*rest[:place], array, *rest[place:]))
                token = _always_zero(results)
                after.append(array)
            return tuple(after), token

        def turns_inside(_, state):
            # A count known to the compiler: the host need not look at it after each turn.
            return lax.fori_loop(0, inner, turn, state)

        return lax.fori_loop(0, turns, turns_inside, (touched, jnp.int32(0)))[1]

    return chain


def _always_zero(results: Any) -> jax.Array:
    """Returns int32 0, from one element of every result."""
    token = jnp.int32(0)
    for leaf in jax.tree.leaves(results):
        element = lax.reshape(lax.slice(leaf, (0,) * leaf.ndim, (1,) * leaf.ndim), ())
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            bits = lax.bitcast_convert_type(element.astype(jnp.float32), jnp.int32)
        else:
            bits = element.astype(jnp.int32)
        token = token | (bits == _NEVER).astype(jnp.int32)
    return token


def _check_used(fn: Any, arguments: tuple[jax.Array, ...], place: int) -> None:
    jaxpr = fn.trace(*arguments).jaxpr.jaxpr
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    read |= {id(variable) for variable in jaxpr.outvars}
    if id(jaxpr.invars[place]) not in read:
        raise ValueError(
            f"fn: got one that does not read argument {place}, its smallest, wanted one that needs all"
        )


def _turns_inside(fn: Callable[..., Any], inputs: Sequence[tuple[jax.Array, ...]]) -> int:
    """Returns how many turns over the inputs the inner loop makes, a power of two, from the time of single calls."""
    jax.block_until_ready(fn(*inputs[0]))
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        jax.block_until_ready(fn(*inputs[0]))
        seconds.append(time.perf_counter() - begin)
    turns = int(_INNER_S / (min(seconds) * len(inputs)))
    return min(_MOST_INNER, 1 << max(turns, 1).bit_length() - 1)


@functools.cache
def _empty_chain(
    touched: tuple[tuple[tuple[int, ...], str], ...], inner: int, *, round_ms: float
) -> float:
    """Times a link [ms]: a chain over arrays of these shapes and dtypes, whose calls return one element."""
    arrays = tuple(jnp.zeros(shape, dtype) for shape, dtype in touched)
    element = lambda array: lax.slice(array, (0,) * array.ndim, (1,) * array.ndim)
    chain = _chain(element, 0, inner)
    found, _ = _rounds(
        chain, arrays, ((),) * len(arrays), inner, rounds=_FEWEST_ROUNDS, round_ms=round_ms
    )
    return max(0.0, min(found))  # noise only adds; too little is subtracted rather than too much


def _rounds(
    chain: Callable[..., jax.Array], touched, others, inner: int, *, rounds: int, round_ms: float
) -> tuple[list[float], int]:
    """Returns the time of one call [ms] in each round, and how many calls a round's difference holds."""

    def run(turns: int) -> float:
        count = jax.block_until_ready(jnp.int32(turns))
        begin = time.perf_counter()
        jax.block_until_ready(chain(count, touched, others))
        return time.perf_counter() - begin

    run(1)  # compiles
    few, begin = 1, time.perf_counter()
    overhead = run(0)
    while run(few) - overhead < 1e-3 * round_ms and few < 1 << 20:
        few *= 2
    calls = few * inner * len(touched)
    found: list[float] = []
    while len(found) < rounds:
        if len(found) >= _FEWEST_ROUNDS and time.perf_counter() - begin > _MOST_S:
            break
        found.append(1e3 * (run(2 * few) - run(few)) / calls)
    return found, calls
