"""How sure a measured share or mean is: 95% intervals for few samples."""

import functools
import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054  # 97.5% quantile of the normal distribution


def wilson_interval(successes: float | int, samples: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a share; sane at 0 and 1, where the normal interval has no width.

    Raises:
      ValueError: no samples, or more successes than samples.
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}, wanted at least 1")
    if not 0 <= successes <= samples:
        raise ValueError(f"successes: got {successes}, wanted 0 to {samples}")
    share, z2 = successes / samples, _Z**2
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    spread = share * (1 - share) / samples + z2 / (4 * samples**2)
    half = _Z / (1 + z2 / samples) * math.sqrt(spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% Student t interval of a mean, for few independent values; infinite for a single one.

    Raises:
      ValueError: no values.
    """
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or not data.size:
        raise ValueError(f"values: got shape {data.shape}, wanted one axis with at least one value")
    if data.size == 1:
        return -math.inf, math.inf
    half = student_quantile(data.size - 1) * float(data.std(ddof=1)) / math.sqrt(data.size)
    mean = float(data.mean())
    return mean - half, mean + half


@functools.cache
def student_quantile(freedom: int, *, inside: float = 0.95) -> float:
    """Returns the t that a Student variable of `freedom` degrees stays within, in size, with probability `inside`."""

    def within(t: float) -> float:  # finite series, Abramowitz and Stegun 26.7.3 and 26.7.4
        angle = math.atan(t / math.sqrt(freedom))
        sine, square = math.sin(angle), math.cos(angle) ** 2
        odd = freedom % 2
        term = total = math.cos(angle) if odd else 1.0
        if freedom == 1:
            total = 0.0
        for power in range(2 + odd, freedom - 1, 2):
            term *= square * (power - 1) / power
            total += term
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < inside else (low, middle)
    return low
