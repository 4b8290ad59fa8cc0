"""Intervals and tests of the harness: exact where that can be counted, seeded, and right on data made to order."""

import itertools

import numpy as np
import pytest

from jaxtopk.evaluation import statistics
from jaxtopk.evaluation.metrics import wilson_interval


def test_the_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        values = rng.beta(2, 5, size=60)
        low, high = statistics.bootstrap_interval(values, seed=trial, resamples=1000)
        hits += low <= 2 / 7 <= high
    assert 0.90 < hits / 300 < 0.98


def test_the_bootstrap_agrees_with_drawing_samples_one_by_one():
    values = np.asarray([0, 0, 1, 0.5, 1, 1, 0.25, 1, 0, 1])
    drawn = np.random.default_rng(1).choice(values, size=(20_000, 10)).mean(axis=1)
    wanted = np.quantile(drawn, [0.025, 0.975])
    np.testing.assert_allclose(statistics.bootstrap_interval(values), wanted, atol=0.026)


def test_equal_values_get_an_interval_all_the_same():
    assert statistics.bootstrap_interval([1.0] * 20) == pytest.approx(wilson_interval(20, 20))
    low, high = statistics.bootstrap_interval([0.0])
    assert low == 0
    assert high > 0.5


def test_more_samples_give_a_narrower_interval_and_a_seed_the_same():
    width = lambda values: float(np.diff(statistics.bootstrap_interval(values))[0])
    assert width([0, 1] * 100) < width([0, 1] * 10) / 2
    assert statistics.bootstrap_interval([0, 1, 1], seed=3) == statistics.bootstrap_interval(
        [0, 1, 1], seed=3
    )


def test_tasks_are_resampled_each_by_itself():
    # One task is always right and the other always wrong: resampling both together would mix them.
    low, high = statistics.stratified_interval([[1.0] * 50, [0.0] * 49 + [1.0]])
    assert 0.5 <= low <= high < 0.54


def test_few_differences_are_tested_exactly():
    first, second = [0.5, 0.2, 0.9, 0.4, 0.7], [0.7, 0.2, 0.4, 0.9, 0.8]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=5)
    ]
    wanted = np.mean(np.asarray(sums) >= abs(sum(differences)) - 1e-12)
    assert statistics.paired_test(first, second) == pytest.approx(wanted)
    # All six the same way: 2 of 64 patterns are as far out.
    assert statistics.paired_test([0] * 6, [1] * 6) == 2 / 64


def test_many_differences_are_tested_by_seeded_flips():
    rng = np.random.default_rng(0)
    base = rng.random(100)
    alike = np.clip(base + rng.normal(0, 0.1, 100), 0, 1)
    worse = np.clip(base - 0.2 * (rng.random(100) < 0.5), 0, 1)
    assert statistics.paired_test(base, alike) > 0.05
    assert statistics.paired_test(base, worse) == 1 / 10_001
    assert statistics.paired_test(base, alike, seed=1) == statistics.paired_test(
        base, alike, seed=1
    )


def test_the_flips_agree_with_the_exact_test():
    rng = np.random.default_rng(2)
    differences = rng.choice([-1.0, 1.0], size=16, p=[0.3, 0.7])
    exact = statistics.paired_test(np.zeros(16), differences)
    padded = np.concatenate([differences, [1e-12]])  # 17 differences: no longer counted out
    assert statistics.paired_test(np.zeros(17), padded) == pytest.approx(exact, abs=0.02)


def test_settings_that_score_alike_do_not_differ():
    assert statistics.paired_test([0.1, 1, 0], [0.1, 1, 0]) == 1.0


def test_the_difference_interval_is_paired():
    first = np.linspace(0, 0.9, 40)
    low, high = statistics.difference_interval(first, first + 0.1)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_holm_multiplies_by_what_is_left_and_never_goes_down():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.bootstrap_interval([]), "values: got none"),
        (lambda: statistics.bootstrap_interval([0, 2]), "wanted scores in"),
        (lambda: statistics.paired_test([1], [1, 2]), "samples: got 1 and 2"),
        (lambda: statistics.difference_interval([], []), "samples: got 0 and 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
