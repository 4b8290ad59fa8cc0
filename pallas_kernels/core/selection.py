"""A selection as two numbers a row, (threshold, tie_cut), and the integer order that makes it exact.

A key is selected where `score > threshold`, or `score == threshold` and its index is at most `tie_cut`. Comparisons are
made on an order-preserving int32 image of the float32 score, so that every backend agrees to the bit: -0.0 equals 0.0,
subnormals are 0.0 (hardware that flushes them cannot tell), NaN is below -inf and never selected.
"""

import fractions
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from pallas_kernels.core import varying

DEAD = -(2**31)  # order key of a key that the row may not see
NAN = -(2**31) + 1  # order key of a NaN score
NOTHING = 2**31 - 1  # threshold key of a row that selects nothing
SMALLEST_NORMAL_KEY = 0x00800000  # order key of the smallest positive normal float32
_INFINITY = 0x7F800000

MAX_RATIO_DENOMINATOR = 2**15  # keeps the budget's products inside int32


class TopKSelection(NamedTuple):
    """The keys kept by each row.

    indices: int32 [..., topk], ascending, -1 at the tail; None where no list was asked for.
    count: int32 [...], keys kept: min(topk, visible keys whose score is not NaN).
    threshold: float32 [...], the smallest kept score; +inf where nothing is kept.
    tie_cut: int32 [...], the largest kept index among scores equal to the threshold; -1 where nothing is kept.
    """

    indices: Int32[Array, "..."] | None
    count: Int32[Array, "..."]
    threshold: Float32[Array, "..."]
    tie_cut: Int32[Array, "..."]


def repeat_for_heads(chosen: TopKSelection, heads: int) -> TopKSelection:
    """Gives each head the selection of its set, `heads` in a row: [B, G, ...] -> [B, G * heads, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, heads, axis=1), chosen)


def order_key(
    scores: Shaped[Array, "..."], bitcast=lax.bitcast_convert_type
) -> Int32[Array, "..."]:
    """Maps scores to int32 so that integer order is score order; made of integer operations only."""
    bits = bitcast(scores.astype(jnp.float32), jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    key = jnp.where(bits < 0, -magnitude, magnitude)
    key = jnp.where(magnitude < SMALLEST_NORMAL_KEY, 0, key)
    return jnp.where(magnitude > _INFINITY, NAN, key)


def key_to_score(
    key: Int32[Array, "..."], bitcast=lax.bitcast_convert_type
) -> Float32[Array, "..."]:
    """Inverse of `order_key` for the keys of numbers; `NOTHING` becomes +inf, the threshold of an empty row."""
    bits = jnp.where(key < 0, -key | jnp.int32(DEAD), key)
    score = bitcast(bits, jnp.float32)
    return jnp.where(key == NOTHING, jnp.float32(jnp.inf), score)


def selected(
    scores: Shaped[Array, "... S"],
    visible: Bool[Array, "... S"],
    threshold: Float32[Array, "..."],
    tie_cut: Int32[Array, "..."],
) -> Bool[Array, "... S"]:
    """Rebuilds the set of a row from its two numbers; `scores` must be the very bits that were selected on."""
    key, bound = order_key(scores), order_key(threshold)[..., None]
    index = lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 1)
    kept = (key > bound) | ((key == bound) & (index <= tie_cut[..., None]))
    return visible & (key != NAN) & kept


def compact(mask: Bool[Array, "... S"], size: int) -> Int32[Array, "... {size}"]:
    """Lists the true positions of each row in ascending order, -1 at the tail; more than `size` are cut off.

    Slot j holds the first position by which j + 1 are true, found by bisection on their running count: a gather a step,
    where a scatter of positions would be serial on a CPU and unordered on a GPU.
    """
    s = mask.shape[-1]
    so_far = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    wanted = lax.broadcasted_iota(jnp.int32, (*mask.shape[:-1], size), mask.ndim - 1) + 1

    def halve(_, bracket):
        left, right = bracket
        middle = (left + right) // 2
        enough = jnp.take_along_axis(so_far, middle, axis=-1, mode="clip") >= wanted
        return jnp.where(enough, left, middle + 1), jnp.where(enough, middle, right)

    so_far, first, last = varying.align(so_far, jnp.zeros_like(wanted), jnp.full_like(wanted, s))
    left, _ = lax.fori_loop(0, s.bit_length(), halve, (first, last))
    return jnp.where(left < s, left, -1)


def ratio_fraction(ratio: float) -> tuple[int, int]:
    """Turns a share in (0, 1] into whole numbers (a, d), d <= 2**15, once and in Python: 0.07 is 7/100, not 8 of 100."""
    fraction = fractions.Fraction(ratio).limit_denominator(MAX_RATIO_DENOMINATOR)
    if fraction.numerator == 0:
        return 1, MAX_RATIO_DENOMINATOR
    return fraction.numerator, fraction.denominator


def budget_from_ratio(
    visible: Int32[Array, "..."], ratio: float, min_topk: int = 1
) -> Int32[Array, "..."]:
    """Returns clip(ceil(ratio * visible), min_topk, visible) in exact integer arithmetic, any visible below 2**31."""
    numerator, denominator = ratio_fraction(ratio)
    quotient, remainder = visible // denominator, visible % denominator
    kept = numerator * quotient + (numerator * remainder + denominator - 1) // denominator
    return jnp.minimum(jnp.maximum(kept, min_topk), visible)


def rows_of(topk: int | jax.Array, rows: tuple[int, ...]) -> Int32[Array, "..."]:
    """Broadcasts a budget to one int32 a row; an int past int32 keeps everything, as any budget past S does."""
    topk = min(topk, NOTHING) if isinstance(topk, int) else topk
    return jnp.broadcast_to(jnp.asarray(topk, jnp.int32), rows)


def row_budget(
    visible: Int32[Array, "B T"],
    topk: int | Int32[Array, "..."] | None,
    topk_ratio: float | None,
    min_topk: int,
    dense_rows: Bool[Array, "B T"] | None,
) -> Int32[Array, "B T"]:
    """Returns how many keys each row may keep, from its count of visible keys; `dense_rows` keep all of them."""
    if topk_ratio is not None:
        budget = budget_from_ratio(visible, topk_ratio, min_topk)
    else:
        budget = jnp.minimum(rows_of(0 if topk is None else topk, visible.shape), visible)
    return budget if dense_rows is None else jnp.where(dense_rows, visible, budget)
