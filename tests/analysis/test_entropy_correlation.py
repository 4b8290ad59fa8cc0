"""Correlation of heads: coefficients against known ones, intervals that cover, and inputs that say nothing."""

import numpy as np
import pytest

from jaxtopk.analysis.correlation import head_loss_correlation


def test_coefficients_are_those_of_the_definition():
    x, y = np.asarray([[1.0, 2, 3], [4, 5, 6]]), np.asarray([[2.0, 1, 4], [3, 7, 5]])
    found = head_loss_correlation(x, y)
    assert found.pearson.value == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    # 1 - 6 sum d^2 / (n (n^2 - 1)), ranks 2 1 4 3 6 5
    assert found.spearman.value == pytest.approx(1 - 6 * 6 / (6 * 35))
    assert found.heads == 6


def test_equal_numbers_share_the_mean_of_their_ranks():
    x, y = [1.0, 1.0, 2.0, 3.0], [5.0, 6.0, 6.0, 7.0]
    found = head_loss_correlation(x, y)
    wanted = np.corrcoef([0.5, 0.5, 2, 3], [0, 1.5, 1.5, 3])[0, 1]
    assert found.spearman.value == pytest.approx(wanted)


def test_ranks_see_a_bend_and_lines_do_not():
    x = np.linspace(0.1, 5, 40)
    found = head_loss_correlation(x, np.exp(3 * x))
    assert found.spearman.value == pytest.approx(1)
    assert found.pearson.value < 0.7
    assert head_loss_correlation(x, -x).pearson[:] == pytest.approx((-1, -1, -1))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, inside = 0.6, 0
    for trial in range(60):
        x = rng.normal(size=60)
        y = truth * x + np.sqrt(1 - truth**2) * rng.normal(size=60)
        _, low, high = head_loss_correlation(x, y, seed=trial, resamples=300).pearson
        inside += low <= truth <= high
    assert 50 <= inside < 60


def test_the_seed_fixes_the_interval_and_unknown_heads_are_left_out():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 30))
    plain = head_loss_correlation(x, y, seed=3)
    assert head_loss_correlation(x, y, seed=3) == plain
    assert head_loss_correlation(x, y, seed=4) != plain
    more = head_loss_correlation(np.append(x, 9.0), np.append(y, np.nan), seed=3)
    assert more == plain


@pytest.mark.parametrize(
    ("entropy", "loss", "options", "message"),
    [
        ([1, 2, 3], [1, 2], {}, r"loss: got shape \(2,\), wanted \(3,\)"),
        ([1, 2, np.nan], [1, 2, 3], {}, "got 2 heads with both numbers, wanted at least 3"),
        ([1, 2, 3], [0, 0, 0], {}, "loss: got 0 for every head"),
        ([2, 2, 2], [1, 2, 3], {}, "entropy: got 2 for every head"),
        ([1, 2, 3], [1, 2, 3], {"resamples": 0}, "resamples: got 0"),
        ([1, 2, 3], [1, 2, 3], {"inside": 1.0}, "inside: got 1.0"),
    ],
)
def test_what_cannot_be_correlated_is_refused(entropy, loss, options, message):
    with pytest.raises(ValueError, match=message):
        head_loss_correlation(entropy, loss, **options)
