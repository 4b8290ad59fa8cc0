"""`knn_indices` for any device: a scan over chunks of rows, each of which measures all keys and selects the nearest."""

from jax import lax

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import precision, row_chunks, selection
from pallas_kernels.ops.knn_attention.block_sizes import KnnBlockSizes, chunk_rows
from pallas_kernels.ops.topk_select import xla as topk_select


def knn_indices(query_positions, key_positions, *, neighbours, key_valid, block_sizes=None):
    """Arguments as the public function, checked; `key_valid` bool [B, S]."""
    b, t, p = query_positions.shape
    s = key_positions.shape[1]
    dtype = precision.accumulator(query_positions.dtype)
    chunk = block_sizes_.resolve(
        "knn_indices",
        "xla",
        block_sizes,
        cls=KnnBlockSizes,
        dtype=query_positions.dtype.name,
        bucket={"batch": b, "rows": t, "s": s},
        heuristic=KnnBlockSizes,
    ).block_q
    chunk = chunk_rows(b, t, s) if chunk is None else min(chunk, t)
    key = key_positions.astype(dtype)

    def search(_, rows):
        _, query = rows
        query = query.astype(dtype)
        steps = (query[:, :, None, axis] - key[:, None, :, axis] for axis in range(p))
        # The barrier: a distance computed again in another fusion may round otherwise, and miss its own threshold.
        distance = lax.optimization_barrier(sum(step * step for step in steps))
        x = topk_select.rankable(-distance, key_valid[:, None])
        budget = selection.rows_of(neighbours, distance.shape[:2])
        _, threshold, tie_cut = topk_select.select(x, budget)
        return None, selection.compact(topk_select.chosen(x, threshold, tie_cut), neighbours)

    _, indices = row_chunks.scan(search, None, (query_positions,), num_rows=t, chunk=chunk)
    return row_chunks.join(indices, axis=1, num_rows=t)
