"""Exact Top-k decoding: score all keys, select from each row of scores, attend to the list (Mosaic GPU, Hopper).

1. Scores: q.k of every visible key, written as float32 [B, N, S]. In half precision the tensor cores take tiles of keys against
   all heads of a group (`_score_tiles_kernel`), else float32 multiply-adds do (`_score_rows_kernel`). Key tiles come by TMA into
   a ring of buffers; splits outside the visible keys read nothing.
2. `topk_select` turns each row of scores into a list of places, with their scores. A shared scope pools the scores first, and
   fetches each head's own scores at the shared places after, both in XLA.
3. `_attend_kernel`: a block takes parts of one head's list, reads their value rows straight into registers, all rows of a part in
   flight together, and adds them up with their weights.
4. The splits' (max, sum, accumulator) are merged by log-sum-exp.

Every later step reads the scores that step 1 wrote, so the set and the softmax cannot disagree. Additions are in an order that
depends on shapes alone: two runs give the same bits.

One warpgroup a block. Head sizes are multiples of 8 up to 256. A cache shorter than one tile is padded, a longer one is read in
place: its last tile starts early and scores some keys twice.

A cache in pages is read in place too, whatever its length: a tile is a copy of each of its pages, and listed places become
rows of the pool before their values are read. The steps, and so the bits of the result, are those of a contiguous cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, gpu_lanes, gpu_merge, masks, paging, selection
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.core.gpu_tiles import CacheTiles, copies_of, visible_of
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from pallas_kernels.ops.topk_select import mosaic_gpu as topk_select

_OP = "topk_decode_attention: mosaic_gpu"
_TILE = 128  # keys of a step of the tensor-core score kernel
_ROW_TILE = 64  # and of the other one: the rows of one register tile
# Key tiles in flight: so many, or fewer if they would take more bytes.
_STAGES, _STAGE_BYTES = 4, 96 * 1024
_LANES = 128  # lanes of a warpgroup
_PART = 128  # listed keys that the attend kernel takes at a time
_SPLIT_KEYS = 4096  # scored by one block
_BLOCKS = 528  # blocks wanted in flight: four on each of the 132 multiprocessors
_ATTEND_BLOCKS = 2112  # and of the attend kernel, which mostly waits for memory: sixteen
_MAX_HEAD_SIZE = 256
_QUERY_REGISTERS = 96  # registers a lane may spend on keeping the group's queries
_SWIZZLE = 128  # bytes


def _range_of(b: int, num_keys: int, lengths, window):
    """Returns start and end as the kernels take them: [B] i32 to be cut to the keys there are, or None for the first and last."""
    if window is None:
        return None, lengths
    end = jnp.full((b,), num_keys) if lengths is None else jnp.clip(lengths, 0, num_keys)
    return jnp.maximum(end - window, 0), end


def _visible_tiles(start, end, split, splits: int, num_keys: int, tile: int):
    """Returns the tiles [first, last) of a split, and where a tile begins.

    Whole tiles are shared out; what is left over goes to the block of the last whole tile, as it overlaps with that.
    """
    share = pl.cdiv(num_keys // tile, splits)
    stop = jnp.where(split == splits - 1, pl.cdiv(num_keys, tile), (split + 1) * share)
    first = jnp.maximum(split * share, lax.div(start, tile))
    last = jnp.minimum(stop, lax.div(end + (tile - 1), tile))
    return first, last, lambda index: jnp.minimum(index * tile, num_keys - tile)


def _score_tiles_kernel(
    # inputs, global memory
    query_ref,  # [B, K, heads, H], the group's queries and zeros
    key_ref,  # [B, S, K, H], or pages [P, page, K, H]
    table_ref,  # None, or [B, pages] i32
    start_ref,  # None, or [B] i32, first visible key
    end_ref,  # None, or [B] i32, one past the last
    # outputs, global memory
    scores_ref,  # [B, K, group, >= S] f32; keys outside of the visible tiles are not written
    # scratch, shared memory
    queries_ref,  # [heads, H], swizzled
    tiles_ref,  # [stages, tile, H], swizzled
    loaded,  # barrier
    filled,  # barriers, one a stage
    *,
    num_keys: int,
    limit: int,
    scale: float,
    splits: int,
    interpreted: bool,
):
    stages = tiles_ref.shape[0]
    b, kv, split = lax.axis_index("batch"), lax.axis_index("kv_head"), lax.axis_index("split")
    start, end = visible_of(b, start_ref, end_ref, scores_ref.shape[0], limit)
    first, last, offset_of = _visible_tiles(start, end, split, splits, num_keys, _TILE)
    keys = CacheTiles(
        cache_ref=key_ref,
        table_ref=table_ref,
        sequence=b,
        head=kv,
        start=start,
        end=end,
        rows=_TILE,
    )

    def fetch(tile, pages):
        slot = lax.rem(tile - first, stages)
        keys.fetch(offset_of(tile), pages, tiles_ref.at[slot], filled.at[slot])

    def fetch_first(tile):
        fetch(tile, keys.pages(offset_of(tile)))

    for stage in range(stages):
        pl.when(first + stage < last)(functools.partial(fetch_first, first + stage))
    plgpu.copy_gmem_to_smem(query_ref.at[b, kv], queries_ref, loaded)
    plgpu.barrier_wait(loaded)

    @pl.loop(first, last)
    def _(tile):
        slot = lax.rem(tile - first, stages)
        pages = keys.pages(offset_of(tile + stages))  # ready when the next copies are
        plgpu.barrier_wait(filled.at[slot])

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, tiles_ref.at[slot], queries_ref.T)
            return acc_ref[...]

        products = pl.run_scoped(multiply, plgpu.ACC((_TILE, queries_ref.shape[0]), jnp.float32))
        pl.when(tile + stages < last)(functools.partial(fetch, tile + stages, pages))
        gpu_lanes.store_columns(
            products * scale,
            scores_ref.at[b, kv],
            offset_of(tile),
            scores_ref.shape[2],
            interpreted=interpreted,
        )


def _score_rows_kernel(
    # inputs, global memory
    query_ref,  # [B, N, H]
    key_ref,  # [B, S, K, H], or pages [P, page, K, H]
    table_ref,  # None, or [B, pages] i32
    start_ref,  # None, or [B] i32, first visible key
    end_ref,  # None, or [B] i32, one past the last
    # outputs, global memory
    scores_ref,  # [B, N, >= S] f32; keys outside of the visible tiles are not written
    # scratch, shared memory
    tiles_ref,  # [stages, tile, H]
    filled,  # barriers, one a stage
    *,
    num_keys: int,
    limit: int,
    group: int,
    scale: float,
    splits: int,
):
    stages, _, h = tiles_ref.shape
    b, kv, split = lax.axis_index("batch"), lax.axis_index("kv_head"), lax.axis_index("split")
    start, end = visible_of(b, start_ref, end_ref, scores_ref.shape[0], limit)
    first, last, offset_of = _visible_tiles(start, end, split, splits, num_keys, _ROW_TILE)
    cache = CacheTiles(
        cache_ref=key_ref,
        table_ref=table_ref,
        sequence=b,
        head=kv,
        start=start,
        end=end,
        rows=_ROW_TILE,
    )

    def fetch(tile, pages):
        slot = lax.rem(tile - first, stages)
        cache.fetch(offset_of(tile), pages, tiles_ref.at[slot], filled.at[slot])

    def fetch_first(tile):
        fetch(tile, cache.pages(offset_of(tile)))

    def read_query(g):
        query = plgpu.load(
            query_ref.at[b, kv * group + g], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
        )
        return query.astype(jnp.float32)

    keep_queries = group * h // 4 <= _QUERY_REGISTERS  # four lanes share a query
    queries = [read_query(g) for g in range(group)] if keep_queries else []

    for stage in range(stages):
        pl.when(first + stage < last)(functools.partial(fetch_first, first + stage))

    @pl.loop(first, last)
    def _(tile):
        slot = lax.rem(tile - first, stages)
        pages = cache.pages(offset_of(tile + stages))  # ready when the next copies are
        plgpu.barrier_wait(filled.at[slot])
        keys = plgpu.load(tiles_ref.at[slot], layout=plgpu.Layout.WGMMA, optimized=False).astype(
            jnp.float32
        )
        plgpu.commit_smem()  # the reads above come before the copy that overwrites the slot
        pl.when(tile + stages < last)(functools.partial(fetch, tile + stages, pages))

        def score(g, query):
            products = keys * lax.broadcast_in_dim(query, keys.shape, (1,))
            scores_ref[b, kv * group + g, pl.ds(offset_of(tile), _ROW_TILE)] = (
                jnp.sum(products, axis=1) * scale
            )

        if keep_queries:
            for g, query in enumerate(queries):
                score(g, query)
        else:
            pl.loop(0, group)(lambda g: score(g, read_query(g)))


def _attend_kernel(
    # inputs, global memory
    places_ref,  # [B, N or sets, >= topk] i32, rows of selected keys; the tail is garbage
    scores_ref,  # [B, N, >= topk] f32, their scores; the tail is garbage
    count_ref,  # [B, N] i32
    value_ref,  # [B, S, K, V]; a batch axis of 1 is one table for all
    # outputs, global memory
    acc_ref,  # [splits, B, N, V] f32, sum of exp(s - m) * value
    m_ref,  # [splits, B, N] f32, max of the scores
    total_ref,  # [splits, B, N] f32, sum of exp(s - m)
    # scratch, shared memory
    part_places_ref,  # [part] i32
    weights_ref,  # [1, part] f32
    sums_ref,  # [rows together * row] f32
    *,
    group: int,
    splits: int,
    interpreted: bool,
):
    num_heads, num_sets = scores_ref.shape[1], places_ref.shape[1]
    v_size, dtype = value_ref.shape[3], value_ref.dtype
    b, head, split = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("split")
    of_set = lax.div(head, num_heads // num_sets)
    count = count_ref[b, head]
    parts = lax.div(count + (_PART - 1), _PART)
    one_each = plgpu.Layout.WG_STRIDED((_PART,), vec_size=1)
    lane = plgpu.broadcasted_iota(jnp.int32, (_PART,), 0, layout=one_each)

    def scores_of(part):
        scores = plgpu.load(
            scores_ref.at[b, head, pl.ds(part * _PART, _PART)], layout=one_each, optimized=False
        )
        return jnp.where(part * _PART + lane < count, scores, -jnp.inf)

    def largest(index, m):
        return jnp.maximum(m, scores_of(split + index * splits))

    full = lambda value, shape, layout: plgpu.layout_cast(
        jnp.full(shape, value, jnp.float32), layout
    )
    # This block takes every `splits`-th part of the list.
    steps = lax.div(jnp.maximum(parts - split, 0) + (splits - 1), splits)
    m = jnp.max(lax.fori_loop(0, steps, largest, full(-jnp.inf, (_PART,), one_each)))
    shift = jnp.where(m == -jnp.inf, 0.0, m)

    vector = gpu_lanes.row_vector(dtype)
    strip = plgpu.Layout.WG_STRIDED((_LANES * vector,), vec_size=vector)
    table = value_ref.at[0 if value_ref.shape[0] == 1 else b, :, lax.div(head, group)]

    def attend(index, carry):
        acc, total = carry
        part = split + index * splits
        weights = jnp.exp(scores_of(part) - shift)
        place = plgpu.load(
            places_ref.at[b, of_set, pl.ds(part * _PART, _PART)], layout=one_each, optimized=False
        )
        # Past the list's end any key will do: its weight is 0.
        part_places_ref[...] = jnp.where(part * _PART + lane < count, place, 0)
        weights_ref[0] = weights
        [acc] = gpu_lanes.add_rows(
            [acc], table, part_places_ref, weights_ref, _PART, interpreted=interpreted
        )
        return acc, total + weights

    acc, total = lax.fori_loop(
        0,
        steps,
        attend,
        (full(0.0, (_LANES * vector,), strip), full(0.0, (_PART,), one_each)),
    )
    out = gpu_lanes.fold_rows(acc, sums_ref, v_size, dtype)
    acc_ref[split, b, head] = out
    m_ref[split, b, head] = m
    total_ref[split, b, head] = jnp.sum(total)


def _check(query, key, value, block_sizes):
    dtype = query.dtype.name
    if dtype not in ("float32", "bfloat16", "float16"):
        raise NotImplementedError(f"{_OP} got dtype {dtype}, wanted float32, bfloat16 or float16")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if 0 in array.shape:
            raise NotImplementedError(
                f"{_OP} got {name} of shape {array.shape}, wanted every axis of at least 1"
            )
    for name, size in (("query", query.shape[2]), ("value", value.shape[3])):
        if size % 8 or size > _MAX_HEAD_SIZE:
            raise NotImplementedError(
                f"{_OP} got {name} of head size {size}, wanted a multiple of 8 up to {_MAX_HEAD_SIZE}"
            )
    gpu_lanes.check_table(_OP, "value", value)
    if block_sizes is not None and block_sizes.block_kv is not None:
        raise NotImplementedError(
            f"{_OP} got block_kv {block_sizes.block_kv}, wanted None: tiles are fixed by the tensor cores"
        )


def _sizes(query, num_keys: int, kv_heads: int, topk, block_sizes) -> TopKDecodeBlockSizes:
    """Returns the caller's sizes, else the tuned ones, else those that leave every choice to the kernels."""
    b, n, h = query.shape
    size = topk if isinstance(topk, int) else num_keys
    return block_sizes_.resolve(
        "topk_decode_attention",
        "mosaic_gpu",
        block_sizes,
        cls=TopKDecodeBlockSizes,
        dtype=query.dtype.name,
        bucket={
            "rows": b * kv_heads,
            "s": num_keys,
            "topk": size,
            "head": h,
            "group": n // kv_heads,
        },
        heuristic=TopKDecodeBlockSizes,
    )


def topk_decode_attention(
    query,
    key,
    value,
    *,
    topk,
    lengths,
    scope,
    pooling,
    window,
    page_table,
    quantized_key,
    certified,
    scale,
    with_indices,
    block_sizes: TopKDecodeBlockSizes | None = None,
):
    """Arguments as the public function, checked; returns (out, lse, TopKSelection)."""
    if quantized_key is not None:
        raise NotImplementedError(f"{_OP} got a quantized_key, wanted None")
    table, page = None, 0
    if page_table is not None:
        num_pages, page, k, v_size = value.shape
        table = paging.safe_table(page_table, lengths, page=page, num_pages=num_pages)
        value = value.reshape(1, num_pages * page, k, v_size)
    _check(query, key, value, block_sizes)
    b, n, h = query.shape
    k = value.shape[2]
    num_keys = value.shape[1] if table is None else table.shape[1] * page
    start, end = _range_of(b, num_keys, lengths, window)
    sizes = _sizes(query, num_keys, k, topk, block_sizes)
    scores = _scores(query, key, start, end, scale, sizes.num_splits, table)
    padded = scores.shape[2]

    num_sets = pooling_.num_sets(scope, n, k)
    per_set = n // num_sets
    visible = masks.visible_to_decode(padded, end, window, b)[:, None, :]
    ranked = pooling_.pool(scores, visible, num_sets, pooling)
    budget = None
    if not isinstance(topk, int):
        budget = selection.rows_of(topk, (b, n))[:, ::per_set].reshape(-1)
    # Without a static budget the list has room for every key.
    size = min(topk, num_keys) if isinstance(topk, int) else num_keys
    shared = num_sets != n
    count, threshold, cut, places, *listed_scores = topk_select.select(
        ranked.reshape(b * num_sets, padded),
        start,
        end,
        budget,
        topk=size,
        limit=num_keys,
        listed=("indices",) if shared else ("indices", "scores"),
    )
    count, threshold, cut = (x.reshape(b, num_sets) for x in (count, threshold, cut))
    places = places.reshape(b, num_sets, size)
    if shared:
        each = jnp.repeat(jnp.maximum(places, 0), per_set, axis=1)
        at_places = jnp.take_along_axis(scores, each, axis=2, mode="promise_in_bounds")
    else:
        at_places = listed_scores[0].reshape(b, n, size)
    counts = jnp.repeat(count, per_set, axis=1)
    rows = places if table is None else paging.pool_rows(places, table, page)
    out, lse = _attend(at_places, rows, counts, value, sizes.list_splits or sizes.num_splits)

    indices = None
    if with_indices:
        indices = jnp.pad(places, ((0, 0), (0, 0), (0, topk - size)), constant_values=-1)
    selected = TopKSelection(indices, count, threshold, cut)
    return out, lse, selection.repeat_for_heads(selected, per_set)


def _scores(query, key, start, end, scale, wanted, table=None):
    """Returns scale * q.k as float32 [B, N, >= S], where a key is visible; anything elsewhere. With a table, keys are in pages."""
    (b, n, h), (_, num_keys, k, _) = query.shape, key.shape
    page = None
    if table is not None:
        page = num_keys
        num_keys = table.shape[1] * page
    group, limit = n // k, num_keys
    options = interpret_options()
    interpret = compat.gpu_interpret(options)
    # Swizzled tiles begin at multiples of 8 keys, and so has the last one, which ends with the cache.
    tensor_cores = key.dtype.itemsize == 2 and h % (_SWIZZLE // 2) == 0
    tensor_cores &= num_keys % 8 == 0 or num_keys < _TILE
    tile = _TILE if tensor_cores else _ROW_TILE
    if num_keys < tile:
        if table is None:
            key = jnp.pad(key, ((0, 0), (0, tile - num_keys), (0, 0), (0, 0)))
        num_keys = tile
    arrivals, suffix = copies_of(tile, page), "" if page is None else f"_p{page}"
    padded = pl.cdiv(num_keys, _LANES) * _LANES
    # Sequences may differ in length: parts of at most `_SPLIT_KEYS` spread a long one over the device.
    wanted = wanted or max(pl.cdiv(_BLOCKS, b * k), num_keys // _SPLIT_KEYS)
    splits = block_sizes_.even_splits(num_keys // tile, wanted)
    stages = max(2, min(_STAGES, _STAGE_BYTES // (tile * h * key.dtype.itemsize)))
    grid = {"grid": (b, k, splits), "grid_names": ("batch", "kv_head", "split")}
    if not tensor_cores:
        return plgpu.kernel(
            functools.partial(
                _score_rows_kernel,
                num_keys=num_keys,
                limit=limit,
                group=group,
                scale=scale,
                splits=splits,
            ),
            out_type=jax.ShapeDtypeStruct((b, n, padded), jnp.float32),
            scratch_types=[
                plgpu.SMEM((stages, tile, h), key.dtype),
                plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            ],
            kernel_name=f"topk_decode_scores_rows_h{h}_g{group}" + suffix,
            interpret=interpret,
            **grid,
        )(query, key, table, start, end)
    heads = pl.cdiv(group, 8) * 8
    queries = jnp.pad(query.reshape(b, k, group, h), ((0, 0), (0, 0), (0, heads - group), (0, 0)))
    swizzled = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))
    return plgpu.kernel(
        functools.partial(
            _score_tiles_kernel,
            num_keys=num_keys,
            limit=limit,
            scale=scale,
            splits=splits,
            interpreted=options is not None,
        ),
        out_type=jax.ShapeDtypeStruct((b, k, group, padded), jnp.float32),
        scratch_types=[
            plgpu.SMEM((heads, h), key.dtype, transforms=swizzled),
            plgpu.SMEM((stages, tile, h), key.dtype, transforms=swizzled),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        ],
        kernel_name=f"topk_decode_scores_h{h}_g{group}" + suffix,
        interpret=interpret,
        **grid,
    )(queries, key, table, start, end).reshape(b, n, padded)


def _attend(scores, places, counts, value, wanted):
    """Attends to lists: scores float32 [B, N, size], places int32 [B, sets, size], counts int32 [B, N]; returns (out, lse)."""
    (b, n, size), v_size = scores.shape, value.shape[3]
    options = interpret_options()
    row = gpu_lanes.folded_size(v_size, value.dtype)
    room = pl.cdiv(size, _PART) * _PART
    widen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room - size)))
    wanted = wanted or pl.cdiv(_ATTEND_BLOCKS, b * n)
    splits = block_sizes_.even_splits(room // _PART, wanted)
    partial_row = jax.ShapeDtypeStruct((splits, b, n), jnp.float32)
    acc, m, total = plgpu.kernel(
        functools.partial(
            _attend_kernel,
            group=n // value.shape[2],
            splits=splits,
            interpreted=options is not None,
        ),
        out_type=[
            jax.ShapeDtypeStruct((splits, b, n, row), jnp.float32),
            partial_row,
            partial_row,
        ],
        scratch_types=[
            plgpu.SMEM((_PART,), jnp.int32),
            plgpu.SMEM((1, _PART), jnp.float32),
            plgpu.SMEM((gpu_lanes.fold_room(value.dtype),), jnp.float32),
        ],
        grid=(b, n, splits),
        grid_names=("batch", "head", "split"),
        kernel_name=f"topk_decode_attend_v{v_size}",
        interpret=compat.gpu_interpret(options),
    )(widen(places), widen(scores), counts, value)
    out, lse = gpu_merge.merge_splits(acc, m, total, value.dtype)
    return out[..., :v_size], lse
