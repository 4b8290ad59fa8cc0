"""How many pieces, and how many words of filler beside them, make a sample as long as wanted, with few encodings.

An encoding of a long sample is what takes time, so a search starts from short ones, guesses by a straight line (a little
low, since a sample that is too long is of no use), and stops as soon as the sample is close enough.
"""

from collections.abc import Callable

_MAX_UNITS = 2**20  # the largest sample a search will try
_PROBE_UNITS = 17  # of the second, still short, encoding
_PROBE_WORDS = 64
_LINEAR_STEPS = 8  # guesses by a straight line; after these the bracket is halved
_MAX_STEPS = 32


def fit_budget(length: Callable[[int, int], int], budget: int) -> tuple[int, int]:
    """Returns units and filler words whose length is at most `budget`, and within half a percent of it where possible.

    Args:
      length: tokens of a sample of so many units and filler words; grows with both, more or less. It has to be at most
        `budget` for one unit without filler.
    """
    slack = max(budget // 200, 1)
    units = _largest(
        lambda count: length(count, 0), budget, first=1, probe=_PROBE_UNITS, slack=2 * slack
    )
    left = budget - length(units, 0)
    if left <= slack:
        return units, 0
    per_word = max((length(1, _PROBE_WORDS) - length(1, 0)) / _PROBE_WORDS, 0.1)
    guess = max(int((left - slack / 2) / per_word), 1)
    return units, _largest(
        lambda count: length(units, count), budget, first=0, probe=guess, slack=slack
    )


def fit_whole_units(length: Callable[[int], int], budget: int) -> int:
    """Returns the units that fit, found by doubling and halving: exactly the largest where length grows strictly."""
    low, high = 1, 2
    while high < _MAX_UNITS and length(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if length(middle) <= budget else (low, middle)
    return low


def _largest(
    length: Callable[[int], int], budget: int, *, first: int, probe: int, slack: int
) -> int:
    """Returns a count that fits: one within `slack` of the budget, else one whose next would not fit, as far as is known.

    Args:
      first: a count that is known to fit.
      probe: the next one to try.
    """
    low, high = first, None
    previous = first
    aim = slack / 2  # tokens below the budget
    for step in range(_MAX_STEPS):
        if length(probe) <= budget:
            previous, low, aim = low, probe, slack / 2
        else:
            # Lower and lower, or a crooked line would give many guesses, each a little too long.
            high, aim = probe, 2 * aim
        left = budget - length(low)
        if left <= slack or low >= _MAX_UNITS or (high is not None and high - low <= 1):
            break
        other = previous if high is None else high
        each = (length(other) - length(low)) / (other - low) if other != low else 0.0
        if left <= each:
            break
        if high is None:
            ahead = (left - aim) / each if each > 0 else low + 1
            probe = min(low + max(int(min(ahead, _MAX_UNITS)), 1), _MAX_UNITS)
        elif step < _LINEAR_STEPS and each > 0:
            probe = min(low + max(int((left - aim) / each), 1), high - 1)
        else:
            probe = (low + high) // 2
    return low
