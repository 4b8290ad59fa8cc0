"""What a task is: seeded samples that fill a token budget, and a score for a reply."""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxtopk.evaluation.words import ADJECTIVES, NOUNS

_MAX_UNITS = 2**20  # the largest prompt a search will try


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with its answer.

    Args:
      prompt: the context and the question.
      reply_start: how the reply begins, on a line of its own; the model goes on from here.
      answers: strings that a right reply holds.
      depth: where the answer stands in the prompt, 0 at its start and 1 at its end.
      num_units: how many repeated pieces the prompt was filled with.
    """

    prompt: str
    reply_start: str
    answers: tuple[str, ...]
    depth: float
    num_units: int

    @property
    def text(self) -> str:
        """What a model that continues text is given; chat models may get `prompt` through their template instead."""
        return f"{self.prompt}\n{self.reply_start}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A family of samples; sample `index` of a `seed` is always the same text."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name for tables and results."""

    @abc.abstractmethod
    def build(self, rng: np.random.Generator, index: int, num_units: int) -> Sample:
        """Returns a sample of `num_units` pieces; its length grows with them, up to the luck of the words drawn."""

    def sample(
        self,
        index: int,
        *,
        seed: int,
        target_tokens: int,
        count_tokens: Callable[[Sample], int],
    ) -> Sample:
        """Returns a sample that fills `target_tokens` with as many pieces as fit, and never exceeds them.

        Args:
          count_tokens: length of a sample as the model will read it, chat template included.

        Raises:
          ValueError: not even one piece fits.
        """

        def build(num_units: int) -> Sample:
            # A fresh generator each time: the random draws do not depend on the path of the search.
            return self.build(np.random.default_rng([seed, index]), index, num_units)

        def fits(num_units: int) -> bool:
            return count_tokens(build(num_units)) <= target_tokens

        if not fits(1):
            raise ValueError(
                f"{self.name}: target_tokens got {target_tokens}, "
                f"wanted at least {count_tokens(build(1))} for one unit"
            )
        low, high = 1, 2
        while high < _MAX_UNITS and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return build(low)

    def score(self, sample: Sample, reply: str) -> float:
        """Returns the share of the answers that the reply holds, whatever their case."""
        return match_all(sample.answers, reply)


def match_all(answers: Sequence[str], reply: str) -> float:
    """Returns the share of `answers` that stand in `reply`; upper and lower case, and runs of spaces, are the same."""
    normalise = lambda text: " ".join(text.lower().split())
    reply = normalise(reply)
    return sum(normalise(answer) in reply for answer in answers) / len(answers)


def draw_keys(rng: np.random.Generator, count: int) -> list[str]:
    """Draws distinct adjective-noun keys, such as "amber-harbour".

    Raises:
      ValueError: more keys than the word lists can make.
    """
    available = len(ADJECTIVES) * len(NOUNS)
    if count > available:
        raise ValueError(
            f"keys: got {count}, wanted at most {available}, all pairs of the word lists"
        )
    chosen = rng.choice(available, size=count, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]


def draw_numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """Draws distinct numbers of exactly `digits` digits, none with a leading zero."""
    low, high = 10 ** (digits - 1), 10**digits
    if count > high - low:
        raise ValueError(f"digits: got {digits} for {count} distinct numbers, wanted more digits")
    drawn: dict[int, None] = {}  # keeps the order of drawing
    while len(drawn) < count:
        drawn.update(dict.fromkeys(rng.integers(low, high, size=count - len(drawn)).tolist()))
    return [str(number) for number in drawn]
