"""`topk_select` for any device: bisection on the integer order of float32, a row read once a step, nothing sorted.

1. Scores that may be chosen stay, subnormals as 0; all others become NaN, which no comparison lets in.
2. A bracket of order keys closes on the budget-th largest score: count(x >= low) >= budget > count(x >= high). The middle
   is taken between integers, so that 32 steps always suffice, and compared as floats, so that a step is one compare and
   add a key. Rows stop early when their count meets the budget: 15 to 25 steps on attention scores.
3. Only rows with more equal scores than places bisect once more, over the index, for the tie cut.

Counting in float32 is exact and twice as fast as in int32 on a CPU (measured); it needs S below 2 ** 24.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.core import selection
from pallas_kernels.core.selection import TopKSelection

_MAX_EXACT_COUNT = 2**24
_CHUNK_BYTES = 2**28  # float32 scores of the rows that are searched side by side


def rankable(scores: Float[Array, "... S"], visible: Bool[Array, "..."]) -> Float32[Array, "... S"]:
    """Returns scores as they are compared: float32, subnormals as 0, NaN where a key may not be chosen."""
    x = scores.astype(jnp.float32)
    x = jnp.where(jnp.abs(x) < jnp.finfo(jnp.float32).smallest_normal, 0, x)
    return jnp.where(visible, x, jnp.nan)


def chosen(
    x: Float32[Array, "... S"], threshold: Float32[Array, "..."], tie_cut: Int32[Array, "..."]
) -> Bool[Array, "... S"]:
    """Rebuilds the set of each row of `rankable` scores from its threshold and tie cut."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    threshold, tie_cut = threshold[..., None], tie_cut[..., None]
    return (x > threshold) | ((x == threshold) & (index <= tie_cut))


def select(
    x: Float32[Array, "... S"], budget: Int32[Array, "..."]
) -> tuple[Int32[Array, "..."], Float32[Array, "..."], Int32[Array, "..."]]:
    """Returns (count, threshold, tie_cut) of each row of `rankable` scores."""
    counter = jnp.float32 if x.shape[-1] < _MAX_EXACT_COUNT else jnp.int32

    def how_many(mask):
        return jnp.sum(mask.astype(counter), axis=-1).astype(jnp.int32)

    alive = how_many(x == x)
    count = jnp.clip(budget, 0, alive)
    low = selection.order_key(jnp.min(jnp.where(x == x, x, jnp.inf), axis=-1))
    high = selection.order_key(jnp.max(jnp.where(x == x, x, -jnp.inf), axis=-1)) + 1

    def is_open(low, high, reach):
        return (reach != count) & (high - low != 1) & (count > 0)

    def halve(bracket):
        # A row that is done keeps its set: a higher `low` is only taken where it reaches as many keys.
        low, high, reach = bracket
        middle = low + lax.shift_right_logical(high - low, jnp.int32(1))
        reached = how_many(x >= _bound(middle)[..., None])
        up = reached >= count
        return (
            jnp.where(up, middle, low),
            jnp.where(up, high, middle),
            jnp.where(up, reached, reach),
        )

    low, _, reach = lax.while_loop(lambda b: jnp.any(is_open(*b)), halve, (low, high, alive))
    threshold = jnp.min(jnp.where(x >= _bound(low)[..., None], x, jnp.inf), axis=-1)
    index = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    equal = x == threshold[..., None]
    last = jnp.max(jnp.where(equal, index, -1), axis=-1)

    # The first index at which enough equals are in: `places` of them lie at or before `right`, fewer before `left`.
    crowded = (reach != count) & (count > 0)
    places = count - how_many(x > threshold[..., None])

    def halve_index(bracket):
        left, right = bracket
        middle = (left + right) // 2
        enough = how_many(equal & (index <= middle[..., None])) >= places
        return jnp.where(enough, left, middle + 1), jnp.where(enough, middle, right)

    left = jnp.where(crowded, 0, last)
    tie_cut, _ = lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve_index, (left, last))
    nothing = count == 0
    return count, jnp.where(nothing, jnp.inf, threshold), jnp.where(nothing, -1, tie_cut)


def _bound(key: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """Returns the float that `rankable` scores of at least this order key reach; never a subnormal, which may flush."""
    smallest = jnp.int32(selection.SMALLEST_NORMAL_KEY)
    key = jnp.where((key > -smallest) & (key <= 0), 0, key)
    return selection.key_to_score(jnp.where((key > 0) & (key < smallest), smallest, key))


def topk_select(scores, topk, *, lengths, with_indices, block_sizes=None):
    """Arguments as the public function, checked; `lengths` int32 [...] or None, `topk` an int or int32 rows."""
    *rows, s = scores.shape
    # Fused with what made them, scores may be made twice, be rounded apart, and miss their own threshold.
    scores = lax.optimization_barrier(scores)
    budget = selection.rows_of(topk, tuple(rows)).reshape(-1)
    bounds = None if lengths is None else lengths.reshape(-1)

    def search(scores, budget, bounds):
        visible = jnp.bool_(True)
        if bounds is not None:
            visible = lax.broadcasted_iota(jnp.int32, scores.shape, 1) < bounds[:, None]
        x = rankable(scores, visible)
        count, threshold, tie_cut = select(x, budget)
        indices = selection.compact(chosen(x, threshold, tie_cut), topk) if with_indices else None
        return TopKSelection(indices, count, threshold, tie_cut)

    flat = scores.reshape(-1, s)
    at_once = max(_CHUNK_BYTES // (4 * s), 1)
    if flat.shape[0] <= at_once:
        found = search(flat, budget, bounds)
    else:
        found = lax.map(
            lambda row: jax.tree.map(lambda x: x[0], search(*jax.tree.map(lambda x: x[None], row))),
            (flat, budget, bounds),
            batch_size=at_once,
        )
    return jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), found)
