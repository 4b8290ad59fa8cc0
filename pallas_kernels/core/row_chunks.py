"""Attention of a chunk of query rows at a time: the scan, the chunk's scores, and the chunk's gradients.

B batch, C rows of the chunk, S keys, N query heads, K key/value heads, H head size, V value head size. Only one chunk's
[B, N, C, S] arrays exist at a time, so memory is O(T + S) at a fixed chunk. With p the softmax weights of a row, do and g
the cotangents of its out and lse, and D = sum_j p_j <do, v_j>:

    dv_j += p_j do    ds_j = p_j (<do, v_j> - D + g)    dq = scale sum_j ds_j k_j    dk_j += scale ds_j q
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.core import precision


def scan(body: Callable, carry, xs, *, num_rows: int, chunk: int):
    """Runs `body(carry, (index, *xs of the chunk)) -> carry, ys` over chunks of rows, in order.

    Args:
      xs: a tuple of pytrees whose arrays hold the `num_rows` rows on axis 1. The last chunk is filled up with zeros; its
        index, int32 [chunk], counts on past `num_rows`.

    Returns:
      (carry, ys) with the chunks on a new leading axis of ys, see `join`.
    """
    chunks = -(-num_rows // chunk)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - num_rows)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    index = jnp.arange(chunks * chunk, dtype=jnp.int32).reshape(chunks, chunk)
    xs = (index, *jax.tree.map(split, tuple(xs)))
    if chunks > 1:
        return lax.scan(body, carry, xs)
    carry, ys = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


def join(x: Array, *, axis: int, num_rows: int) -> Array:
    """Joins what the chunks of `scan` returned, [chunks, B, ...] with rows on `axis` of [B, ...]; drops filled-up rows."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, num_rows, axis=axis)


def by_kv_head(x: Array, num_kv_heads: int) -> Array:
    """Splits the heads of [B, N, C, S] into [B, K, N / K, C, S]."""
    b, n, c, s = x.shape
    return x.reshape(b, num_kv_heads, n // num_kv_heads, c, s)


def scores(
    query: Float[Array, "B C N H"], key: Float[Array, "B S K H"], scale: float
) -> Float[Array, "B N C S"]:
    """Returns scale <q, k>: the one routine whose bits forward and backward both select on.

    The barrier keeps the scaling from being fused, differently in each pass, into what reads the scores.
    """
    b, c, n, h = query.shape
    _, s, k, _ = key.shape
    product = jnp.einsum(
        "bckgh,bskh->bkgcs",
        query.reshape(b, c, k, n // k, h),
        key,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=precision.accumulator(query.dtype),
    )
    return lax.optimization_barrier(scale * product.reshape(b, n, c, s))


class KeyGradients(NamedTuple):
    """What the backward scan carries: sums over the rows so far, in the accumulator's type, added in the rows' order."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]

    @classmethod
    def zeros(cls, key: Array, value: Array) -> "KeyGradients":
        """Returns the gradients before any row."""
        dtype = precision.accumulator(key.dtype)
        return cls(jnp.zeros_like(key, dtype), jnp.zeros_like(value, dtype))


def gradients(
    so_far: KeyGradients,
    weights: Float[Array, "B N C S"],
    live: Bool[Array, "B N C S"],
    query: Float[Array, "B C N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    d_out: Float[Array, "B C N V"],
    d_lse: Float[Array, "B C N"],
    scale: float,
) -> tuple[KeyGradients, Float[Array, "B C N H"]]:
    """Adds the chunk's part of the keys' and values' gradients and returns the gradient of its queries.

    Args:
      weights: the softmax over the live keys, 0 elsewhere.
      live: the keys that each row attends to. What it does not attend to, NaN included, adds nothing.
    """
    b, c, n, h = query.shape
    k = key.shape[2]
    dtype = precision.accumulator(query.dtype)
    # A bfloat16 operand rounds p and ds as flash kernels do; float16 has too small a range for ds.
    narrow = jnp.bfloat16 if query.dtype == jnp.bfloat16 else dtype

    def dot(equation, x, y):
        return jnp.einsum(
            equation,
            x.astype(narrow),
            y.astype(narrow),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )

    d_out = d_out.reshape(b, c, k, n // k, -1)
    # What is not attended to is chosen away before anything is summed: 0 * NaN would spread a NaN, its own or its row's.
    d_weights = jnp.where(live, dot("bckgv,bskv->bkgcs", d_out, value).reshape(weights.shape), 0)
    mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_lse = jnp.moveaxis(d_lse.astype(dtype), 2, 1)[..., None]
    d_scores = jnp.where(live, scale * weights * (d_weights - mean + d_lse), 0)
    d_scores = by_kv_head(d_scores, k)
    d_query = dot("bkgcs,bskh->bckgh", d_scores, _finite(key)).reshape(b, c, n, h)
    d_key = dot("bkgcs,bckgh->bskh", d_scores, _finite(query).reshape(b, c, k, n // k, h))
    d_value = dot("bkgcs,bckgv->bskv", by_kv_head(weights, k), d_out)
    return KeyGradients(so_far.key + d_key, so_far.value + d_value), d_query.astype(query.dtype)


def _finite(x):
    """Zeroes what is not finite: such an operand gives no score worth a gradient, and 0 * NaN would spread it."""
    return jnp.where(jnp.isfinite(x), x, 0)
