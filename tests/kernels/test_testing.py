"""The judges themselves: each bound lets pass what it should and catches what is just beyond it."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import topk_select
from pallas_kernels.testing import (
    adversarial_scores,
    assert_accurate,
    assert_deterministic,
    assert_same_selection,
    assert_well_formed,
)

ORACLE = np.asarray([3.0, -10.0, 0.5, -np.inf])


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("float64", 1e-12)])
def test_wide_results_may_miss_by_a_share_of_the_largest_value(dtype, bound):
    off = np.asarray([0, 0, 10 * bound, 0])
    assert_accurate(ORACLE + 0.9 * off, ORACLE, dtype=dtype)
    with pytest.raises(AssertionError, match="max error .*, wanted at most"):
        assert_accurate(ORACLE + 1.1 * off, ORACLE, dtype=dtype)


def test_narrow_results_are_judged_beside_the_naive_one():
    rng = np.random.default_rng(0)
    oracle, noise = rng.normal(size=1000), rng.normal(size=1000) * 0.1
    judge = lambda error: assert_accurate(
        oracle + error, oracle, naive=oracle + noise, dtype="float16"
    )
    judge(1.4 * noise)
    with pytest.raises(AssertionError, match="RMS error"):
        judge(1.6 * noise)
    spike = np.where(np.arange(1000) == np.abs(noise).argmax(), 2.1 * noise, 0)
    with pytest.raises(AssertionError, match="max error"):
        judge(spike)
    assert_accurate(oracle * (1 + 2.0**-11), oracle, naive=oracle, dtype="float16")  # the floor
    with pytest.raises(AssertionError, match="judged beside a naive one"):
        assert_accurate(oracle, oracle, dtype="bfloat16")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.0])
def test_what_is_not_finite_must_stand_where_the_oracle_has_it(wrong):
    assert_accurate(ORACLE, ORACLE, dtype="float32")
    with pytest.raises(AssertionError, match="non-finite positions"):
        assert_accurate(np.asarray([3.0, -10.0, 0.5, wrong]), ORACLE, dtype="float32")
    if not np.isfinite(wrong):
        with pytest.raises(AssertionError, match="non-finite positions"):
            assert_accurate(np.asarray([3.0, wrong, 0.5, -np.inf]), ORACLE, dtype="float32")


SCORES = jnp.asarray([[5.0, 1, 3, 3, 0], [2, 2, 2, 2, 2]])
SELECTION = topk_select(SCORES, 2, implementation="reference")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", [1, 2]),
        ("threshold", [3.0000002, 2]),
        ("tie_cut", [3, 1]),
        ("indices", [[0, 3], [0, 1]]),
        ("indices", [[2, 0], [0, 1]]),
        ("indices", [[0, -1], [0, 1]]),
    ],
)
def test_selections_of_whole_numbers_must_agree_in_every_field(field, value):
    assert_same_selection(SELECTION, SELECTION)
    other = SELECTION._replace(**{field: jnp.asarray(value, getattr(SELECTION, field).dtype)})
    with pytest.raises(AssertionError, match=field if field != "indices" else None):
        assert_same_selection(other, SELECTION)


def test_other_selections_may_swap_scores_within_one_ulp_of_each_other():
    scores = np.asarray([[5, np.nextafter(np.float32(3), np.float32(9)), 3, 1]], np.float32)
    one, other = SELECTION._replace, np.asarray
    first = one(
        indices=other([[0, 1]]), count=other([2]), threshold=scores[0, 1:2], tie_cut=other([1])
    )
    second = one(
        indices=other([[0, 2]]), count=other([2]), threshold=scores[0, 2:3], tie_cut=other([2])
    )
    third = one(
        indices=other([[0, 3]]), count=other([2]), threshold=scores[0, 2:3], tie_cut=other([2])
    )
    assert_same_selection(first, second, scores)
    with pytest.raises(AssertionError):
        assert_same_selection(first, third, scores)


def test_empty_rows_have_their_marks():
    empty = topk_select(
        jnp.asarray([[1.0, 2.0]]), 1, lengths=jnp.asarray([0]), implementation="reference"
    )
    assert_well_formed(empty)
    for wrong in (dict(threshold=jnp.asarray([0.0])), dict(tie_cut=jnp.asarray([0]))):
        with pytest.raises(AssertionError, match="an empty row's"):
            assert_well_formed(empty._replace(**wrong))


def test_runs_that_differ_in_a_bit_are_not_deterministic():
    runs = iter([0.0, 0.0, 0.0, -0.0])
    run = lambda: {"x": np.asarray([np.nan, next(runs)], np.float32)}
    assert_deterministic(run)
    with pytest.raises(AssertionError, match="two runs differ at .*x"):
        assert_deterministic(run)


def test_adversarial_rows_are_what_their_names_say():
    rows = adversarial_scores(300, 20)
    assert all(row.shape == (300,) and row.dtype == np.float32 for row in rows.values())
    assert np.signbit(rows["zeros of both signs"]).any()
    assert (np.abs(rows["subnormals"]) < 2.0**-126).all()
    assert rows["subnormals"].any()
    assert np.isnan(rows["only nan"]).all()
    assert len(np.unique(rows["adjacent floats"])) == 4
