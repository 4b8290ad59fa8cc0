"""`topk_attention` for any device: a scan over chunks of rows, each of which scores, selects and attends.

Only one chunk's [B, N, rows, S] scores exist at a time, forward and backward. The residuals of the backward are the inputs
and two numbers a row: it scores each chunk again and rebuilds the very set from (threshold, tie_cut), so both passes take
their scores from one routine with one chunk shape. Shared scopes rank pooled scores; their backward pools again, elementwise,
with the log-sum-exps kept from the forward. The gradients of a set are those of `core/row_chunks.py`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import masks, online_softmax, row_chunks, selection, varying
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.ops.topk_attention.block_sizes import TopKAttentionBlockSizes, chunk_rows
from pallas_kernels.ops.topk_select import xla as topk_select


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    """What is static about a call."""

    num_rows: int  # T, before the last chunk is filled up
    chunk: int
    num_sets: int
    topk_ratio: float | None
    min_topk: int
    causal: bool
    window: int | None
    pooling: str
    scale: float


class _Rows(NamedTuple):
    """What is known of the query rows besides their queries, T leading axis second; None where it plays no part."""

    budget: jax.Array | None  # int32 [B, T]
    segment_ids: jax.Array | None  # int32 [B, T]
    dense: jax.Array | None  # bool [B, T]


class _Keys(NamedTuple):
    """What is known of the keys besides themselves."""

    lengths: jax.Array | None  # int32 [B]
    segment_ids: jax.Array | None  # int32 [B, S]


class _Found(NamedTuple):
    """What the backward needs to rebuild each row's set: G sets, N heads."""

    threshold: jax.Array  # float32 [B, G, T]
    tie_cut: jax.Array  # int32 [B, G, T]
    pool_lse: jax.Array | None  # [B, N, T], where sets are pooled from probabilities


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
    b, t, n, _ = query.shape
    _, s, k, _ = key.shape
    chunk = block_sizes_.resolve(
        "topk_attention",
        "xla",
        block_sizes,
        cls=TopKAttentionBlockSizes,
        dtype=query.dtype.name,
        bucket={"batch": b, "rows": t, "s": s, "heads": n},
        heuristic=TopKAttentionBlockSizes,
    ).block_q
    rule = _Rule(
        num_rows=t,
        chunk=chunk_rows(b, t, n, s) if chunk is None else min(chunk, t),
        num_sets=pooling_.num_sets(scope, n, k),
        topk_ratio=topk_ratio,
        min_topk=min_topk,
        causal=causal,
        window=window,
        pooling=pooling,
        scale=scale,
    )
    budget = None if topk is None else selection.rows_of(topk, (b, t))
    rows = _Rows(budget, query_segment_ids, dense_rows)
    query, key, value = varying.align(query, key, value)
    out, lse, threshold, tie_cut = _attend(
        rule, query, key, value, rows, _Keys(lengths, key_segment_ids)
    )
    repeat = lambda x: jnp.repeat(x, n // rule.num_sets, axis=1)
    return out, lse, repeat(threshold), repeat(tie_cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: _Rule, query, key, value, rows: _Rows, keys: _Keys):
    out, lse, found = _forward(rule, query, key, value, rows, keys)
    return out, lse, found.threshold, found.tie_cut


def _attend_fwd(rule, query, key, value, rows, keys):
    out, lse, found = _forward(rule, query, key, value, rows, keys)
    found = _Found(
        checkpoint_name(found.threshold, "topk_threshold"),
        checkpoint_name(found.tie_cut, "topk_tie_cut"),
        None if found.pool_lse is None else checkpoint_name(found.pool_lse, "topk_pool_lse"),
    )
    return (out, lse, found.threshold, found.tie_cut), (query, key, value, rows, keys, found)


def _attend_bwd(rule, residuals, cotangents):
    query, key, value, rows, keys, found = residuals
    grads = _backward(rule, query, key, value, rows, keys, found, *cotangents[:2])
    return (*grads, jax.tree.map(lambda _: None, rows), jax.tree.map(lambda _: None, keys))


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(rule: _Rule, query, key, value, rows: _Rows, keys: _Keys):
    """Returns out [B, T, N, V], lse [B, N, T] and `_Found`."""
    k = key.shape[2]

    def attend(_, chunk):
        index, query, rows = chunk
        b, c, n, _ = query.shape
        visible = _visible(rule, index, rows, keys, key.shape[1])
        scores = row_chunks.scores(query, key, rule.scale)
        pool_lse = None
        if pooling_.needs_lse(rule.num_sets, n, rule.pooling):
            pool_lse = pooling_.full_lse(scores, visible[:, None])
        ranked = _ranked(scores, visible, pool_lse, rule)
        seen = jnp.broadcast_to(jnp.sum(visible, axis=-1, dtype=jnp.int32), (b, c))
        budget = selection.row_budget(seen, rows.budget, rule.topk_ratio, rule.min_topk, rows.dense)
        _, threshold, tie_cut = topk_select.select(
            ranked, jnp.broadcast_to(budget[:, None], (b, rule.num_sets, c))
        )
        kept = _per_head(topk_select.chosen(ranked, threshold, tie_cut), n)
        m, total, p = online_softmax.weights(scores, kept)
        acc = online_softmax.weigh_finite_values(
            "bkgcs,bskv->bkgcv", row_chunks.by_kv_head(p, k), row_chunks.by_kv_head(kept, k), value
        ).reshape(b, n, c, -1)
        out = online_softmax.divide(acc, total).astype(query.dtype)
        return None, (
            out,
            online_softmax.log_sum_exp(m, total),
            _Found(threshold, tie_cut, pool_lse),
        )

    t = rule.num_rows
    _, ys = row_chunks.scan(attend, None, (query, rows), num_rows=t, chunk=rule.chunk)
    out, lse, found = jax.tree.map(lambda y: row_chunks.join(y, axis=2, num_rows=t), ys)
    return jnp.swapaxes(out, 1, 2), lse, found


def _backward(
    rule: _Rule, query, key, value, rows: _Rows, keys: _Keys, found: _Found, d_out, d_lse
):
    """Returns the cotangents of query, key and value."""

    def differentiate(so_far, chunk):
        index, query, rows, found, d_out, d_lse = chunk
        threshold, tie_cut, pool_lse = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), found)
        visible = _visible(rule, index, rows, keys, key.shape[1])
        scores = row_chunks.scores(query, key, rule.scale)
        ranked = _ranked(scores, visible, pool_lse, rule)
        kept = _per_head(topk_select.chosen(ranked, threshold, tie_cut), query.shape[2])
        _, total, p = online_softmax.weights(scores, kept)
        p = p / jnp.where(total == 0, 1, total)[..., None]
        return row_chunks.gradients(so_far, p, kept, query, key, value, d_out, d_lse, rule.scale)

    rows_first = lambda x: jnp.moveaxis(x, 2, 1)  # [B, heads, T] -> [B, T, heads]
    xs = (query, rows, jax.tree.map(rows_first, found), d_out, rows_first(d_lse))
    zeros = row_chunks.KeyGradients.zeros(key, value)
    sums, d_query = row_chunks.scan(
        differentiate, zeros, xs, num_rows=rule.num_rows, chunk=rule.chunk
    )
    d_query = row_chunks.join(d_query, axis=1, num_rows=rule.num_rows)
    return d_query, sums.key.astype(key.dtype), sums.value.astype(value.dtype)


def _ranked(scores, visible, pool_lse, rule: _Rule):
    """Returns the scores that the chunk's G sets are chosen by, as `topk_select.rankable` makes them."""
    visible = visible[:, None]
    pooled = pooling_.pool(scores, visible, rule.num_sets, rule.pooling, pool_lse)
    return topk_select.rankable(pooled, visible)


def _visible(rule: _Rule, index, rows: _Rows, keys: _Keys, num_keys: int):
    """Returns which keys the chunk's rows see, [1 or B, rows, S]; the rows that fill up the last chunk see none."""
    visible = masks.visible_keys(
        index,
        jnp.arange(num_keys, dtype=jnp.int32),
        offset=num_keys - rule.num_rows,
        causal=rule.causal,
        window=rule.window,
        lengths=keys.lengths,
        query_segment_ids=rows.segment_ids,
        key_segment_ids=keys.segment_ids,
    )
    return visible & (index < rule.num_rows)[None, :, None]


def _per_head(x, num_heads: int):
    """Repeats what G sets share over their heads."""
    return jnp.repeat(x, num_heads // x.shape[1], axis=1)
