"""Selection fused with the scoring that feeds it: no score leaves VMEM (Mosaic TPU).

An op brings a `Scorer`: its arrays and how a tile of scores is made of them. Here are the grid, the row buffer and the lists.

1. Blocks of keys stream in, double-buffered; their scores become int32 order keys in a row buffer.
2. At the last block, bisection over that buffer gives count, threshold and tie cut (`select_rows`).
3. `list_rows` packs the kept positions of each row to the front, in ascending order, where a list is wanted.

A row block is `rows` query rows of one sequence (prefill). Where there are fewer than 8 query rows (decoding), the rows of
several sequences, its members, share a block, so that the search has whole registers. Grid (row blocks, members, key blocks);
the last two carry the row buffer and run in order. Key blocks past what a member's rows may see are neither copied nor scored,
and what a shorter member leaves of the block's longest is filled as dead. All masks come as one number a row: how many leading
keys it sees. Numbers of rows travel along lanes, [2, rows], since a column [rows, 1] would take 512 bytes a row in HBM.

VMEM: rows x S x 4 bytes of order keys, two blocks of each array, two of the lists. `write_scores` runs the same tiles but
writes them out. Compiled ahead of time for v5e, v5p, v6e and tpu7x, and interpreted; never executed on a TPU.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import compat, selection
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.core.tpu_launch import check_vmem
from pallas_kernels.core.tpu_tiles import LANES, SUBLANES, as_row, round_up
from pallas_kernels.ops.topk_select.mosaic_tpu import chunk_width, select_rows

_LIST_TILES = 8
_MAX_BLOCKS = 1 << 16  # row blocks x members: two int32 each in SMEM, which holds 1 MiB


@dataclasses.dataclass(frozen=True)
class Layout:
    """How [B, T] rows and S keys are cut into blocks.

    rows: query rows of a sequence in a block.
    cell: rows that one tile of scores has, 8 or 1.
    members: sequences in a block.
    """

    batch: int
    num_rows: int
    num_keys: int
    rows: int
    cell: int
    members: int
    block_kv: int

    @classmethod
    def of(cls, batch: int, num_rows: int, num_keys: int, *, rows: int, block_kv: int) -> "Layout":
        """Rounds the sizes to whole tiles; fewer than 8 query rows make decoding's layout."""
        block_kv = round_up(min(block_kv, round_up(num_keys, LANES)), LANES)
        sizes = dict(batch=batch, num_rows=num_rows, num_keys=num_keys, block_kv=block_kv)
        if num_rows < SUBLANES:
            members = min(batch, SUBLANES // num_rows)
            return cls(rows=num_rows, cell=1, members=members, **sizes)
        # A power of two, so that blocks of rows never straddle a register's lanes.
        rows = min(1 << (max(rows, SUBLANES).bit_length() - 1), LANES, pl.next_power_of_2(num_rows))
        return cls(rows=rows, cell=SUBLANES, members=1, **sizes)

    @property
    def row_blocks(self) -> int:
        """Row blocks of one sequence."""
        return pl.cdiv(self.num_rows, self.rows)

    @property
    def groups(self) -> int:
        """Row blocks in all."""
        return pl.cdiv(self.batch, self.members) * self.row_blocks

    @property
    def key_blocks(self) -> int:
        """Key blocks."""
        return pl.cdiv(self.num_keys, self.block_kv)

    @property
    def buffer_rows(self) -> int:
        """Rows of the row buffer, whole registers."""
        return round_up(self.members * self.rows, SUBLANES)

    @property
    def width(self) -> int:
        """Keys of the row buffer, whole blocks."""
        return self.key_blocks * self.block_kv

    def by_group(self, x):
        """Cuts [B, T] into [groups, members, rows], filled up with zeros."""
        sequences = pl.cdiv(self.batch, self.members)
        x = jnp.pad(
            x,
            (
                (0, sequences * self.members - self.batch),
                (0, self.row_blocks * self.rows - self.num_rows),
            ),
        )
        x = x.reshape(sequences, self.members, self.row_blocks, self.rows)
        return jnp.swapaxes(x, 1, 2).reshape(self.groups, self.members, self.rows)

    def by_sequence(self, x):
        """Puts [groups, buffer rows, ...] back together: [B, T, ...]."""
        rest = x.shape[2:]
        x = x[:, : self.members * self.rows]
        x = x.reshape(-1, self.row_blocks, self.members, self.rows, *rest)
        x = jnp.swapaxes(x, 1, 2).reshape(-1, self.row_blocks * self.rows, *rest)
        return x[: self.batch, : self.num_rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """What an op reads, and how it makes scores of it.

    name: of the kernel, as a profile shows it.
    rows: arrays [B, ...] of query rows: (array, shape of a row block without B, its place given the row block's number).
    keys: arrays [B, ...] with the keys on one axis: (array, that axis).
    scratch: VMEM buffers.
    prepare: called with every ref by name, and the row block, before the first key block of a member; fills the scratch.
    tile: called with every ref by name, the cell, and the tile's first key within the block; returns float32 scores as a
      list of [cell, 128] registers.
    width: keys of a tile, divides the key block.
    flops: operations a row and key.
    """

    name: str
    rows: Mapping[str, tuple[jax.Array, tuple[int, ...], Callable[..., tuple]]]
    keys: Mapping[str, tuple[jax.Array, int]]
    scratch: Mapping[str, tuple[tuple[int, ...], jnp.dtype]]
    prepare: Callable[..., None]
    tile: Callable[..., list[jax.Array]]
    width: int
    flops: int


def lanes(start, size: int):
    """Returns the slice of `size` keys from a multiple of 128 on."""
    return pl.ds(pl.multiple_of(start, LANES), size)


def cell_rows(cell, size: int = SUBLANES):
    """Returns the slice of a cell's rows within its member."""
    return pl.ds(pl.multiple_of(cell * size, size), size)


def as_column(line, size: int, first=0):
    """Turns lanes into sublanes, exactly: `size` lanes of [1, n] from `first` on -> [size, 1]."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (size, line.shape[1]), axis) for axis in (0, 1))
    line = jnp.where(lane == row + first, line, jnp.zeros_like(line))
    return jnp.sum(line, axis=1, keepdims=True)


def list_rows(
    keys_ref, out_ref, listed_ref, bounds_ref, counting_ref, threshold, tie_cut, num_steps, *, tiles
):
    """Lists the kept positions of each row of a buffer in ascending order, -1 at the tail.

    A register's kept lanes are packed to its front: lane j moves left by the number of lanes before it that are not kept,
    one bit of that distance a step, lowest first; no two lanes ever meet. The packed lanes are then turned to where the
    row's list stands and merged into the one or two registers of the list that they fall into.

    Args:
      keys_ref: int32 [R, W] order keys in VMEM.
      out_ref: int32 [R, L] in VMEM; L a multiple of 128, at least the longest list.
      listed_ref: int32 [R, 128] scratch: how many positions of the row are listed so far, in every lane.
      bounds_ref: int32 [2, R, 128] scratch: threshold and tie cut, in every lane, where loops find them again.
      counting_ref: bfloat16 [128, 256] scratch, a matrix of ones and zeros.
      threshold, tie_cut: int32 [R, 1] from `select_rows`; a row that keeps nothing has `NOTHING` and -1.
      num_steps: int32 scalar; only the first `num_steps` x `tiles` registers of a row are read, the others hold nothing.
      tiles: registers of a row that are looked through before it is decided whether there is anything to pack.
    """
    shape = keys_ref.shape[0], LANES
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    for i, bound in enumerate((threshold, tie_cut)):
        bounds_ref[i] = jnp.broadcast_to(bound, shape)
    # Times 0/1 lanes: how many are set before each lane, and how many in all.
    before, after = (lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), axis) for axis in (0, 1))
    counting = jnp.where((after >= LANES) | (before < after), 1.0, 0.0)
    counting_ref[...] = counting.astype(counting_ref.dtype)

    def kept_in(tile):
        start = pl.multiple_of(tile * LANES, LANES)
        keys, (threshold, tie_cut) = keys_ref[:, pl.ds(start, LANES)], bounds_ref[...]
        return (keys > threshold) | ((keys == threshold) & (start + lane <= tie_cut))

    def merge(tile):
        kept = kept_in(tile)
        ones = jnp.where(kept, 1.0, 0.0).astype(jnp.bfloat16)
        counts = jnp.dot(ones, counting_ref[...], preferred_element_type=jnp.float32).astype(
            jnp.int32
        )
        rank, total = counts[:, :LANES], counts[:, LANES:]
        # Seven bits of distance, seven of the lane that it was, and one that says that there is something.
        packed = jnp.where(kept, (1 << 14) | (lane << 7) | (lane - rank), 0)
        for bit in (1 << i for i in range(7)):
            moving = jnp.where((packed & bit) != 0, packed, 0)
            packed = (packed ^ moving) | pltpu.roll(moving, LANES - bit, 1)
        listed = listed_ref[...]
        turn = listed & (LANES - 1)
        for bit in (1 << i for i in range(7)):
            packed = jnp.where((turn & bit) != 0, pltpu.roll(packed, bit, 1), packed)
        register = (listed >> 7) + jnp.where(lane >= turn, 0, 1)
        register = jnp.where(packed != 0, register, -1)
        position = tile * LANES + ((packed >> 7) & (LANES - 1))
        has_any = total > 0
        first = jnp.min(jnp.where(has_any, listed, out_ref.shape[1])) // LANES
        listed = listed + total
        last = jnp.max(jnp.where(has_any, listed - 1, -1)) // LANES

        def write(i, carry):
            part = out_ref.at[:, pl.ds(pl.multiple_of(i * LANES, LANES), LANES)]
            part[...] = jnp.where(register == i, position, part[...])
            return carry

        lax.fori_loop(first, last + 1, write, 0)
        listed_ref[...] = listed

    def step(group, carry):
        hits = [kept_in(group * tiles + i) for i in range(tiles)]

        @pl.when(jnp.max(jnp.where(functools.reduce(jnp.logical_or, hits), 1, 0)) > 0)
        def _pack():
            lax.fori_loop(0, tiles, lambda i, _: merge(group * tiles + i), None)

        return carry

    out_ref[...] = jnp.full_like(out_ref, -1)
    listed_ref[...] = jnp.zeros_like(listed_ref)
    lax.fori_loop(0, num_steps, step, 0)


def _score_block(layout: Layout, scorer: Scorer, refs: dict, seen_ref, member, block, write):
    """Scores a member's rows against one block of keys; calls write(row, first key, scores, visible) tile by tile."""
    start = pl.multiple_of(block * layout.block_kv, LANES)
    first_row = member * layout.rows

    def cell(i, offset):
        row = first_row + i * layout.cell
        seen = seen_ref[pl.ds(row, layout.cell), :]
        for j, scores in enumerate(scorer.tile(refs, i, offset)):
            first = pl.multiple_of(start + offset + j * LANES, LANES)
            index = first + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            write(row, first, scores, index < seen)

    def column(c, carry):
        offset = pl.multiple_of(c * scorer.width, LANES)
        if layout.cell == SUBLANES:
            return lax.fori_loop(0, layout.rows // SUBLANES, lambda i, _: cell(i, offset), carry)
        for i in range(layout.rows):
            cell(i, offset)
        return carry

    lax.fori_loop(0, layout.block_kv // scorer.width, column, None)


def _begin_member(layout: Layout, scorer: Scorer, refs: dict, limits_ref, group, member, block):
    """Spreads the rows' limits over lanes, once a row block, and prepares the scorer, once a member."""

    @pl.when((block == 0) & (member == 0))
    def _spread_limits():
        seen = as_column(limits_ref[0, 0:1, :], layout.buffer_rows)
        refs["seen"][...] = jnp.broadcast_to(seen, refs["seen"].shape)

    pl.when(block == 0)(lambda: scorer.prepare(refs, group % layout.row_blocks))


def _select_kernel(
    visited_ref,  # [groups * members] i32, SMEM: key blocks that a member's rows reach
    ends_ref,  # [groups] i32, SMEM: the most of its members
    limits_ref,  # [1, 2, R] i32, VMEM: keys that each row sees, its budget
    *refs,  # the scorer's inputs; chosen [1, 3, R] i32; indices [1, R, L] i32 if wanted; scratch
    layout: Layout,
    scorer: Scorer,
    chunk: int,
    with_indices: bool,
):
    inputs = (*scorer.rows, *scorer.keys)
    outputs = ("chosen", "indices") if with_indices else ("chosen",)
    listing = ("bounds", "counting") if with_indices else ()
    names = (*inputs, *outputs, "keys", "seen", *listing, *scorer.scratch)
    refs = dict(zip(names, refs, strict=True))
    keys_ref, seen_ref = refs["keys"], refs["seen"]
    group, member, block = (pl.program_id(i) for i in range(3))
    visited, end = visited_ref[group * layout.members + member], ends_ref[group]
    _begin_member(layout, scorer, refs, limits_ref, group, member, block)

    def rank(row, first, scores, visible):
        order = selection.order_key(scores)
        order = jnp.where(visible & (order != selection.NAN), order, selection.DEAD)
        if layout.cell == SUBLANES:
            keys_ref[pl.ds(pl.multiple_of(row, SUBLANES), SUBLANES), pl.ds(first, LANES)] = order
        else:
            put_rows(order, row, 1, first)

    def put_rows(order, row, count, first):
        """Writes rows of decoding's 8, which stores of single rows at traced places cannot."""
        at = slice(None), pl.ds(first, order.shape[1])
        shape = SUBLANES, order.shape[1]
        index = lax.broadcasted_iota(jnp.int32, shape, 0)
        own = (index >= row) & (index < row + count)
        keys_ref[at] = jnp.where(own, jnp.broadcast_to(order, shape), keys_ref[at])

    pl.when(block < visited)(
        lambda: _score_block(layout, scorer, refs, seen_ref, member, block, rank)
    )

    if layout.members > 1:

        @pl.when((block >= visited) & (block < end))
        def _fill():
            dead = jnp.full((1, layout.block_kv), selection.DEAD, jnp.int32)
            start = pl.multiple_of(block * layout.block_kv, LANES)
            put_rows(dead, member * layout.rows, layout.rows, start)

    @pl.when((member == layout.members - 1) & (block == layout.key_blocks - 1))
    def _select():
        budget = as_column(limits_ref[0, 1:2, :], layout.buffer_rows)
        chosen = select_rows(keys_ref, budget, 0, end * (layout.block_kv // chunk), chunk=chunk)
        for line, value in enumerate(chosen):
            refs["chosen"][0, line : line + 1, :] = as_row(value)
        if with_indices:
            _, threshold, tie_cut = chosen
            tiles = math.gcd(layout.block_kv // LANES, _LIST_TILES)
            steps = end * (layout.block_kv // LANES // tiles)
            # The limits have served; their buffer counts what is listed.
            lists_ref = refs["indices"].at[0]
            list_rows(
                keys_ref,
                lists_ref,
                seen_ref,
                refs["bounds"],
                refs["counting"],
                threshold,
                tie_cut,
                steps,
                tiles=tiles,
            )


def _scores_kernel(
    visited_ref,  # [groups] i32, SMEM
    limits_ref,  # [1, 2, R] i32, VMEM
    *refs,  # the scorer's inputs; out [1, rows, block_kv] f32; scratch
    layout: Layout,
    scorer: Scorer,
):
    names = (*scorer.rows, *scorer.keys, "out", "seen", *scorer.scratch)
    refs = dict(zip(names, refs, strict=True))
    out_ref, seen_ref = refs["out"], refs["seen"]
    group, block = pl.program_id(0), pl.program_id(2)
    visited = visited_ref[group]
    _begin_member(layout, scorer, refs, limits_ref, group, 0, block)

    def put(row, first, scores, visible):
        first = pl.multiple_of(first - block * layout.block_kv, LANES)
        scores = jnp.where(visible, scores, -jnp.inf)
        out_ref[0, pl.ds(row, layout.cell), pl.ds(first, LANES)] = scores

    pl.when(block < visited)(lambda: _score_block(layout, scorer, refs, seen_ref, 0, block, put))

    @pl.when(block >= visited)
    def _hide():
        out_ref[...] = jnp.full_like(out_ref, -jnp.inf)


def _tiled_bytes(shape: tuple[int, ...], dtype) -> int:
    """Returns the bytes of a VMEM buffer, its last two axes filled up to whole tiles."""
    *outer, sublanes, lanes = shape
    itemsize = jnp.dtype(dtype).itemsize
    tile = SUBLANES * 4 // itemsize
    return math.prod(outer) * round_up(sublanes, tile) * round_up(lanes, LANES) * itemsize


def _key_block(layout: Layout, array, axis: int) -> tuple[int, ...]:
    return (1, *(layout.block_kv if i == axis else n for i, n in enumerate(array.shape) if i))


def _blocks_bytes(layout: Layout, scorer: Scorer) -> int:
    """Returns the VMEM of what the scorer reads, two blocks of each."""
    blocks = [(block, x.dtype) for x, block, _ in scorer.rows.values()]
    blocks += [(_key_block(layout, x, axis), x.dtype) for x, axis in scorer.keys.values()]
    return 2 * sum(_tiled_bytes(*block) for block in blocks)


def _in_specs(layout: Layout, scorer: Scorer) -> list[pl.BlockSpec]:
    """Specs of the limits and the scorer's arrays; the first prefetched scalar is `visited`."""

    def sequence(group, member):  # filling-up members read the last sequence, and see none of it
        return jnp.minimum(group // layout.row_blocks * layout.members + member, layout.batch - 1)

    def row_spec(array, block, place):
        at = lambda g, m, k, *_: (sequence(g, m), *place(g % layout.row_blocks))
        return pl.BlockSpec((1, *block), at)

    def key_spec(array, axis):
        def at(g, m, k, visited_ref, *_):
            # A block that is not visited repeats the last one that is, and so costs no copy.
            block = jnp.minimum(k, jnp.maximum(visited_ref[g * layout.members + m] - 1, 0))
            return (sequence(g, m), *(block if i == axis else 0 for i in range(1, array.ndim)))

        return pl.BlockSpec(_key_block(layout, array, axis), at)

    limits = pl.BlockSpec((1, 2, layout.buffer_rows), lambda g, m, k, *_: (g, 0, 0))
    rows = [row_spec(*operand) for operand in scorer.rows.values()]
    return [limits, *rows, *(key_spec(*operand) for operand in scorer.keys.values())]


def _limits(op: str, layout: Layout, seen, budget):
    """Returns what a launch needs to know of its rows: visited, ends, limits."""
    if layout.groups * layout.members > _MAX_BLOCKS:
        raise NotImplementedError(
            f"{op}: mosaic_tpu got {layout.batch} x {layout.num_rows} rows in "
            f"{layout.groups * layout.members} blocks, wanted at most {_MAX_BLOCKS} blocks"
        )
    seen, budget = layout.by_group(jnp.clip(seen, 0, layout.num_keys)), layout.by_group(budget)
    visited = pl.cdiv(jnp.max(seen, axis=2), jnp.int32(layout.block_kv))
    limits = jnp.stack([seen, budget], axis=1).reshape(layout.groups, 2, -1)
    padding = layout.buffer_rows - limits.shape[2]
    limits = jnp.pad(limits, ((0, 0), (0, 0), (0, padding)))
    return visited.reshape(-1), jnp.max(visited, axis=1), limits


def _arrays(scorer: Scorer) -> list[jax.Array]:
    return [operand[0] for operand in (*scorer.rows.values(), *scorer.keys.values())]


def _call(kernel, op: str, layout: Layout, scorer: Scorer, scalars, limits, *, out, scratch, **kw):
    """Launches a kernel; `out` are (shape, dtype, block, index map), `scratch` what it has beside the scorer's."""
    scratch = [*scratch, *scorer.scratch.values()]
    needed = _blocks_bytes(layout, scorer) + sum(
        _tiled_bytes(shape, dtype) for shape, dtype in scratch
    )
    needed += sum(2 * _tiled_bytes(block, dtype) for _, dtype, block, _ in out)
    arrays = _arrays(scorer)
    pairs = layout.batch * layout.num_rows * layout.num_keys
    return pl.pallas_call(
        functools.partial(kernel, layout=layout, scorer=scorer, **kw),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _, _ in out],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(layout.groups, layout.members, layout.key_blocks),
            in_specs=_in_specs(layout, scorer),
            out_specs=[pl.BlockSpec(block, at) for _, _, block, at in out],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=check_vmem(
                op, needed, f"{layout.buffer_rows} rows of S={layout.num_keys}"
            ),
        ),
        cost_estimate=pl.CostEstimate(
            flops=pairs * scorer.flops,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            transcendentals=0,
        ),
        interpret=compat.tpu_interpret(interpret_options()),
        name=f"{scorer.name}_r{layout.rows}x{layout.members}_kv{layout.block_kv}",
    )(*scalars, limits, *arrays)


def select(
    op: str, layout: Layout, scorer: Scorer, seen, budget, *, list_size: int | None
) -> TopKSelection:
    """Selects from fused scores.

    Args:
      seen, budget: int32 [B, T]: how many leading keys each row sees, how many it keeps.
      list_size: length of the index lists; None makes none.

    Raises:
      NotImplementedError: the row buffer does not fit VMEM, or there are too many row blocks.
    """
    visited, ends, limits = _limits(op, layout, seen, budget)
    r = layout.buffer_rows
    per_group = lambda g, m, k, *_: (g, 0, 0)
    out = [((layout.groups, 3, r), jnp.int32, (1, 3, r), per_group)]
    scratch = [((r, layout.width), jnp.int32), ((r, LANES), jnp.int32)]
    if list_size is not None:
        size = min(list_size, layout.num_keys)
        block = (1, r, round_up(size, LANES))
        if layout.cell == SUBLANES:
            shape = layout.batch, layout.num_rows, size
            at = lambda g, m, k, *_: (g // layout.row_blocks, g % layout.row_blocks, 0)
        else:
            shape, at = (layout.groups, r, size), per_group
        out.append((shape, jnp.int32, block, at))
        scratch += [((2, r, LANES), jnp.int32), ((LANES, 2 * LANES), jnp.bfloat16)]
    chosen, *lists = _call(
        _select_kernel,
        op,
        layout,
        scorer,
        (visited, ends),
        limits,
        out=out,
        scratch=scratch,
        chunk=chunk_width(r, layout.block_kv),
        with_indices=list_size is not None,
    )
    count, threshold, tie_cut = (layout.by_sequence(chosen[:, i]) for i in range(3))
    indices = None
    if list_size is not None:
        indices = lists[0] if layout.cell == SUBLANES else layout.by_sequence(lists[0])
        missing = list_size - indices.shape[2]
        indices = jnp.pad(indices, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    return TopKSelection(indices, count, selection.key_to_score(threshold), tie_cut)


def write_scores(op: str, layout: Layout, scorer: Scorer, seen):
    """Returns the scores themselves, float32 [B, T, S], -inf where a row may not look; one member a block."""
    visited, _, limits = _limits(op, layout, seen, jnp.zeros_like(seen))
    (scores,) = _call(
        _scores_kernel,
        op,
        layout,
        scorer,
        (visited,),
        limits,
        out=[
            (
                (layout.batch, layout.num_rows, layout.num_keys),
                jnp.float32,
                (1, layout.rows, layout.block_kv),
                lambda g, m, k, *_: (g // layout.row_blocks, g % layout.row_blocks, k),
            )
        ],
        scratch=[((layout.buffer_rows, LANES), jnp.int32)],
    )
    return scores
