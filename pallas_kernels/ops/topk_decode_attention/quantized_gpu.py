"""Exact or approximate Top-k decoding by an eight-bit copy of the keys: half of the bytes are read (Mosaic GPU, Hopper).

1. Scores by the copy (`_score_copy_kernel`): integer tensor cores multiply tiles of int8 keys by the group's queries, each query
   as two int8 numbers, 2^7 p + r, in units of a power of two. The products are exact in int32, and so is 2^7 <p, k> + <r, k>.
2. Without `certified`, these scores rank the keys, and `gather_attention` attends to the listed ones, with their true scores.
3. With it, the kernel writes an upper bound of each true score instead: u = score by the copy + w (see `_coefficients`).
   `topk_select` lists the `_room` keys of largest u; `_rescore_kernel` scores them from the keys themselves, in the very arithmetic
   of the call without a copy; and the `topk` best of those are selected. Every key that is not listed has a score of at most the
   smallest u listed. Where the last selected score is above that, no other key can belong to the set, and as the lists are in
   order of place, ties fall as they would have. Each step after is that of the call without a copy: so are the bits.
4. Where that fails for any head (rows full of ties, keys that are not finite, bounds too wide), the call is made again without
   the copy. It is never wrong, only slower.

Of shapes and settings that cannot gain from the copy (see `_worthwhile`), `certified` makes the call without it at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, gpu_lanes, masks, selection
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.quantization import QuantizedKeys
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.gather_attention import mosaic_gpu as gather_attention
from pallas_kernels.ops.topk_decode_attention import mosaic_gpu
from pallas_kernels.ops.topk_select import mosaic_gpu as topk_select

_OP = "topk_decode_attention: mosaic_gpu"
_TILE = 128  # keys of a step
_TOGETHER = 8  # key/value heads that a block scores: their scales are neighbours and fill a sector of memory
# Key tiles in flight: so many, or fewer if they would take more bytes.
_STAGES, _STAGE_BYTES = 4, 96 * 1024
_LANES = 128
_SPLIT_KEYS = 4096  # scored by one block
_BLOCKS = 528  # blocks wanted in flight: four on each of the 132 multiprocessors
_RESCORE_BLOCKS = 2112  # and of the rescoring kernel, which mostly waits for memory: sixteen
# Keys that are rescored beyond the budget, as a share of it, up to whole tiles. All heads of SmolLM2-135M, after two prompts of
# 2,040 tokens of plays, were settled by fewer: by 0.33, 0.40, 0.58 and 0.80 of budgets of 512, 256, 128 and 64.
_SPARE = 0.5
_PART_BITS = 7  # of the lower one of the two numbers that make an element of a query
_QUERY_BITS = 2 * _PART_BITS
_SAFE_EXPONENT = 60  # of a query's largest element, either sign; beyond, nothing is certified
_SAFE_SCALE = 2.0**40
_LARGEST_WIDTH = 2.0**80  # a bound this wide is none


def _score_copy_kernel(*refs, bounds: bool, num_keys: int, splits: int, interpreted: bool):
    # inputs, global memory:
    #   parts [B, K, 2 * heads, H] i8: the upper numbers of the group's queries and zeros, then the lower ones
    #   values [B, S, K, H] i8; scale [B, S, K] f32, and error likewise if `bounds`
    #   one vector [B, K, heads] f32 a coefficient: one, or four if `bounds`
    #   start, end [B] i32: the first visible key, one past the last
    # outputs, global memory:
    #   scores [B, K, group, >= S] f32; keys outside of the visible tiles are not written
    # scratch, shared memory:
    #   parts [together, 2 * heads, H] and tiles [stages, tile, H], swizzled; a barrier, and one a stage
    refs = list(refs)
    parts_ref, values_ref = refs.pop(0), refs.pop(0)
    token_refs = [refs.pop(0) for _ in range(2 if bounds else 1)]
    coefficient_refs = [refs.pop(0) for _ in range(4 if bounds else 1)]
    start_ref, end_ref, scores_ref, queries_ref, tiles_ref, loaded, filled = refs
    stages, together, heads = tiles_ref.shape[0], queries_ref.shape[0], queries_ref.shape[1] // 2
    b, split = lax.axis_index("batch"), lax.axis_index("split")
    first_head = lax.axis_index("kv_heads") * together
    first, last, offset_of = mosaic_gpu._visible_tiles(
        start_ref[b], end_ref[b], split, splits, num_keys, _TILE
    )
    # A step is a tile of one head; the heads of some tokens follow one another.
    steps = jnp.maximum(last - first, 0) * together
    shape = _TILE, heads

    def part_of(step):
        """The step's first token, its head among those of the block and among all."""
        head = lax.rem(step, together)
        return offset_of(first + lax.div(step, together)), head, first_head + head

    def fetch(step):
        slot = lax.rem(step, stages)
        begin, _, kv = part_of(step)
        rows = values_ref.at[b, pl.ds(begin, _TILE), kv]
        plgpu.copy_gmem_to_smem(rows, tiles_ref.at[slot], filled.at[slot])

    def numbers_of(step):
        """Scales, and errors, one a row of the product; then the coefficients, one a column."""
        begin, _, kv = part_of(step)
        load = functools.partial(plgpu.load, optimized=False)
        rows, columns = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
        return (
            [load(ref.at[b, pl.ds(begin, _TILE), kv], layout=rows) for ref in token_refs],
            [load(ref.at[b, kv], layout=columns) for ref in coefficient_refs],
        )

    for stage in range(stages):
        pl.when(stage < steps)(functools.partial(fetch, stage))
    for head in range(together):
        plgpu.copy_gmem_to_smem(parts_ref.at[b, first_head + head], queries_ref.at[head], loaded)
    plgpu.barrier_wait(loaded)

    def score(step, numbers):
        slot = lax.rem(step, stages)
        begin, head, kv = part_of(step)
        following = numbers_of(jnp.minimum(step + 1, steps - 1))  # on their way meanwhile
        plgpu.barrier_wait(filled.at[slot])

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, tiles_ref.at[slot], queries_ref.at[head].T)
            return acc_ref[...]

        products = pl.run_scoped(multiply, plgpu.ACC((_TILE, 2 * heads), jnp.int32))
        pl.when(step + stages < steps)(functools.partial(fetch, step + stages))
        upper = lax.slice(products, (0, 0), shape)
        lower = lax.slice(products, (0, heads), (_TILE, 2 * heads))
        rows = [lax.broadcast_in_dim(x, shape, (0,)) for x in numbers[0]]
        columns = [lax.broadcast_in_dim(x, shape, (1,)) for x in numbers[1]]
        scores = (upper * 2**_PART_BITS + lower).astype(jnp.float32) * (rows[0] * columns[0])
        if bounds:
            width = columns[1] * rows[1] + (columns[2] * rows[0] + columns[3])
            # Of a key that is not finite, the scale is NaN and the error inf.
            scores = jnp.where(width < _LARGEST_WIDTH, scores + width, jnp.inf)
        gpu_lanes.store_columns(
            scores, scores_ref.at[b, kv], begin, scores_ref.shape[2], interpreted=interpreted
        )
        return following

    pl.when(steps > 0)(lambda: lax.fori_loop(0, steps, score, numbers_of(0)) and None)


def _coefficients(query, scale: float, bounds: bool):
    """Splits queries in two; returns int8 [..., H] twice, and what a kernel needs to make scores, or bounds, of the products.

    With k a key, c its copy (scale * values) and |k - c| <= error; q a query, d what its two parts lose of it; every length is
    in the L2 norm, of H elements:

      q.k = (q - d).c + q.(k - c) + d.c,   so   |q.k - (q - d).c| <= |q| error + |d| |c|,   |c| <= 127 sqrt(H) scale

    Rounding adds, of scores that are computed in float32:

      - the true score's. Tensor cores add 16 products and a sum at a time, each cut off at 2^-23 of the largest, and cut off the
        result: at most 18 * 2^-23 |q| |k| a time, H / 16 times: H * 2^-22.8 |q| |k|. float32 sums in any order do better.
      - its scaling, the copy's score (integers, then three products) and the sum of that and the width: below 2^-20 |q| |k|.

    Both are within s = (H + 16) 2^-21 times |q| |k|, and |k| <= |c| + error. Numbers that underflow, in the products or in what
    the copy was made of, are below 2^-100 (|q| + 1) together. So the width is, times |scale|,

      w = (1 + s) |q| error + (|d| + s |q|) 127 sqrt(H) scale + 2^-100 (|q| + 1)
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
    most = 2.0**_QUERY_BITS - 1
    whole = jnp.clip(jnp.round(in_units), -most, most)
    upper = jnp.clip(jnp.round(whole * 2.0**-_PART_BITS), -127, 127)
    lower = whole - upper * 2**_PART_BITS
    parts = upper.astype(jnp.int8), lower.astype(jnp.int8)
    per_product = jnp.where(finite, scale * unit, jnp.nan)
    if not bounds:
        return parts, [per_product]
    length = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1)) * unit * (1 + 2.0**-12)
    size, lost = length(in_units), length(in_units - whole)
    rounding = (h + 16) * 2.0**-21
    of_error = abs(scale) * (1 + rounding) * size
    of_scale = abs(scale) * 127 * h**0.5 * (lost + rounding * size)
    least = jnp.where(safe, abs(scale) * 2.0**-100 * (size + 1), jnp.inf)
    return parts, [per_product, of_error, of_scale, least]


def _score_copy(query, copy: QuantizedKeys, start, end, scale, wanted, *, bounds: bool):
    """Returns scores by the copy, or upper bounds of the true ones, float32 [B, N, >= S], where a key is visible."""
    (b, n, h), (_, num_keys, k, _) = query.shape, copy.values.shape
    group = n // k
    options = interpret_options()
    if num_keys < _TILE:
        pad = lambda x: jnp.pad(x, ((0, 0), (0, _TILE - num_keys)) + ((0, 0),) * (x.ndim - 2))
        copy = jax.tree.map(pad, copy)
        num_keys = _TILE
    padded = pl.cdiv(num_keys, _LANES) * _LANES
    heads = pl.cdiv(group, 8) * 8
    parts, coefficients = _coefficients(query.reshape(b, k, group, h), scale, bounds)
    room = ((0, 0), (0, 0), (0, heads - group))
    queries = jnp.concatenate([jnp.pad(part, (*room, (0, 0))) for part in parts], axis=2)
    coefficients = [jnp.pad(x, room) for x in coefficients]
    # Heads of the same tokens: their scales and errors are neighbours, and so are their rows.
    together = next(n for n in range(min(_TOGETHER, k), 0, -1) if k % n == 0)
    blocks = b * k // together
    wanted = wanted or max(pl.cdiv(_BLOCKS, blocks), num_keys * together // _SPLIT_KEYS)
    splits = block_sizes_.even_splits(num_keys // _TILE, wanted)
    stages = max(2, min(_STAGES, _STAGE_BYTES // (_TILE * h)))
    swizzle = 128 if h % 128 == 0 else 64
    transforms = plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle)
    return plgpu.kernel(
        functools.partial(
            _score_copy_kernel,
            bounds=bounds,
            num_keys=num_keys,
            splits=splits,
            interpreted=options is not None,
        ),
        out_type=jax.ShapeDtypeStruct((b, k, group, padded), jnp.float32),
        scratch_types=[
            plgpu.SMEM((together, 2 * heads, h), jnp.int8, transforms=transforms),
            plgpu.SMEM((stages, _TILE, h), jnp.int8, transforms=transforms),
            plgpu.Barrier(num_arrivals=together),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        ],
        grid=(b, k // together, splits),
        grid_names=("batch", "kv_heads", "split"),
        kernel_name=f"topk_decode_{'bounds' if bounds else 'copy'}_h{h}_g{group}",
        interpret=compat.gpu_interpret(options),
    )(
        queries,
        copy.values,
        copy.scale,
        *([copy.error] if bounds else []),
        *coefficients,
        start,
        end,
    ).reshape(b, n, padded)


def _rescore_kernel(
    # inputs, global memory
    query_ref,  # [B, N, heads, H], a head's query and zeros
    key_ref,  # [B, S, K, H]
    places_ref,  # [B, N, >= room] i32, listed keys
    count_ref,  # [B, N] i32
    # outputs, global memory
    scores_ref,  # [B, N, 1, >= room] f32; the tail is not written
    # scratch, shared memory
    queries_ref,  # [heads, H], swizzled
    part_places_ref,  # [part] i32
    tile_ref,  # [part, H], swizzled
    loaded,  # barrier
    *,
    group: int,
    scale: float,
    splits: int,
    interpreted: bool,
):
    b, head, split = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("split")
    count = count_ref[b, head]
    one_each = plgpu.Layout.WG_STRIDED((_TILE,), vec_size=1)
    lane = plgpu.broadcasted_iota(jnp.int32, (_TILE,), 0, layout=one_each)
    table = key_ref.at[b, :, lax.div(head, group)]
    plgpu.copy_gmem_to_smem(query_ref.at[b, head], queries_ref, loaded)
    plgpu.barrier_wait(loaded)
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
        gpu_lanes.gather_rows(table, part_places_ref, tile_ref, interpreted=interpreted)
        plgpu.commit_smem()

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, tile_ref, queries_ref.T)
            return acc_ref[...]

        products = pl.run_scoped(multiply, plgpu.ACC((_TILE, queries_ref.shape[0]), jnp.float32))
        gpu_lanes.store_columns(
            products * scale, scores_ref.at[b, head], begin, 1, interpreted=interpreted
        )


def _rescore(query, key, places, count, scale):
    """Returns scale * q.k of listed keys, float32 [B, N, room], in the arithmetic of the score kernel; places [B, N, room]."""
    (b, n, h), room = query.shape, places.shape[2]
    group = n // key.shape[2]
    options = interpret_options()
    heads = pl.cdiv(group, 8) * 8
    queries = jnp.pad(query[:, :, None], ((0, 0), (0, 0), (0, heads - 1), (0, 0)))
    splits = block_sizes_.even_splits(room // _TILE, pl.cdiv(_RESCORE_BLOCKS, b * n))
    transforms = gpu_lanes.swizzled(key.dtype)
    return plgpu.kernel(
        functools.partial(
            _rescore_kernel,
            group=group,
            scale=scale,
            splits=splits,
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
    )(queries, key, places, count)[:, :, 0]


def _check(query, copy: QuantizedKeys, page_table):
    if page_table is not None:
        raise NotImplementedError(
            f"{_OP} got a page_table beside a quantized_key, wanted one of them"
        )
    if copy.values.dtype != jnp.int8:
        raise NotImplementedError(
            f"{_OP} got quantized_key.values of dtype {copy.values.dtype.name}, wanted int8"
        )
    if query.shape[2] % 64:
        raise NotImplementedError(
            f"{_OP} got a quantized_key of head size {query.shape[2]}, wanted a multiple of 64"
        )
    num_keys = copy.values.shape[1]
    if num_keys % 8 and num_keys >= _TILE:
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
    mosaic_gpu._check(query, key, value, rest["block_sizes"])
    if not certified:
        return _by_copy(query, key, value, quantized_key, topk=topk, scope=scope, **rest)
    room = _room(topk)
    if not _worthwhile(key, room, scope, rest["scale"]):
        return plain()
    return _certified(query, key, value, quantized_key, plain, topk=topk, room=room, **rest)


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
):
    """Attends to the keys that the copy ranks highest."""
    (b, n, _), (_, num_keys, k, _) = query.shape, key.shape
    start, end = _visible_range(b, num_keys, lengths, window)
    wanted = None if block_sizes is None else block_sizes.num_splits
    scores = _score_copy(query, copy, start, end, scale, wanted, bounds=False)
    padded = scores.shape[2]
    num_sets = pooling_.num_sets(scope, n, k)
    visible = masks.visible_to_decode(padded, end, window, b)[:, None, :]
    ranked = pooling_.pool(scores, visible, num_sets, pooling)
    budget = selection.rows_of(topk, (b, n))[:, :: n // num_sets]
    # Without a static budget the list has room for every key.
    size = min(topk, num_keys) if isinstance(topk, int) else num_keys
    count, threshold, cut, places = topk_select.select(
        ranked.reshape(b * num_sets, padded),
        jnp.repeat(start, num_sets),
        jnp.repeat(end, num_sets),
        budget.reshape(-1),
        topk=size,
        listed=("indices",),
    )
    count, threshold, cut = (x.reshape(b, num_sets) for x in (count, threshold, cut))
    places = places.reshape(b, num_sets, size)
    out, lse = gather_attention.gather_attention(
        query[:, None], key, value, places[:, None], scale=scale
    )
    selected = TopKSelection(
        _widened(places, topk) if with_indices else None, count, threshold, cut
    )
    return out[:, 0], lse[:, :, 0], selection.repeat_for_heads(selected, n // num_sets)


def _visible_range(b: int, num_keys: int, lengths, window):
    """Returns the first visible key of each sequence and one past the last, int32 [B]."""
    end = jnp.full((b,), num_keys, jnp.int32) if lengths is None else jnp.clip(lengths, 0, num_keys)
    return jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0), end


def _widened(places, topk: int):
    """Fills lists up to `topk` places."""
    room = topk - places.shape[2]
    return jnp.pad(places, ((0, 0), (0, 0), (0, room)), constant_values=-1)


def _room(topk) -> int | None:
    """Returns how many keys are listed and scored again, whole tiles of them; None where the budget is not static."""
    if not isinstance(topk, int):
        return None
    return pl.cdiv(int((1 + _SPARE) * topk), _TILE) * _TILE


def _worthwhile(key, room: int | None, scope: str, scale: float) -> bool:
    """Whether `certified` may gain from the copy; else the call without it gives the same, sooner.

    It may not where the listed keys are all there are or their number is not static, where true scores do not come from the
    tensor cores (float32), in shared scopes, which rank by pooled scores, and at extreme scales.
    """
    return (
        room is not None
        and room < key.shape[1]
        and scope == "head"
        and key.dtype.itemsize == 2
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
):
    """Returns what `plain()` does, bit for bit."""
    del pooling  # of shared scopes
    (b, n, _), num_keys = query.shape, key.shape[1]
    start, end = _visible_range(b, num_keys, lengths, window)
    wanted = None if block_sizes is None else block_sizes.num_splits
    bounds = _score_copy(query, copy, start, end, scale, wanted, bounds=True)
    listed, least_bound, _, places = topk_select.select(
        bounds.reshape(b * n, -1),
        jnp.repeat(start, n),
        jnp.repeat(end, n),
        jnp.full((b * n,), room, jnp.int32),
        topk=room,
        listed=("indices",),
    )
    places = places.reshape(b, n, room)
    scores = _rescore(query, key, places, listed.reshape(b, n), scale)
    count, threshold, cut, chosen, chosen_scores = topk_select.select(
        scores.reshape(b * n, room),
        jnp.zeros_like(listed),
        listed,
        jnp.full((b * n,), topk, jnp.int32),
        topk=topk,
        listed=("indices", "scores"),
    )
    all_listed = jnp.repeat(end - start, n) <= room
    decided = all_listed | ((count == topk) & (threshold > least_bound))
    place_of = lambda slots: jnp.where(
        slots < 0,
        -1,
        jnp.take_along_axis(places, jnp.maximum(slots, 0), axis=2, mode="promise_in_bounds"),
    )
    chosen_places = place_of(chosen.reshape(b, n, topk))
    counts = count.reshape(b, n)
    out, lse = mosaic_gpu._attend(
        chosen_scores.reshape(b, n, topk), chosen_places, counts, value, wanted
    )
    selected = TopKSelection(
        chosen_places if with_indices else None,
        counts,
        threshold.reshape(b, n),
        place_of(cut.reshape(b, n, 1))[..., 0],
    )
    certified = out, lse, selected
    return lax.cond(jnp.all(decided), lambda: certified, plain)
