"""`knn_indices` on TPUs: distances on the vector unit, selection in VMEM (Mosaic TPU).

Keys come as [P, S], a coordinate a sublane, and are spread over the 8 rows of a tile; a query's coordinates are spread over the
lanes once a row block. Keys that are not valid get NaN for coordinates, which no selection takes. The score is the negated
distance; the rest is `topk_select/fused_tpu.py`: grid, row buffer, search, lists. Nothing of T x S is held in HBM.
"""

import functools
import operator

import jax.numpy as jnp

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, selection
from pallas_kernels.core.tpu_tiles import LANES, SUBLANES
from pallas_kernels.ops.knn_attention.block_sizes import KnnBlockSizes
from pallas_kernels.ops.topk_select import fused_tpu
from pallas_kernels.ops.topk_select.fused_tpu import Layout, Scorer

_OP = "knn_indices"
_TILE_REGISTERS = 5  # of keys scored together, at most; they hide each other's latency


def _prepare(refs, row_block):
    """Spreads a block's coordinates over the lanes: [P, rows] -> [P, rows, 128]."""
    query, spread = refs["query"], refs["spread"]
    for axis in range(spread.shape[0]):
        column = fused_tpu.as_column(query[0, 0, axis : axis + 1, :], query.shape[3])
        spread[axis] = jnp.broadcast_to(column, spread.shape[1:])


def _tile(refs, cell, offset, *, cell_rows: int, width: int):
    """Returns the negated distances of a cell, [cell_rows, 128] for each 128 of `width` keys."""
    rows = fused_tpu.cell_rows(cell, cell_rows)
    key = refs["key"][0, :, fused_tpu.lanes(offset, width)]
    scores = []
    for piece in range(0, width, LANES):
        steps = [
            refs["spread"][axis, rows, :] - key[axis : axis + 1, piece : piece + LANES]
            for axis in range(key.shape[0])
        ]
        scores.append(-functools.reduce(operator.add, (step * step for step in steps)))
    return scores


def _layout(b: int, t: int, s: int, neighbours: int, block_sizes) -> Layout:
    """Chooses the block sizes: as many rows as leave half of VMEM free, up to 64."""
    row_bytes = 4 * s + 8 * min(neighbours, s)
    fits = compat.tpu_vmem_bytes() // 2 // row_bytes // SUBLANES * SUBLANES
    usual_rows, usual_kv = min(max(fits, SUBLANES), 64), 2048
    sizes = block_sizes_.resolve(
        _OP,
        "mosaic_tpu",
        block_sizes,
        cls=KnnBlockSizes,
        dtype="float32",
        bucket={"rows": b * t, "s": s},
        heuristic=lambda: KnnBlockSizes(block_q=usual_rows, block_kv=usual_kv),
    )
    return Layout.of(b, t, s, rows=sizes.block_q or usual_rows, block_kv=sizes.block_kv or usual_kv)


def knn_indices(query_positions, key_positions, *, neighbours, key_valid, block_sizes=None):
    """Arguments as the public function, checked; `key_valid` bool [B, S].

    Raises:
      NotImplementedError: float64 positions, or distance rows that do not fit VMEM.
    """
    b, t, p = query_positions.shape
    s = key_positions.shape[1]
    if query_positions.dtype == jnp.float64:
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got query_positions of dtype float64, wanted float32, bfloat16 or float16"
        )
    query, key = query_positions.astype(jnp.float32), key_positions.astype(jnp.float32)
    key = jnp.where(key_valid[..., None], key, jnp.nan)
    layout = _layout(b, t, s, neighbours, block_sizes)
    padded = layout.row_blocks * layout.rows
    query = jnp.pad(query, ((0, 0), (0, padded - t), (0, 0)))
    query = query.reshape(b, layout.row_blocks, layout.rows, p)
    registers = layout.block_kv // LANES
    width = LANES * next(n for n in range(_TILE_REGISTERS, 0, -1) if registers % n == 0)
    scorer = Scorer(
        name=f"{_OP}_p{p}",
        rows={
            "query": (
                jnp.swapaxes(query, 2, 3),
                (1, p, layout.rows),
                lambda row_block: (row_block, 0, 0),
            )
        },
        keys={"key": (jnp.swapaxes(key, 1, 2), 2)},
        scratch={"spread": ((p, layout.rows, LANES), jnp.dtype(jnp.float32))},
        prepare=_prepare,
        tile=functools.partial(_tile, cell_rows=layout.cell, width=width),
        width=width,
        flops=3 * p,
    )
    seen = jnp.full((b, t), s, jnp.int32)
    budget = selection.rows_of(neighbours, (b, t))
    return fused_tpu.select(_OP, layout, scorer, seen, budget, list_size=neighbours).indices
