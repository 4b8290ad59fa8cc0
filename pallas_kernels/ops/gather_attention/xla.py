"""`gather_attention` for any device: a scan over chunks of rows, each of which gathers what it lists and attends.

Time is that of the lists, T x k, and memory O(T + S) at a fixed chunk. The backward, in `xla_vjp`, keeps nothing but the
inputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import online_softmax, platform, precision, row_chunks, varying
from pallas_kernels.ops.gather_attention import lists, xla_vjp
from pallas_kernels.ops.gather_attention.block_sizes import (
    GatherAttentionBlockSizes,
    cheaper_backward,
    chunk_rows,
)

_OP = "gather_attention: xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What is static about a call."""

    layout: lists.Layout
    chunk: int
    chunk_backward: int
    backward: str
    scale: float


def rule_of(query, key, value, indices, scale, block_sizes):
    """Returns what is static about a call."""
    b, t, n, h = query.shape
    _, s, k, v = value.shape
    g, size = indices.shape[2:]
    sizes = block_sizes_.resolve(
        "gather_attention",
        "xla",
        block_sizes,
        cls=GatherAttentionBlockSizes,
        dtype=query.dtype.name,
        bucket={"batch": b, "rows": t, "slots": max(g, k) * size, "head": h},
        heuristic=GatherAttentionBlockSizes,
    )
    backward = sizes.backward or cheaper_backward(max(g, k) * size, n * s)
    if backward == "lists" and platform.target_platform() == "gpu":
        raise NotImplementedError(
            f"{_OP}: backward got 'lists' on a GPU, wanted 'counts' (a scatter-add has no fixed order there)"
        )
    fetched = 4 * b * max(g, k) * size * (h + v)  # bytes a row
    # In the backward, "lists" holds what its slots send beside what they fetched.
    of_backward = (
        chunk_rows(t, 2 * fetched) if backward == "lists" else chunk_rows(t, 4 * b * n * s, least=8)
    )
    return Rule(
        layout=lists.Layout.of(n, k, g),
        chunk=min(t, sizes.block_q or chunk_rows(t, fetched)),
        chunk_backward=min(t, sizes.block_q_backward or of_backward),
        backward=backward,
        scale=scale,
    )


def gather_attention(query, key, value, indices, *, scale, block_sizes=None):
    """Arguments as the public function, checked, masked slots -1; returns (out, lse)."""
    rule = rule_of(query, key, value, indices, scale, block_sizes)
    indices = jnp.where(indices < 0, key.shape[1], indices)
    return _attend(rule, *varying.align(query, key, value, indices))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, query, key, value, indices):
    """Returns out [B, T, N, V] and lse [B, N, T]."""
    b, t, n, _ = query.shape
    s = key.shape[1]
    layout = rule.layout
    dot = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=precision.accumulator(query.dtype),
    )

    def attend(_, chunk):
        _, query, indices = chunk
        keys, values = layout.fetch(key, indices), layout.fetch(value, indices)
        scores = rule.scale * dot("bcprwqh,bcprkwh->bcprwqk", query, keys)
        m, total, p = online_softmax.weights(scores, lists.listed(indices, s))
        acc = dot("bcprwqk,bcprkwv->bcprwqv", p.astype(value.dtype), values)
        out = online_softmax.divide(acc, total).astype(query.dtype)
        return None, (out, online_softmax.log_sum_exp(m, total))

    xs = (layout.split_heads(query), layout.split_lists(indices))
    _, ys = row_chunks.scan(attend, None, xs, num_rows=t, chunk=rule.chunk)
    out, lse = (row_chunks.join(y, axis=1, num_rows=t) for y in ys)
    return out.reshape(b, t, n, -1), jnp.swapaxes(lse.reshape(b, t, n), 1, 2)


def _attend_fwd(rule, query, key, value, indices):
    return _attend(rule, query, key, value, indices), (query, key, value, indices)


def attend_bwd(rule: Rule, residuals, cotangents):
    """Returns the cotangents of query, key and value, and None; residuals are those and the indices, S where masked."""
    query, key = residuals[:2]
    if key.shape[0] != query.shape[0]:
        raise NotImplementedError(
            f"{_OP} got a page_table under differentiation, wanted None: only 'reference' differentiates a paged cache"
        )
    d_out, d_lse = cotangents
    arguments = (*residuals, d_out, jnp.swapaxes(d_lse, 1, 2))
    options = dict(chunk=rule.chunk_backward, scale=rule.scale)
    if rule.backward == "lists":
        return (*xla_vjp.by_lists(*arguments, layout=rule.layout, **options), None)
    return (*xla_vjp.by_counts(*arguments, **options), None)


_attend.defvjp(_attend_fwd, attend_bwd)
