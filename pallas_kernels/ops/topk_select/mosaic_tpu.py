"""Threshold and tie cut of each row, by bisection on ordered bits held in VMEM (Mosaic TPU).

1. Blocks of scores stream in; each becomes int32 order keys in a row buffer, `DEAD` where the row may not look.
2. The threshold is settled by halving the int32 range 32 times: a bound stays while at least `count` keys reach it.
3. Where more keys equal the threshold than the row still needs, their index is halved the same way; this is the tie cut.

HBM is read once, every pass of 2 and 3 reads VMEM, and the counts are integers: exact, and the same in any order. Grid
(rows / block_rows, S / block_s); the second axis carries the row buffer, so it runs in order. Blocks past the longest row
of their group are neither fetched nor scanned. VMEM: block_rows x S x 4 bytes of keys, two blocks of scores. Compiled
ahead of time for v5e, v5p, v6e and tpu7x, and interpreted; never executed on a TPU.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, selection
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.core.tpu_launch import check_vmem
from pallas_kernels.core.tpu_tiles import LANES, round_up
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes

_OP = "topk_select"
_CHUNK_ELEMENTS = 16 * 8 * LANES  # what one step of a pass holds: 16 of the 64 vector registers
_FEW_ROWS = 32  # whose columns take no more than 4 registers
_MAX_ROW_GROUPS = 1 << 17  # one int32 each in SMEM, which holds 1 MiB


def chunk_width(rows: int, block: int) -> int:
    """Returns how many keys of each row one step of a pass reads: a power of two of lanes that divides `block`."""
    width = LANES
    while block % (2 * width) == 0 and rows * 2 * width <= _CHUNK_ELEMENTS:
        width *= 2
    return width


class _Kind(NamedTuple):
    """How the numbers of a row become one."""

    lanewise: Callable
    across: Callable
    start: int


_SUM = _Kind(jnp.add, jnp.sum, 0)
_MAX = _Kind(jnp.maximum, jnp.max, -1)


def select_rows(keys_ref, budget, begin, end, *, chunk: int):
    """Selects the `budget` largest keys of each row of a buffer; equal keys keep the lowest index.

    Args:
      keys_ref: int32 [R, S'] order keys in VMEM, `DEAD` where not visible or NaN; S' a multiple of `chunk`.
      budget: int32 [R, 1].
      begin, end: int32 scalars; only chunks begin <= c < end are read, the others hold nothing.
      chunk: keys of each row read at a time, a multiple of 128.

    Returns:
      count, threshold key and tie cut, each int32 [R, 1].
    """
    num_rows, num_keys = keys_ref.shape

    def scan(measure, kinds, width=chunk):
        """Folds what measure(keys, index) makes of each row: one [R, 1] for each kind."""

        def body(c, totals):
            start = pl.multiple_of(c * width, LANES)
            keys = keys_ref[:, pl.ds(start, width)]
            index = start + lax.broadcasted_iota(jnp.int32, keys.shape, 1)
            folded = []
            for total, hits, kind in zip(totals, measure(keys, index), kinds, strict=True):
                # Whole registers; nothing crosses a lane.
                parts = [hits[:, i : i + LANES] for i in range(0, width, LANES)]
                folded.append(kind.lanewise(total, functools.reduce(kind.lanewise, parts)))
            return folded

        totals = [jnp.full((num_rows, LANES), kind.start, jnp.int32) for kind in kinds]
        steps = chunk // width
        totals = lax.fori_loop(begin * steps, end * steps, body, totals)
        # Integers would cross the lanes in two halves; as float32 all that VMEM has room to count is exact.
        return [
            kind.across(total.astype(jnp.float32), axis=1, keepdims=True).astype(jnp.int32)
            for total, kind in zip(totals, kinds, strict=True)
        ]

    def count_where(hit, width=chunk):
        [counted] = scan(lambda *x: [jnp.where(hit(*x), 1, 0)], [_SUM], width)
        return counted

    alive = count_where(lambda keys, _: keys != selection.DEAD)
    count = jnp.clip(budget, 0, alive)

    def settle(hit, enough, start, bits: int, passes, width=chunk):
        """Returns the largest value that is `enough`, found bit by bit from `start` on; fewer `passes` leave `start`.

        A column takes a register for every 8 rows, so that no other bound is kept beside the value that is tried.
        """

        def body(i, value):
            bit = lax.shift_left(jnp.int32(1), bits - 1 - i)
            tried = value + bit
            counted = count_where(lambda keys, index: hit(keys, index, tried), width)
            return tried - jnp.where(enough(counted), 0, bit)

        return lax.fori_loop(0, passes, body, start)

    # The largest bound that at least `count` keys reach. From the lowest int32 on, the first bit wraps around to 0.
    threshold = settle(
        lambda keys, _, tried: keys >= tried,
        lambda counted: counted >= count,
        jnp.full((num_rows, 1), selection.DEAD, jnp.int32),
        32,
        32,
    )
    # More columns are held from here on; of many rows they take what half a chunk does.
    halved = num_rows > _FEW_ROWS and chunk % (2 * LANES) == 0
    width = chunk // 2 if halved else chunk
    reached, last = scan(
        lambda keys, index: (
            jnp.where(keys >= threshold, 1, 0),
            jnp.where(keys == threshold, index, -1),
        ),
        (_SUM, _MAX),
        width,
    )

    # Most rows take every equal key, and then the cut is the last of them: no pass is needed. Else it is the largest index
    # before which fewer than `count` keys are above the threshold or equal to it.
    surplus = jnp.max(jnp.where(count > 0, reached - count, 0)) > 0
    bits = (num_keys - 1).bit_length()
    cut = settle(
        lambda keys, index, tried: (keys > threshold) | ((keys == threshold) & (index < tried)),
        lambda counted: counted < count,
        jnp.where(surplus, 0, last),
        bits,
        jnp.where(surplus, bits, 0),
        width,
    )

    nothing = count == 0
    threshold = jnp.where(nothing, selection.NOTHING, threshold)
    return count, threshold, jnp.where(nothing, -1, cut)


def _kernel(
    # scalars
    visited_ref,  # [row groups] i32, SMEM: blocks that the longest row of the group reaches
    # inputs
    scores_ref,  # [block_rows, block_s], VMEM
    limits_ref,  # [block_rows, 2] i32, VMEM: valid keys, budget
    # outputs
    chosen_ref,  # [block_rows, 3] i32, VMEM: count, threshold key, tie cut
    # scratch
    keys_ref,  # [block_rows, blocks * block_s] i32, VMEM
    *,
    chunk: int,
):
    visited, block = visited_ref[pl.program_id(0)], pl.program_id(1)
    block_s = scores_ref.shape[1]

    @pl.when(block < visited)
    def _rank_block():
        start = pl.multiple_of(block * block_s, LANES)
        # Step by step, so that the keys of a chunk stay in registers.
        for offset in range(0, block_s, chunk):
            key = selection.order_key(scores_ref[:, offset : offset + chunk])
            index = start + offset + lax.broadcasted_iota(jnp.int32, key.shape, 1)
            valid = (index < limits_ref[:, 0:1]) & (key != selection.NAN)
            keys_ref[:, pl.ds(start + offset, chunk)] = jnp.where(valid, key, selection.DEAD)

    @pl.when(block == pl.num_programs(1) - 1)
    def _select():
        chosen = select_rows(
            keys_ref, limits_ref[:, 1:2], 0, visited * (block_s // chunk), chunk=chunk
        )
        for column, value in enumerate(chosen):
            chosen_ref[:, column : column + 1] = value


def _heuristic(s: int, dtype) -> tuple[int, int]:
    """Returns (block_rows, block_s)."""
    # More rows together hide the latency of a pass; long rows fill the registers alone. bf16 tiles are 16 rows.
    rows = 64 if s <= 8192 else 32 if s <= 16384 else 16 if s <= 32768 else 8
    return max(rows, 32 // dtype.itemsize), 16384


def _sizes(num_rows: int, s: int, dtype, block_sizes) -> tuple[int, int]:
    """Returns (block_rows, block_s), rounded to what the hardware tiles."""
    usual_rows, usual_s = _heuristic(s, dtype)
    sizes = block_sizes_.resolve(
        _OP,
        "mosaic_tpu",
        block_sizes,
        cls=TopKSelectBlockSizes,
        dtype=dtype.name,
        bucket={"rows": num_rows, "s": s},
        heuristic=lambda: TopKSelectBlockSizes(block_rows=usual_rows, block_s=usual_s),
    )
    tile = 32 // dtype.itemsize
    block_rows = round_up(sizes.block_rows or usual_rows, tile)
    block_s = round_up(min(sizes.block_s or usual_s, s), LANES)
    # A block of odd width would leave steps of one register a row.
    return min(block_rows, round_up(num_rows, tile)), round_up(
        block_s, min(1024, pl.next_power_of_2(block_s))
    )


def topk_select(scores, topk, *, lengths, with_indices, block_sizes=None):
    """Arguments as the public function, checked; `lengths` int32 [...] or None, `topk` an int or int32 rows.

    Raises:
      NotImplementedError: float16 or float64 scores, or rows that do not fit VMEM.
    """
    *rows, s = scores.shape
    rows = tuple(rows)
    if scores.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got scores of dtype {scores.dtype.name}, wanted float32 or bfloat16"
        )
    flat = scores.reshape(-1, s)
    num_rows = flat.shape[0]
    valid = jnp.full(rows, s, jnp.int32) if lengths is None else lengths
    budget = selection.rows_of(topk, rows)
    if num_rows == 0:
        chosen = jnp.zeros((0, 3), jnp.int32)
    else:
        limits = jnp.stack([jnp.clip(valid, 0, s).reshape(-1), budget.reshape(-1)], axis=1)
        chosen = _chosen(flat, limits, block_sizes=block_sizes)
    count, threshold, tie_cut = (chosen[:, i].reshape(rows) for i in range(3))
    threshold = selection.key_to_score(threshold)
    indices = None
    if with_indices:
        visible = lax.broadcasted_iota(jnp.int32, scores.shape, len(rows)) < valid[..., None]
        indices = selection.compact(selection.selected(scores, visible, threshold, tie_cut), topk)
    return TopKSelection(indices, count, threshold, tie_cut)


def _chosen(scores, limits, *, block_sizes):
    """Launches the kernel: scores [rows, S], limits int32 [rows, 2] -> int32 [rows, 3]."""
    num_rows, s = scores.shape
    block_rows, block_s = _sizes(num_rows, s, scores.dtype, block_sizes)
    groups, blocks = pl.cdiv(num_rows, block_rows), pl.cdiv(s, block_s)
    if groups > _MAX_ROW_GROUPS:
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got {num_rows} rows in groups of {block_rows}, wanted at most {_MAX_ROW_GROUPS} groups"
        )
    needed = 4 * block_rows * blocks * block_s + 2 * block_rows * block_s * scores.dtype.itemsize
    vmem_limit = check_vmem(_OP, needed, f"{block_rows} rows of S={s}")
    padded = jnp.pad(limits[:, 0], (0, groups * block_rows - num_rows))
    visited = pl.cdiv(jnp.max(padded.reshape(groups, block_rows), axis=1), jnp.int32(block_s))

    def scores_map(group, block, visited_ref):
        # A block that is not visited repeats the last one that is, and so costs no copy.
        return group, jnp.minimum(block, jnp.maximum(visited_ref[group] - 1, 0))

    per_group = lambda group, block, visited_ref: (group, 0)
    return pl.pallas_call(
        functools.partial(_kernel, chunk=chunk_width(block_rows, block_s)),
        out_shape=jax.ShapeDtypeStruct((num_rows, 3), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups, blocks),
            in_specs=[
                pl.BlockSpec((block_rows, block_s), scores_map),
                pl.BlockSpec((block_rows, 2), per_group),
            ],
            out_specs=pl.BlockSpec((block_rows, 3), per_group),
            scratch_shapes=[pltpu.VMEM((block_rows, blocks * block_s), jnp.int32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2
            * 36
            * num_rows
            * s,  # a compare and an add for each of 32 halvings and some four single passes
            bytes_accessed=num_rows * (s * scores.dtype.itemsize + 20),
            transcendentals=0,
        ),
        interpret=compat.tpu_interpret(interpret_options()),
        name=f"topk_select_{scores.dtype.name}_r{block_rows}_s{block_s}",
    )(visited, scores, limits)
