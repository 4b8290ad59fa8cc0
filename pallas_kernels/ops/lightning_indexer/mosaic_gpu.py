"""The lightning indexer on tensor cores, and selection from its scores (Mosaic GPU, Hopper).

A block holds the index queries of a few rows, [rows x heads, D], in shared memory, and streams tiles of index keys past them by
TMA. One product gives a tile's keys against all heads of all these rows, [keys, rows x heads], in registers; there each row's
heads pass the ReLU, take their weights and are added up. Only the sums are written, float32 [B, T, S].

`indexer_select` writes the scores of a chunk of rows at a time and selects from them with `topk_select`: both see the same bits.
Tiles that no row of a block may see are neither read nor written.

Grid (batch, blocks of rows, splits of the keys), one warpgroup a block. float32 inputs are refused: the tensor cores would
round them. A head size that is no multiple of 64, or a number of keys that is none of 8, is filled up first, at the price of a
copy.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, selection
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.lightning_indexer.block_sizes import LightningIndexerBlockSizes
from pallas_kernels.ops.topk_select import mosaic_gpu as topk_select

_OP = "mosaic_gpu"
_MAX_COLUMNS = 256  # rows x heads of one product
_ACCUMULATORS = 64 * 256  # float32 of one product in registers: 128 a lane
_STAGES = 3  # key tiles in flight
_BLOCKS = 264  # wanted in flight: two on each of the 132 multiprocessors
_SWIZZLE = 128  # bytes
_MAX_DEPTH = 256
_CHUNK_BYTES = 2**28  # float32 scores of the rows that are selected from at a time


def _score_kernel(
    # inputs, global memory
    query_ref,  # [B, blocks, rows x heads, D]
    key_ref,  # [B, S, D]
    weights_ref,  # [B, blocks, rows, heads] f32
    end_ref,  # [B, blocks] i32, one past the last key that a row of the block sees
    # outputs, global memory
    scores_ref,  # [B, blocks x rows, S] f32
    # scratch, shared memory
    queries_ref,  # [rows x heads, D], swizzled
    tiles_ref,  # [stages, tile, D], swizzled
    loaded,  # barrier
    filled,  # barriers, one a stage
    *,
    splits: int,
):
    stages, tile_size, _ = tiles_ref.shape
    num_keys = key_ref.shape[1]
    _, _, rows, heads = weights_ref.shape
    b, block, split = lax.axis_index("batch"), lax.axis_index("block"), lax.axis_index("split")
    share = pl.cdiv(pl.cdiv(num_keys, tile_size), splits)
    first = split * share
    last = jnp.minimum(first + share, lax.div(end_ref[b, block] + (tile_size - 1), tile_size))

    def offset_of(tile):
        return jnp.minimum(tile * tile_size, num_keys - tile_size)

    def fetch(tile):
        slot = lax.rem(tile - first, stages)
        plgpu.copy_gmem_to_smem(
            key_ref.at[b, pl.ds(offset_of(tile), tile_size)], tiles_ref.at[slot], filled.at[slot]
        )

    for stage in range(stages):
        pl.when(first + stage < last)(functools.partial(fetch, first + stage))

    @pl.when(first < last)
    def _():
        plgpu.copy_gmem_to_smem(query_ref.at[b, block], queries_ref, loaded)
        plgpu.barrier_wait(loaded)

    weights = [
        plgpu.load(
            weights_ref.at[b, block, row], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
        )
        for row in range(rows)
    ]

    @pl.loop(first, last)
    def _(tile):
        slot = lax.rem(tile - first, stages)
        plgpu.barrier_wait(filled.at[slot])

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, tiles_ref.at[slot], queries_ref.T)
            return acc_ref[...]

        products = pl.run_scoped(multiply, plgpu.ACC((tile_size, rows * heads), jnp.float32))
        pl.when(tile + stages < last)(functools.partial(fetch, tile + stages))
        for row in range(rows):
            of_row = lax.slice(products, (0, row * heads), (tile_size, (row + 1) * heads))
            fired = jnp.maximum(of_row, 0.0)
            weighted = fired * lax.broadcast_in_dim(weights[row], fired.shape, (1,))
            part = pl.ds(offset_of(tile), tile_size)
            scores_ref[b, block * rows + row, part] = jnp.sum(weighted, axis=1)


def _pad_to(x, axis: int, size: int):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return x if size == x.shape[axis] else jnp.pad(x, widths)


def _check(op: str, index_query, block_sizes: LightningIndexerBlockSizes | None):
    _, _, heads, depth = index_query.shape
    if index_query.dtype.name not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"{op}: {_OP} got dtype {index_query.dtype.name}, wanted bfloat16 or float16"
        )
    if heads > _MAX_COLUMNS:
        raise NotImplementedError(
            f"{op}: {_OP} got {heads} indexer heads, wanted at most {_MAX_COLUMNS}"
        )
    if depth > _MAX_DEPTH:
        raise NotImplementedError(
            f"{op}: {_OP} got indexer heads of size {depth}, wanted at most {_MAX_DEPTH}"
        )
    if block_sizes is not None and block_sizes.block_kv is not None:
        raise NotImplementedError(
            f"{op}: {_OP} got block_kv {block_sizes.block_kv}, wanted None: tiles are fixed by the tensor cores"
        )


def _ends(index_query, index_key, causal: bool, lengths):
    """Returns int32 [B, T], one past the last key that each row sees."""
    b, t = index_query.shape[:2]
    s = index_key.shape[1]
    rows = jnp.arange(t, dtype=jnp.int32) + (s - t + 1)
    end = jnp.clip(rows, 0, s) if causal else jnp.full((t,), s, jnp.int32)
    end = jnp.broadcast_to(end, (b, t))
    return end if lengths is None else jnp.minimum(end, jnp.clip(lengths, 0, s)[:, None])


def _sizes(op: str, index_query, index_key, block_sizes) -> LightningIndexerBlockSizes:
    """Returns the caller's sizes, else the tuned ones, else those that leave every choice to the kernel."""
    b, t, i, d = index_query.shape
    return block_sizes_.resolve(
        op,
        "mosaic_gpu",
        block_sizes,
        cls=LightningIndexerBlockSizes,
        dtype=index_query.dtype.name,
        bucket={"rows": b * t, "s": index_key.shape[1], "heads": i, "head": d},
        heuristic=LightningIndexerBlockSizes,
    )


def _scores(index_query, index_key, head_weights, end, sizes: LightningIndexerBlockSizes):
    """Returns the scores of every key before `end` [B, T], float32 [B, T, S]; elsewhere anything."""
    b, t, i, d = index_query.shape
    s = index_key.shape[1]
    heads, depth = pl.cdiv(i, 8) * 8, pl.cdiv(d, _SWIZZLE // 2) * (_SWIZZLE // 2)
    # Heads of weight 0 and zero queries add nothing; neither do zeros along the depth.
    query = _pad_to(_pad_to(index_query, 3, depth), 2, heads)
    weights = _pad_to(head_weights.astype(jnp.float32), 2, heads)
    key = _pad_to(index_key, 2, depth)
    rows = max(1, min(t, _MAX_COLUMNS // heads))
    if sizes.block_q is not None:
        rows = min(rows, sizes.block_q)
    blocks = pl.cdiv(t, rows)
    query, weights = (_pad_to(x, 1, blocks * rows) for x in (query, weights))
    block_end = jnp.max(_pad_to(end, 1, blocks * rows).reshape(b, blocks, rows), axis=2)
    tile = 128 if 128 * rows * heads <= _ACCUMULATORS else 64
    # Swizzled tiles begin at multiples of 8 keys, and so has the last one, which ends with the keys.
    key = _pad_to(key, 1, max(pl.cdiv(s, 8) * 8, tile))
    width = key.shape[1]
    splits = max(1, min(pl.cdiv(_BLOCKS, b * blocks), width // (4 * tile)))
    if sizes.num_splits is not None:
        splits = max(1, min(sizes.num_splits, width // tile))
    swizzled = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))
    scores = plgpu.kernel(
        functools.partial(_score_kernel, splits=splits),
        out_type=jax.ShapeDtypeStruct((b, blocks * rows, width), jnp.float32),
        scratch_types=[
            plgpu.SMEM((rows * heads, depth), key.dtype, transforms=swizzled),
            plgpu.SMEM((_STAGES, tile, depth), key.dtype, transforms=swizzled),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=1, num_barriers=_STAGES),
        ],
        grid=(b, blocks, splits),
        grid_names=("batch", "block", "split"),
        kernel_name=f"indexer_scores_i{heads}_d{depth}_q{rows}",
        interpret=compat.gpu_interpret(interpret_options()),
    )(
        query.reshape(b, blocks, rows * heads, depth),
        key,
        weights.reshape(b, blocks, rows, heads),
        block_end,
    )
    return scores[:, :t, :s]


def indexer_scores(index_query, index_key, head_weights, *, causal, lengths, block_sizes=None):
    """Arguments as the public function, checked."""
    _check("indexer_scores", index_query, block_sizes)
    end = _ends(index_query, index_key, causal, lengths)
    sizes = _sizes("indexer_scores", index_query, index_key, block_sizes)
    scores = _scores(index_query, index_key, head_weights, end, sizes)
    index = lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    return jnp.where(index < end[..., None], scores, -jnp.inf)


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
    _check("indexer_select", index_query, block_sizes)
    b, t, _, _ = index_query.shape
    s = index_key.shape[1]
    sizes = _sizes("indexer_select", index_query, index_key, block_sizes)
    end = _ends(index_query, index_key, causal, lengths)
    budget = None if isinstance(topk, int) else selection.rows_of(topk, (b, t))
    size = min(topk, s) if isinstance(topk, int) else None
    listed = ("indices",) if with_indices else ()

    def select(query, weights, end, budget):
        """Selects for [B, chunk] rows; returns arrays [B, chunk, ...]."""
        rows = query.shape[1]
        # Keys past the last that any of these rows sees need not be looked at, but shapes are static.
        scores = _scores(query, index_key, weights, end, sizes).reshape(b * rows, s)
        found = topk_select.select(
            scores,
            end=end.reshape(-1),
            budget=None if budget is None else budget.reshape(-1),
            topk=size,
            listed=listed,
        )
        return tuple(x.reshape(b, rows, *x.shape[1:]) for x in found)

    chunks = pl.cdiv(4 * b * t * s, _CHUNK_BYTES)
    chunk = pl.cdiv(t, chunks)
    if chunk >= t:
        found = select(index_query, head_weights, end, budget)
    else:
        chunk = pl.cdiv(chunk, 4) * 4  # whole blocks of rows
        chunks = pl.cdiv(t, chunk)

        def split(x):
            x = _pad_to(x, 1, chunks * chunk)
            return jnp.swapaxes(x.reshape(b, chunks, chunk, *x.shape[2:]), 0, 1)

        found = lax.map(
            lambda xs: select(*xs),
            jax.tree.map(split, (index_query, head_weights, end, budget)),
        )
        found = tuple(
            jnp.swapaxes(x, 0, 1).reshape(b, chunks * chunk, *x.shape[3:])[:, :t] for x in found
        )
    count, threshold, cut = found[:3]
    indices = None
    if with_indices:
        indices = jnp.pad(
            found[3], ((0, 0), (0, 0), (0, topk - found[3].shape[2])), constant_values=-1
        )
    return TopKSelection(indices, count, threshold, cut)
