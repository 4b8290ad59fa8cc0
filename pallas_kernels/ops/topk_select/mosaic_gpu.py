"""Threshold and tie cut of each row by a many-way search on ordered integers (Mosaic GPU, Hopper).

1. A score becomes an int32 whose order is the score's order; hidden keys, NaN included, become the smallest integer.
2. The threshold lies in [low, high): at least `topk` keys reach `low`, fewer reach `high`. One pass over the row counts the
   keys that reach each of `2**bits - 1` bounds between them, and the interval shrinks to one of 2**bits parts.
3. Among the keys equal to the threshold, the last one kept is found by halving the range of chunks that holds it, then the
   range of places inside one chunk: in all about one more pass.

Nothing is sorted, and nothing is written but three integers a row. Sums are of integers, so the result has one value.

Grid (rows,), one warpgroup a row. A row of up to `_RESIDENT_KEYS` is turned into keys once and stays in shared memory, where a
pass is cheap: 2 bits a pass. A longer row is read from global memory in every pass: 4 bits a pass, so eight of them.

Rows are read straight into registers, in steps of `block_s` keys. The last step of a ragged row starts early enough to end
with the row and hides the keys that it has seen before, so that no length needs padding, except rows shorter than one step.
One warpgroup only: the scratch of a reduction to a scalar is shared by all warpgroups of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import compat, selection
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes

_LANES = 128
_VECTOR = 512  # keys that the warpgroup holds in one register vector, four a lane
_STEP = 2048  # keys read at a time
_RESIDENT_KEYS = 49_152  # int32 in shared memory: 192 of the 227 KiB of a block
_RESIDENT_BITS, _STREAMED_BITS = 2, 4
_LOWEST = -0x7F800000  # order key of -inf: every number reaches it
_HIGHEST = 0x7F800001  # one above that of +inf: no number reaches it


def _select_kernel(
    # inputs, global memory
    scores_ref,  # [rows, S]
    budget_ref,  # [rows] i32
    start_ref,  # [rows] i32, first visible key
    end_ref,  # [rows] i32, one past the last
    # outputs, global memory
    count_ref,  # [rows] i32
    bound_ref,  # [rows] i32, order key of the threshold
    cut_ref,  # [rows] i32
    # scratch: nothing, or the row's keys
    *scratch,  # [steps * step] i32, shared memory
    step: int,
    vector: int,
    align: int,
    bits: int,
):
    keys_ref = scratch[0] if scratch else None
    num_keys = scores_ref.shape[1]
    vectors = step // vector
    layout = plgpu.Layout.WG_STRIDED((vector,), vec_size=align)
    place = plgpu.broadcasted_iota(jnp.int32, (vector,), 0, layout=layout)
    row = lax.axis_index("row")
    start, end, budget = start_ref[row], end_ref[row], budget_ref[row]
    first, last = lax.div(start, step), lax.div(end + (step - 1), step)

    def read_keys(index, v):
        # The last step of a ragged row overlaps the one before it; `index * step` is where its own keys begin.
        offset = jnp.minimum(index * step, num_keys - step) + v * vector
        scores = plgpu.load(
            scores_ref.at[row, pl.ds(offset, vector)], layout=layout, optimized=False
        )
        key, position = selection.order_key(scores), offset + place
        seen = (position >= jnp.maximum(start, index * step)) & (position < end)
        return jnp.where(seen & (key != selection.NAN), key, selection.DEAD)

    def slot(index, v):
        return pl.ds(index * step + v * vector, vector)

    def keys_of(index, v):
        if keys_ref is None:
            return read_keys(index, v)
        return plgpu.load(keys_ref.at[slot(index, v)], layout=layout)

    def count(tests, begin, stop, keys_of=keys_of):
        """How many keys of the steps [begin, stop) pass each test."""

        def add_step(index, sums):
            for v in range(vectors):
                key = keys_of(index, v)
                sums = [
                    total + test(key).astype(jnp.int32)
                    for total, test in zip(sums, tests, strict=True)
                ]
            return sums

        zeros = [plgpu.layout_cast(jnp.zeros((vector,), jnp.int32), layout) for _ in tests]
        return [jnp.sum(total) for total in lax.fori_loop(begin, stop, add_step, zeros)]

    def stage(index, v):
        key = read_keys(index, v)
        if keys_ref is not None:
            keys_ref[slot(index, v)] = key
        return key

    [alive] = count([lambda key: key != selection.DEAD], first, last, keys_of=stage)
    kept = jnp.clip(budget, 0, alive)
    count_ref[row] = kept

    @pl.when(kept == 0)
    def _():
        bound_ref[row] = selection.NOTHING
        cut_ref[row] = -1

    @pl.when(kept > 0)
    def _():
        def shrink(carry):
            low, high, above = carry  # keys that reach `high`: fewer than `kept`
            # The width may pass 2**31: it is read as unsigned, hence the logical shift of a width that is at least 2.
            part = lax.shift_right_logical(high - low - 1, bits) + 1
            bounds = [low + i * part for i in range(1, 2**bits)]
            for bound, reached in zip(
                bounds, count([lambda key, b=b: key >= b for b in bounds], first, last), strict=True
            ):
                enough = reached >= kept
                # Bounds ascend; those past `high` are reached by fewer still, and stay without effect.
                lower = ~enough & (bound < high)
                low = jnp.where(enough, bound, low)
                high, above = jnp.where(lower, bound, high), jnp.where(lower, reached, above)
            return low, high, above

        bound, _, above = lax.while_loop(
            lambda carry: carry[1] - carry[0] != 1,
            shrink,
            (jnp.int32(_LOWEST), jnp.int32(_HIGHEST), jnp.int32(0)),
        )
        quota = kept - above  # equals of the threshold that are kept: at least 1

        def halve_steps(carry):
            begin, stop, before = (
                carry  # `before` equals in the steps left of `begin`: fewer than the quota
            )
            middle = lax.div(begin + stop, 2)
            [equals] = count([lambda key: key == bound], begin, middle)
            inside = before + equals >= quota
            return (
                jnp.where(inside, begin, middle),
                jnp.where(inside, middle, stop),
                jnp.where(inside, before, before + equals),
            )

        holder, _, before = lax.while_loop(
            lambda carry: carry[1] - carry[0] > 1, halve_steps, (first, last, jnp.int32(0))
        )

        def halve_places(_, carry):
            begin, stop = carry  # the last kept place lies in [begin, stop)
            middle = lax.div(begin + stop, 2)
            equals = jnp.int32(0)
            for v in range(vectors):
                hit = (keys_of(holder, v) == bound) & (v * vector + place < middle)
                equals += jnp.sum(hit.astype(jnp.int32))
            inside = before + equals >= quota
            return jnp.where(inside, begin, middle), jnp.where(inside, middle, stop)

        place_in_step, _ = lax.fori_loop(
            0, (step - 1).bit_length(), halve_places, (jnp.int32(0), jnp.int32(step))
        )
        bound_ref[row] = bound
        cut_ref[row] = jnp.minimum(holder * step, num_keys - step) + place_in_step


def _sizes(num_keys: int, block_s: int | None) -> tuple[int, int]:
    """Returns (step, vector): keys read at a time, and those of one register vector."""
    vector = min(_VECTOR, pl.cdiv(num_keys, _LANES) * _LANES)
    step = _STEP if block_s is None else block_s
    if step % _LANES or step & (step - 1):
        raise NotImplementedError(
            f"topk_select: mosaic_gpu got block_s {step}, wanted a power of two of at least {_LANES}"
        )
    while step > vector and step > num_keys:
        step //= 2
    return max(step, vector), vector


def select(scores, start, end, budget, *, block_s: int | None = None):
    """Returns (count, threshold, tie_cut) of each row, as `reference.select` with visible = start <= index < end.

    Args:
      scores: [rows, S], float16, bfloat16 or float32. Keys outside [start, end) are never looked at.
      start, end, budget: int32 [rows], 0 <= start, end <= S.
    """
    rows, num_keys = scores.shape
    step, vector = _sizes(num_keys, block_s)
    if num_keys < step:
        scores = jnp.pad(scores, ((0, 0), (0, step - num_keys)))
        num_keys = step
    padded = pl.cdiv(num_keys, step) * step
    resident = padded <= _RESIDENT_KEYS
    # A lane reads `align` neighbours at once, which global memory allows at multiples of `align` only.
    align = next(n for n in (4, 2, 1) if num_keys % n == 0 and vector % (n * _LANES) == 0)
    bits = _RESIDENT_BITS if resident else _STREAMED_BITS
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    count, bound, cut = plgpu.kernel(
        functools.partial(_select_kernel, step=step, vector=vector, align=align, bits=bits),
        out_type=[row, row, row],
        scratch_types=[plgpu.SMEM((padded,), jnp.int32)] if resident else [],
        grid=(rows,),
        grid_names=("row",),
        kernel_name=f"topk_select_{'resident' if resident else 'streamed'}_s{step}",
        interpret=compat.gpu_interpret(interpret_options()),
    )(scores, budget, start, end)
    return count, selection.key_to_score(bound), cut


def topk_select(
    scores, topk, *, lengths, with_indices, block_sizes: TopKSelectBlockSizes | None = None
):
    """Arguments as the public function, checked; `lengths` int32 [...] or None, `topk` an int or int32 rows."""
    if block_sizes is not None and block_sizes.block_rows not in (None, 1):
        raise NotImplementedError(
            f"topk_select: mosaic_gpu got block_rows {block_sizes.block_rows}, wanted 1: a block holds one row"
        )
    rows, num_keys = scores.shape[:-1], scores.shape[-1]
    if scores.dtype == jnp.float64:
        scores = scores.astype(jnp.float32)
    flat = scores.reshape(-1, num_keys)
    end = jnp.full(rows, num_keys, jnp.int32) if lengths is None else jnp.clip(lengths, 0, num_keys)
    budget = selection.rows_of(topk, rows)
    if flat.shape[0] == 0:
        count, threshold, cut = (
            jnp.zeros((0,), jnp.int32),
            jnp.zeros((0,)),
            jnp.zeros((0,), jnp.int32),
        )
    else:
        count, threshold, cut = select(
            flat,
            jnp.zeros(flat.shape[:1], jnp.int32),
            end.reshape(-1),
            budget.reshape(-1),
            block_s=None if block_sizes is None else block_sizes.block_s,
        )
    count, threshold, cut = (x.reshape(rows) for x in (count, threshold, cut))
    indices = None
    if with_indices:
        visible = lax.broadcasted_iota(jnp.int32, scores.shape, len(rows)) < end[..., None]
        indices = selection.compact(selection.selected(scores, visible, threshold, cut), topk)
    return TopKSelection(indices, count, threshold, cut)
