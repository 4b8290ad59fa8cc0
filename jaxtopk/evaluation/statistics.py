"""How sure a mean score is, and whether two settings differ on the same samples: resampling, seeded and vectorised."""

from collections.abc import Sequence

import numpy as np

from jaxtopk.evaluation.metrics import wilson_interval

type Scores = Sequence[float | int] | np.ndarray

_EXACT = 16  # differences up to which all patterns of signs are tried
_CHUNK = 2**22  # numbers drawn at a time


def bootstrap_interval(
    values: Scores, *, seed: int = 0, resamples: int = 10_000, inside: float = 0.95
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean of scores in [0, 1].

    Where all values are equal, resampling cannot tell how likely other values were; then the interval is Wilson's, as if the
    value were a share of so many.

    Raises:
      ValueError: no values, or one outside [0, 1].
    """
    return stratified_interval([values], seed=seed, resamples=resamples, inside=inside)


def stratified_interval(
    strata: Sequence[Scores],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    inside: float = 0.95,
) -> tuple[float, float]:
    """Returns the bootstrap interval of the mean of several tasks' mean scores, each task resampled by itself.

    Raises:
      ValueError: as `bootstrap_interval`.
    """
    if not strata or not all(len(values) for values in strata):
        raise ValueError("values: got none, wanted at least one")
    data = [np.asarray(values, np.float64) for values in strata]
    for values in data:
        if values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"values: got {values.min()} to {values.max()}, wanted scores in [0, 1]"
            )
    if all(values.min() == values.max() for values in data):
        mean = float(np.mean([values[0] for values in data]))
        count = sum(map(len, data))
        return wilson_interval(mean * count, count)
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(rng, values, resamples) for values in data], axis=0)
    tail = (1 - inside) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def difference_interval(
    first: Scores,
    second: Scores,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    inside: float = 0.95,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean of second - first, paired by sample.

    Raises:
      ValueError: no samples, or not equally many.
    """
    differences = _differences(first, second)
    means = _resampled_means(np.random.default_rng(seed), differences, resamples)
    tail = (1 - inside) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_test(first: Scores, second: Scores, *, seed: int = 0, flips: int = 10_000) -> float:
    """Returns the two-sided p-value that two settings score alike, by flipping the signs of paired differences.

    If they did, each difference could as well have had the other sign. The p-value is the share of sign patterns whose mean
    is at least as far from 0 as the one seen: over all patterns for up to 16 differences that are not 0, else over `flips`
    seeded ones and the one seen itself.

    Raises:
      ValueError: no samples, or not equally many.
    """
    differences = _differences(first, second)
    differences = differences[differences != 0]
    count = len(differences)
    if not count:
        return 1.0
    seen = abs(differences.sum())
    least = seen - 1e-9 * max(seen, 1.0)  # sums in another order may be a rounding below
    if count <= _EXACT:
        patterns = np.arange(2**count)[:, None] >> np.arange(count)[None, :] & 1
        sums = (1.0 - 2.0 * patterns) @ differences
        return float(np.mean(np.abs(sums) >= least))
    rng = np.random.default_rng(seed)
    hits, left = 0, flips
    while left:
        rows = min(left, max(1, _CHUNK // count))
        signs = rng.integers(0, 2, size=(rows, count), dtype=np.int8)
        sums = (1.0 - 2.0 * signs) @ differences
        hits += int(np.count_nonzero(np.abs(sums) >= least))
        left -= rows
    return (hits + 1) / (flips + 1)


def holm(p_values: Scores) -> list[float]:
    """Returns Holm's adjusted p-values, in the order given: what is below a level there is so for all tests at once."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def _differences(first: Scores, second: Scores) -> np.ndarray:
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"samples: got {len(first)} and {len(second)} scores, wanted equally many, one or more"
        )
    return np.asarray(second, np.float64) - np.asarray(first, np.float64)


def _resampled_means(rng: np.random.Generator, values: np.ndarray, resamples: int) -> np.ndarray:
    # Scores take few values: how often each is drawn says as much as which samples were, and is much less to draw.
    distinct, counts = np.unique(values, return_counts=True)
    drawn = rng.multinomial(len(values), counts / len(values), size=resamples)
    return drawn @ distinct / len(values)


__all__ = [
    "bootstrap_interval",
    "difference_interval",
    "holm",
    "paired_test",
    "stratified_interval",
]
