"""The lightning indexer on TPUs: products on the matrix unit, ReLU and weights in registers, selection in VMEM (Mosaic TPU).

A tile is 8 query rows by `width` keys. The heads' products of a few heads at a time leave the matrix unit as [heads, 8, width]
and are weighed and added up at once, so that they never wait in memory: queries are turned to [heads, 8 rows, D] once a row
block, and each weight is spread over a register's lanes. In decoding a tile is one query row and the 8 rows of a product are
heads, which one sum over sublanes ends. Heads are added in their own order, the same in both ops, so that both see the same
bits. Products accumulate in float32; float32 inputs are multiplied in full precision. The rest is `topk_select/fused_tpu.py`:
grid, row buffer, search, lists. `indexer_select` keeps nothing S long in HBM.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, selection
from pallas_kernels.core.tpu_tiles import LANES, SUBLANES, round_up
from pallas_kernels.ops.lightning_indexer.block_sizes import LightningIndexerBlockSizes
from pallas_kernels.ops.topk_select import fused_tpu
from pallas_kernels.ops.topk_select.fused_tpu import Layout, Scorer

_TILE_HEADS = 16  # of 8 rows: what one product makes is 16 registers wide of 128 keys
_TILE_KEYS = 256


def _prepare_rows(refs, row_block):
    """Turns a block of 8-row cells to [cell, heads x 8, D], and spreads its weights over lanes: [heads, rows, 128]."""
    turned, spread, weights = refs["turned"], refs["spread"], refs["weights"]
    num_heads, rows, _ = spread.shape

    def cell(i, carry):
        # Through float32, whose registers hold 8 rows; exact.
        query = refs["query"][0, fused_tpu.cell_rows(i)].astype(jnp.float32)
        query = jnp.swapaxes(query, 0, 1).reshape(turned.shape[1:])
        turned[i] = query.astype(turned.dtype)
        return carry

    lax.fori_loop(0, turned.shape[0], cell, 0)
    first = row_block * rows % LANES
    for head in range(num_heads):
        line = weights[0, head : head + 1, :].astype(jnp.float32)
        spread[head] = jnp.broadcast_to(fused_tpu.as_column(line, rows, first), (rows, LANES))


def _prepare_queries(refs, row_block):
    """Spreads the weights of single queries, heads along sublanes: [rows, heads, 128]."""
    spread = refs["spread"]
    for row in range(spread.shape[0]):
        spread[row] = jnp.broadcast_to(refs["weights"][0, row], spread.shape[1:])


def _tile(refs, cell, offset, *, num_heads: int, tile_heads: int, width: int, one_row: bool):
    """Returns the scores of a cell: [8, 128] or [1, 128] for each 128 of `width` keys."""
    depth = refs["query"].shape[3]
    by_depth = depth % LANES  # as `_scorer` laid them out
    at = fused_tpu.lanes(offset, width)
    keys = refs["key"][0, :, at] if by_depth else refs["key"][0, at, :]
    queries = refs["query"].at[0, cell] if one_row else refs["turned"].at[cell]
    # In slabs of 8 sublanes: a slab is a head of 8 rows, or 8 heads of one.
    slabs = round_up(num_heads, SUBLANES) // SUBLANES if one_row else num_heads
    precision = lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
    pieces = range(0, width, LANES)
    scores = [jnp.zeros((SUBLANES, LANES), jnp.float32) for _ in pieces]
    for first in range(0, slabs, tile_heads):
        count = min(tile_heads, slabs - first)
        products = lax.dot_general(
            queries[first * SUBLANES : (first + count) * SUBLANES, :],
            keys,
            (((1,), (0 if by_depth else 1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        for slab in range(count):
            weight = refs["spread"][
                (cell, pl.ds((first + slab) * SUBLANES, SUBLANES))
                if one_row
                else (first + slab, fused_tpu.cell_rows(cell))
            ]
            for j, piece in enumerate(pieces):
                product = products[slab * SUBLANES : (slab + 1) * SUBLANES, piece : piece + LANES]
                weighted = weight * jnp.maximum(product, 0.0)
                if one_row and (first + slab + 1) * SUBLANES > num_heads:
                    # Filled-up heads add nothing, not even 0 * NaN.
                    head = lax.broadcasted_iota(jnp.int32, weighted.shape, 0)
                    real = head < num_heads - (first + slab) * SUBLANES
                    weighted = jnp.where(real, weighted, 0.0)
                scores[j] += weighted
    return [jnp.sum(x, axis=0, keepdims=True) for x in scores] if one_row else scores


def _scorer(layout: Layout, index_query, index_key, head_weights, *, name: str) -> Scorer:
    _, _, i, d = index_query.shape
    one_row = layout.cell == 1
    width = _TILE_KEYS if layout.block_kv % _TILE_KEYS == 0 else LANES
    if one_row:
        padding = round_up(i, SUBLANES) - i
        query = jnp.pad(index_query, ((0, 0), (0, 0), (0, padding), (0, 0)))
        weights = jnp.pad(head_weights.astype(jnp.float32), ((0, 0), (0, 0), (0, padding)))
        whole = lambda row_block: (0, 0, 0)
        rows = {
            "query": (query, (layout.rows, i + padding, d), whole),
            "weights": (weights[..., None], (layout.rows, i + padding, 1), whole),
        }
        scratch = {"spread": ((layout.rows, i + padding, LANES), jnp.dtype(jnp.float32))}
        prepare = _prepare_queries
    else:
        cells = layout.rows // SUBLANES
        rows = {
            "query": (index_query, (layout.rows, i, d), lambda row_block: (row_block, 0, 0)),
            "weights": (
                jnp.swapaxes(head_weights, 1, 2),
                (i, LANES),
                lambda row_block: (0, row_block * layout.rows // LANES),
            ),
        }
        scratch = {
            "turned": ((cells, i * SUBLANES, d), index_query.dtype),
            "spread": ((i, layout.rows, LANES), jnp.dtype(jnp.float32)),
        }
        prepare = _prepare_rows
    return Scorer(
        name=f"{name}_{index_query.dtype.name}_h{i}",
        rows=rows,
        # Either way as XLA lays keys out at a program's edge, so that a cache is not copied.
        keys={"key": (jnp.swapaxes(index_key, 1, 2), 2) if d % LANES else (index_key, 1)},
        scratch=scratch,
        prepare=prepare,
        tile=functools.partial(
            _tile, num_heads=i, tile_heads=_TILE_HEADS, width=width, one_row=one_row
        ),
        width=width,
        flops=2 * i * d + 3 * i,
    )


def _layout(op: str, index_query, index_key, block_sizes, *, list_size: int = 0) -> Layout:
    """Chooses the block sizes: as many rows as leave half of VMEM free, up to 64, so that keys are read less often."""
    b, t, i, d = index_query.shape
    s = index_key.shape[1]
    dtype = index_query.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"{op}: mosaic_tpu got index_query of dtype {dtype.name}, wanted float32 or bfloat16"
        )

    # The row buffer and the lists; the queries twice and once turned; their weights.
    row_bytes = 4 * s + 8 * list_size + i * (3 * dtype.itemsize * round_up(d, LANES) + 4 * LANES)
    fits = compat.tpu_vmem_bytes() // 2 // row_bytes // SUBLANES * SUBLANES
    usual_rows, usual_kv = min(max(fits, SUBLANES), 64), 1024
    sizes = block_sizes_.resolve(
        op,
        "mosaic_tpu",
        block_sizes,
        cls=LightningIndexerBlockSizes,
        dtype=dtype.name,
        bucket={"rows": b * t, "s": s, "heads": i, "head": d},
        heuristic=lambda: LightningIndexerBlockSizes(block_q=usual_rows, block_kv=usual_kv),
    )
    return Layout.of(b, t, s, rows=sizes.block_q or usual_rows, block_kv=sizes.block_kv or usual_kv)


def _seen(index_query, index_key, *, causal, lengths):
    """Returns how many leading keys each row sees, int32 [B, T]."""
    b, t = index_query.shape[:2]
    s = index_key.shape[1]
    seen = jnp.full((b, t), s, jnp.int32)
    if causal:
        seen = jnp.minimum(seen, (jnp.arange(t, dtype=jnp.int32) + (s - t + 1))[None])
    return seen if lengths is None else jnp.minimum(seen, lengths[:, None])


def indexer_scores(index_query, index_key, head_weights, *, causal, lengths, block_sizes=None):
    """Arguments as the public function, checked.

    Raises:
      NotImplementedError: float16 or float64 inputs, or blocks that do not fit VMEM.
    """
    op = "indexer_scores"
    layout = _layout(op, index_query, index_key, block_sizes)
    layout = dataclasses.replace(layout, members=1)
    scorer = _scorer(layout, index_query, index_key, head_weights, name=op)
    seen = _seen(index_query, index_key, causal=causal, lengths=lengths)
    return fused_tpu.write_scores(op, layout, scorer, seen)


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
    """Arguments as the public function, checked; `topk` an int or int32 rows.

    Raises:
      NotImplementedError: float16 or float64 inputs, or score rows that do not fit VMEM.
    """
    op = "indexer_select"
    list_size = min(topk, index_key.shape[1]) if with_indices else 0
    layout = _layout(op, index_query, index_key, block_sizes, list_size=list_size)
    scorer = _scorer(layout, index_query, index_key, head_weights, name=op)
    seen = _seen(index_query, index_key, causal=causal, lengths=lengths)
    budget = selection.rows_of(topk, index_query.shape[:2])
    return fused_tpu.select(
        op, layout, scorer, seen, budget, list_size=topk if with_indices else None
    )
