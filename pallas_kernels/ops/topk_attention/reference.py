"""Specification of `topk_attention`: the whole score matrix, each row's set from a sorted row, softmax over the set.

Differentiable by plain autodiff; the set is chosen on scores that carry no gradient.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import masks, online_softmax, precision, selection
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.ops.topk_select import reference as topk_select


def topk_attention(
    query,
    key,
    value,
    *,
    topk,
    topk_ratio,
    min_topk,
    causal,
    lengths,
    query_segment_ids,
    key_segment_ids,
    window,
    dense_rows,
    scope,
    pooling,
    scale,
    block_sizes=None,
):
    """Arguments as the public function, checked; returns (out, lse, threshold, tie_cut)."""
    b, t, n, h = query.shape
    _, s, k, _ = key.shape
    dtype = precision.accumulator(query.dtype)
    visible = masks.visible_keys(
        jnp.arange(t, dtype=jnp.int32),
        jnp.arange(s, dtype=jnp.int32),
        offset=s - t,
        causal=causal,
        window=window,
        lengths=lengths,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
    )
    visible = jnp.broadcast_to(visible, (b, t, s))
    budget = selection.row_budget(
        jnp.sum(visible, axis=-1, dtype=jnp.int32), topk, topk_ratio, min_topk, dense_rows
    )[:, None]
    visible = visible[:, None]
    scores = _scores(query.astype(dtype), key.astype(dtype), scale)

    fixed = lax.stop_gradient(scores)
    num_sets = pooling_.num_sets(scope, n, k)
    ranked = pooling_.pool(fixed, visible, num_sets, pooling)
    _, threshold, tie_cut = topk_select.select(ranked, visible, budget)
    kept = selection.selected(ranked, visible, threshold, tie_cut)
    kept, threshold, tie_cut = (
        jnp.repeat(x, n // num_sets, axis=1) for x in (kept, threshold, tie_cut)
    )

    m, total, p = online_softmax.weights(scores, kept)
    by_kv_head = lambda x: x.reshape(b, k, n // k, t, s)
    acc = online_softmax.weigh_values(
        "bkgts,bskv->bkgtv", by_kv_head(p), by_kv_head(kept), value.astype(dtype)
    ).reshape(b, n, t, -1)
    out = jnp.swapaxes(online_softmax.divide(acc, total), 1, 2)
    return out.astype(query.dtype), online_softmax.log_sum_exp(m, total), threshold, tie_cut


def _scores(query, key, scale):
    """Returns scale <q, k> as [B, N, T, S].

    A non-finite score is a constant: it may not send 0 * NaN back into the operands of the scores beside it.
    """
    b, t, n, h = query.shape
    _, s, k, _ = key.shape

    def dot(query, key):
        grouped = query.reshape(b, t, k, n // k, h)
        product = jnp.einsum("btkgh,bskh->bkgts", grouped, key, precision=lax.Precision.HIGHEST)
        return scale * product.reshape(b, n, t, s)

    raw = lax.stop_gradient(dot(query, key))
    clean = dot(*(jnp.where(jnp.isfinite(x), x, 0) for x in (query, key)))
    return jnp.where(jnp.isfinite(raw), clean, raw)
