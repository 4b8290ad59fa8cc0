"""Specification of `topk_decode_attention`: score every key, select, softmax over the kept ones."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import masks, online_softmax, paging, precision, quantization, selection
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_select import reference as topk_select


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
    b, n, _ = query.shape
    key, value, quantized_key = paging.contiguous_cache(
        key, value, quantized_key, page_table, lengths
    )
    _, s, k, _ = key.shape
    dtype = precision.accumulator(query.dtype)
    visible = masks.visible_to_decode(s, lengths, window, b)[:, None, :]
    scores = scale * jnp.einsum(
        "bkgh,bskh->bkgs",
        query.reshape(b, k, n // k, -1).astype(dtype),
        key.astype(dtype),
        precision=lax.Precision.HIGHEST,
    ).reshape(b, n, s)
    num_sets = pooling_.num_sets(scope, n, k)
    per_head = n // num_sets
    ranking = scores
    if quantized_key is not None and not certified:
        ranking = quantization.scores(query, quantized_key, scale, dtype=dtype)
    ranked = pooling_.pool(ranking, visible, num_sets, pooling)
    budget = selection.rows_of(topk, (b, n))[:, ::per_head]
    chosen = topk_select.select(ranked, visible, budget)
    kept = selection.selected(ranked, visible, *chosen[1:])
    chosen_indices = selection.compact(kept, topk) if with_indices else None
    kept = jnp.repeat(kept, per_head, axis=1)
    m, total, p = online_softmax.weights(scores, kept)
    acc = online_softmax.weigh_values(
        "bkgs,bskv->bkgv",
        p.reshape(b, k, n // k, s),
        kept.reshape(b, k, n // k, s),
        value.astype(dtype),
    ).reshape(b, n, -1)
    out = online_softmax.divide(acc, total).astype(query.dtype)
    lse = online_softmax.log_sum_exp(m, total)
    selected = TopKSelection(chosen_indices, *chosen)
    return out, lse, selection.repeat_for_heads(selected, per_head)
