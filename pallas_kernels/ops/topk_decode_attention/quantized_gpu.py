"""Exact or approximate Top-k decoding by an eight-bit copy of the keys: half of the bytes are read (Mosaic GPU, Hopper).

1. Scores by the copy (`_score_copy_kernel`), by tensor cores. Of int8, tiles of keys are multiplied by the group's queries as they
   are, each query as two int8 numbers, 2^7 p + r, in units of a power of two. The products are exact in int32, and so is
   2^7 <p, k> + <r, k>. Tiles of float8_e4m3fn, and of head sizes that integer products do not take, pass through registers, where
   they become float16 or bfloat16, which hold each of their numbers; queries are one or two parts in the same dtype, and the
   products are added in float32. Products of float8 itself would drop bits of the sums.
2. Without `certified`, these scores rank the keys, and `gather_attention` attends to the listed ones, with their true scores.
3. With it, the kernel writes an upper bound of each true score instead: u = score by the copy + w (see `_coefficients`).
   `topk_select` lists the `_room` keys of largest u; `_rescore_kernel` scores them from the keys themselves, in the very arithmetic
   of the call without a copy; and the `topk` best of those are selected. Every key that is not listed has a score of at most the
   smallest u listed. Where the last selected score is above that, no other key can belong to the set, and as the lists are in
   order of place, ties fall as they would have. Each step after is that of the call without a copy: so are the bits.
4. Where that fails for any head (rows full of ties, keys that are not finite, bounds too wide), the call is made again without
   the copy. It is never wrong, only slower.

Of shapes and settings that cannot gain from the copy (see `_worthwhile`), `certified` makes the call without it at once.

In pages, tiles are copies of each page, and scales and errors are read by a table look-up a lane; listed places become rows of
the pool where keys and values are read. The steps, and so the bits of the result, are those of a contiguous cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, gpu_lanes, masks, paging, quantization, selection
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.core.gpu_tiles import CacheTiles, copies_of, visible_of
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.quantization import QuantizedKeys
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.gather_attention import mosaic_gpu as gather_attention
from pallas_kernels.ops.topk_decode_attention import mosaic_gpu
from pallas_kernels.ops.topk_select import mosaic_gpu as topk_select

_OP = "topk_decode_attention: mosaic_gpu"
_TILE = 128  # keys of a step
_ROW_TILE = mosaic_gpu._ROW_TILE  # keys that are scored again together where no tensor cores do
_TOGETHER = 8  # key/value heads that a block scores: their scales are neighbours and fill a sector of memory
# Key tiles in flight: so many, or fewer if they would take more bytes.
_STAGES, _STAGE_BYTES = 4, 96 * 1024
_QUERY_BYTES = 96 * 1024  # the parts of a block's queries take at most
_SWIZZLES = 128, 64, 32  # bytes of a row of a swizzled tile
_HEADS = 32  # whose scores are finished together, and whose coefficients are read ahead: more would not fit the registers
_REGISTER_COLUMNS = 128  # of a tile that passes through registers, at a time
_LANES = 128
_SPLIT_KEYS = 4096  # scored by one block
_BLOCKS = 528  # blocks wanted in flight: four on each of the 132 multiprocessors
_RESCORE_BLOCKS = 2112  # and of the rescoring kernel, which mostly waits for memory: sixteen
# Keys that are rescored beyond the budget, as a share of it, up to whole tiles. All heads of SmolLM2-135M, after two prompts of
# 2,040 tokens of plays, were settled by fewer: by 0.41, 0.58, 0.96 and 0.88 of budgets of 512, 256, 128 and 64 with int8, and by
# 0.60, 0.89, 1.47 and 1.69 with e4m3, which loses more.
_SPARE = {"int8": 0.5, "float8_e4m3fn": 1.25}
_PART_BITS = 7  # of the lower one of the two numbers that make an element of a query
_QUERY_BITS = 2 * _PART_BITS
_SAFE_EXPONENT = 60  # of a query's largest element, either sign; beyond, nothing is certified
_SAFE_SCALE = 2.0**40
_LARGEST_WIDTH = 2.0**80  # a bound this wide is none


def _score_copy_kernel(
    *refs, group: int, bounds: bool, num_keys: int, limit: int, splits: int, interpreted: bool
):
    # inputs, global memory:
    #   parts [B, K, parts * heads, H]: the upper numbers of the group's queries and zeros, then the lower ones if any
    #   values [B, S, K, H], or pages [P, page, K, H], as of all that follows: eight-bit
    #   scale [B, S, K] f32, and error likewise if `bounds`
    #   one vector [B, K, heads] f32 a coefficient: one, or four if `bounds`
    #   None, or the page table [B, pages] i32
    #   None, or start, end [B] i32: the first visible key, one past the last
    # outputs, global memory:
    #   scores [B, K, group, >= S] f32; keys outside of the visible tiles are not written
    # scratch, shared memory:
    #   parts [together, parts * heads, H], swizzled; tiles [stages, tile, H], likewise if H allows; a barrier, and one a stage
    refs = list(refs)
    parts_ref, values_ref = refs.pop(0), refs.pop(0)
    token_refs = [refs.pop(0) for _ in range(2 if bounds else 1)]
    coefficient_refs = [refs.pop(0) for _ in range(4 if bounds else 1)]
    table_ref, start_ref, end_ref, scores_ref, queries_ref, tiles_ref, loaded, filled = refs
    stages, together, columns = tiles_ref.shape[0], queries_ref.shape[0], queries_ref.shape[1]
    heads = coefficient_refs[0].shape[2]
    whole_numbers = queries_ref.dtype == jnp.int8
    b, split = lax.axis_index("batch"), lax.axis_index("split")
    first_head = lax.axis_index("kv_heads") * together
    start, end = visible_of(b, start_ref, end_ref, scores_ref.shape[0], limit)
    first, last, offset_of = mosaic_gpu._visible_tiles(start, end, split, splits, num_keys, _TILE)
    # A step is a tile of one head; the heads of some tokens follow one another.
    steps = jnp.maximum(last - first, 0) * together

    def part_of(step):
        """The step's first token, its head among those of the block and among all."""
        head = lax.rem(step, together)
        return offset_of(first + lax.div(step, together)), head, first_head + head

    def tiles_of(kv):
        return CacheTiles(
            cache_ref=values_ref,
            table_ref=table_ref,
            sequence=b,
            head=kv,
            start=start,
            end=end,
            rows=_TILE,
        )

    def pages_of(step):
        begin, _, kv = part_of(step)
        return tiles_of(kv).pages(begin)

    def fetch(step, pages):
        slot = lax.rem(step, stages)
        begin, _, kv = part_of(step)
        tiles_of(kv).fetch(begin, pages, tiles_ref.at[slot], filled.at[slot])

    def fetch_first(step):
        fetch(step, pages_of(step))

    def token_numbers(begin, kv):
        """Scales, and errors, one a row of the product."""
        if table_ref is None:
            rows = pl.ds(begin, _TILE)
            layout = plgpu.Layout.WGMMA.reduce(1)
            return [
                plgpu.load(ref.at[b, rows, kv], layout=layout, optimized=False)
                for ref in token_refs
            ]
        page = values_ref.shape[1]
        visible = lax.div(start, page), lax.div(end - 1, page)
        return gpu_lanes.read_tokens(
            token_refs, table_ref, b, kv, begin, *visible, _TILE, interpreted=interpreted
        )

    def coefficients_of(kv, at, size):
        """One a column of the product."""
        layout = plgpu.Layout.WGMMA.reduce(0)
        return [
            plgpu.load(ref.at[b, kv, pl.ds(at, size)], layout=layout, optimized=False)
            for ref in coefficient_refs
        ]

    def numbers_of(step):
        begin, _, kv = part_of(step)
        return (
            token_numbers(begin, kv),
            coefficients_of(kv, 0, heads) if heads <= _HEADS else [],
        )

    for stage in range(stages):
        pl.when(stage < steps)(functools.partial(fetch_first, stage))
    for head in range(together):
        plgpu.copy_gmem_to_smem(parts_ref.at[b, first_head + head], queries_ref.at[head], loaded)
    plgpu.barrier_wait(loaded)

    def products_of(tile_ref, part_ref):
        """Products of the keys with the parts of the queries, int32 or float32 [tile, parts * heads]."""
        if whole_numbers:

            def multiply(acc_ref):
                plgpu.wgmma(acc_ref, tile_ref, part_ref.T)
                return acc_ref[...]

            return pl.run_scoped(multiply, plgpu.ACC((_TILE, columns), jnp.int32))

        h, dtype = part_ref.shape[1], part_ref.dtype
        if interpreted:  # which multiplies tiles in shared memory only
            keys = tile_ref[...].astype(dtype).astype(jnp.float32)
            parts = part_ref[...].astype(jnp.float32)
            products = lax.dot_general(
                keys, parts, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
            )
            plgpu.commit_smem()  # as below
            return products

        def multiply_registers(acc_ref):
            wide = h if h % _SWIZZLES[-1] else _REGISTER_COLUMNS  # rows as they are have no parts
            for begin in range(0, h, wide):
                across = pl.ds(begin, min(wide, h - begin))
                keys = plgpu.load(
                    tile_ref.at[:, across], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False
                )
                keys = plgpu.layout_cast(keys.astype(dtype), plgpu.Layout.WGMMA)
                plgpu.wgmma(acc_ref, keys, part_ref.at[:, across].T)
                plgpu.wgmma_wait(0)  # the next columns may take the registers
            return acc_ref[...]

        products = pl.run_scoped(multiply_registers, plgpu.ACC((_TILE, columns), jnp.float32))
        plgpu.commit_smem()  # the reads above come before the copy that overwrites the slot
        return products

    def score(step, numbers):
        slot = lax.rem(step, stages)
        begin, head, kv = part_of(step)
        following = numbers_of(jnp.minimum(step + 1, steps - 1))  # on their way meanwhile
        pages = pages_of(step + stages)  # ready when the next copies are
        plgpu.barrier_wait(filled.at[slot])
        products = products_of(tiles_ref.at[slot], queries_ref.at[head])
        pl.when(step + stages < steps)(functools.partial(fetch, step + stages, pages))
        for at in range(0, heads, _HEADS):
            size = min(_HEADS, heads - at)
            coefficients = numbers[1] or coefficients_of(kv, at, size)
            shape, stop = (_TILE, size), min(at + size, group)
            sums = lax.slice(products, (0, at), (_TILE, at + size))
            if columns > heads:
                lower = lax.slice(products, (0, heads + at), (_TILE, heads + at + size))
                sums = sums * 2**_PART_BITS + lower if whole_numbers else sums + lower
            rows = [lax.broadcast_in_dim(x, shape, (0,)) for x in numbers[0]]
            across = [lax.broadcast_in_dim(x, shape, (1,)) for x in coefficients]
            scores = sums.astype(jnp.float32) * (rows[0] * across[0])
            if bounds:
                width = across[1] * rows[1] + (across[2] * rows[0] + across[3])
                # Of a key that is not finite, the scale is NaN and the error inf.
                scores = jnp.where(width < _LARGEST_WIDTH, scores + width, jnp.inf)
            gpu_lanes.store_columns(
                scores,
                scores_ref.at[b, kv, pl.ds(at, stop - at)],
                begin,
                stop - at,
                interpreted=interpreted,
            )
        return following

    pl.when(steps > 0)(lambda: lax.fori_loop(0, steps, score, numbers_of(0)) and None)


def _parts(in_units, query_dtype, copy_dtype):
    """Splits queries, in units, in numbers that tensor cores multiply by those of a copy; returns the parts, and their sum.

    Parts are int8 [..., H] twice, or one or two of half precision (see `_operand`); the sum is float32 [..., H].
    """
    operand = _operand(copy_dtype, in_units.shape[-1])
    if operand != jnp.int8:
        kept, parts, bits = jnp.zeros_like(in_units), [], jnp.finfo(operand)
        # float16 holds all of bfloat16 that matters beside the largest element; else two parts make at least 16 bits.
        for _ in range(1 if query_dtype == jnp.bfloat16 or query_dtype == operand else 2):
            # Not by a conversion there and back, which XLA may leave out.
            part = lax.reduce_precision(in_units - kept, bits.nexp, bits.nmant)
            parts.append(part.astype(operand))
            kept += part
        return parts, kept
    most = 2.0**_QUERY_BITS - 1
    whole = jnp.clip(jnp.round(in_units), -most, most)
    upper = jnp.clip(jnp.round(whole * 2.0**-_PART_BITS), -127, 127)
    lower = whole - upper * 2**_PART_BITS
    return [upper.astype(jnp.int8), lower.astype(jnp.int8)], whole


def _operand(copy_dtype, head_size: int):
    """Returns the dtype in which tensor cores multiply: int8, or the one of half precision that holds each of a copy's numbers."""
    if copy_dtype == jnp.float8_e4m3fn:
        return jnp.dtype(jnp.float16)
    # Integer products take 64 elements at a time, as their tiles are laid out.
    return jnp.dtype(jnp.bfloat16 if head_size % 64 else jnp.int8)


def _coefficients(query, scale: float, copy_dtype, bounds: bool):
    """Splits queries in parts; returns those, each [..., H], and what a kernel needs to make scores, or bounds, of the products.

    With k a key, c its copy (scale * values, of at most M each) and |k - c| <= error; q a query, d what its parts lose of it;
    every length is in the L2 norm, of H elements:

      q.k = (q - d).c + q.(k - c) + d.c,   so   |q.k - (q - d).c| <= |q| error + |d| |c|,   |c| <= M sqrt(H) scale

    Rounding adds, of scores that are computed in float32:

      - the true score's. Tensor cores add 16 products and a sum at a time, each cut off at 2^-23 of the largest, and cut off the
        result: at most 18 * 2^-23 |q| |k| a time, H / 16 times: H * 2^-22.8 |q| |k|. float32 sums in any order do better.
      - as much of |q - d| |c| where the copy's products are of half precision: eight bits times at most eleven are exact in
        float32, and so it is again the sums that round, each part's on its own. Sums of integers do not.
      - the scaling of both, the sum of two parts, and that of score and width: below 2^-20 |q| |k|.

    All are within s = (H + 16) 2^-21 times |q| |c|, or |q| |k| with |k| <= |c| + error: H 2^-21 is more than twice H 2^-22.8.
    Numbers that underflow, in the products or in what the copy was made of, are below 2^-100 (|q| + 1) together. So the width
    is, times |scale|,

      w = (1 + s) |q| error + (|d| + s |q|) M sqrt(H) scale + 2^-100 (|q| + 1)
    """
    h = query.shape[-1]
    exact = query.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=-1)
    finite = jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(finite, largest, 0.0))
    safe = finite & (jnp.abs(exponent) <= _SAFE_EXPONENT)
    exponent = jnp.clip(exponent, -100, 120)
    unit = jnp.ldexp(jnp.float32(1.0), exponent - _QUERY_BITS)
    # Powers of two: nothing is lost by working in units.
    in_units = exact * jnp.ldexp(jnp.float32(1.0), _QUERY_BITS - exponent)[..., None]
    in_units = jnp.where(finite[..., None], in_units, 0.0)
    parts, kept = _parts(in_units, query.dtype, copy_dtype)
    per_product = jnp.where(finite, scale * unit, jnp.nan)
    if not bounds:
        return parts, [per_product]
    length = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1)) * unit * (1 + 2.0**-12)
    size, lost = length(in_units), length(in_units - kept)
    rounding = (h + 16) * 2.0**-21
    of_error = abs(scale) * (1 + rounding) * size
    most = quantization.largest(copy_dtype)
    of_scale = abs(scale) * most * h**0.5 * (lost + rounding * size)
    least = jnp.where(safe, abs(scale) * 2.0**-100 * (size + 1), jnp.inf)
    return parts, [per_product, of_error, of_scale, least]


def _score_copy(query, copy: QuantizedKeys, start, end, scale, wanted, table=None, *, bounds: bool):
    """Returns scores by the copy, or upper bounds of the true ones, float32 [B, N, >= S], where a key is visible.

    With a table, the copy is in pages.
    """
    (b, n, h), (_, num_keys, k, _) = query.shape, copy.values.shape
    page = None
    if table is not None:
        page = num_keys
        num_keys = table.shape[1] * page
    group, limit = n // k, num_keys
    options = interpret_options()
    if num_keys < _TILE:
        if table is None:
            pad = lambda x: jnp.pad(x, ((0, 0), (0, _TILE - num_keys)) + ((0, 0),) * (x.ndim - 2))
            copy = jax.tree.map(pad, copy)
        num_keys = _TILE
    padded = pl.cdiv(num_keys, _LANES) * _LANES
    heads = pl.cdiv(group, 8) * 8
    dtype = copy.values.dtype
    parts, coefficients = _coefficients(query.reshape(b, k, group, h), scale, dtype, bounds)
    room = ((0, 0), (0, 0), (0, heads - group))
    queries = jnp.concatenate([jnp.pad(part, (*room, (0, 0))) for part in parts], axis=2)
    coefficients = [jnp.pad(x, room) for x in coefficients]
    # Heads of the same tokens: their scales and errors are neighbours, and so are their rows.
    most = max(1, _QUERY_BYTES // (queries.shape[2] * h * queries.dtype.itemsize))
    together = next(n for n in range(min(_TOGETHER, most, k), 0, -1) if k % n == 0)
    blocks = b * k // together
    wanted = wanted or max(pl.cdiv(_BLOCKS, blocks), num_keys * together // _SPLIT_KEYS)
    splits = block_sizes_.even_splits(num_keys // _TILE, wanted)
    stages = max(2, min(_STAGES, _STAGE_BYTES // (_TILE * h)))
    name = f"topk_decode_{'bounds' if bounds else 'copy'}_h{h}_g{group}"
    name += "" if dtype == jnp.int8 else "_e4m3"
    return plgpu.kernel(
        functools.partial(
            _score_copy_kernel,
            group=group,
            bounds=bounds,
            num_keys=num_keys,
            limit=limit,
            splits=splits,
            interpreted=options is not None,
        ),
        out_type=jax.ShapeDtypeStruct((b, k, group, padded), jnp.float32),
        scratch_types=[
            plgpu.SMEM(
                (together, *queries.shape[2:]), queries.dtype, transforms=_swizzled(queries)
            ),
            plgpu.SMEM((stages, _TILE, h), dtype, transforms=_swizzled(copy.values)),
            plgpu.Barrier(num_arrivals=together),
            plgpu.Barrier(num_arrivals=copies_of(_TILE, page), num_barriers=stages),
        ],
        grid=(b, k // together, splits),
        grid_names=("batch", "kv_heads", "split"),
        kernel_name=name + ("" if page is None else f"_p{page}"),
        interpret=compat.gpu_interpret(options),
    )(
        queries,
        copy.values,
        copy.scale,
        *([copy.error] if bounds else []),
        *coefficients,
        table,
        start,
        end,
    ).reshape(b, n, padded)


def _swizzled(array) -> tuple:
    """The transforms of tiles of rows of an array in shared memory: swizzled by as many bytes as divide a row, at most 128."""
    row = array.shape[-1] * array.dtype.itemsize
    swizzle = next((n for n in _SWIZZLES if row % n == 0), None)
    if (
        swizzle is None
    ):  # an odd number of 16 bytes: neighbouring rows lie in different banks as they are
        return ()
    tiling = plgpu.TilingTransform((8, swizzle // array.dtype.itemsize))
    return tiling, plgpu.SwizzleTransform(swizzle)


def _rescore_kernel(
    # inputs, global memory
    query_ref,  # [B, N, heads, H], a head's query and zeros
    key_ref,  # [B, S, K, H]; a batch axis of 1 is one table for all
    places_ref,  # [B, N, >= room] i32, rows of listed keys
    count_ref,  # [B, N] i32
    # outputs, global memory
    scores_ref,  # [B, N, 1, >= room] f32; the tail is not written
    # scratch, shared memory
    queries_ref,  # [heads, H], swizzled if for the tensor cores
    part_places_ref,  # [part] i32
    tile_ref,  # [part, H], likewise
    loaded,  # barrier
    *,
    group: int,
    scale: float,
    splits: int,
    transforms: tuple,
    interpreted: bool,
):
    b, head, split = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("split")
    count = count_ref[b, head]
    one_each = plgpu.Layout.WG_STRIDED((_TILE,), vec_size=1)
    lane = plgpu.broadcasted_iota(jnp.int32, (_TILE,), 0, layout=one_each)
    table = key_ref.at[0 if key_ref.shape[0] == 1 else b, :, lax.div(head, group)]
    if transforms:
        plgpu.copy_gmem_to_smem(query_ref.at[b, head], queries_ref, loaded)
        plgpu.barrier_wait(loaded)
    else:
        query = plgpu.load(
            query_ref.at[b, head, 0], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
        ).astype(jnp.float32)
    # This block takes every `splits`-th part of the list.
    parts = lax.div(count + (_TILE - 1), _TILE)
    steps = lax.div(jnp.maximum(parts - split, 0) + (splits - 1), splits)

    @pl.loop(0, steps)
    def _(index):
        begin = (split + index * splits) * _TILE
        place = plgpu.load(
            places_ref.at[b, head, pl.ds(begin, _TILE)], layout=one_each, optimized=False
        )
        part_places_ref[...] = jnp.where(begin + lane < count, place, 0)
        gpu_lanes.gather_rows(
            table, part_places_ref, tile_ref, transforms=transforms, interpreted=interpreted
        )
        plgpu.commit_smem()
        if not transforms:
            # As where no copy is: see `mosaic_gpu._score_rows_kernel`.
            for half in range(0, _TILE, _ROW_TILE):
                rows = plgpu.load(
                    tile_ref.at[pl.ds(half, _ROW_TILE)], layout=plgpu.Layout.WGMMA, optimized=False
                ).astype(jnp.float32)
                products = rows * lax.broadcast_in_dim(query, rows.shape, (1,))
                scores_ref[b, head, 0, pl.ds(begin + half, _ROW_TILE)] = (
                    jnp.sum(products, axis=1) * scale
                )
            plgpu.commit_smem()  # the reads above come before the next rows
            return

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, tile_ref, queries_ref.T)
            return acc_ref[...]

        products = pl.run_scoped(multiply, plgpu.ACC((_TILE, queries_ref.shape[0]), jnp.float32))
        gpu_lanes.store_columns(
            products * scale, scores_ref.at[b, head], begin, 1, interpreted=interpreted
        )


def _rescore(query, key, rows, count, scale):
    """Returns scale * q.k of listed rows of keys, float32 [B, N, room], in the arithmetic of the call without a copy.

    Rows are int32 [B, N, room]; keys with a batch axis of 1 are one table for all.
    """
    (b, n, h), room = query.shape, rows.shape[2]
    group = n // key.shape[2]
    options = interpret_options()
    heads = pl.cdiv(group, 8) * 8
    queries = jnp.pad(query[:, :, None], ((0, 0), (0, 0), (0, heads - 1), (0, 0)))
    splits = block_sizes_.even_splits(room // _TILE, pl.cdiv(_RESCORE_BLOCKS, b * n))
    transforms = gpu_lanes.swizzled(key.dtype) if h % 64 == 0 else ()
    return plgpu.kernel(
        functools.partial(
            _rescore_kernel,
            group=group,
            scale=scale,
            splits=splits,
            transforms=transforms,
            interpreted=options is not None,
        ),
        out_type=jax.ShapeDtypeStruct((b, n, 1, room), jnp.float32),
        scratch_types=[
            plgpu.SMEM((heads, h), key.dtype, transforms=transforms),
            plgpu.SMEM((_TILE,), jnp.int32),
            plgpu.SMEM((_TILE, h), key.dtype, transforms=transforms),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(b, n, splits),
        grid_names=("batch", "head", "split"),
        kernel_name=f"topk_decode_rescore_h{h}_g{group}",
        interpret=compat.gpu_interpret(options),
    )(queries, key, rows, count)[:, :, 0]


def _check(query, copy: QuantizedKeys, page_table):
    if query.shape[2] % 16:
        raise NotImplementedError(
            f"{_OP} got a quantized_key of head size {query.shape[2]}, wanted a multiple of 16"
        )
    num_keys = copy.values.shape[1]
    if page_table is None and num_keys % 8 and num_keys >= _TILE:
        raise NotImplementedError(
            f"{_OP} got a quantized_key of {num_keys} keys, wanted a multiple of 8 from {_TILE} on"
        )


def topk_decode_attention(
    query, key, value, *, topk, scope, page_table, quantized_key, certified, **rest
):
    """Arguments as the public function, checked; returns (out, lse, TopKSelection)."""
    plain = functools.partial(
        mosaic_gpu.topk_decode_attention,
        query,
        key,
        value,
        topk=topk,
        scope=scope,
        page_table=page_table,
        quantized_key=None,
        certified=False,
        **rest,
    )
    if quantized_key is None:
        return plain()
    _check(query, quantized_key, page_table)
    num_keys, table = key.shape[1], None
    if page_table is not None:
        num_pages, page, *_ = key.shape
        num_keys = page_table.shape[1] * page
        table = paging.safe_table(page_table, rest["lengths"], page=page, num_pages=num_pages)
        key, value = (x.reshape(1, num_pages * page, *x.shape[2:]) for x in (key, value))
    mosaic_gpu._check(query, key, value, rest["block_sizes"])
    # From here on, keys and values in pages are one table of rows.
    arguments = rest | {"topk": topk, "num_keys": num_keys, "table": table}
    if not certified:
        return _by_copy(query, key, value, quantized_key, scope=scope, **arguments)
    room = _room(topk, quantized_key.values.dtype)
    if not _worthwhile(key.dtype, num_keys, room, scope, rest["scale"]):
        return plain()
    return _certified(query, key, value, quantized_key, plain, room=room, **arguments)


def _by_copy(
    query,
    key,
    value,
    copy,
    *,
    topk,
    lengths,
    scope,
    pooling,
    window,
    scale,
    with_indices,
    block_sizes,
    num_keys: int,
    table,
):
    """Attends to the keys that the copy ranks highest."""
    (b, n, _), k = query.shape, key.shape[2]
    start, end = mosaic_gpu._range_of(b, num_keys, lengths, window)
    wanted = None if block_sizes is None else block_sizes.num_splits
    scores = _score_copy(query, copy, start, end, scale, wanted, table, bounds=False)
    padded = scores.shape[2]
    num_sets = pooling_.num_sets(scope, n, k)
    visible = masks.visible_to_decode(padded, end, window, b)[:, None, :]
    ranked = pooling_.pool(scores, visible, num_sets, pooling)
    budget = None
    if not isinstance(topk, int):
        budget = selection.rows_of(topk, (b, n))[:, :: n // num_sets].reshape(-1)
    # Without a static budget the list has room for every key.
    size = min(topk, num_keys) if isinstance(topk, int) else num_keys
    count, threshold, cut, places = topk_select.select(
        ranked.reshape(b * num_sets, padded),
        start,
        end,
        budget,
        topk=size,
        limit=num_keys,
        listed=("indices",),
    )
    count, threshold, cut = (x.reshape(b, num_sets) for x in (count, threshold, cut))
    places = places.reshape(b, num_sets, size)
    rows = _rows_of(places, table, copy)
    out, lse = gather_attention.gather_attention(
        query[:, None], key, value, rows[:, None], scale=scale
    )
    selected = TopKSelection(
        _widened(places, topk) if with_indices else None, count, threshold, cut
    )
    return out[:, 0], lse[:, :, 0], selection.repeat_for_heads(selected, n // num_sets)


def _rows_of(places, table, copy: QuantizedKeys):
    """Returns in which rows of the keys and values listed places are; -1 stays -1."""
    return places if table is None else paging.pool_rows(places, table, copy.values.shape[1])


def _widened(places, topk: int):
    """Fills lists up to `topk` places."""
    room = topk - places.shape[2]
    return jnp.pad(places, ((0, 0), (0, 0), (0, room)), constant_values=-1)


def _room(topk, copy_dtype) -> int | None:
    """Returns how many keys are listed and scored again, whole tiles of them; None where the budget is not static."""
    if not isinstance(topk, int):
        return None
    return pl.cdiv(int((1 + _SPARE[copy_dtype.name]) * topk), _TILE) * _TILE


def _worthwhile(dtype, num_keys: int, room: int | None, scope: str, scale: float) -> bool:
    """Whether `certified` may gain from the copy; else the call without it gives the same, sooner.

    It may not where the listed keys are all there are or their number is not static, in float32, in shared scopes, which rank
    by pooled scores, and at extreme scales.
    """
    return (
        room is not None
        and room < num_keys
        and scope == "head"
        and dtype.itemsize == 2
        and 1 / _SAFE_SCALE <= abs(scale) <= _SAFE_SCALE
    )


def _certified(
    query,
    key,
    value,
    copy,
    plain,
    *,
    topk,
    room,
    lengths,
    pooling,
    window,
    scale,
    with_indices,
    block_sizes,
    num_keys: int,
    table,
):
    """Returns what `plain()` does, bit for bit."""
    del pooling  # of shared scopes
    b, n, _ = query.shape
    start, end = mosaic_gpu._range_of(b, num_keys, lengths, window)
    wanted = None if block_sizes is None else block_sizes.num_splits
    bounds = _score_copy(query, copy, start, end, scale, wanted, table, bounds=True)
    listed, least_bound, _, places = topk_select.select(
        bounds.reshape(b * n, -1),
        start,
        end,
        topk=room,
        limit=num_keys,
        listed=("indices",),
    )
    places = places.reshape(b, n, room)
    rows = _rows_of(places, table, copy)
    scores = _rescore(query, key, rows, listed.reshape(b, n), scale)
    count, threshold, cut, chosen, chosen_scores = topk_select.select(
        scores.reshape(b * n, room),
        end=listed,
        topk=topk,
        listed=("indices", "scores"),
    )
    visible = jnp.full((b,), num_keys) if end is None else jnp.clip(end, 0, num_keys)
    visible = visible if start is None else visible - start
    all_listed = jnp.repeat(visible <= room, n)
    decided = all_listed | ((count == topk) & (threshold > least_bound))
    place_of = lambda slots: jnp.where(
        slots < 0,
        -1,
        jnp.take_along_axis(places, jnp.maximum(slots, 0), axis=2, mode="promise_in_bounds"),
    )
    chosen_places = place_of(chosen.reshape(b, n, topk))
    counts = count.reshape(b, n)
    # In the parts of the call without a copy, as they decide in which order values are added.
    sizes = mosaic_gpu._sizes(query, num_keys, value.shape[2], topk, block_sizes)
    out, lse = mosaic_gpu._attend(
        chosen_scores.reshape(b, n, topk),
        _rows_of(chosen_places, table, copy),
        counts,
        value,
        sizes.list_splits or sizes.num_splits,
    )
    selected = TopKSelection(
        chosen_places if with_indices else None,
        counts,
        threshold.reshape(b, n),
        place_of(cut.reshape(b, n, 1))[..., 0],
    )
    certified = out, lse, selected
    return lax.cond(jnp.all(decided), lambda: certified, plain)
