"""Specification of `knn_indices`: all distances, then a stable order read off sorted rows."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.core import precision, selection
from pallas_kernels.ops.topk_select import reference as topk_select


def knn_indices(query_positions, key_positions, *, neighbours, key_valid, block_sizes=None):
    """Arguments as the public function, checked; `key_valid` bool [B, S]."""
    dtype = precision.accumulator(query_positions.dtype)
    query, key = query_positions.astype(dtype), key_positions.astype(dtype)
    # The difference first: |q|^2 - 2 <q, k> + |k|^2 would cancel the digits that tell near keys apart.
    distance = jnp.sum(jnp.square(query[:, :, None] - key[:, None]), axis=-1)
    # A distance computed again in another fusion may round otherwise, and miss its own threshold.
    distance = lax.optimization_barrier(distance)
    visible = jnp.broadcast_to(key_valid[:, None], distance.shape)
    budget = selection.rows_of(neighbours, distance.shape[:2])
    _, threshold, tie_cut = topk_select.select(-distance, visible, budget)
    kept = selection.selected(-distance, visible, threshold, tie_cut)
    return selection.compact(kept, neighbours)
