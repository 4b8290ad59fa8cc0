"""Specification of `gather_attention`: take the listed keys and values, softmax over them. Plain autodiff differentiates it."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import online_softmax, precision


def gather_attention(query, key, value, indices, *, scale, block_sizes=None):
    """Arguments as the public function, checked, masked entries -1; returns (out, lse)."""
    b, t, n, h = query.shape
    k = key.shape[2]
    dtype = precision.accumulator(query.dtype)
    listed = jnp.repeat(jnp.swapaxes(indices, 1, 2), n // indices.shape[2], axis=1)  # [B, N, T, k]
    valid = listed >= 0
    head = jnp.arange(n, dtype=jnp.int32)[None, :, None, None] // (n // k)
    # A batch axis of 1 is one table for all.
    batch = jnp.arange(b, dtype=jnp.int32)[:, None, None, None] % key.shape[0]
    take = lambda x: x[batch, jnp.maximum(listed, 0), head]  # [B, N, T, k, H or V]

    def dot(query, keys):
        return scale * jnp.einsum("btnh,bntjh->bntj", query, keys, precision=lax.Precision.HIGHEST)

    # Masked entries read key 0, which may be anything. A non-finite score is a constant, as 0 * NaN would spread backwards.
    query, keys = query.astype(dtype), jnp.where(valid[..., None], take(key).astype(dtype), 0)
    raw = lax.stop_gradient(dot(query, keys))
    clean = dot(*(jnp.where(jnp.isfinite(x), x, 0) for x in (query, keys)))
    m, total, p = online_softmax.weights(jnp.where(jnp.isfinite(raw), clean, raw), valid)
    values = jnp.where(valid[..., None], take(value).astype(dtype), 0)
    acc = jnp.einsum("bntj,bntjv->bntv", p, values, precision=lax.Precision.HIGHEST)
    out = jnp.swapaxes(online_softmax.divide(acc, total), 1, 2)
    return out.astype(value.dtype), online_softmax.log_sum_exp(m, total)
