"""`topk_decode_attention` for any device: one score row a head, its threshold by bisection, weights over the kept keys.

Memory is O(S) a head. Values are read whole, in one product with weights that are 0 where a key is not kept; how that
product keeps a stray NaN out is `online_softmax.weigh_finite_values`.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import masks, online_softmax, paging, precision, quantization, selection
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_select import xla as topk_select


def topk_decode_attention(
    query,
    key,
    value,
    *,
    topk,
    lengths,
    scope,
    pooling,
    window,
    page_table,
    quantized_key,
    certified,
    scale,
    with_indices,
    block_sizes=None,
):
    """Arguments as the public function, checked; returns (out, lse, TopKSelection)."""
    b, n, h = query.shape
    key, value, quantized_key = paging.contiguous_cache(
        key, value, quantized_key, page_table, lengths
    )
    _, s, k, _ = key.shape
    dtype = precision.accumulator(query.dtype)
    visible = masks.visible_to_decode(s, lengths, window, b)[:, None, :]
    scores = scale * jnp.einsum(
        "bkgh,bskh->bkgs",
        query.reshape(b, k, n // k, h),
        key,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    ).reshape(b, n, s)
    num_sets = pooling_.num_sets(scope, n, k)
    per_set = n // num_sets
    ranking = scores
    if quantized_key is not None and not certified:
        ranking = quantization.scores(query, quantized_key, scale, dtype=dtype)
    ranked = topk_select.rankable(pooling_.pool(ranking, visible, num_sets, pooling), visible)
    picked = topk_select.select(ranked, selection.rows_of(topk, (b, n))[:, ::per_set])
    kept = topk_select.chosen(ranked, *picked[1:])
    indices = selection.compact(kept, topk) if with_indices else None
    kept = jnp.repeat(kept, per_set, axis=1)
    m, total, p = online_softmax.weights(scores, kept)
    acc = online_softmax.weigh_finite_values(
        "bkgs,bskv->bkgv", p.reshape(b, k, n // k, s), kept.reshape(b, k, n // k, s), value
    ).reshape(b, n, -1)
    out = online_softmax.divide(acc, total).astype(query.dtype)
    lse = online_softmax.log_sum_exp(m, total)
    selected = TopKSelection(indices, *picked)
    return out, lse, selection.repeat_for_heads(selected, per_set)
