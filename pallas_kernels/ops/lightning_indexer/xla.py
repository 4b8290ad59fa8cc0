"""The lightning indexer for any device: a scan over chunks of rows, each of which scores all keys and selects.

Only one chunk's products, [B, rows, I, S], exist at a time, so memory is O(T + S) beside the result. Both functions take
their scores from one routine with one chunk shape, and so from the same bits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import masks, precision, row_chunks, selection
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.lightning_indexer.block_sizes import LightningIndexerBlockSizes, chunk_rows
from pallas_kernels.ops.lightning_indexer.reference import relu
from pallas_kernels.ops.topk_select import xla as topk_select


def score(
    index_query: Float[Array, "B C I D"],
    index_key: Float[Array, "B S D"],
    head_weights: Float[Array, "B C I"],
) -> Float[Array, "B C S"]:
    """Returns the scores of a chunk of rows.

    The barrier: a score computed again in another fusion may round otherwise, and miss its own threshold.
    """
    dtype = precision.accumulator(index_query.dtype)
    products = jnp.einsum(
        "bcid,bsd->bcis",
        index_query,
        index_key,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    weighted = head_weights.astype(dtype)[..., None] * relu(products)
    return lax.optimization_barrier(jnp.sum(weighted, axis=2))


def _over_chunks(
    op, body, index_query, index_key, head_weights, extra, *, causal, lengths, block_sizes
):
    """Runs body(scores [B, C, S], visible, extra rows) over chunks of rows; returns its results, rows on axis 1.

    Args:
      extra: an array of [B, T] of which the body gets the chunk's rows.
    """
    b, t, i, _ = index_query.shape
    s = index_key.shape[1]
    chunk = block_sizes_.resolve(
        op,
        "xla",
        block_sizes,
        cls=LightningIndexerBlockSizes,
        dtype=index_query.dtype.name,
        bucket={"batch": b, "rows": t, "s": s, "heads": i},
        heuristic=LightningIndexerBlockSizes,
    ).block_q
    chunk = chunk_rows(b, t, i, s) if chunk is None else min(chunk, t)
    keys = jnp.arange(s, dtype=jnp.int32)

    def step(_, rows):
        index, query, weights, extra = rows
        visible = masks.visible_keys(index, keys, offset=s - t, causal=causal, lengths=lengths)
        return None, body(score(query, index_key, weights), visible, extra)

    xs = index_query, head_weights, extra
    _, ys = row_chunks.scan(step, None, xs, num_rows=t, chunk=chunk)
    return jax.tree.map(lambda y: row_chunks.join(y, axis=1, num_rows=t), ys)


def indexer_scores(index_query, index_key, head_weights, *, causal, lengths, block_sizes=None):
    """Arguments as the public function, checked."""

    def mask(scores, visible, _):
        return jnp.where(visible, scores, -jnp.inf).astype(jnp.float32)

    nothing = jnp.zeros(index_query.shape[:2], jnp.int32)
    return _over_chunks(
        "indexer_scores",
        mask,
        index_query,
        index_key,
        head_weights,
        nothing,
        causal=causal,
        lengths=lengths,
        block_sizes=block_sizes,
    )


def indexer_select(
    index_query,
    index_key,
    head_weights,
    *,
    topk,
    causal,
    lengths,
    with_indices,
    block_sizes=None,
):
    """Arguments as the public function, checked; `topk` an int or int32 rows."""

    def search(scores, visible, budget: Int32[Array, "B C"]):
        x = topk_select.rankable(scores, visible)
        count, threshold, tie_cut = topk_select.select(x, budget)
        indices = None
        if with_indices:
            indices = selection.compact(topk_select.chosen(x, threshold, tie_cut), topk)
        return TopKSelection(indices, count, threshold, tie_cut)

    return _over_chunks(
        "indexer_select",
        search,
        index_query,
        index_key,
        head_weights,
        selection.rows_of(topk, index_query.shape[:2]),
        causal=causal,
        lengths=lengths,
        block_sizes=block_sizes,
    )
