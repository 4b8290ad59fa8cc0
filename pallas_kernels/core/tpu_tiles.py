"""Small pieces that the TPU kernels of attention share: products that accumulate in float32, heads out of tiles, tile sizes."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
_HALF = 16  # bits
_LOW = (1 << _HALF) - 1  # the lower half of a word, which is the even row of two


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def tiled_size(shape: tuple[int, ...]) -> int:
    """Returns the elements of a VMEM buffer with its last two axes filled up to whole tiles."""
    *outer, sublanes, lanes = shape
    return math.prod(outer) * round_up(sublanes, SUBLANES) * round_up(lanes, LANES)


def rows_between(shape: tuple[int, ...], first: int | jax.Array, end: int | jax.Array):
    """Returns the mask of rows first <= i < end."""
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= first) & (row < end)


def as_row(column):
    """Turns sublanes into lanes, exactly: [n, 1] -> [1, n]."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (column.shape[0],) * 2, axis) for axis in (0, 1))
    return jnp.sum(jnp.where(lane == row, column, 0), axis=0, keepdims=True)


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
        first, second = (dot(part.astype(value.dtype), value, contract) for part in parts)
        return first + second
    # One product of twice the rows loads the values into the matrix unit once.
    both = dot(jnp.concatenate(parts).astype(value.dtype), value, contract)
    return both[:rows] + both[rows:]


def is_strided(k: int, h: int, dtype) -> bool:
    """Whether `load_head` takes buffers [slots, tokens, K, H]: tokens must follow each other without a gap in their tiles."""
    rows = k * dtype.itemsize / 4  # of 32-bit words, that a token takes
    return h == LANES and (rows in (1, 2, 4) or k % SUBLANES == 0)


def load_head(blocks, slot, offset, size: int, head: int):
    """Loads one head of `size` tokens from a buffer in VMEM, by strides: nothing of the other heads comes to registers.

    Args:
      blocks: float32 or bfloat16 [slots, tokens, K, H] for which `is_strided` holds.
      slot, offset: int32 scalars; offset + size <= tokens, and offset is a multiple of 8.
      size: a multiple of 16.

    Returns:
      [size, H] of the buffer's dtype.
    """
    slots, tokens, k, h = blocks.shape
    first = slot * tokens + offset
    if blocks.dtype.itemsize == 4:
        rows = blocks.reshape(slots * tokens * k, h)
        rows = rows.at[pl.ds(pl.multiple_of(first * k, SUBLANES), size * k)]
        return rows[pl.ds(head, size, stride=k), :]
    # Two heads of a token share a row of words; in the result, two tokens of a head do.
    pairs = k // 2
    rows = blocks.bitcast(jnp.int32).reshape(slots * tokens * pairs, h)
    rows = rows.at[pl.ds(pl.multiple_of(first * pairs, SUBLANES), size * pairs)]
    even, odd = (
        rows[pl.ds(head // 2 + token * pairs, size // 2, stride=2 * pairs), :] for token in (0, 1)
    )
    half = jnp.full_like(even, _HALF)
    if head % 2:
        word = lax.shift_right_logical(even, half) | (odd & ~_LOW)
    else:
        word = (even & _LOW) | lax.shift_left(odd, half)
    return pltpu.bitcast(word, blocks.dtype)
