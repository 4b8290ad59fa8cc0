"""The integer order of scores, sets rebuilt from two numbers, index lists, and budgets in whole numbers."""

import fractions

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import budget_from_ratio
from pallas_kernels.core import selection

LADDER = np.asarray(
    [-np.inf, -3.4e38, -1.0, -(2.0**-126), 0.0, 2.0**-126, 1.0, 1 + 2.0**-23, 3.4e38, np.inf],
    np.float32,
)


def test_the_order_of_keys_is_that_of_scores():
    keys = np.asarray(selection.order_key(jnp.asarray(LADDER)))
    assert (np.diff(keys) > 0).all()
    assert keys[0] > selection.NAN > selection.DEAD
    assert keys[-1] < selection.NOTHING


def test_both_zeros_and_all_subnormals_are_one_key_and_nan_is_below_everything():
    tiny = np.asarray([1, 0x7FFFFF, -1, -0x7FFFFF], np.int32)
    tiny = np.sign(tiny) * np.abs(tiny).view(np.float32)
    same = np.concatenate([np.asarray([0.0, -0.0], np.float32), tiny.astype(np.float32)])
    np.testing.assert_array_equal(selection.order_key(jnp.asarray(same)), 0)
    nans = np.asarray([0x7FC00000, -0x400000, 0x7F800001], np.int32).view(np.float32)
    np.testing.assert_array_equal(selection.order_key(jnp.asarray(nans)), selection.NAN)


@hypothesis.given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=32, max_size=32))
def test_keys_turn_back_into_their_scores(bits):
    scores = np.asarray(bits, np.int32).view(np.float32)
    scores = np.where(np.isnan(scores) | (np.abs(scores) < 2.0**-126), np.float32(1), scores)
    back = selection.key_to_score(selection.order_key(jnp.asarray(scores)))
    np.testing.assert_array_equal(back, scores)


def test_nothing_turns_into_the_threshold_of_an_empty_row():
    assert selection.key_to_score(jnp.int32(selection.NOTHING)) == jnp.inf
    scores, seen = jnp.asarray([[1.0, jnp.inf]]), jnp.ones((1, 2), bool)
    empty = selection.selected(scores, seen, jnp.asarray([jnp.inf]), jnp.asarray([-1], jnp.int32))
    assert not np.any(empty)


def test_a_set_is_all_above_the_threshold_and_equals_up_to_the_cut_among_what_is_seen():
    scores = jnp.asarray([[3.0, 1, 2, 2, jnp.nan, 2, 9, 2]])
    seen = jnp.asarray([[True] * 6 + [False, True]])
    kept = selection.selected(scores, seen, jnp.asarray([2.0]), jnp.asarray([3], jnp.int32))
    np.testing.assert_array_equal(kept[0], [1, 0, 1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_lists_are_the_first_true_positions(size):
    mask = np.random.default_rng(0).random((2, 3, 33)) < 0.3
    mask[0, 0], mask[0, 1] = False, True
    got = np.asarray(selection.compact(jnp.asarray(mask), size))
    for row, found in zip(mask.reshape(-1, 33), got.reshape(-1, size), strict=True):
        want = np.flatnonzero(row)[:size]
        np.testing.assert_array_equal(
            found, np.pad(want, (0, size - len(want)), constant_values=-1)
        )


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.07, 0.29, 0.56, 1 / 3, 0.999, 1.0])
def test_budgets_are_exact_ceilings(ratio):
    """In floating point, ceil(0.07 * 100) is 8."""
    exact = fractions.Fraction(ratio).limit_denominator(2**15)
    rng = np.random.default_rng(0)
    visible = [0, 1, 2, 99, 100, 101, 300, 2**15, 2**24, 2**31 - 1, *rng.integers(0, 2**24, 50)]
    for floor in (1, 16):
        got = budget_from_ratio(jnp.asarray(visible, jnp.int32), ratio, floor)
        want = [
            min(n, max(floor, -(-(exact.numerator * int(n)) // exact.denominator))) for n in visible
        ]
        np.testing.assert_array_equal(got, want)


def test_a_share_too_small_to_be_a_fraction_keeps_the_least_there_is():
    got = budget_from_ratio(jnp.asarray([0, 5, 10 * 2**15], jnp.int32), 1e-9)
    np.testing.assert_array_equal(got, [0, 1, 10])  # no share is below 2^-15


def test_row_budgets_take_a_number_a_share_or_all():
    visible = jnp.asarray([[0, 3, 10]], jnp.int32)
    dense = jnp.asarray([[False, True, True]])
    budget = lambda *args: selection.row_budget(visible, *args).tolist()
    assert budget(2, None, 1, None) == [[0, 2, 2]]
    assert budget(2, None, 1, dense) == [[0, 3, 10]]
    assert budget(10**12, None, 1, None) == [[0, 3, 10]]
    assert budget(None, 0.25, 2, None) == [[0, 2, 3]]
    assert budget(jnp.asarray([[5, 1, 7]]), None, 1, None) == [[0, 1, 7]]
