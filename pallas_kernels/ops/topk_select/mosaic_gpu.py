"""Threshold, tie cut and list of each row's largest scores: narrow the row first, then search the few (Mosaic GPU, Hopper).

1. A score becomes an int32 whose order is the score's order; hidden keys, NaN included, become the smallest integer.
2. *Narrow.* A strided sample of the row gives a bound that a little more than `topk` scores should reach. One pass over the
   row packs the scores that reach it, with their places, into a list in shared memory, in order of place. It counts them, so
   a sample that misled is noticed: fewer than `topk`, or more than the list holds. Once it holds `topk`, it leaves out what
   only equals the bound: with all that is above the bound, the equals that come first are enough, and so a plateau (scores
   that are a ReLU's 0) does not fill it. A row that fits the list whole needs no sample.
3. *Search.* The threshold lies in [low, high): at least `topk` scores reach `low`, fewer reach `high`. A pass over the list
   counts the scores that reach each of three bounds between them. The last key kept among equals is found by halving.
4. The selected places are packed from the list into the row of indices.
5. A row whose sample misled, or whose budget is beyond the list, is searched in global memory: a pass tests the sample's bound
   itself, which settles a plateau, then each pass counts seven bounds.

So a row is read once and a bit. Nothing is sorted; sums are of integers, and lists are packed in order: the result has one
value, whatever the sample.

Grid (rows,), one warpgroup a row. Few long rows are narrowed by a kernel of their own, grid (rows, splits), each block packing
its part of the row in global memory. Rows are read straight into registers, the next tile while one is worked on. The last tile
of a ragged row starts early enough to end with the row and hides the keys that it has seen before.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, gpu_lanes, selection
from pallas_kernels.core.gpu_tiles import visible_of
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes
from pallas_kernels.ops.topk_select.narrow_gpu import (
    least_listed,
    lower_bound,
    narrow_kernel,
    pack_candidates,
)
from pallas_kernels.ops.topk_select.row_gpu import (
    BITS,
    LOWEST,
    Plan,
    Row,
    budget_of,
    even_keys,
    full,
    search_in_place,
    shrink,
)

_LANES = 128
_VECTORS = 4  # register vectors that a lane reads at a time
_CHUNK = 512  # keys of the list that a pass looks at together: four a lane
_MAX_CAPACITY = 12_288  # keys of the list: 96 of the 227 KiB of shared memory
_SMALL_ROW = 2048  # keys of a row that the list always holds whole
_DEFAULT_BUDGET = 4096  # what the list is sized for where the budget is an array
_SAMPLE = 8192
_SPLIT_SAMPLES = 2048, 4096  # for blocks that share a row, as each reads the row's whole sample
_SPLIT_SURPLUS = 2.0  # times the budget: what a row's lists may hold for that
_BLOCKS = 528  # blocks wanted in flight: four on each of the 132 multiprocessors
_SPLIT_KEYS = 8192  # a block of its own is not worth less
_SPLITS_AT_ONCE = 8  # whose lists are read together


def _plan(
    rows: int,
    num_keys: int,
    limit: int,
    topk: int | None,
    sizes: TopKSelectBlockSizes | None,
    interpreted: bool,
) -> Plan:
    explicit = sizes is not None
    sizes = block_sizes_.resolve(
        "topk_select",
        "mosaic_gpu",
        sizes,
        cls=TopKSelectBlockSizes,
        dtype="float32",  # what is read is widened at once
        bucket={"rows": rows, "s": num_keys, "topk": _DEFAULT_BUDGET if topk is None else topk},
        heuristic=TopKSelectBlockSizes,
    )
    # A lane reads `align` neighbours at once, which global memory allows at multiples of `align` only.
    align = next(n for n in (4, 2, 1) if num_keys % n == 0 and num_keys >= n * _LANES)
    block_s = sizes.block_s
    if block_s is not None and not explicit:  # measured at another size of the same bucket
        block_s = min(block_s, align * _LANES * gpu_lanes.MAX_VECTORS)
    step = align * _LANES * _VECTORS if block_s is None else block_s
    if step % (align * _LANES) or step & (step - 1) or step > align * _LANES * 8:
        raise NotImplementedError(
            f"topk_select: mosaic_gpu got block_s {step}, wanted a power of two from {align * _LANES} "
            f"to {align * _LANES * gpu_lanes.MAX_VECTORS}"
        )
    while step > num_keys:
        step //= 2
    budget = min(_DEFAULT_BUDGET if topk is None else topk, num_keys)
    sample = max(_LANES * 8, min(_SAMPLE, 2 ** (num_keys.bit_length() - 4)))
    wanted = _most_reached(budget, sample, num_keys)
    capacity = (wanted + 4 * math.sqrt(wanted)) * num_keys / sample
    # A plateau fills the budget and the tile that does so; a few are above it.
    capacity = max(capacity, 1.25 * budget + step)
    capacity = max(min(capacity, _MAX_CAPACITY, num_keys), min(num_keys, _SMALL_ROW))
    if topk is None and num_keys <= _MAX_CAPACITY:
        capacity = num_keys  # the budget may be anything
    capacity = pl.cdiv(math.ceil(capacity), _CHUNK) * _CHUNK
    splits = 1
    if num_keys > 2 * _SPLIT_KEYS and num_keys > capacity:
        # In one wave: blocks of a second one would leave most of the device idle.
        wanted = max(_BLOCKS // rows, min(2, pl.cdiv(_BLOCKS, rows)))
        splits = max(1, min(wanted, num_keys // _SPLIT_KEYS))
    if sizes.num_splits is not None and num_keys > capacity:
        splits = block_sizes_.even_splits(pl.cdiv(num_keys, step), sizes.num_splits)
    if splits > 1:  # few rows: there is room for a list that no sample is likely to miss
        capacity = pl.cdiv(min(_MAX_CAPACITY, num_keys), _CHUNK) * _CHUNK
        for size in _SPLIT_SAMPLES:
            listed = _most_reached(budget, size, num_keys) * num_keys / size
            if size < sample and listed <= _SPLIT_SURPLUS * budget:
                sample = size
    return Plan(
        rows=rows,
        limit=limit,
        topk=topk,
        step=step,
        align=align,
        capacity=capacity,
        small_row=_SMALL_ROW,
        sample=sample,
        splits=splits,
        interpreted=interpreted,
    )


def _half(low, high):
    # The width may pass 2**31: it is read as unsigned, hence the logical shift.
    return low + lax.shift_right_logical(high - low, 1)


def _most_reached(budget: int, sample: int, num_keys: int) -> float:
    """Returns how much of a sample the bound of `lower_bound` is meant to be reached by, at most."""
    expected = budget * sample / num_keys
    return 1.125 * (expected + 4 * math.sqrt(expected) + 4) + 1


def _select_kernel(*refs, plan: Plan, listed: tuple[str, ...]):
    # inputs, global memory:
    #   scores, budget, start, end as in `narrow_kernel`; where the rows were narrowed before, what that kernel put out
    # outputs, global memory:
    #   count [rows] i32, threshold [rows] f32, tie cut [rows] i32; lists [rows, >= topk]: "indices" i32, "scores" f32
    # scratch, shared memory:
    #   places_ref, keys_ref [capacity, and a chunk where rows were narrowed before] i32, the list; lanes_ref
    refs = list(refs)
    scores_ref, budget_ref, start_ref, end_ref = (refs.pop(0) for _ in range(4))
    narrowed = [refs.pop(0) for _ in range(4)] if plan.splits > 1 else None
    count_ref, threshold_ref, cut_ref = (refs.pop(0) for _ in range(3))
    list_refs = [refs.pop(0) for _ in listed]
    places_ref, keys_ref, lanes_ref = refs
    index = lax.axis_index("row")
    visible = visible_of(index, start_ref, end_ref, plan.rows, plan.limit)
    row = Row(scores_ref, index, *visible, plan.step, plan.align)
    budget = budget_of(index, budget_ref, plan)
    chunk_layout = plgpu.Layout.WG_STRIDED((_CHUNK,), vec_size=4)
    lane = plgpu.broadcasted_iota(jnp.int32, (_CHUNK,), 0, layout=chunk_layout)
    append = functools.partial(gpu_lanes.append, interpreted=plan.interpreted)
    reduce = functools.partial(gpu_lanes.reduce, interpreted=plan.interpreted)

    def chunk_of(ref, chunk):
        return plgpu.load(ref.at[pl.ds(chunk * _CHUNK, _CHUNK)], layout=chunk_layout)

    if narrowed is None:
        low, hopeful = lower_bound(row, budget, lanes_ref, plan)
        last = jnp.where(hopeful, row.last, row.first)
        lists = [places_ref, keys_ref]
        found = pack_candidates(row, row.first, last, low, budget, lists, lanes_ref, plan)
        found = jnp.where(hopeful, found, plan.capacity + 1)
    else:
        narrowed_bound_ref, found_ref, narrowed_places_ref, narrowed_bits_ref = narrowed
        low = narrowed_bound_ref[index, 0]

        copy_layout = plgpu.Layout.WG_STRIDED((_CHUNK,), vec_size=1)
        copy_lane = plgpu.broadcasted_iota(jnp.int32, (_CHUNK,), 0, layout=copy_layout)

        def part_of(split, chunk):
            part = pl.ds(chunk * _CHUNK, _CHUNK)
            return [
                plgpu.load(ref.at[index, split, part], layout=copy_layout, optimized=False)
                for ref in (narrowed_places_ref, narrowed_bits_ref)
            ]

        def put(part, at):
            # What is past the end of a split's list is written over by the next split's, or never looked at.
            @pl.when(at <= plan.capacity)
            def _():
                for ref, values in zip((places_ref, keys_ref), part, strict=True):
                    ref[pl.ds(at, _CHUNK)] = values

        def take_splits(group, found):
            splits = [group * _SPLITS_AT_ONCE + i for i in range(_SPLITS_AT_ONCE)]
            real = [jnp.minimum(split, plan.splits - 1) for split in splits]
            counts = [found_ref[index, split] for split in real]
            # The starts of several lists are under way together; few are longer than one chunk.
            parts = [part_of(split, 0) for split in real]
            for split, count, part in zip(splits, counts, parts, strict=True):
                count = jnp.where(split < plan.splits, count, 0)
                put(part, found)
                rest = jnp.where(count > plan.capacity, 0, lax.div(count + (_CHUNK - 1), _CHUNK))
                pl.loop(1, rest)(
                    lambda chunk, split=split, found=found: put(
                        part_of(split, chunk), found + chunk * _CHUNK
                    )
                )
                found = jnp.minimum(found + count, 2 * plan.capacity + 2)
            return found

        def pack_split(split, found):
            """The same for one split, without what equals the bound once the budget is listed."""
            count = found_ref[index, split]

            def pack(chunk, found):
                place, bits = part_of(split, chunk)
                least = least_listed(low, budget, found, (_CHUNK,), copy_layout)
                score = lax.bitcast_convert_type(bits, jnp.float32)
                hit = (chunk * _CHUNK + copy_lane < count) & (score >= least)
                lists = [places_ref, keys_ref]
                return append(hit, [place, bits], lists, found, lanes_ref, layout=copy_layout)

            complete = count <= plan.capacity
            chunks = jnp.where(complete, lax.div(count + (_CHUNK - 1), _CHUNK), 0)
            found = lax.fori_loop(0, chunks, pack, found)
            return jnp.where(complete, found, 2 * plan.capacity + 2)

        found = lax.fori_loop(0, pl.cdiv(plan.splits, _SPLITS_AT_ONCE), take_splits, jnp.int32(0))
        # With a plateau at the bound every split's list fills the budget, and they do not fit together.
        found = lax.cond(
            found > plan.capacity,
            lambda: lax.fori_loop(0, plan.splits, pack_split, jnp.int32(0)),
            lambda: found,
        )

    # Candidates of a bound that every number reaches are all the numbers there are.
    narrow = (found <= plan.capacity) & ((found >= budget) | (low == LOWEST))

    def finish(kept, bound, cut, emit):
        """Writes the row's results; `emit(found)` packs the selected keys into the lists."""
        count_ref[index] = kept
        bound = jnp.where(kept > 0, bound, selection.NOTHING)
        threshold_ref[index] = selection.key_to_score(bound, plan.bitcast)
        cut_ref[index] = jnp.where(kept > 0, cut, -1)
        if not list_refs:
            return
        width = list_refs[0].shape[1]

        @pl.when(kept < width)
        def _():
            def fill(part, _):
                for name, ref in zip(listed, list_refs, strict=True):
                    blank = jnp.full(
                        (_LANES,),
                        *((-1, jnp.int32) if name == "indices" else (-jnp.inf, jnp.float32)),
                    )
                    ref[index, pl.ds(part * _LANES, _LANES)] = plgpu.layout_cast(
                        blank, plgpu.Layout.WG_STRIDED((_LANES,), vec_size=1)
                    )

            lax.fori_loop(0, width // _LANES, fill, None)

        pl.when(kept > 0)(emit)

    def listing(place, key):
        """What the lists hold of some keys."""
        payloads = {"indices": place, "scores": selection.key_to_score(key)}
        return [payloads[name] for name in listed], [ref.at[index] for ref in list_refs]

    @pl.when(narrow)
    def _():
        chunks = lax.div(found + (_CHUNK - 1), _CHUNK)
        kept = jnp.minimum(budget, found)

        def to_keys(chunk, largest):
            part = pl.ds(chunk * _CHUNK, _CHUNK)
            scores = lax.bitcast_convert_type(chunk_of(keys_ref, chunk), jnp.float32)
            key = selection.order_key(scores)
            key = jnp.where(chunk * _CHUNK + lane < found, key, selection.DEAD)
            keys_ref[part] = key
            return jnp.maximum(largest, key)

        largest = lax.fori_loop(0, chunks, to_keys, full(selection.DEAD, (_CHUNK,), chunk_layout))
        [largest] = reduce([largest], lanes_ref, layout=chunk_layout, kind="max")

        def count(*tests):
            """How many candidates pass each test of (key, place)."""

            def add(chunk, sums):
                key = chunk_of(keys_ref, chunk)
                place = chunk_of(places_ref, chunk)
                return [
                    total + test(key, place).astype(jnp.int32)
                    for total, test in zip(sums, tests, strict=True)
                ]

            zeros = [full(0, (_CHUNK,), chunk_layout) for _ in tests]
            sums = lax.fori_loop(0, chunks, add, zeros)
            return reduce(sums, lanes_ref, layout=chunk_layout, kind="add")

        def count_keys(tests):
            return count(*[lambda key, _, test=test: test(key) for test in tests])

        def one_pass(carry):
            low, high, reached = carry
            bounds = even_keys(low, high, BITS)
            low, high, reached, _ = shrink(low, high, reached, 0, kept, bounds, count_keys)
            return low, high, reached

        low_key, _, reached = lax.while_loop(
            lambda carry: (carry[1] - carry[0] != 1) & (carry[2] != kept),
            one_pass,
            (jnp.maximum(low, LOWEST), largest + 1, found),
        )
        low_key = jnp.where(kept > 0, low_key, largest + 1)

        # Where exactly `kept` scores reach the bound, the threshold is the smallest of them.
        def smallest(chunk, negated):
            key = chunk_of(keys_ref, chunk)
            return jnp.maximum(negated, jnp.where(key >= low_key, -key, selection.DEAD))

        negated = lax.fori_loop(0, chunks, smallest, full(selection.DEAD, (_CHUNK,), chunk_layout))
        [negated] = reduce([negated], lanes_ref, layout=chunk_layout, kind="max")
        bound = jnp.where(reached == kept, -negated, low_key)
        above, equals = count(lambda key, _: key > bound, lambda key, _: key == bound)
        quota = kept - above

        def last_place():
            def largest_place(chunk, largest):
                key, place = chunk_of(keys_ref, chunk), chunk_of(places_ref, chunk)
                return jnp.maximum(largest, jnp.where(key == bound, place, -1))

            largest = lax.fori_loop(0, chunks, largest_place, full(-1, (_CHUNK,), chunk_layout))
            return reduce([largest], lanes_ref, layout=chunk_layout, kind="max")[0]

        def place_of_quota():
            def halve(carry):
                before, at = carry  # up to `before` too few equals, up to `at` enough
                middle = _half(before, at)
                [counted] = count(lambda key, place: (key == bound) & (place <= middle))
                enough = counted >= quota
                return jnp.where(enough, before, middle), jnp.where(enough, middle, at)

            return lax.while_loop(
                lambda carry: carry[1] - carry[0] > 1, halve, (row.start - 1, row.end - 1)
            )[1]

        cut = lax.cond(equals == quota, last_place, place_of_quota)

        def emit():
            def pack(chunk, packed):
                key, place = chunk_of(keys_ref, chunk), chunk_of(places_ref, chunk)
                hit = (key > bound) | ((key == bound) & (place <= cut))
                payloads, lists = listing(place, key)
                return append(hit, payloads, lists, packed, lanes_ref, layout=chunk_layout)

            lax.fori_loop(0, chunks, pack, jnp.int32(0))

        finish(kept, bound, cut, emit)

    @pl.when(~narrow)
    def _():
        search_in_place(
            Row(scores_ref, index, row.start, row.end, plan.align * _LANES, plan.align),
            budget,
            low,
            lanes_ref,
            finish,
            listing,
            plan,
        )


def select(
    scores,
    start=None,
    end=None,
    budget=None,
    *,
    topk: int | None = None,
    limit: int | None = None,
    listed: tuple[str, ...] = (),
    block_sizes: TopKSelectBlockSizes | None = None,
):
    """Returns (count, threshold, tie_cut, *lists) of each row, as `reference.select` with visible = start <= index < end.

    Args:
      scores: [rows, S], float16, bfloat16 or float32. Keys outside [start, end) are never looked at.
      start, end: int32 [rows / n], each for n rows in turn; beyond [0, limit] they are cut. None means 0, and `limit`.
      budget: int32 [rows]; None means `topk`.
      topk: no budget is larger; None if that is not known. Sizes the kernel.
      limit: keys of a row that may be visible; None means S.
      listed: "indices" for int32 [rows, topk], ascending, -1 at the tail; "scores" for float32 [rows, topk], those of the
        indices, subnormals as 0 and -inf at the tail.
    """
    rows, num_keys = scores.shape
    limit = num_keys if limit is None else limit
    if num_keys < _LANES:
        scores = jnp.pad(scores, ((0, 0), (0, _LANES - num_keys)))
        num_keys = _LANES
    options = interpret_options()
    plan = _plan(rows, num_keys, limit, topk, block_sizes, options is not None)
    interpret = compat.gpu_interpret(options)
    lanes = plgpu.SMEM((gpu_lanes.SCRATCH,), jnp.int32)
    arguments = [scores, budget, start, end]
    if plan.splits > 1:
        of_split = jax.ShapeDtypeStruct((rows, plan.splits), jnp.int32)
        segments = jax.ShapeDtypeStruct((rows, plan.splits, plan.capacity), jnp.int32)
        arguments += plgpu.kernel(
            functools.partial(narrow_kernel, plan=plan),
            out_type=[of_split, of_split, segments, segments],
            scratch_types=[lanes],
            grid=(rows, plan.splits),
            grid_names=("row", "split"),
            kernel_name=f"topk_select_narrow_s{plan.step}",
            interpret=interpret,
        )(*arguments)
    row = functools.partial(jax.ShapeDtypeStruct, (rows,))
    width = pl.cdiv(topk or 1, _LANES) * _LANES
    room = plan.capacity + (
        _CHUNK if plan.splits > 1 else 0
    )  # the last list is put down in whole chunks
    dtypes = {"indices": jnp.int32, "scores": jnp.float32}
    count, threshold, cut, *lists = plgpu.kernel(
        functools.partial(_select_kernel, plan=plan, listed=listed),
        out_type=[row(jnp.int32), row(jnp.float32), row(jnp.int32)]
        + [jax.ShapeDtypeStruct((rows, width), dtypes[name]) for name in listed],
        scratch_types=[
            plgpu.SMEM((room,), jnp.int32),
            plgpu.SMEM((room,), jnp.int32),
            lanes,
        ],
        grid=(rows,),
        grid_names=("row",),
        kernel_name=f"topk_select_s{plan.step}_c{plan.capacity}",
        interpret=interpret,
    )(*arguments)
    return count, threshold, cut, *(x[:, :topk] for x in lists)


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
    listed = ("indices",) if with_indices else ()
    if flat.shape[0] == 0:
        nothing = jnp.zeros((0,), jnp.int32)
        results = [
            nothing,
            jnp.zeros((0,)),
            nothing,
            *[jnp.zeros((0, topk), jnp.int32)] * len(listed),
        ]
    else:
        results = select(
            flat,
            end=None if lengths is None else lengths.reshape(-1),
            budget=None if isinstance(topk, int) else selection.rows_of(topk, rows).reshape(-1),
            topk=topk if isinstance(topk, int) else None,
            listed=listed,
            block_sizes=block_sizes,
        )
    count, threshold, cut = (x.reshape(rows) for x in results[:3])
    indices = results[3].reshape(*rows, -1) if with_indices else None
    return TopKSelection(indices, count, threshold, cut)
