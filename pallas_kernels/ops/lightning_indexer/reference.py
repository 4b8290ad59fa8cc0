"""Specification of the lightning indexer: every head's products at once, then a stable order read off sorted rows."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import masks, precision, selection
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_select import reference as topk_select


def relu(x):
    """Returns max(x, 0), NaN where x is NaN: on a CPU, XLA may hand `maximum` to a library that returns 0 there."""
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def score(index_query, index_key, head_weights):
    """Returns sum_i w_ti relu(<q_ti, k_s>) of every row and key, [B, T, S], in the accumulator's type."""
    dtype = precision.accumulator(index_query.dtype)
    query, key, weights = (x.astype(dtype) for x in (index_query, index_key, head_weights))
    products = jnp.einsum("btid,bsd->btis", query, key, precision=lax.Precision.HIGHEST)
    # A score computed again in another fusion may round otherwise, and miss its own threshold.
    return lax.optimization_barrier(jnp.sum(weights[..., None] * relu(products), axis=2))


def visible_keys(index_query, index_key, *, causal, lengths):
    """Returns the mask of the keys that each row may see, [B, T, S]."""
    b, t = index_query.shape[:2]
    s = index_key.shape[1]
    rows, keys = jnp.arange(t, dtype=jnp.int32), jnp.arange(s, dtype=jnp.int32)
    visible = masks.visible_keys(rows, keys, offset=s - t, causal=causal, lengths=lengths)
    return jnp.broadcast_to(visible, (b, t, s))


def indexer_scores(index_query, index_key, head_weights, *, causal, lengths, block_sizes=None):
    """Arguments as the public function, checked."""
    visible = visible_keys(index_query, index_key, causal=causal, lengths=lengths)
    scores = score(index_query, index_key, head_weights)
    return jnp.where(visible, scores, -jnp.inf).astype(jnp.float32)


def indexer_select(
    index_query,
    index_key,
    head_weights,
    *,
    topk,
    causal,
    lengths,
    with_indices,
    block_sizes=None,
):
    """Arguments as the public function, checked; `topk` an int or int32 rows."""
    visible = visible_keys(index_query, index_key, causal=causal, lengths=lengths)
    scores = score(index_query, index_key, head_weights)
    budget = selection.rows_of(topk, index_query.shape[:2])
    count, threshold, tie_cut = topk_select.select(scores, visible, budget)
    indices = None
    if with_indices:
        kept = selection.selected(scores, visible, threshold, tie_cut)
        indices = selection.compact(kept, topk)
    return TopKSelection(indices, count, threshold, tie_cut)
