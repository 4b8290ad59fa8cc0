"""Specification of `topk_select`: one stable order, read off a sorted row."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import selection
from pallas_kernels.core.selection import TopKSelection


def select(scores, visible, budget):
    """Returns (count, threshold, tie_cut) of each row: the `budget` largest visible scores, lowest index first on ties.

    Args:
      scores: [..., S].
      visible: bool, broadcasts to `scores`.
      budget: int32 [...].
    """
    key = jnp.where(visible, selection.order_key(scores), selection.DEAD)
    key = jnp.where(key == selection.NAN, selection.DEAD, key)
    alive = key != selection.DEAD
    count = jnp.clip(budget, 0, jnp.sum(alive, axis=-1, dtype=jnp.int32))
    descending = jnp.flip(jnp.sort(key, axis=-1), axis=-1)
    bound = jnp.take_along_axis(descending, jnp.maximum(count - 1, 0)[..., None], axis=-1)[..., 0]
    quota = count - jnp.sum(key > bound[..., None], axis=-1, dtype=jnp.int32)
    equal_so_far = jnp.cumsum((key == bound[..., None]) & alive, axis=-1, dtype=jnp.int32)
    cut = jnp.argmax(equal_so_far >= quota[..., None], axis=-1).astype(jnp.int32)
    nothing = count == 0
    bound = jnp.where(nothing, selection.NOTHING, bound)
    return count, selection.key_to_score(bound), jnp.where(nothing, -1, cut)


def topk_select(scores, topk, *, lengths, with_indices, block_sizes=None):
    """Arguments as the public function, checked; `lengths` int32 [...] or None, `topk` an int or int32 rows."""
    rows = scores.shape[:-1]
    # Fused with what made them, scores may be made twice, be rounded apart, and miss their own threshold.
    scores = lax.optimization_barrier(scores)
    visible = jnp.broadcast_to(jnp.bool_(True), scores.shape)
    if lengths is not None:
        visible = lax.broadcasted_iota(jnp.int32, scores.shape, len(rows)) < lengths[..., None]
    count, threshold, tie_cut = select(scores, visible, selection.rows_of(topk, rows))
    indices = None
    if with_indices:
        kept = selection.selected(scores, visible, threshold, tie_cut)
        indices = selection.compact(kept, topk)
    return TopKSelection(indices, count, threshold, tie_cut)
