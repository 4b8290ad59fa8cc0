"""How well the entropy of a head foretells what it loses under Top-k: rank and linear correlation, with intervals."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Correlation(NamedTuple):
    """A coefficient in [-1, 1], and the ends of its interval."""

    value: float
    low: float
    high: float


class HeadCorrelation(NamedTuple):
    """Of one number a head with another; see `head_loss_correlation`.

    spearman: of ranks: whether one grows with the other, however.
    pearson: of the numbers themselves: whether it does so along a line.
    heads: how many were compared.
    """

    spearman: Correlation
    pearson: Correlation
    heads: int


def head_loss_correlation(
    entropy: ArrayLike,
    loss: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 2000,
    inside: float = 0.95,
) -> HeadCorrelation:
    """Correlates each head's entropy with what it loses when only its best keys stay.

    Intervals are percentiles of bootstrap resamples of heads, pairs kept together. Heads of one model are not independent
    draws: the interval says how much the coefficient hangs on single heads, not how another model would come out.

    Args:
      entropy: a number a head, any shape, such as its mean entropy or H / ln n, [layer, head].
      loss: of the same shape, such as 1 - mass. Heads where either is NaN are left out.
      seed: of the resampling.
      resamples: at least 1.
      inside: share of resamples inside the interval.

    Raises:
      ValueError: the shapes differ, fewer than three heads are left, or all heads have the same number: a constant
        correlates with nothing.
    """
    x, y = np.asarray(entropy, np.float64), np.asarray(loss, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"loss: got shape {y.shape}, wanted {x.shape} as the entropy has")
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, wanted at least 1")
    if not 0 < inside < 1:
        raise ValueError(f"inside: got {inside}, wanted a share between 0 and 1")
    both = ~(np.isnan(x) | np.isnan(y))
    x, y = x[both], y[both]
    if x.size < 3:
        raise ValueError(f"entropy: got {x.size} heads with both numbers, wanted at least 3")
    for name, values in (("entropy", x), ("loss", y)):
        if values.min() == values.max():
            raise ValueError(f"{name}: got {values[0]:g} for every head, wanted different numbers")
    drawn = np.random.default_rng(seed).integers(0, x.size, size=(resamples, x.size))
    tail = (1 - inside) / 2

    def correlate(transform: Callable[[np.ndarray], np.ndarray]) -> Correlation:
        value = float(_pearson(transform(x[None]), transform(y[None]))[0])
        # A resample may hold one head only, over and over: it says nothing, and is left out.
        again = _pearson(transform(x[drawn]), transform(y[drawn]))
        low, high = np.nanquantile(again, [tail, 1 - tail])
        return Correlation(value, float(low), float(high))

    return HeadCorrelation(correlate(_ranks), correlate(lambda values: values), int(x.size))


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the correlation of each row of x with that of y; NaN where one of them is constant."""
    # A constant row less its mean is only nearly zero: its size is known from its ends.
    varies = (x.min(axis=1) < x.max(axis=1)) & (y.min(axis=1) < y.max(axis=1))
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
    product = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    found = (x * y).sum(axis=1) / np.where(varies & (product > 0), product, 1)
    return np.where(varies & (product > 0), np.clip(found, -1, 1), np.nan)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each entry in its row; equal entries share the mean of their ranks."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    rows, size = values.shape
    place = np.broadcast_to(np.arange(size), (rows, size))
    edge = np.ones((rows, 1), bool)
    begins = np.concatenate([edge, ordered[:, 1:] != ordered[:, :-1]], axis=1)
    ends = np.concatenate([begins[:, 1:], edge], axis=1)
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, place, size)[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty((rows, size))
    np.put_along_axis(ranks, order, (first + last) / 2, axis=1)
    return ranks


__all__ = ["Correlation", "HeadCorrelation", "head_loss_correlation"]
