"""Intervals against values worked out by hand or published, and their behaviour at the ends."""

import math

import numpy as np
import pytest

from jaxtopk.evaluation.metrics import mean_interval, student_quantile, wilson_interval


def test_wilson_interval_of_a_worked_case():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38415, half width 1.96 / 1.38415 * sqrt(0.016 + 0.009604)
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4901625, abs=1e-5)
    assert high == pytest.approx(0.9433178, abs=1e-5)


def test_wilson_interval_has_width_at_both_ends_and_stays_inside():
    assert wilson_interval(0, 8)[0] == 0
    assert wilson_interval(8, 8)[1] == 1
    assert wilson_interval(8, 8)[0] == pytest.approx(1 - wilson_interval(0, 8)[1])
    assert wilson_interval(8, 8)[0] < 0.7


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042)],
)
def test_student_quantiles_are_the_published_ones(freedom, published):
    assert student_quantile(freedom) == pytest.approx(published, abs=5e-4)


def test_mean_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = [
        low <= 3 <= high
        for low, high in (mean_interval(list(rng.normal(3, 2, 5))) for _ in range(2000))
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_a_single_value_has_no_bounds():
    assert mean_interval([1.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(0, 0), "samples: got 0"),
        (lambda: wilson_interval(3, 2), "successes: got 3, wanted 0 to 2"),
        (lambda: mean_interval([]), "values: got shape"),
    ],
)
def test_impossible_counts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
