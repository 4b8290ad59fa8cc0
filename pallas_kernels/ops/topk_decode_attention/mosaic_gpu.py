"""Exact Top-k decoding: score all keys, find each row's threshold, attend to the keys above it (Mosaic GPU, Hopper).

1. `_score_kernel`: q.k of every visible key, in float32 multiply-adds whatever the input dtype, written as [B, N, S]. Key
   tiles come by TMA into a ring of up to `_STAGES` buffers; splits outside the visible keys read nothing.
2. `topk_select` turns each row of scores into (threshold, tie_cut). A shared scope pools the scores first, in XLA.
3. `_attend_kernel`: a split looks at its scores 128 keys at a time, and fetches the value rows of the selected keys only,
   each by a copy of its own; all rows of a tile are in flight together. A row that one head of the group selects and another
   does not reaches only the first one's sum.
4. The splits' (max, sum, accumulator) are merged by log-sum-exp, in XLA.

Every later step reads the scores that step 1 wrote, so the set and the softmax cannot disagree. Additions are in an order that
depends on shapes and lengths alone: two runs give the same bits.

Grid of both kernels (batch, key/value head, split), one warpgroup a block. Head sizes are multiples of 8 up to 256. A cache
shorter than one tile is padded, a longer one is read in place: its last tile starts early and scores some keys twice.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import compat, masks, online_softmax, selection
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from pallas_kernels.ops.topk_select import mosaic_gpu as topk_select

_OP = "topk_decode_attention: mosaic_gpu"
_TILE = 64  # keys a step of the score kernel: the rows of one register tile
_STAGES, _STAGE_BYTES = (
    4,
    96 * 1024,
)  # key tiles in flight: so many, or fewer if they would take more bytes
_LANES = 128  # lanes of a warpgroup: keys a step of the attend kernel, one a lane
_WORD = 32  # selected keys are listed as bits of int32 words
_BLOCKS = 528  # blocks wanted in flight: four on each of the 132 multiprocessors
_MAX_HEAD_SIZE = 256
_QUERY_REGISTERS = 96  # registers a lane may spend on keeping the group's queries


def _score_kernel(
    # inputs, global memory
    query_ref,  # [B, N, H]
    key_ref,  # [B, S, K, H]
    start_ref,  # [B] i32, first visible key
    end_ref,  # [B] i32, one past the last
    # outputs, global memory
    scores_ref,  # [B, N, >= S] f32; keys outside of the visible tiles are not written
    # scratch, shared memory
    tiles_ref,  # [stages, tile, H]
    filled,  # barriers, one a stage
    *,
    group: int,
    scale: float,
    splits: int,
):
    stages = tiles_ref.shape[0]
    _, num_keys, _, h = key_ref.shape
    b, kv, split = lax.axis_index("batch"), lax.axis_index("kv_head"), lax.axis_index("split")
    # Whole tiles are shared out; what is left over goes to the block of the last whole tile, as it overlaps with that.
    whole, tiles = num_keys // _TILE, pl.cdiv(num_keys, _TILE)
    share = pl.cdiv(whole, splits)
    stop = jnp.where(split == splits - 1, tiles, (split + 1) * share)
    first = jnp.maximum(split * share, lax.div(start_ref[b], _TILE))
    last = jnp.minimum(stop, lax.div(end_ref[b] + (_TILE - 1), _TILE))

    def offset_of(tile):
        return jnp.minimum(tile * _TILE, num_keys - _TILE)

    def fetch(tile):
        slot = lax.rem(tile - first, stages)
        plgpu.copy_gmem_to_smem(
            key_ref.at[b, pl.ds(offset_of(tile), _TILE), kv], tiles_ref.at[slot], filled.at[slot]
        )

    def read_query(g):
        query = plgpu.load(
            query_ref.at[b, kv * group + g], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
        )
        return query.astype(jnp.float32)

    keep_queries = group * h // 4 <= _QUERY_REGISTERS  # four lanes share a query
    queries = [read_query(g) for g in range(group)] if keep_queries else []

    for stage in range(stages):
        pl.when(first + stage < last)(functools.partial(fetch, first + stage))

    @pl.loop(first, last)
    def _(tile):
        slot = lax.rem(tile - first, stages)
        plgpu.barrier_wait(filled.at[slot])
        keys = plgpu.load(tiles_ref.at[slot], layout=plgpu.Layout.WGMMA, optimized=False).astype(
            jnp.float32
        )
        plgpu.commit_smem()  # the reads above come before the copy that overwrites the slot
        pl.when(tile + stages < last)(functools.partial(fetch, tile + stages))

        def score(g, query):
            products = keys * lax.broadcast_in_dim(query, keys.shape, (1,))
            scores_ref[b, kv * group + g, pl.ds(offset_of(tile), _TILE)] = (
                jnp.sum(products, axis=1) * scale
            )

        if keep_queries:
            for g, query in enumerate(queries):
                score(g, query)
        else:
            pl.loop(0, group)(lambda g: score(g, read_query(g)))


def _attend_kernel(
    # inputs, global memory
    scores_ref,  # [B, N, >= S] f32
    ranked_ref,  # [B, sets, >= S] f32, what was selected on
    value_ref,  # [B, S, K, V]
    bound_ref,  # [B, sets] i32, order key of the threshold
    cut_ref,  # [B, sets] i32
    start_ref,  # [B] i32, first visible key
    end_ref,  # [B] i32, one past the last
    # outputs, global memory
    acc_ref,  # [splits, B, N, >= V] f32, sum of exp(s - m) * value
    m_ref,  # [splits, B, N] f32, max of the selected scores
    total_ref,  # [splits, B, N] f32, sum of exp(s - m)
    # scratch, shared memory
    rows_ref,  # [128, >= V], the value rows of a tile's selected keys
    weights_ref,  # [group, 128] f32
    *filled,  # four times 32 barriers, one a row
    group: int,
    splits: int,
):
    num_heads, num_sets = scores_ref.shape[1], ranked_ref.shape[1]
    v_size, width = value_ref.shape[3], rows_ref.shape[1]
    b, kv, split = lax.axis_index("batch"), lax.axis_index("kv_head"), lax.axis_index("split")
    share = pl.cdiv(pl.cdiv(value_ref.shape[1], _LANES), splits)
    start, end = start_ref[b], end_ref[b]
    first = jnp.maximum(split * share, lax.div(start, _LANES))
    last = jnp.minimum((split + 1) * share, lax.div(end + (_LANES - 1), _LANES))
    heads = [kv * group + g for g in range(group)]
    sets = [lax.div(head, num_heads // num_sets) for head in heads]
    bounds = [bound_ref[b, s] for s in sets]
    cuts = [cut_ref[b, s] for s in sets]

    one_each = plgpu.Layout.WG_STRIDED((_LANES,), vec_size=1)
    columns = plgpu.Layout.WG_STRIDED((width,), vec_size=1)
    lane = plgpu.broadcasted_iota(jnp.int32, (_LANES,), 0, layout=one_each)

    def look(tile, g):
        """The scores of one head in a tile, and which of its keys are selected."""
        part = pl.ds(tile * _LANES, _LANES)
        scores = plgpu.load(scores_ref.at[b, heads[g], part], layout=one_each, optimized=False)
        ranked = scores
        if num_sets != num_heads:
            ranked = plgpu.load(ranked_ref.at[b, sets[g], part], layout=one_each, optimized=False)
        key, position = selection.order_key(ranked), tile * _LANES + lane
        kept = (key > bounds[g]) | ((key == bounds[g]) & (position <= cuts[g]))
        return scores, kept & (key != selection.NAN) & (position >= start) & (position < end)

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def largest(tile, maxima):
        looks = [look(tile, g) for g in range(group)]
        return [
            jnp.maximum(m, jnp.where(kept, scores, -jnp.inf))
            for m, (scores, kept) in zip(maxima, looks, strict=True)
        ]

    nothing = [full((_LANES,), -jnp.inf, one_each)] * group
    maxima = [jnp.max(m) for m in lax.fori_loop(first, last, largest, nothing)]
    shifts = [jnp.where(m == -jnp.inf, 0.0, m) for m in maxima]

    def pop(word):
        """The index of the lowest bit, and the word without it."""
        lowest = word & -word
        return (_WORD - 1) - lax.clz(lowest), word ^ lowest

    def attend(tile, carry):
        accs, totals = carry
        wanted = lane < 0  # keys that some head keeps: none yet
        for g in range(group):
            scores, kept = look(tile, g)
            weights = jnp.where(kept, jnp.exp(jnp.where(kept, scores, -jnp.inf) - shifts[g]), 0.0)
            weights_ref[g] = weights
            totals[g] += weights
            wanted |= kept
        bit = jnp.where(wanted, jnp.int32(1) << (lane & (_WORD - 1)), 0)
        words = [jnp.sum(jnp.where(lane >> 5 == w, bit, 0)) for w in range(_LANES // _WORD)]

        for w, word in enumerate(words):

            def fetch(word, w=w):
                index, word = pop(word)
                row = w * _WORD + index
                plgpu.copy_gmem_to_smem(
                    value_ref.at[b, tile * _LANES + row, kv],
                    rows_ref.at[row, pl.ds(0, v_size)],
                    filled[w].at[index],
                )
                return word

            lax.while_loop(lambda word: word != 0, fetch, word)

        for w, word in enumerate(words):

            def add(carry, w=w):
                word, accs = carry
                index, word = pop(word)
                row = w * _WORD + index
                plgpu.barrier_wait(filled[w].at[index])
                # Lanes past the value size hold what was there before; nothing reads their sums.
                value = plgpu.load(rows_ref.at[row], layout=columns).astype(jnp.float32)
                for g in range(group):
                    weight = lax.broadcast(weights_ref[g, row], (width,))
                    # A head that does not keep this key must not see its value: 0 * NaN is NaN.
                    accs[g] = jnp.where(weight > 0, accs[g] + weight * value, accs[g])
                return word, accs

            _, accs = lax.while_loop(lambda carry: carry[0] != 0, add, (word, accs))
        plgpu.commit_smem()  # the reads of this tile's rows come before the copies of the next
        return accs, totals

    accs = [full((width,), 0.0, columns)] * group
    totals = [full((_LANES,), 0.0, one_each)] * group
    accs, totals = lax.fori_loop(first, last, attend, (accs, totals))
    for g in range(group):
        acc_ref[split, b, heads[g]] = accs[g]
        m_ref[split, b, heads[g]] = maxima[g]
        total_ref[split, b, heads[g]] = jnp.sum(totals[g])


def _splits(blocks: int, tiles: int, wanted: int | None) -> int:
    """Returns in how many parts `tiles` are divided, none of them empty."""
    wanted = pl.cdiv(_BLOCKS, blocks) if wanted is None else wanted
    share = pl.cdiv(tiles, max(1, min(wanted, tiles)))
    return pl.cdiv(tiles, share)


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
    if block_sizes is not None and block_sizes.block_kv not in (None, _TILE):
        raise NotImplementedError(
            f"{_OP} got block_kv {block_sizes.block_kv}, wanted {_TILE}: the rows of a register tile"
        )


def _merge(acc, m, total):
    """Adds up the splits (axis 0), each scaled by exp of its own max; returns (out, lse)."""
    largest = jnp.max(m, axis=0)
    factor = jnp.where(m == -jnp.inf, 0, jnp.exp(m - online_softmax.finite_max(largest)[None]))
    acc = jnp.sum(factor[..., None] * acc, axis=0)
    total = jnp.sum(factor * total, axis=0)
    return online_softmax.divide(acc, total), online_softmax.log_sum_exp(largest, total)


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
    scale,
    with_indices,
    block_sizes: TopKDecodeBlockSizes | None = None,
):
    """Arguments as the public function, checked; returns (out, lse, TopKSelection)."""
    _check(query, key, value, block_sizes)
    b, n, h = query.shape
    _, num_keys, k, v_size = value.shape
    end = jnp.full((b,), num_keys, jnp.int32) if lengths is None else jnp.clip(lengths, 0, num_keys)
    start = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)
    if num_keys < _TILE:
        key, value = (
            jnp.pad(x, ((0, 0), (0, _TILE - num_keys), (0, 0), (0, 0))) for x in (key, value)
        )
        num_keys = _TILE
    padded = pl.cdiv(num_keys, _LANES) * _LANES
    interpret = compat.gpu_interpret(interpret_options())
    wanted = None if block_sizes is None else block_sizes.num_splits
    group = n // k
    grid_names = ("batch", "kv_head", "split")

    splits = _splits(b * k, num_keys // _TILE, wanted)
    stages = max(2, min(_STAGES, _STAGE_BYTES // (_TILE * h * key.dtype.itemsize)))
    scores = plgpu.kernel(
        functools.partial(_score_kernel, group=group, scale=scale, splits=splits),
        out_type=jax.ShapeDtypeStruct((b, n, padded), jnp.float32),
        scratch_types=[
            plgpu.SMEM((stages, _TILE, h), key.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        ],
        grid=(b, k, splits),
        grid_names=grid_names,
        kernel_name=f"topk_decode_scores_h{h}_g{group}",
        interpret=interpret,
    )(query, key, start, end)

    num_sets = pooling_.num_sets(scope, n, k)
    per_set = n // num_sets
    visible = masks.visible_to_decode(padded, end, window, b)[:, None, :]
    ranked = pooling_.pool(scores, visible, num_sets, pooling)
    budget = selection.rows_of(topk, (b, n))[:, ::per_set]
    chosen = topk_select.select(
        ranked.reshape(b * num_sets, padded),
        jnp.repeat(start, num_sets),
        jnp.repeat(end, num_sets),
        budget.reshape(-1),
    )
    count, threshold, cut = (x.reshape(b, num_sets) for x in chosen)

    splits = _splits(b * k, padded // _LANES, wanted)
    width = pl.cdiv(v_size, _LANES) * _LANES
    partial_row = jax.ShapeDtypeStruct((splits, b, n), jnp.float32)
    acc, m, total = plgpu.kernel(
        functools.partial(_attend_kernel, group=group, splits=splits),
        out_type=[
            jax.ShapeDtypeStruct((splits, b, n, width), jnp.float32),
            partial_row,
            partial_row,
        ],
        scratch_types=[
            plgpu.SMEM((_LANES, width), value.dtype),
            plgpu.SMEM((group, _LANES), jnp.float32),
            *[plgpu.Barrier(num_arrivals=1, num_barriers=_WORD)] * (_LANES // _WORD),
        ],
        grid=(b, k, splits),
        grid_names=grid_names,
        kernel_name=f"topk_decode_attend_v{v_size}_g{group}",
        interpret=interpret,
    )(scores, ranked, value, selection.order_key(threshold), cut, start, end)
    out, lse = _merge(acc[..., :v_size], m, total)

    indices = None
    if with_indices:
        kept = selection.selected(ranked, visible, threshold, cut)
        indices = selection.compact(kept, topk)
    selected = TopKSelection(indices, count, threshold, cut)
    return out.astype(query.dtype), lse, selection.repeat_for_heads(selected, per_set)
