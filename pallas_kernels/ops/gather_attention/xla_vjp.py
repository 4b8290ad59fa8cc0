"""Gradients of `gather_attention`'s xla path, in two forms that fix the order in which dk and dv are summed.

With p the softmax over a row's list, do and g the cotangents of out and lse, and D = sum_j p_j <do, v_j> a number a row:

    dv_j += p_j do    ds_j = p_j (<do, v_j> - D + g)    dq = scale sum_j ds_j k_j    dk_j += scale ds_j q

`by_lists` gathers again and scatter-adds what each slot sends: time T x k, in order where a scatter is serial (CPU, TPU).
`by_counts` counts how often each row lists each key, [B, G, rows, S]; count times exp(score - max) is the row's weight, and
the rest are the matrix products of `core/row_chunks`: time T x S, but a sum of integers has one result in any order, where
the atomics of a GPU's float scatter-add have as many as there are runs.

Both scan chunks of rows, which follow one another, and sum in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.core import online_softmax, precision, row_chunks
from pallas_kernels.ops.gather_attention import lists


def by_lists(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    indices: Int32[Array, "B T G k"],
    d_out: Float[Array, "B T N V"],
    d_lse: Float[Array, "B T N"],
    *,
    layout: lists.Layout,
    chunk: int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Returns the cotangents of query, key and value; indices hold S where masked, as in all of this module."""
    b, t, _, h = query.shape
    s, k = key.shape[1:3]
    dtype = precision.accumulator(query.dtype)
    # A backward operand of bfloat16 rounds p and ds as flash kernels do; float16 has too small a range for ds.
    narrow = jnp.bfloat16 if query.dtype == jnp.bfloat16 else dtype
    dot = functools.partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=dtype
    )

    def differentiate(sums, chunk):
        index, query, indices, d_out, d_lse = chunk
        indices = jnp.where((index < t)[None, :, None, None, None], indices, s)
        listed = lists.listed(indices, s)
        keys, values = layout.fetch(key, indices), layout.fetch(value, indices)
        scores = scale * dot("bcprwqh,bcprkwh->bcprwqk", query, keys)
        _, total, p = online_softmax.weights(scores, listed)
        p = p / jnp.where(total == 0, 1, total)[..., None]
        d_out = d_out.astype(narrow)
        d_p = dot("bcprwqv,bcprkwv->bcprwqk", d_out, values.astype(narrow))
        mean = jnp.sum(p * d_p, axis=-1, keepdims=True)
        # Chosen, not multiplied: where a row lists nothing, its cotangents may be NaN.
        d_scores = jnp.where(listed, scale * p * (d_p - mean + d_lse.astype(dtype)), 0)
        d_scores, p = d_scores.astype(narrow), p.astype(narrow)
        d_query = dot("bcprwqk,bcprkwh->bcprwqh", d_scores, _finite(keys).astype(narrow))
        d_keys = dot("bcprwqk,bcprwqh->bcprkwh", d_scores, _finite(query).astype(narrow))
        d_values = dot("bcprwqk,bcprwqv->bcprkwv", p, d_out)
        # The rows of W heads side by side, as they were fetched.
        sent = jnp.concatenate([d_keys, d_values], axis=-1).reshape(*indices.shape, -1)
        return _add_in_order(sums, indices, sent), d_query.astype(query.dtype)

    by_head = layout.split_heads
    xs = (
        by_head(query),
        layout.split_lists(indices),
        by_head(d_out),
        by_head(d_lse[..., None]),
    )
    zeros = jnp.concatenate(row_chunks.KeyGradients.zeros(key, value), axis=-1)
    zeros = zeros.reshape(b, s, layout.p, -1)
    sums, d_query = row_chunks.scan(differentiate, zeros, xs, num_rows=t, chunk=chunk)
    d_query = row_chunks.join(d_query, axis=1, num_rows=t).reshape(query.shape)
    sums = sums.reshape(b, s, k, -1)
    return d_query, sums[..., :h].astype(key.dtype), sums[..., h:].astype(value.dtype)


def by_counts(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    indices: Int32[Array, "B T G k"],
    d_out: Float[Array, "B T N V"],
    d_lse: Float[Array, "B T N"],
    *,
    chunk: int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Returns the cotangents of query, key and value."""
    t, n = query.shape[1:3]
    s = key.shape[1]

    def differentiate(so_far, chunk):
        index, query, indices, d_out, d_lse = chunk
        indices = jnp.where((index < t)[None, :, None, None], indices, s)
        times = _count(indices, s)
        times = jnp.repeat(times, n // times.shape[1], axis=1)
        live = times > 0
        _, _, p = online_softmax.weights(row_chunks.scores(query, key, scale), live)
        p = p * times.astype(p.dtype)
        total = jnp.sum(p, axis=-1, keepdims=True)
        p = p / jnp.where(total == 0, 1, total)
        return row_chunks.gradients(so_far, p, live, query, key, value, d_out, d_lse, scale)

    zeros = row_chunks.KeyGradients.zeros(key, value)
    xs = (query, indices, d_out, d_lse)
    sums, d_query = row_chunks.scan(differentiate, zeros, xs, num_rows=t, chunk=chunk)
    d_query = row_chunks.join(d_query, axis=1, num_rows=t)
    return d_query, sums.key.astype(key.dtype), sums.value.astype(value.dtype)


def _finite(x):
    """Zeroes what is not finite: a score of -inf has no gradient, and 0 * inf would give its row one."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _add_in_order(totals, indices, addends):
    """Adds [B, C, P, R, k, size] to the rows of [B, S, P, size] that [B, C, P, R, k] names; drops what names S."""
    one_head = lambda totals, i, x: totals.at[i].add(x, mode="drop")
    return jax.vmap(jax.vmap(one_head, (1, 1, 1), 1))(totals, indices, addends)


def _count(indices, num_keys: int):
    """Counts how often each row lists each key: [B, C, G, k] to int32 [B, G, C, S]."""

    def one_row(indices):
        return jnp.zeros((num_keys,), jnp.int32).at[indices].add(jnp.int32(1), mode="drop")

    return jnp.swapaxes(jax.vmap(jax.vmap(jax.vmap(one_row)))(indices), 1, 2)
