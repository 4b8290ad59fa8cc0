"""Exact Top-k decoding, one sequence a grid step: score, select, then attend, with nothing S long in HBM (Mosaic TPU).

1. Blocks of keys stream from HBM, all heads together, double-buffered; their scores stay in VMEM as int32 order keys.
2. A shared scope pools the heads' scores into a second, shorter buffer.
3. Bisection over that buffer gives count, threshold and tie cut (`topk_select`).
4. One pass finds each head's maximum and lists the blocks that hold a selected key.
5. The value blocks on that list stream in; weights come from the kept scores, so keys are read once.

Blocks past a sequence's length or before its window are neither copied nor scanned. Every head's row rides through each
product (a product costs the loading of its keys, not its few rows) and keeps the key/value head it belongs to, so groups of
any size need no packing. Products accumulate in float32; float32 inputs are multiplied in full precision, bfloat16 weights
as the sum of two bfloat16 parts.

A head's rows leave a block of [S, K, H] by strided loads where K and H fill tiles; elsewhere a few tokens at a time are
swapped into a buffer of whole heads. Either way registers hold the tiles of one head, so that loops over bfloat16 spill none.

The cache is read in the layout that XLA itself gives it at a program's edge, so that no copy is made: [S, K, H] as it is
where K and H fill tiles, else [K, S, H], or [K, H, S] where H would leave lanes empty. An S that is not a multiple of 128 can
be cut into blocks in the first layout only, and XLA copies the others into it: keep the capacity a multiple of 128.

A paged cache is read in the same way, each block page by page into the same buffers, so that all that follows is the same to
the bit; pages past a sequence's length or before its window are not copied. Its pages are in such a layout themselves, [page,
K, H] and so on; XLA tears pages of less than 128 tokens apart where H would leave lanes empty, and those are refused.

Grid (B,), parallel. SMEM: a sequence's part of the page table. VMEM: heads x S x 4 bytes of order keys, two blocks each of
keys and values. Compiled ahead of time for v5e, v5p, v6e and tpu7x, and interpreted; never executed on a TPU.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import masks, paging, selection, tpu_launch, tpu_tiles
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.core.tpu_launch import check_vmem
from pallas_kernels.core.tpu_tiles import LANES, SUBLANES, round_up
from pallas_kernels.ops.topk_decode_attention import pooling_tpu
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from pallas_kernels.ops.topk_select.mosaic_tpu import chunk_width, select_rows

_OP = "topk_decode_attention"
_PIECE = LANES  # keys that one product takes
_SWAPPED = 2 * SUBLANES  # keys whose heads are swapped in registers at a time, a tile of bfloat16
_BLOCK_BYTES = 1 << 20  # one block of keys; two are in flight


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Refs:
    """What the kernel reads and writes, one sequence at a time; R rows are the heads, padded to 8, Q the pooled sets."""

    # scalars, SMEM
    begins: jax.Ref  # [B] i32, first visible key
    ends: jax.Ref  # [B] i32, one past the last visible key
    # inputs
    query: jax.Ref  # [1, R, H], VMEM
    budget: jax.Ref  # [1, Q, 1] i32, VMEM
    page_table: jax.Ref | None = None  # [1, 1, pages] i32, SMEM
    key: jax.Ref  # [B, ...] in the cache's layout, or [P, ...] in that of its pages, HBM
    value: jax.Ref
    # outputs
    out: jax.Ref  # [1, R, V], VMEM
    lse: jax.Ref  # [1, R, 1] f32, VMEM
    chosen: jax.Ref  # [1, Q, 3] i32, VMEM: count, threshold key, tie cut
    # [B, Q, blocks * block_kv] i32, HBM: the order keys, where an index list is wanted
    ranked_out: jax.Ref | None = None
    # scratch
    scores: jax.Ref  # [R, blocks * block_kv] i32, VMEM: order keys of the heads' scores
    pooled: jax.Ref | None = None  # [Q, blocks * block_kv] i32, VMEM: order keys of a shared scope
    key_blocks: jax.Ref  # [2, ...], VMEM
    value_blocks: jax.Ref
    key_heads: jax.Ref | None = None  # [K, 128, H], VMEM: a piece of [S, K, H], head by head
    value_heads: jax.Ref | None = None
    acc: jax.Ref  # [R, V] f32, VMEM, sum of the weighted values
    poison: jax.Ref  # [R, V] f32, VMEM: how many non-finite values each output would take in
    held: jax.Ref  # [blocks] i32, SMEM: blocks that hold a selected key
    key_arrived: jax.Ref  # [2] DMA semaphores
    value_arrived: jax.Ref
    ranked_left: jax.Ref | None = None  # DMA semaphore


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of one launch."""

    num_heads: int
    num_kv_heads: int
    num_sets: int  # G: how many selections a sequence makes
    num_keys: int
    page: int | None  # tokens of a page of a paged cache
    block_kv: int
    chunk: int  # keys that one step of a pass over the scores takes
    key_axis: int  # where S stands among the three axes of a sequence's keys
    value_axis: int
    key_by_stride: bool  # whether each head's keys are read straight from an [S, K, H] block
    value_by_stride: bool
    scale: float
    pooling: str

    @property
    def num_blocks(self) -> int:
        return pl.cdiv(self.num_keys, self.block_kv)


def _key_axis(s: int, k: int, h: int, dtype) -> int:
    """Returns where S stands in the cache's own layout: 0 in [S, K, H], 1 in [K, S, H], 2 in [K, H, S]."""
    if h % LANES:
        axis = 2
    elif k in (2, 4) or k % SUBLANES == 0 or (k == 1 and dtype.itemsize == 4):
        axis = 0
    else:
        axis = 1
    # The last block is S % block long, and copies of a tiled axis come in whole tiles.
    return axis if s % (1, 2 * SUBLANES, LANES)[axis] == 0 else 0


def _at(axis: int, index) -> tuple:
    """Returns the index that takes `index` along S, all of the rest."""
    return tuple(index if i == axis else slice(None) for i in range(3))


def _heads(block, axis: int):
    """Turns a block into its key/value heads: [K, keys, H], or [K, H, keys] where `axis` is 2."""
    return jnp.swapaxes(block, 0, 1) if axis == 0 else block


def _kernel(refs: _Refs, *, plan: _Plan):
    b = pl.program_id(0)
    begin, end = refs.begins[b], refs.ends[b]
    num_rows = refs.scores.shape[0]
    ranked = refs.scores if refs.pooled is None else refs.pooled
    per_head, per_set = (
        plan.num_heads // plan.num_kv_heads,
        plan.num_heads // plan.num_sets,
    )
    chunks = plan.block_kv // plan.chunk
    first_block = begin // plan.block_kv
    # A sequence that sees nothing may have begin past end.
    num_visited = jnp.maximum(pl.cdiv(end, jnp.int32(plan.block_kv)) - first_block, 0)
    full = functools.partial(jnp.full, dtype=jnp.float32)

    def stream(hbm, buffers, arrived, axis, count, block_at, step, init):
        """Runs step(block, buffer slot, carry) over `count` blocks while the next one is on its way."""
        whole, tail = divmod(plan.num_keys, plan.block_kv)

        def for_each_page(i, act, *, page: int, table):
            block, slot = block_at(i), i % 2
            size = math.gcd(page, plan.block_kv)  # a block may be shorter than a page
            base = block * plan.block_kv
            # Of the first and the last block, only the pages that hold a visible key.
            first = jnp.maximum(begin - base, 0) // size
            last = pl.cdiv(jnp.minimum(end - base, plan.block_kv), jnp.int32(size))
            at = lambda start: _at(axis, pl.ds(pl.multiple_of(start, size), size))

            def copy(j, carry):
                token = base + j * size
                source = hbm.at[table[0, 0, token // page]]
                source = source if size == page else source.at[at(token % page)]
                target = buffers.at[slot].at[at(j * size)]
                act(pltpu.make_async_copy(source, target, arrived.at[slot]))
                return carry

            lax.fori_loop(first, last, copy, 0)

        def for_each_piece(i, act):
            # The last block of an uneven S is shorter, and a copy's size is static.
            block, slot = block_at(i), i % 2

            def copy(size):
                start = pl.multiple_of(block * plan.block_kv, LANES)
                source = hbm.at[b].at[_at(axis, pl.ds(start, size))]
                target = buffers.at[slot].at[_at(axis, pl.ds(0, size))]
                act(pltpu.make_async_copy(source, target, arrived.at[slot]))

            if whole:
                pl.when(block < whole)(lambda: copy(plan.block_kv))
            if tail:
                pl.when(block == whole)(lambda: copy(tail))

        for_each_copy = for_each_piece
        if plan.page is not None:
            for_each_copy = functools.partial(for_each_page, page=plan.page, table=refs.page_table)
        start = functools.partial(for_each_copy, act=lambda copy: copy.start())
        wait = functools.partial(for_each_copy, act=lambda copy: copy.wait())
        pl.when(count > 0)(lambda: start(0))

        def body(i, carry):
            pl.when(i + 1 < count)(lambda: start(i + 1))
            wait(i)
            return step(block_at(i), i % 2, carry)

        return lax.fori_loop(0, count, body, init)

    def chunk_of(ref, start, size=plan.chunk):
        return ref[:, pl.ds(pl.multiple_of(start, LANES), size)]

    def for_each_piece_of(step, carry):
        """Runs step(offset, carry) over the pieces of a block."""
        body = lambda i, carry: step(pl.multiple_of(i * _PIECE, _PIECE), carry)
        return lax.fori_loop(0, plan.block_kv // _PIECE, body, carry)

    def heads_of(blocks, apart, slot, offset, axis, *, by_stride: bool):
        """Returns what loads a head's part of a piece, [keys, H], or [H, keys] where `axis` is 2; a static head if by stride."""
        if axis > 0:
            piece = _at(axis, pl.ds(offset, _PIECE))[1:]
            return lambda head: blocks[(slot, head, *piece)]
        if by_stride:
            return lambda head: tpu_tiles.load_head(blocks, slot, offset, _PIECE, head)

        def take_apart(i, carry):
            start = pl.multiple_of(i * _SWAPPED, _SWAPPED)
            tokens = blocks[slot, pl.ds(pl.multiple_of(offset + start, _SWAPPED), _SWAPPED)]
            apart[:, pl.ds(start, _SWAPPED)] = jnp.swapaxes(tokens, 0, 1)
            return carry

        lax.fori_loop(0, _PIECE // _SWAPPED, take_apart, 0)
        return lambda head: apart[head]

    def keys_of(slot, offset):
        source = refs.key_blocks, refs.key_heads, slot, offset, plan.key_axis
        return heads_of(*source, by_stride=plan.key_by_stride)

    def values_of(slot, offset, *, by_stride: bool = plan.value_by_stride):
        source = refs.value_blocks, refs.value_heads, slot, offset, plan.value_axis
        return heads_of(*source, by_stride=by_stride)

    def of_own_head(products):
        """Takes each row from the product with its own key/value head."""
        result = products[0]
        for head, product in enumerate(products[1:], 1):
            own = tpu_tiles.rows_between(result.shape, head * per_head, (head + 1) * per_head)
            result = jnp.where(own, product, result)
        return result

    def score_block(block, slot, carry):
        def score_piece(offset, carry):
            keys = keys_of(slot, offset)
            contract = (1, 0 if plan.key_axis == 2 else 1)
            heads = range(plan.num_kv_heads)
            score = of_own_head(
                [tpu_tiles.dot(refs.query[0], keys(head), contract) for head in heads]
            )
            start = pl.multiple_of(block * plan.block_kv + offset, LANES)
            index = start + lax.broadcasted_iota(jnp.int32, score.shape, 1)
            order = selection.order_key(plan.scale * score)
            visible = (index >= begin) & (index < end) & (order != selection.NAN)
            refs.scores[:, pl.ds(start, _PIECE)] = jnp.where(visible, order, selection.DEAD)
            return carry

        return for_each_piece_of(score_piece, carry)

    def expand(per_pool):
        """Gives each head the row of its set: [Q, n] -> [R, n]."""
        if refs.pooled is None:
            return per_pool
        shape = num_rows, per_pool.shape[1]
        rows = jnp.zeros(shape, per_pool.dtype)
        for g in range(plan.num_sets):
            own = tpu_tiles.rows_between(shape, g * per_set, (g + 1) * per_set)
            rows = jnp.where(own, jnp.broadcast_to(per_pool[g : g + 1], shape), rows)
        return rows

    def fold(x, combine):
        """Combines the registers of each row: [R, chunk] -> [R, 128], nothing crosses a lane."""
        parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
        return functools.reduce(combine, parts)

    def finite_score(order):
        """Returns the score of a row's largest order key, 0 where that is -inf or there is none."""
        score = selection.key_to_score(order)
        return jnp.where((order == selection.DEAD) | (score == -jnp.inf), 0.0, score)

    no_order = jnp.full((num_rows, LANES), selection.DEAD, jnp.int32)

    def kept_in(start, size=plan.chunk):
        """Returns the mask of selected keys among `size` of them, [R, size]."""
        order = chunk_of(ranked, start, size)
        index = start + lax.broadcasted_iota(jnp.int32, order.shape, 1)
        kept = (order > threshold) | ((order == threshold) & (index <= tie_cut))
        kept = kept & (order != selection.DEAD)
        return kept if refs.pooled is None else expand(jnp.where(kept, 1, 0)) > 0

    def list_block(i, carry):
        count, best = carry
        block = first_block + i

        def take(c, best):
            start = block * plan.block_kv + c * plan.chunk
            order = jnp.where(kept_in(start), chunk_of(refs.scores, start), selection.DEAD)
            return jnp.maximum(best, fold(order, jnp.maximum))

        best_here = lax.fori_loop(0, chunks, take, no_order)
        refs.held[count] = block
        hit = jnp.max(jnp.where(best_here == selection.DEAD, 0, 1))
        return count + hit, jnp.maximum(best, best_here)

    def attend_block(block, slot, total):
        contract = (1, 1 if plan.value_axis == 2 else 0)

        def attend_piece(offset, total):
            start = block * plan.block_kv + offset
            kept = kept_in(start, _PIECE)
            score = selection.key_to_score(chunk_of(refs.scores, start, _PIECE))
            p = jnp.where(kept, jnp.exp(score - m), 0.0)
            values = values_of(slot, offset)
            heads = range(plan.num_kv_heads)
            added = of_own_head([tpu_tiles.weigh(p, values(head), contract) for head in heads])
            # 0 * NaN is NaN: what no row of a head keeps may hold anything. A finite sum proves that nothing did.
            finite = jnp.isfinite(added)
            refs.acc[...] += jnp.where(finite, added, 0.0)

            @pl.when(jnp.max(jnp.where(finite, 0.0, 1.0)) > 0)
            def _add_the_finite():
                # Too rare to be worth the code of a loop unrolled, so the head is traced.
                values = values_of(slot, offset, by_stride=False)

                def add_head(head, carry):
                    value = values(head).astype(jnp.float32)
                    usable = jnp.isfinite(value)
                    clean = jnp.where(usable, value, 0.0).astype(refs.value_blocks.dtype)
                    sums = tpu_tiles.weigh(p, clean, contract)
                    hits = tpu_tiles.dot(
                        jnp.where(kept, 1.0, 0.0).astype(jnp.bfloat16),
                        jnp.where(usable, 0.0, 1.0).astype(jnp.bfloat16),
                        contract,
                    )
                    own = tpu_tiles.rows_between(sums.shape, head * per_head, (head + 1) * per_head)
                    refs.acc[...] += jnp.where(own & ~finite, sums, 0.0)
                    refs.poison[...] += jnp.where(own, hits, 0.0)
                    return carry

                lax.fori_loop(0, plan.num_kv_heads, add_head, 0)

            return total + p

        return for_each_piece_of(attend_piece, total)

    refs.poison[...] = jnp.zeros_like(refs.poison)
    refs.acc[...] = jnp.zeros_like(refs.acc)
    stream(
        refs.key,
        refs.key_blocks,
        refs.key_arrived,
        plan.key_axis,
        num_visited,
        lambda i: first_block + i,
        score_block,
        0,
    )
    if refs.pooled is not None:
        pooling_tpu.pool_order_keys(
            refs.scores,
            refs.pooled,
            first_block * chunks,
            (first_block + num_visited) * chunks,
            chunk=plan.chunk,
            num_sets=plan.num_sets,
            per_set=per_set,
            pooling=plan.pooling,
        )
    count, threshold, tie_cut = select_rows(
        ranked,
        refs.budget[0],
        first_block * chunks,
        (first_block + num_visited) * chunks,
        chunk=plan.chunk,
    )
    for column, fact in enumerate((count, threshold, tie_cut)):
        refs.chosen[0, :, column : column + 1] = fact
    leaving = None
    if refs.ranked_out is not None:
        leaving = pltpu.make_async_copy(ranked, refs.ranked_out.at[b], refs.ranked_left)
        leaving.start()

    num_held, best = lax.fori_loop(0, num_visited, list_block, (jnp.int32(0), no_order))
    m = finite_score(jnp.max(best, axis=1, keepdims=True))
    total = stream(
        refs.value,
        refs.value_blocks,
        refs.value_arrived,
        plan.value_axis,
        num_held,
        lambda i: refs.held[i],
        attend_block,
        full((num_rows, _PIECE), 0),
    )
    total = jnp.sum(total, axis=1, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    out = jnp.where(refs.poison[...] > 0, jnp.nan, refs.acc[...] / safe)
    refs.out[0] = jnp.where(empty, 0.0, out).astype(refs.out.dtype)
    refs.lse[0] = jnp.where(empty, -jnp.inf, m + jnp.log(safe))
    if leaving is not None:
        leaving.wait()


def _block_kv(b: int, s: int, k: int, h: int, dtype, block_sizes) -> int:
    row_bytes = k * round_up(h, LANES) * dtype.itemsize
    usual = min(max(_BLOCK_BYTES // row_bytes, LANES), 2048)
    sizes = block_sizes_.resolve(
        _OP,
        "mosaic_tpu",
        block_sizes,
        cls=TopKDecodeBlockSizes,
        dtype=dtype.name,
        bucket={"rows": b * k, "s": s, "head": h},
        heuristic=lambda: TopKDecodeBlockSizes(block_kv=usual),
    )
    if sizes.num_splits not in (None, 1):
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got num_splits={sizes.num_splits}, wanted 1 (a sequence runs on one core)"
        )
    block = min(sizes.block_kv or usual, round_up(s, LANES))
    return max(block // LANES, 1) * LANES


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
    block_sizes=None,
):
    """Arguments as the public function, checked; returns (out, lse, TopKSelection).

    Raises:
      NotImplementedError: float16 or float64 inputs, score rows that do not fit VMEM, or a pool whose pages are torn apart.
    """
    if quantized_key is not None:
        raise NotImplementedError(f"{_OP}: mosaic_tpu got a quantized_key, wanted None")
    b, n, h = query.shape
    _, capacity, k, v = value.shape
    page, s = None, capacity
    if page_table is not None:
        page, s = capacity, page_table.shape[1] * capacity
        _check_pages(key, value)
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got query of dtype {query.dtype.name}, wanted float32 or bfloat16"
        )
    num_sets = pooling_.num_sets(scope, n, k)
    per_set = n // num_sets
    rows, sets = round_up(n, SUBLANES), round_up(num_sets, SUBLANES)
    shared = per_set > 1
    block_kv = _block_kv(b, s, k, h, query.dtype, block_sizes)
    key_axis = _key_axis(capacity, k, h, key.dtype)
    value_axis = _key_axis(capacity, k, v, value.dtype)
    # The device simulator reads no other view of a buffer than its own.
    options = interpret_options()
    strides = options is None or not options.simulate
    plan = _Plan(
        num_heads=n,
        num_kv_heads=k,
        num_sets=num_sets,
        num_keys=s,
        page=page,
        block_kv=block_kv,
        chunk=chunk_width(rows, block_kv),
        key_axis=key_axis,
        value_axis=value_axis,
        key_by_stride=strides and key_axis == 0 and tpu_tiles.is_strided(k, h, key.dtype),
        value_by_stride=strides and value_axis == 0 and tpu_tiles.is_strided(k, v, value.dtype),
        scale=scale,
        pooling=pooling,
    )
    begins, ends = _range_of(b, s, lengths, window)
    budget = selection.rows_of(topk, (b, n))[:, ::per_set, None]
    operands = {
        "begins": begins,
        "ends": ends,
        "query": jnp.pad(query, ((0, 0), (0, rows - n), (0, 0))),
        "budget": jnp.pad(budget, ((0, 0), (0, sets - num_sets), (0, 0))),
        **({} if page is None else {"page_table": _window_of_pages(page_table, lengths, key)}),
        "key": jnp.moveaxis(key, 1, 1 + plan.key_axis),
        "value": jnp.moveaxis(value, 1, 1 + plan.value_axis),
    }
    out, lse, chosen, *ranked = _launch(
        operands, plan, sets=sets, shared=shared, value_head=v, with_indices=with_indices
    )
    count, threshold, tie_cut = (chosen[:, :num_sets, i] for i in range(3))
    indices = None
    if with_indices:
        order = ranked[0][:, :num_sets, :s]
        index = lax.broadcasted_iota(jnp.int32, order.shape, 2)
        kept = (order == threshold[..., None]) & (index <= tie_cut[..., None])
        kept = (kept | (order > threshold[..., None])) & (order != selection.DEAD)
        visible = masks.visible_to_decode(s, lengths, window, b)[:, None, :]
        indices = selection.compact(kept & visible, topk)
    selected = TopKSelection(indices, count, selection.key_to_score(threshold), tie_cut)
    return out[:, :n], lse[:, :n, 0], selection.repeat_for_heads(selected, per_set)


def _range_of(b: int, num_keys: int, lengths, window):
    """Returns the first visible key of each sequence and one past the last, int32 [B]; where nothing is visible, any begin."""
    ends = jnp.full((b,), num_keys, jnp.int32) if lengths is None else lengths
    begins = jnp.zeros_like(ends) if window is None else jnp.maximum(ends - window, 0)
    return begins, jnp.clip(ends, 0, num_keys)


def _check_pages(key, value):
    """Refuses a pool that XLA does not lay out page after page; an interpreter has no layouts, so that there any runs."""
    page = key.shape[1]
    for name, size in (("key", key.shape[3]), ("value", value.shape[3])):
        if size % LANES and page % LANES and interpret_options() is None:
            raise NotImplementedError(
                f"{_OP}: mosaic_tpu got pages of {page} tokens with {name} of head size {size}, wanted pages of at least "
                f"{LANES} or a head size that is a multiple of {LANES}"
            )


def _window_of_pages(page_table, lengths, key):
    """Returns the table as [B, 1, pages], of which SMEM holds a sequence at a time."""
    table = paging.safe_table(page_table, lengths, page=key.shape[1], num_pages=key.shape[0])
    return table[:, None]


def _launch(operands, plan: _Plan, *, sets: int, shared: bool, value_head: int, with_indices: bool):
    """Returns out [B, R, V], lse [B, R, 1], chosen [B, Q, 3], and the order keys [B, Q, S'] where wanted."""
    query, key, value = operands["query"], operands["key"], operands["value"]
    b, rows, h = query.shape
    dtype, itemsize = query.dtype, query.dtype.itemsize
    width = plan.num_blocks * plan.block_kv

    def block_shape(hbm, axis):
        return tuple(plan.block_kv if i == axis else size for i, size in enumerate(hbm.shape[1:]))

    key_block, value_block = block_shape(key, plan.key_axis), block_shape(value, plan.value_axis)
    apart = {}
    if plan.key_axis == 0 and not plan.key_by_stride:
        apart["key_heads"] = plan.num_kv_heads, _PIECE, h
    if plan.value_axis == 0:
        apart["value_heads"] = plan.num_kv_heads, _PIECE, value_head
    scratch = {
        "scores": pltpu.VMEM((rows, width), jnp.int32),
        **({"pooled": pltpu.VMEM((sets, width), jnp.int32)} if shared else {}),
        "key_blocks": pltpu.VMEM((2, *key_block), dtype),
        "value_blocks": pltpu.VMEM((2, *value_block), dtype),
        **{name: pltpu.VMEM(shape, dtype) for name, shape in apart.items()},
        "acc": pltpu.VMEM((rows, value_head), jnp.float32),
        "poison": pltpu.VMEM((rows, value_head), jnp.float32),
        "held": pltpu.SMEM((plan.num_blocks,), jnp.int32),
        "key_arrived": pltpu.SemaphoreType.DMA((2,)),
        "value_arrived": pltpu.SemaphoreType.DMA((2,)),
        **({"ranked_left": pltpu.SemaphoreType.DMA} if with_indices else {}),
    }
    outputs = {
        "out": jax.ShapeDtypeStruct((b, rows, value_head), dtype),
        "lse": jax.ShapeDtypeStruct((b, rows, 1), jnp.float32),
        "chosen": jax.ShapeDtypeStruct((b, sets, 3), jnp.int32),
        **(
            {"ranked_out": jax.ShapeDtypeStruct((b, sets, width), jnp.int32)}
            if with_indices
            else {}
        ),
    }
    paged = "" if plan.page is None else f"_page{plan.page}"
    in_buffers = key_block, key_block, value_block, value_block, *apart.values()
    block_bytes = itemsize * sum(map(tpu_tiles.tiled_size, in_buffers))
    needed = 4 * width * (rows + (sets if shared else 0)) + block_bytes
    # Every copy lies within the cache, as lengths and tables were clipped to it.
    return tpu_launch.call_by_name(
        functools.partial(_kernel, plan=plan),
        _Refs,
        operands,
        scalars=("begins", "ends"),
        outputs=outputs,
        scratch=scratch,
        in_hbm=("key", "value", "ranked_out"),
        in_smem=("page_table",),
        vmem_limit_bytes=check_vmem(_OP, needed, f"{rows} rows of S={plan.num_keys}"),
        cost_estimate=pl.CostEstimate(
            # Both products, and two operations a score in each of some 40 passes; all of V is the upper bound.
            flops=b * plan.num_heads * plan.num_keys * (2 * (h + value_head) + 80),
            bytes_accessed=b * plan.num_keys * plan.num_kv_heads * (h + value_head) * itemsize,
            transcendentals=b * plan.num_heads * plan.num_keys,
        ),
        name=f"topk_decode_{dtype.name}_g{plan.num_sets}_kv{plan.block_kv}_{plan.key_axis}{plan.value_axis}{paged}",
    )
