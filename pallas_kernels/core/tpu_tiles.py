"""Small pieces that the TPU kernels of attention share: products that accumulate in float32, and what a tile is made of."""

import math

import jax.numpy as jnp
from jax import lax

LANES = 128
SUBLANES = 8


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def tiled_size(shape: tuple[int, ...]) -> int:
    """Returns the elements of a VMEM buffer with its last two axes filled up to whole tiles."""
    *outer, sublanes, lanes = shape
    return math.prod(outer) * round_up(sublanes, SUBLANES) * round_up(lanes, LANES)


def rows_between(shape: tuple[int, ...], first: int, end: int):
    """Returns the mask of rows first <= i < end."""
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= first) & (row < end)


def dot(lhs, rhs, contract: tuple[int, int]):
    """Contracts one axis of each matrix; float32 inputs are multiplied in full precision."""
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(lhs, rhs, dims, precision=precision, preferred_element_type=jnp.float32)


def weigh(p, value, contract: tuple[int, int]):
    """Returns p times `value` for float32 weights: bfloat16 values meet them in two parts, 16 bits of weight in all."""
    if value.dtype == jnp.float32:
        return dot(p, value, contract)
    coarse = p.astype(value.dtype).astype(jnp.float32)
    parts = coarse, p - coarse
    rows = p.shape[0]
    if rows % SUBLANES:
        return sum(dot(part.astype(value.dtype), value, contract) for part in parts)
    # One product of twice the rows loads the values into the matrix unit once.
    both = dot(jnp.concatenate(parts).astype(value.dtype), value, contract)
    return both[:rows] + both[rows:]
