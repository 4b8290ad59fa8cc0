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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, selection
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.core.tpu_tiles import LANES, round_up
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes

_OP = "topk_select"
_CHUNK_ELEMENTS = 16 * 8 * LANES  # what one step of a pass holds: 16 of the 64 vector registers
_MAX_ROW_GROUPS = 1 << 17  # one int32 each in SMEM, which holds 1 MiB
_VMEM_MARGIN = (
    8 << 20
)  # for what the compiler adds: pipeline bookkeeping, spills, lane padding of narrow columns


def chunk_width(rows: int, block: int) -> int:
    """Returns how many keys of each row one step of a pass reads: a power of two of lanes that divides `block`."""
    width = LANES
    while block % (2 * width) == 0 and rows * 2 * width <= _CHUNK_ELEMENTS:
        width *= 2
    return width


def check_vmem(op: str, needed: int, shape: str) -> int:
    """Returns the VMEM limit to ask the compiler for; refuses what the target device cannot hold."""
    limit, capacity = needed + _VMEM_MARGIN, compat.tpu_vmem_bytes()
    if limit > capacity:
        raise NotImplementedError(
            f"{op}: mosaic_tpu got {shape}, which needs {limit >> 20} MiB of VMEM, wanted at most {capacity >> 20} MiB"
        )
    return limit


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

    def fold(hits, combine):  # [R, chunk] -> [R, 128]: whole registers, nothing crosses a lane
        parts = [hits[:, i : i + LANES] for i in range(0, chunk, LANES)]
        return functools.reduce(combine, parts)

    def scan(step, init):  # step(keys, index, carry) over the row, chunk by chunk
        def body(c, carry):
            start = pl.multiple_of(c * chunk, LANES)
            index = start + lax.broadcasted_iota(jnp.int32, (num_rows, chunk), 1)
            return step(keys_ref[:, pl.ds(start, chunk)], index, carry)

        return lax.fori_loop(begin, end, body, init)

    def count_where(hit):
        def step(keys, index, total):
            return total + fold(jnp.where(hit(keys, index), 1, 0), jnp.add)

        return jnp.sum(scan(step, jnp.zeros((num_rows, LANES), jnp.int32)), axis=1, keepdims=True)

    alive = count_where(lambda keys, _: keys != selection.DEAD)
    count = jnp.clip(budget, 0, alive)

    def halve_threshold(_, bounds):  # #(key >= low) >= count > #(key >= high)
        low, high = bounds
        # The range may exceed 2**31; as unsigned arithmetic the difference and its half are right.
        middle = low + lax.shift_right_logical(high - low, jnp.full_like(low, 1))
        enough = count_where(lambda keys, _: keys >= middle) >= count
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    full = functools.partial(jnp.full, (num_rows, 1), dtype=jnp.int32)
    bounds = full(selection.DEAD), full(selection.NOTHING)
    threshold, _ = lax.fori_loop(0, 32, halve_threshold, bounds)

    def tally(keys, index, carry):
        above, equal, last = carry
        is_equal = keys == threshold
        above += fold(jnp.where(keys > threshold, 1, 0), jnp.add)
        equal += fold(jnp.where(is_equal, 1, 0), jnp.add)
        return above, equal, jnp.maximum(last, fold(jnp.where(is_equal, index, -1), jnp.maximum))

    zeros = jnp.zeros((num_rows, LANES), jnp.int32)
    above, equal, last = scan(tally, (zeros, zeros, zeros - 1))
    above = jnp.sum(above, axis=1, keepdims=True)
    equal = jnp.sum(equal, axis=1, keepdims=True)
    last = jnp.max(last, axis=1, keepdims=True)
    quota = count - above

    def halve_cut(_, bounds):  # #(equal, index <= low) < quota <= #(equal, index <= high)
        low, high = bounds
        middle = low + lax.shift_right_logical(high - low, jnp.full_like(low, 1))
        enough = count_where(lambda keys, index: (keys == threshold) & (index <= middle)) >= quota
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # Most rows take every equal key, and then the cut is the last of them: no pass is needed.
    surplus = jnp.max(jnp.where(count > 0, equal - quota, 0)) > 0
    passes = jnp.where(surplus, num_keys.bit_length(), 0)
    _, cut = lax.fori_loop(0, passes, halve_cut, (full(-1), last))

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
