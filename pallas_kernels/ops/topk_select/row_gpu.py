"""One row of scores in global memory: how a block reads it, and how it selects from it in place (Mosaic GPU)."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu_lanes, selection

BITS = 2  # of the threshold that a pass over the list, or over the sample, settles
_STREAMED_BITS = 3  # and a pass over the row
_STREAMED_VECTORS = 4  # register vectors that a lane reads at a time in such a pass
LOWEST = -0x7F800000  # order key of -inf: every number reaches it
_HIGHEST = 0x7F800001  # one above that of +inf: no number reaches it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one call.

    rows, limit: how many rows there are, and how many keys of each may be visible.
    topk: the largest budget, and each row's where no other is given.
    step, align: keys that are read at a time, and neighbours that a lane reads together.
    capacity: keys that the list holds.
    small_row: keys of a row that the list holds whole, without a sample.
    sample: keys that are sampled, a power of two.
    splits: blocks that narrow one row.
    """

    rows: int
    limit: int
    topk: int | None
    step: int
    align: int
    capacity: int
    small_row: int
    sample: int
    splits: int
    interpreted: bool

    def bitcast(self, scalar, dtype):
        """Returns the scalar of the same bits."""
        return gpu_lanes.bitcast_scalar(scalar, dtype, interpreted=self.interpreted)


class Row:
    """One row of scores in global memory, read tile by tile."""

    def __init__(self, scores_ref, row, start, end, step: int, align: int):
        """start, end: the first visible key and one past the last, inside the row."""
        self.ref, self.row, self.start, self.end, self.step = scores_ref, row, start, end, step
        self.num_keys = scores_ref.shape[1]
        self.layout = plgpu.Layout.WG_STRIDED((step,), vec_size=align)
        self.lane_place = plgpu.broadcasted_iota(jnp.int32, (step,), 0, layout=self.layout)
        self.first, self.last = lax.div(start, step), lax.div(end + (step - 1), step)

    def offset(self, tile):
        """Where a tile's keys begin: the last one's so early that it ends with the row."""
        return jnp.minimum(tile * self.step, self.num_keys - self.step)

    def load(self, tile):
        """A tile's scores as float32."""
        part = self.ref.at[self.row, pl.ds(self.offset(tile), self.step)]
        return plgpu.load(part, layout=self.layout, optimized=False).astype(jnp.float32)

    def places(self, tile):
        """The places of a tile's keys, and whether they are visible and no earlier tile has them."""
        place = self.offset(tile) + self.lane_place
        begin = jnp.maximum(self.start, tile * self.step)
        width = jnp.maximum(self.end - begin, 0)
        return place, (place - begin).astype(jnp.uint32) < width.astype(jnp.uint32)

    def seen(self, tile, scores):
        """Makes scores of keys that `places` does not call visible NaN; most tiles have none, which one test settles."""
        begin = tile * self.step
        whole = (begin >= self.start) & (begin + self.step <= self.end)
        hide = lambda: jnp.where(self.places(tile)[1], scores, jnp.nan)
        return lax.cond(whole, lambda: scores, hide)

    def scan(self, first, last, state, use):
        """state = use(tile, scores, state) over the tiles [first, last); the next one is on its way meanwhile."""

        def body(tile, carry):
            scores, state = carry
            following = self.load(jnp.minimum(tile + 1, last - 1))
            return following, use(tile, scores, state)

        _, state = lax.fori_loop(first, last, body, (self.load(jnp.minimum(first, last)), state))
        return state


def budget_of(index, budget_ref, plan: Plan):
    """Returns how many keys a row is to keep."""
    return jnp.int32(plan.topk) if budget_ref is None else jnp.maximum(budget_ref[index], 0)


def keys_of(scores):
    """Returns order keys, those of NaN as of what is not visible."""
    key = selection.order_key(scores)
    return jnp.where(key == selection.NAN, selection.DEAD, key)


def full(value, shape, layout):
    """Returns a vector of one int32."""
    return plgpu.layout_cast(lax.broadcast(jnp.int32(value), shape), layout)


def even_keys(low, high, bits: int):
    """Returns bounds that divide [low, high) into 2**bits parts of one width as integers."""
    part = lax.shift_right_logical(high - low - 1, bits) + 1
    return [low + i * part for i in range(1, 2**bits)]


def shrink(low, high, reach_low, reach_high, wanted, bounds, count):
    """Narrows [low, high), where at least `wanted` keys reach `low` and fewer reach `high`, by one pass.

    `count(tests)` returns how many keys pass each test; `bounds` ascend.

    Returns:
      low, high, and how many keys reach each; of what was given as 0, and not counted, nothing that means anything.
    """
    counts = count([lambda key, b=b: key >= b for b in bounds])
    for bound, counted in zip(bounds, counts, strict=True):
        enough = counted >= wanted
        # Bounds ascend; those past `high` are reached by fewer still, and stay without effect.
        lower = ~enough & (bound < high)
        low, reach_low = jnp.where(enough, bound, low), jnp.where(enough, counted, reach_low)
        high, reach_high = jnp.where(lower, bound, high), jnp.where(lower, counted, reach_high)
    return low, high, reach_low, reach_high


def search_in_place(row: Row, budget, hint, lanes_ref, finish, listing, plan: Plan):
    """Selects from a row in global memory, by as many passes over it as it takes; `hint` is a key worth testing first."""
    append = functools.partial(gpu_lanes.append, layout=row.layout, interpreted=plan.interpreted)

    def keys_and_places(tile):
        place, seen = row.places(tile)
        return jnp.where(seen, keys_of(row.load(tile)), selection.DEAD), place

    def fold(begin, stop, state, use):
        """state = use(key, state) over the tiles [begin, stop), some of them read at a time."""

        def body(group, state):
            tiles = [begin + group * _STREAMED_VECTORS + v for v in range(_STREAMED_VECTORS)]
            scores = [row.load(jnp.minimum(tile, stop - 1)) for tile in tiles]
            for tile, score in zip(tiles, scores, strict=True):
                _, seen = row.places(tile)
                seen &= tile < stop
                state = use(jnp.where(seen, keys_of(score), selection.DEAD), state)
            return state

        groups = lax.div(stop - begin + (_STREAMED_VECTORS - 1), _STREAMED_VECTORS)
        return lax.fori_loop(0, groups, body, state)

    def count(tests, begin, stop):
        """How many keys of the tiles [begin, stop) pass each test."""
        sums = fold(
            begin,
            stop,
            [full(0, (row.step,), row.layout) for _ in tests],
            lambda key, sums: [
                total + test(key).astype(jnp.int32) for total, test in zip(sums, tests, strict=True)
            ],
        )
        return gpu_lanes.reduce(
            sums, lanes_ref, layout=row.layout, kind="add", interpreted=plan.interpreted
        )

    first, last = row.first, row.last
    alive, over, level = count(
        [
            lambda key: key != selection.DEAD,
            lambda key: key > hint,
            lambda key: (key == hint) & (key != selection.DEAD),
        ],
        first,
        last,
    )
    kept = jnp.minimum(budget, alive)
    # The threshold is the hint itself, or above it, or below it.
    low = jnp.where(over >= kept, hint + 1, jnp.where(over + level >= kept, hint, LOWEST))
    high = jnp.where(over >= kept, _HIGHEST, jnp.where(over + level >= kept, hint + 1, hint))
    above = jnp.where(over >= kept, 0, jnp.where(over + level >= kept, over, over + level))

    def one_pass(carry):
        low, high, above = carry  # keys that reach `high`: fewer than `kept`
        bounds = even_keys(low, high, _STREAMED_BITS)
        count_row = lambda tests: count(tests, first, last)
        low, high, _, above = shrink(low, high, 0, above, kept, bounds, count_row)
        return low, high, above

    bound, _, above = lax.while_loop(
        lambda carry: (carry[1] - carry[0] != 1) & (kept > 0), one_pass, (low, high, above)
    )
    quota = kept - above  # equals of the threshold that are kept: at least 1

    def halve_tiles(carry):
        begin, stop, before = carry  # `before` equals in the tiles left of `begin`: below the quota
        middle = lax.div(begin + stop, 2)
        [equals] = count([lambda key: key == bound], begin, middle)
        inside = before + equals >= quota
        return (
            jnp.where(inside, begin, middle),
            jnp.where(inside, middle, stop),
            jnp.where(inside, before, before + equals),
        )

    holder, _, before = lax.while_loop(
        lambda carry: (carry[1] - carry[0] > 1) & (kept > 0),
        halve_tiles,
        (first, last, jnp.int32(0)),
    )

    def halve_places(_, carry):
        begin, stop = carry  # the last kept place of the tile lies in [begin, stop)
        middle = lax.div(begin + stop, 2)
        key, _ = keys_and_places(holder)
        hit = (key == bound) & (row.lane_place < middle)
        [equals] = gpu_lanes.reduce(
            [hit.astype(jnp.int32)],
            lanes_ref,
            layout=row.layout,
            kind="add",
            interpreted=plan.interpreted,
        )
        inside = before + equals >= quota
        return jnp.where(inside, begin, middle), jnp.where(inside, middle, stop)

    inside, _ = lax.fori_loop(
        0, (row.step - 1).bit_length(), halve_places, (jnp.int32(0), jnp.int32(row.step))
    )
    cut = row.offset(holder) + inside

    def emit():
        def pack(tile, packed):
            key, place = keys_and_places(tile)
            hit = (key > bound) | ((key == bound) & (place <= cut))
            payloads, lists = listing(place, key)
            return append(hit, payloads, lists, packed, lanes_ref)

        lax.fori_loop(first, last, pack, jnp.int32(0))

    finish(kept, bound, cut, emit)
