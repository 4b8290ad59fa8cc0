"""Nearest neighbours on GPUs: XLA writes the distances of a chunk of rows, `topk_select` selects from them (Mosaic GPU, Hopper).

A distance is a handful of float32 operations, so there is nothing for tensor cores; the selection is what is slow elsewhere. A
key that is padding gets a distance of NaN, which is never selected.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ops.topk_select import mosaic_gpu as topk_select

_CHUNK_BYTES = 2**28  # float32 distances of the rows that are selected from at a time


def knn_indices(query_positions, key_positions, *, neighbours, key_valid, block_sizes=None):
    """Arguments as the public function, checked; `key_valid` bool [B, S]."""
    if block_sizes is not None and any(
        x is not None for x in (block_sizes.block_q, block_sizes.block_kv)
    ):
        raise NotImplementedError(
            f"knn_indices: mosaic_gpu got block_sizes {block_sizes}, wanted none: XLA makes the distances"
        )
    if query_positions.dtype == jnp.float64:
        raise NotImplementedError(
            "knn_indices: mosaic_gpu got dtype float64, wanted float16, bfloat16 or float32"
        )
    b, t, p = query_positions.shape
    s = key_positions.shape[1]
    size = min(neighbours, s)
    query, key = query_positions.astype(jnp.float32), key_positions.astype(jnp.float32)

    def nearest(query):  # [B, chunk, P]
        # The difference first: |q|^2 - 2 <q, k> + |k|^2 would cancel the digits that tell near keys apart.
        distance = jnp.zeros((b, query.shape[1], s), jnp.float32)
        for axis in range(p):
            distance += jnp.square(query[:, :, None, axis] - key[:, None, :, axis])
        scores = jnp.where(key_valid[:, None], -distance, jnp.nan).reshape(-1, s)
        rows = scores.shape[0]
        whole = lambda value: jnp.full((rows,), value, jnp.int32)
        found = topk_select.select(
            scores, whole(0), whole(s), whole(size), topk=size, listed=("indices",)
        )
        return found[3].reshape(b, -1, size)

    chunks = pl.cdiv(4 * b * t * s, _CHUNK_BYTES)
    chunk = pl.cdiv(t, chunks)
    if chunks == 1:
        indices = nearest(query)
    else:
        padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - t), (0, 0)))
        parts = jnp.swapaxes(padded.reshape(b, chunks, chunk, p), 0, 1)
        indices = jnp.swapaxes(lax.map(nearest, parts), 0, 1).reshape(b, -1, size)[:, :t]
    return jnp.pad(indices, ((0, 0), (0, 0), (0, neighbours - size)), constant_values=-1)
