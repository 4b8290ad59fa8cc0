"""Linear maps of a decoder: how weights are drawn, and products that are as exact as their operands."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float, dtype: DTypeLike) -> Array:
    """Draws with mean 0; flat, since XLA CPU needs seconds to compile a random array of four axes."""
    drawn = jax.random.normal(rngs.params(), (math.prod(shape),), jnp.float32)
    return (drawn * deviation).reshape(shape).astype(dtype)


def einsum(formula: str, x: Array, weight: Array, dtype: DTypeLike) -> Array:
    """Contracts into `dtype`, summing in float32 at least."""
    # GPUs and TPUs would otherwise round float32 operands to tf32 or bfloat16.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(formula, x, weight, precision=precision, preferred_element_type=dtype)


def affine(formula: str, x: Array, weight: nnx.Param | Array, bias: nnx.Param | None) -> Array:
    """Contracts into x's dtype, and adds the bias if there is one."""
    out = einsum(formula, x, weight[...], x.dtype)
    if bias is None:
        return out
    return out + bias[...].reshape((1,) * (out.ndim - bias[...].ndim) + bias[...].shape)


__all__ = ["affine", "einsum", "normal"]
