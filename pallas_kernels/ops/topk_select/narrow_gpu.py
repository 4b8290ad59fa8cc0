"""The few scores of a row that may be selected: a bound by a sample, and the list of what reaches it (Mosaic GPU)."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu_lanes, selection
from pallas_kernels.core.gpu_tiles import visible_of
from pallas_kernels.ops.topk_select.row_gpu import (
    BITS,
    LOWEST,
    Plan,
    Row,
    budget_of,
    even_keys,
    full,
    keys_of,
    shrink,
)

_EVEN_PASSES = 2  # over the sample, whose bounds are even steps of the score and not of its key


def _even_scores(low, high, bitcast):
    """Returns bounds that divide [low, high) into parts of one width as scores; all of them are inside, if there is room."""
    least, most = (selection.key_to_score(key, bitcast) for key in (low, high))
    part = (most - least) * 0.5**BITS
    bounds = [selection.order_key(least + i * part, bitcast) for i in range(1, 2**BITS)]
    return [jnp.maximum(jnp.minimum(bound, high - 1), low + 1) for bound in bounds]


def lower_bound(row: Row, budget, lanes_ref, plan: Plan):
    """Returns a key that at least `budget`, and not many more, of the row's scores are likely to reach, and if the list may hold them.

    The key is `LOWEST` where the list is to hold the whole row.
    """
    visible = row.end - row.start
    layout = plgpu.Layout.WG_STRIDED((plan.sample,), vec_size=1)

    def from_sample():
        keys = keys_of(
            gpu_lanes.sampled_load(
                row.ref.at[row.row],
                row.start,
                jnp.maximum(visible - gpu_lanes.GROUP, 0),
                plan.sample,
                interpreted=plan.interpreted,
            ).astype(jnp.float32)
        )
        share = plan.sample / visible.astype(jnp.float32)
        expected = budget.astype(jnp.float32) * share
        # Four standard deviations more than the budget's share of the sample: one row in 30,000 gets too few.
        wanted = (expected + 4.0 * lax.sqrt(expected) + 4.0).astype(jnp.int32)
        slack = lax.shift_right_logical(wanted, 3)

        def totals(*vectors, kind="add"):
            return gpu_lanes.reduce(
                vectors, lanes_ref, layout=layout, kind=kind, interpreted=plan.interpreted
            )

        def count(tests):
            return totals(*[test(keys).astype(jnp.int32) for test in tests])

        largest, smallest = totals(keys, -keys, kind="max")
        smallest = jnp.maximum(-smallest, LOWEST)

        def one_pass(carry):
            low, high, reached, passes = carry
            # Scores are spread more evenly than their keys; where they are not, the keys bring the search to its end.
            evenly = _even_scores(jnp.maximum(low, smallest), high, plan.bitcast)
            bounds = [
                jnp.where(passes < _EVEN_PASSES, *pair)
                for pair in zip(evenly, even_keys(low, high, BITS), strict=True)
            ]
            low, high, reached, _ = shrink(low, high, reached, 0, wanted, bounds, count)
            return low, high, reached, passes + 1

        low, _, reached, _ = lax.while_loop(
            lambda carry: (carry[1] - carry[0] != 1) & (carry[2] - wanted > slack),
            one_pass,
            (
                jnp.int32(LOWEST),
                jnp.maximum(largest, LOWEST) + 1,
                jnp.int32(plan.sample),
                jnp.int32(0),
            ),
        )
        reached = reached.astype(jnp.float32)
        most = reached + 3.0 * lax.sqrt(reached)
        # Where the list holds the whole row, a bound is worth its sample only if it leaves half of the row out.
        whole = (visible <= plan.capacity) & (2.0 * most > plan.sample)
        room = plan.capacity * share

        def fits_without_equals():
            # With a plateau at the bound the list takes what fills the budget and the tile that does so, then what is above
            # the bound: see `pack_candidates`.
            [above] = count([lambda key: key > low])
            above = above.astype(jnp.float32)
            most_above = above + 3.0 * lax.sqrt(above) + 4.0
            filling = budget.astype(jnp.float32) * share
            tile = plan.step * share * jnp.minimum(2.0 * most / plan.sample, 1.0)
            return filling + tile + most_above * (1.0 - jnp.minimum(filling / most, 1.0)) <= room

        fits = lax.cond(most <= room, lambda: jnp.bool_(True), fits_without_equals)
        return jnp.where(whole, LOWEST, low), whole | fits

    return lax.cond(
        visible <= min(plan.capacity, plan.small_row),
        lambda: (jnp.int32(LOWEST), jnp.bool_(True)),
        from_sample,
    )


def least_listed(bound, budget, found, shape, layout):
    """Returns the score that a key has to reach to be listed after `found` others, as a vector of this shape.

    That is the bound's, and where `budget` are listed the next one above it.
    """
    # Zero's key stands for the subnormals too; comparing to the number below them keeps all of them, and more is no harm.
    first = jnp.where(bound == 0, -selection.SMALLEST_NORMAL_KEY, bound)
    above = jnp.where(bound == 0, selection.SMALLEST_NORMAL_KEY, bound + 1)
    return selection.key_to_score(full(jnp.where(found >= budget, above, first), shape, layout))


def pack_candidates(row: Row, first, last, bound, budget, lists, lanes_ref, plan: Plan):
    """Packs the places and bits of the scores that reach `bound`, of the tiles [first, last); returns how many there are.

    Scores that equal the bound are left out of a tile that begins with `budget` listed.
    """

    def pack(tile, scores, found):
        scores = row.seen(tile, scores)
        return gpu_lanes.append(
            scores >= least_listed(bound, budget, found, (row.step,), row.layout),
            [row.offset(tile) + row.lane_place, lax.bitcast_convert_type(scores, jnp.int32)],
            lists,
            found,
            lanes_ref,
            layout=row.layout,
            interpreted=plan.interpreted,
        )

    return row.scan(first, last, jnp.int32(0), pack)


def narrow_kernel(
    # inputs, global memory
    scores_ref,  # [rows, S]
    budget_ref,  # None, or [rows] i32
    start_ref,  # None, or [rows / n] i32, each for n rows
    end_ref,  # likewise
    # outputs, global memory
    bound_ref,  # [rows, splits] i32, order key that candidates reach; the same in all splits
    found_ref,  # [rows, splits] i32, candidates of the split; more than the capacity: the list is cut off
    places_ref,  # [rows, splits, capacity] i32
    bits_ref,  # [rows, splits, capacity] i32
    # scratch
    lanes_ref,
    *,
    plan: Plan,
):
    """Packs what may be selected of one part of a row; every part finds the same bound."""
    index, split = lax.axis_index("row"), lax.axis_index("split")
    visible = visible_of(index, start_ref, end_ref, plan.rows, plan.limit)
    row = Row(scores_ref, index, *visible, plan.step, plan.align)
    budget = budget_of(index, budget_ref, plan)
    bound, hopeful = lower_bound(row, budget, lanes_ref, plan)
    share = pl.cdiv(pl.cdiv(row.num_keys, plan.step), plan.splits)
    first = jnp.maximum(row.first, split * share)
    last = jnp.maximum(jnp.minimum(row.last, (split + 1) * share), first)
    last = jnp.where(hopeful, last, first)
    lists = [places_ref.at[index, split], bits_ref.at[index, split]]
    found = pack_candidates(row, first, last, bound, budget, lists, lanes_ref, plan)
    bound_ref[index, split] = bound
    found_ref[index, split] = jnp.where(hopeful, found, plan.capacity + 1)
