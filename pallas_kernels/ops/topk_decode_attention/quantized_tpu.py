"""Top-k decoding ranked by an eight-bit copy of the keys: half of the bytes are read (Mosaic TPU).

1. `_kernel` streams the copy from HBM, all heads together, double-buffered, and its token scales beside it. Scores by the copy
   stay in VMEM as int32 order keys; a shared scope pools them; bisection gives count, threshold and tie cut (`select_rows`);
   the kept places leave as ascending lists (`list_rows`). Nothing S long is written to HBM.
2. `gather_attention` attends to the lists: their keys and values are copied row by row, and the softmax is over true scores.

Eight-bit numbers are exact in bfloat16, and so are their products with bfloat16 queries in float32, in which the matrix unit
adds them; a float32 query goes in as a sum of three bfloat16 parts, 24 bits. A score is (scale x token scale) x product, as in
the reference.

The copy is read in the layout that XLA itself gives it at a program's edge. Where four heads of a token fill a word ([S, K, H],
K = 4 or a multiple of 8), a block is copied as words, [S K / 4, H]: a strided load takes the same word of many tokens, and
shifts take its four heads apart. Of other K, whose cache is [K, S, H], each head is a block by itself. Scales lie as [B, K, S]
(XLA copies them, not the keys, where S is no multiple of 128), or [P, K, page] in pages of at least 128 tokens; of smaller
pages XLA keeps a token's scales apart, and those are refused.

`certified` makes the call without the copy: exact by definition, and no faster. That call adds up values block by block, in order
and with zeros between, and sums over listed rows need not have its bits. Listed keys could be scored again and the blocks of
values streamed all the same, but of 131,072 keys and 2,048 kept by each of 32 heads that would save a sixth of the bytes.

Grid (B,), parallel. SMEM: a sequence's part of the page table. VMEM: heads x S x 4 bytes of order keys (of a window, as many as
it can reach), two blocks of the copy, two of the lists. Compiled ahead of time for v5e, v5p, v6e and tpu7x, and interpreted, but
for the view of bytes as words in HBM, which the device simulator lacks; never executed on a TPU.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import paging, selection, tpu_launch, tpu_tiles
from pallas_kernels.core import pooling as pooling_
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.core.tpu_launch import check_vmem
from pallas_kernels.core.tpu_tiles import LANES, SUBLANES, as_row, round_up
from pallas_kernels.ops.gather_attention import mosaic_tpu as gather_attention
from pallas_kernels.ops.topk_decode_attention import mosaic_tpu
from pallas_kernels.ops.topk_decode_attention.pooling_tpu import pool_order_keys
from pallas_kernels.ops.topk_select.fused_tpu import list_rows
from pallas_kernels.ops.topk_select.mosaic_tpu import chunk_width, select_rows

_OP = "topk_decode_attention"
_PIECE = LANES  # keys that meet the queries in one product
_PACK = 4  # heads in a word
_LIST_TILES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Refs:
    """What the kernel reads and writes, one sequence at a time; R rows are the heads, padded to 8, Q the sets, likewise."""

    # scalars, SMEM
    begins: jax.Ref  # [B] i32, first visible key
    ends: jax.Ref  # [B] i32, one past the last visible key
    # inputs
    query: jax.Ref  # [1, K, parts * W, H] bf16, VMEM: whole registers of rows around those of each key/value head
    budget: jax.Ref  # [1, Q, 1] i32, VMEM
    page_table: jax.Ref | None = None  # [1, 1, pages] i32, SMEM
    # [B, S, K, H] i8 or f8, or as words [B, S * K / 4, H] i32, or [B, K, S, H], HBM; of pages, [P, page, ...] likewise
    values: jax.Ref
    token_scale: jax.Ref  # [B, K, S] f32, or [P, K, page], HBM
    # outputs
    chosen: jax.Ref  # [1, 3, Q] i32, VMEM: count, threshold key, tie cut
    lists: jax.Ref  # [1, Q, L] i32, VMEM: kept places
    # scratch
    scores: jax.Ref  # [R, blocks * block_kv] i32, VMEM: order keys, from the first visible block on
    pooled: jax.Ref | None = None  # [Q, blocks * block_kv] i32, VMEM: order keys of a shared scope
    # [2, H / 128, block_kv * K / 4, 128] i32, or [2, K, block_kv, H] i8 or f8, VMEM
    blocks: jax.Ref
    scale_blocks: jax.Ref  # [2, K, block_kv] f32, VMEM
    listed: jax.Ref  # [Q, 128] i32, VMEM: how many places are listed
    bounds: jax.Ref  # [2, Q, 128] i32 and [128, 256] bf16, VMEM: of `list_rows`
    counting: jax.Ref
    arrived: jax.Ref  # [2] DMA semaphores
    scales_arrived: jax.Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static numbers of one launch."""

    num_heads: int
    num_kv_heads: int
    num_sets: int  # G: how many selections a sequence makes
    num_keys: int
    page: int | None  # tokens of a page of a paged copy
    num_blocks: int  # that a sequence can reach
    block_kv: int
    query_parts: int
    query_rows: int  # W
    as_words: bool
    made_outside: bool  # the words are operands already
    dtype: jnp.dtype  # of the copy
    scale: float
    pooling: str

    @property
    def lines(self) -> int:
        """Words of a token, in one lane."""
        return self.num_kv_heads // _PACK


def _in_words(num_kv_heads: int) -> bool:
    """Whether XLA lays out the copy as [S, K, H], its heads in words; else it is [K, S, H]."""
    return num_kv_heads == _PACK or num_kv_heads % SUBLANES == 0


def _number(words, byte: int, dtype):
    """Takes byte 0 to 3 of each word, as the number of `dtype` that it is: bfloat16, exact."""
    to_top = jnp.full_like(words, 8 * (_PACK - 1 - byte))
    top = lax.shift_left(words, to_top)
    if dtype == jnp.int8:
        number = lax.shift_right_arithmetic(top, jnp.full_like(words, 24))
        return number.astype(jnp.float32).astype(jnp.bfloat16)
    # 1 bit of sign, 4 of exponent (bias 7) and 3 of fraction, moved to where float32 (bias 127) has its own. Exponent 0 has no
    # leading one: it is made with one, under the next exponent, and the one is taken off.
    sign = top & jnp.int32(-(2**31))
    size = lax.shift_right_logical(top & (127 << 24), jnp.full_like(words, 4))
    small = size < 1 << 23
    bits = size + jnp.where(small, jnp.int32(121 << 23), jnp.int32(120 << 23))
    number = lax.bitcast_convert_type(bits, jnp.float32) - jnp.where(small, 2.0**-6, 0.0)
    number = jnp.where(size == 127 << 20, jnp.nan, number)
    signed = lax.bitcast_convert_type(number, jnp.int32) | sign
    return lax.bitcast_convert_type(signed, jnp.float32).astype(jnp.bfloat16)


def _kernel(refs: _Refs, *, plan: _Plan):
    b = pl.program_id(0)
    begin, end = refs.begins[b], refs.ends[b]
    num_rows = refs.scores.shape[0]
    num_kv_heads = plan.num_kv_heads
    per_head, per_set = plan.num_heads // num_kv_heads, plan.num_heads // plan.num_sets
    first_block = begin // plan.block_kv
    num_visited = jnp.maximum(pl.cdiv(end, jnp.int32(plan.block_kv)) - first_block, 0)

    def copy_part(act, slot, row, start, target, size):
        """Copies `size` tokens of a sequence, or of a page, to where `target` stands in a block."""
        arrived = refs.arrived.at[slot]
        if plan.as_words:
            words = refs.values.at[row]
            if not plan.made_outside:
                words = words.bitcast(jnp.int32).reshape(words.shape[0] * plan.lines, -1)
            words = words.at[pl.ds(start * plan.lines, size * plan.lines)]
            block = refs.blocks.at[slot, :, pl.ds(target * plan.lines, size * plan.lines)]
            # Strided loads take 128 lanes at a time.
            for i in range(block.shape[0]):
                lanes = pl.ds(i * block.shape[2], block.shape[2])
                act(pltpu.make_async_copy(words.at[:, lanes], block.at[i], arrived))
        else:
            block = refs.blocks.at[slot, :, pl.ds(target, size)]
            act(pltpu.make_async_copy(refs.values.at[row, :, pl.ds(start, size)], block, arrived))
        size = round_up(size, LANES)
        scales = refs.token_scale.at[row, :, pl.ds(start, size)]
        block = refs.scale_blocks.at[slot, :, pl.ds(target, size)]
        act(pltpu.make_async_copy(scales, block, refs.scales_arrived.at[slot]))

    def for_each_copy(i, act):
        block, slot = first_block + i, i % 2
        base = pl.multiple_of(block * plan.block_kv, LANES)
        if plan.page is not None and refs.page_table is not None:
            page, table = plan.page, refs.page_table
            size = math.gcd(page, plan.block_kv)
            # Of the first and the last block, only the pages that hold a visible key.
            first = jnp.maximum(begin - base, 0) // size
            last = pl.cdiv(jnp.minimum(end - base, plan.block_kv), jnp.int32(size))

            def copy_page(j, carry):
                token = base + j * size
                start, target = (pl.multiple_of(x, size) for x in (token % page, j * size))
                copy_part(act, slot, table[0, 0, token // page], start, target, size)
                return carry

            lax.fori_loop(first, last, copy_page, 0)
            return
        # The last block of an uneven S is shorter, and a copy's size is static.
        whole, tail = divmod(plan.num_keys, plan.block_kv)
        if whole:
            pl.when(block < whole)(lambda: copy_part(act, slot, b, base, 0, plan.block_kv))
        if tail:
            pl.when(block == whole)(lambda: copy_part(act, slot, b, base, 0, tail))

    start_block = functools.partial(for_each_copy, act=lambda copy: copy.start())
    wait_block = functools.partial(for_each_copy, act=lambda copy: copy.wait())

    def products_of(slot, offset):
        """Returns the products of a piece's keys with the queries of each key/value head, [parts * W, 128] f32 each."""
        if not plan.as_words:
            keys = [refs.blocks[slot, head, pl.ds(offset, _PIECE)] for head in range(num_kv_heads)]
            keys = [x.astype(jnp.bfloat16) for x in keys]
            return [tpu_tiles.dot(refs.query[0, i], x, (1, 1)) for i, x in enumerate(keys)]
        products = []
        size = refs.blocks.shape[3]
        for line, i in itertools.product(range(plan.lines), range(refs.blocks.shape[1])):
            at = pl.ds(offset, _PIECE)
            if plan.lines > 1:
                at = pl.ds(offset * plan.lines + line, _PIECE, stride=plan.lines)
            words = refs.blocks.at[slot, i][at, :]
            for byte in range(_PACK):
                head = line * _PACK + byte
                query = refs.query[0, head, :, i * size : (i + 1) * size]
                product = tpu_tiles.dot(query, _number(words, byte, plan.dtype), (1, 1))
                if i == 0:
                    products.append(product)
                else:
                    products[head] += product
        return products

    def score_piece(block, slot, offset):
        tiles = [None] * (num_rows // SUBLANES)
        for head, products in enumerate(products_of(slot, offset)):
            w = plan.query_rows
            parts = [products[i * w : (i + 1) * w] for i in range(plan.query_parts)]
            token_scale = refs.scale_blocks[slot, head : head + 1, pl.ds(offset, _PIECE)]
            score = sum(parts[1:], start=parts[0]) * (plan.scale * token_scale)
            first, last = head * per_head, (head + 1) * per_head - 1
            for tile in range(first // SUBLANES, last // SUBLANES + 1):
                row = (tile - first // SUBLANES) * SUBLANES
                part = score[row : row + SUBLANES]
                if tiles[tile] is not None:
                    own = tpu_tiles.rows_between(part.shape, first - tile * SUBLANES, SUBLANES)
                    part = jnp.where(own, part, tiles[tile])
                tiles[tile] = part
        index = block * plan.block_kv + offset + lax.broadcasted_iota(jnp.int32, tiles[0].shape, 1)
        visible = (index >= begin) & (index < end)
        at = pl.ds(pl.multiple_of((block - first_block) * plan.block_kv + offset, LANES), _PIECE)
        for tile, score in enumerate(tiles):
            order = selection.order_key(score)
            order = jnp.where(visible & (order != selection.NAN), order, selection.DEAD)
            refs.scores[tile * SUBLANES : (tile + 1) * SUBLANES, at] = order

    def score_block(i, carry):
        pl.when(i + 1 < num_visited)(lambda: start_block(i + 1))
        wait_block(i)
        piece = lambda p, _: score_piece(first_block + i, i % 2, pl.multiple_of(p * _PIECE, _PIECE))
        lax.fori_loop(0, plan.block_kv // _PIECE, piece, None)
        return carry

    pl.when(num_visited > 0)(lambda: start_block(0))
    lax.fori_loop(0, num_visited, score_block, None)

    ranked = refs.scores
    if refs.pooled is not None:
        ranked, chunk = refs.pooled, chunk_width(num_rows, plan.block_kv)
        pool_order_keys(
            refs.scores,
            ranked,
            0,
            num_visited * (plan.block_kv // chunk),
            chunk=chunk,
            num_sets=plan.num_sets,
            per_set=per_set,
            pooling=plan.pooling,
        )
    chunk = chunk_width(ranked.shape[0], plan.block_kv)
    end_chunk = num_visited * (plan.block_kv // chunk)
    count, threshold, tie_cut = select_rows(ranked, refs.budget[0], 0, end_chunk, chunk=chunk)
    tiles = next(n for n in range(_LIST_TILES, 0, -1) if plan.block_kv // LANES % n == 0)
    steps = num_visited * (plan.block_kv // LANES // tiles)
    list_rows(
        ranked,
        refs.lists.at[0],
        refs.listed,
        refs.bounds,
        refs.counting,
        threshold,
        tie_cut,
        steps,
        tiles=tiles,
    )
    for line, fact in enumerate((count, threshold, tie_cut)):
        refs.chosen[0, line : line + 1, :] = as_row(fact)


def _bfloat16_parts(query):
    """Returns what adds up to the query, the smallest part first, as they are added: one of bfloat16, three of float32."""
    if query.dtype == jnp.bfloat16:
        return [query]
    parts, rest, bits = [], query, jnp.finfo(jnp.bfloat16)
    for _ in range(3):
        # Not by a conversion there and back, which XLA may leave out.
        taken = lax.reduce_precision(rest, bits.nexp, bits.nmant)
        parts.append(taken.astype(jnp.bfloat16))
        rest = jnp.where(jnp.isfinite(taken), rest - taken, 0.0)
    return parts[::-1]


def _query_windows(query, num_kv_heads: int):
    """Cuts the queries of each key/value head out of those of all, in whole registers.

    Returns:
      [B, K, parts * W, H] bfloat16, the number of parts, and W.
    """
    b, n, h = query.shape
    group = n // num_kv_heads
    firsts = [head * group // SUBLANES * SUBLANES for head in range(num_kv_heads)]
    size = max(round_up((head + 1) * group, SUBLANES) - first for head, first in enumerate(firsts))
    parts = _bfloat16_parts(query)
    parts = [jnp.pad(part, ((0, 0), (0, size), (0, 0))) for part in parts]
    windows = [jnp.concatenate([part[:, i : i + size] for part in parts], axis=1) for i in firsts]
    return jnp.stack(windows, axis=1), len(parts), size


def _as_words(values):
    """Packs each four neighbouring heads into words, the first lowest: [B, S, K, H] -> [B, S * K / 4, H]."""
    b, s, k, h = values.shape
    grouped = jnp.moveaxis(values.reshape(b, s, k // _PACK, _PACK, h), 3, 4)
    return lax.bitcast_convert_type(grouped, jnp.int32).reshape(b, -1, h)


def _check(key, value, page_table):
    """Refuses what the kernels cannot take; an interpreter has no layouts, so that there any cache runs."""
    if key.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got query of dtype {key.dtype.name}, wanted float32 or bfloat16"
        )
    _, s, k, _ = key.shape
    if page_table is not None and s % LANES:
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got a page_table of pages of {s} tokens beside a quantized_key, wanted pages of at least {LANES}"
        )
    if interpret_options() is not None:
        return
    if s % SUBLANES and not _in_words(k):
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got a quantized_key of {s} keys of {k} heads, wanted a multiple of {SUBLANES}"
        )
    try:
        gather_attention._check_layout(key, value)
    except NotImplementedError as error:
        raise NotImplementedError(f"{_OP}: mosaic_tpu beside a quantized_key: {error}") from error


def topk_decode_attention(query, key, value, *, quantized_key, certified, page_table, **rest):
    """Arguments as the public function, checked; returns (out, lse, TopKSelection).

    Raises:
      NotImplementedError: what the call without a copy refuses; beside one, pages of less than 128 tokens, caches that
        `gather_attention` refuses, or score rows and lists that do not fit VMEM.
    """
    if quantized_key is None or certified:
        plain = dict(quantized_key=None, certified=False, page_table=page_table)
        return mosaic_tpu.topk_decode_attention(query, key, value, **plain, **rest)
    _check(key, value, page_table)
    return _by_copy(query, key, value, quantized_key, page_table, **rest)


def _by_copy(
    query,
    key,
    value,
    copy,
    page_table,
    *,
    topk,
    lengths,
    scope,
    pooling,
    window,
    scale,
    with_indices,
    block_sizes=None,
):
    """Attends to the keys that the copy ranks highest."""
    (b, n, _), (num_tables, s, k, _) = query.shape, key.shape
    page, table = s, None
    if page_table is not None:
        table = paging.safe_table(page_table, lengths, page=page, num_pages=num_tables)
        s = page * table.shape[1]
    num_sets = pooling_.num_sets(scope, n, k)
    per_set = n // num_sets
    begins, ends = mosaic_tpu._range_of(b, s, lengths, window)
    budget = selection.rows_of(topk, (b, n))[:, ::per_set]
    # Without a static budget the list has room for every key.
    size = min(topk, s) if isinstance(topk, int) else s
    count, threshold, tie_cut, places = _select(
        query,
        copy,
        table,
        begins,
        ends,
        budget,
        list_size=size,
        window=window,
        scale=scale,
        pooling=pooling,
        block_sizes=block_sizes,
    )
    rows = places
    if table is not None:
        # The pools are one table of rows, which all sequences share.
        key, value = (x.reshape(1, num_tables * page, k, -1) for x in (key, value))
        rows = paging.pool_rows(places, table, page)
    out, lse = gather_attention.gather_attention(
        query[:, None], key, value, rows[:, None], scale=scale
    )
    indices = None
    if with_indices:
        room = ((0, 0), (0, 0), (0, topk - size))
        indices = jnp.pad(places, room, constant_values=-1)
    selected = TopKSelection(indices, count, selection.key_to_score(threshold), tie_cut)
    return out[:, 0], lse[:, :, 0], selection.repeat_for_heads(selected, per_set)


def _select(
    query, copy, table, begins, ends, budget, *, list_size, window, scale, pooling, block_sizes=None
):
    """Returns count, threshold key and tie cut, int32 [B, G], and lists of places [B, G, list_size], -1 at the tail."""
    (b, n, h), (_, s, k, _) = query.shape, copy.values.shape
    page = None
    if table is not None:
        page, s = s, s * table.shape[1]
    num_sets = budget.shape[1]
    rows, sets = round_up(n, SUBLANES), round_up(num_sets, SUBLANES)
    block_kv = mosaic_tpu._block_kv(b, s, k, h, copy.values.dtype, block_sizes)
    num_blocks = pl.cdiv(s, block_kv)
    if window is not None:
        # So many keys may begin anywhere in a block.
        num_blocks = min(num_blocks, pl.cdiv(window - 1, block_kv) + 1)
    queries, parts, window_rows = _query_windows(query, k)
    options = interpret_options()
    plan = _Plan(
        num_heads=n,
        num_kv_heads=k,
        num_sets=num_sets,
        num_keys=s,
        page=page,
        num_blocks=num_blocks,
        block_kv=block_kv,
        query_parts=parts,
        query_rows=window_rows,
        as_words=_in_words(k),
        # The device simulator reads no other view of a buffer than its own, so that there the words are made beforehand.
        made_outside=options is not None and options.simulate,
        dtype=copy.values.dtype,
        scale=scale,
        pooling=pooling,
    )
    values = copy.values
    if not plan.as_words:
        values = jnp.swapaxes(values, 1, 2)
    elif plan.made_outside:
        values = _as_words(values)
    token_scale = jnp.swapaxes(copy.scale, 1, 2)
    if page is None:
        token_scale = jnp.pad(token_scale, ((0, 0), (0, 0), (0, round_up(s, LANES) - s)))
    operands = {
        "begins": begins,
        "ends": ends,
        "query": queries,
        "budget": jnp.pad(budget, ((0, 0), (0, sets - num_sets)))[..., None],
        **({} if table is None else {"page_table": table[:, None]}),
        "values": values,
        "token_scale": token_scale,
    }
    chosen, lists = _launch(operands, plan, rows=rows, sets=sets, list_size=list_size)
    count, threshold, tie_cut = (chosen[:, i, :num_sets] for i in range(3))
    # The kernel counts from the first block that a sequence sees.
    offset = (begins // block_kv * block_kv)[:, None]
    tie_cut = jnp.where(tie_cut < 0, -1, tie_cut + offset)
    lists = lists[:, :num_sets, :list_size]
    return count, threshold, tie_cut, jnp.where(lists < 0, -1, lists + offset[..., None])


def _launch(operands, plan: _Plan, *, rows: int, sets: int, list_size: int):
    """Returns chosen [B, 3, Q] and lists [B, Q, L], both int32."""
    b = operands["query"].shape[0]
    h = operands["values"].shape[-1]
    i32, f32 = jnp.int32, jnp.float32
    width, block_kv, k = plan.num_blocks * plan.block_kv, plan.block_kv, plan.num_kv_heads
    shared = plan.num_sets < plan.num_heads
    # An interpreter takes heads that are no multiple of 128.
    lanes = LANES if h % LANES == 0 else h
    words = (2, h // lanes, block_kv * plan.lines, lanes)
    block = words if plan.as_words else (2, k, block_kv, h)
    scratch = {
        "scores": pltpu.VMEM((rows, width), i32),
        **({"pooled": pltpu.VMEM((sets, width), i32)} if shared else {}),
        "blocks": pltpu.VMEM(block, i32 if plan.as_words else plan.dtype),
        "scale_blocks": pltpu.VMEM((2, k, block_kv), f32),
        "listed": pltpu.VMEM((sets, LANES), i32),
        "bounds": pltpu.VMEM((2, sets, LANES), i32),
        "counting": pltpu.VMEM((LANES, 2 * LANES), jnp.bfloat16),
        "arrived": pltpu.SemaphoreType.DMA((2,)),
        "scales_arrived": pltpu.SemaphoreType.DMA((2,)),
    }
    lists = round_up(list_size, LANES)
    outputs = {
        "chosen": jax.ShapeDtypeStruct((b, 3, sets), i32),
        "lists": jax.ShapeDtypeStruct((b, sets, lists), i32),
    }
    name = f"topk_decode_copy_{plan.dtype.name}_g{plan.num_sets}_kv{block_kv}"
    name += ("_words" if plan.as_words else "") + (f"_page{plan.page}" if plan.page else "")
    copies = 2 * block_kv * (k * round_up(h, LANES) + 4 * round_up(k, SUBLANES))
    needed = 4 * width * (rows + (sets if shared else 0)) + copies + 8 * sets * lists
    # Every copy lies within the copied cache, as lengths and tables were clipped to it.
    return tpu_launch.call_by_name(
        functools.partial(_kernel, plan=plan),
        _Refs,
        operands,
        scalars=("begins", "ends"),
        outputs=outputs,
        scratch=scratch,
        in_hbm=("values", "token_scale"),
        in_smem=("page_table",),
        vmem_limit_bytes=check_vmem(
            _OP, needed, f"{rows} rows of S={plan.num_keys} and {sets} lists of {list_size}"
        ),
        cost_estimate=pl.CostEstimate(
            # A product, and two operations a score in each of some 40 passes.
            flops=b * plan.num_heads * width * (2 * h + 80),
            bytes_accessed=b * width * k * (h + 4),
            transcendentals=0,
        ),
        name=name,
    )
