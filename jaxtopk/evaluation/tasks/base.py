"""What a task is: seeded samples that fill a token budget, and a score for a reply."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jaxtopk.evaluation.tasks.drawing import generator
from jaxtopk.evaluation.tasks.fitting import fit_budget, fit_whole_units
from jaxtopk.evaluation.tasks.haystack import filler_words

type Split = Literal["test", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with its answer.

    Args:
      prompt: the context and the question.
      reply_start: how the reply begins, on a line of its own; the model goes on from here.
      answers: strings that a right reply holds.
      depth: where the answer stands, as a share of the characters of the prompt; None where it has no single place.
      num_units: how many repeated pieces the prompt was filled with.
      meta: what a score or a table by group needs beside, such as ("difficulty", "easy").

    Raises:
      ValueError: there is no answer, or an empty one.
    """

    prompt: str
    reply_start: str
    answers: tuple[str, ...]
    depth: float | None
    num_units: int
    meta: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.answers or not all(answer.strip() for answer in self.answers):
            raise ValueError(f"answers: got {self.answers}, wanted strings that are not empty")

    @property
    def text(self) -> str:
        """What a model that continues text is given; chat models may get `prompt` through their template instead."""
        return f"{self.prompt}\n{self.reply_start}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSample:
    """A sequence of token ids, some of which say what should come next.

    Args:
      tokens: the sequence.
      labels: at each position the token wanted next (it need not be the one that follows), -1 where nothing is asked.

    Raises:
      ValueError: the lengths differ, or nothing is asked.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.tokens):
            raise ValueError(f"labels: got {len(self.labels)}, wanted {len(self.tokens)}")
        if all(label < 0 for label in self.labels):
            raise ValueError("labels: got none, wanted at least one position with a label")

    @property
    def first_label(self) -> int:
        """The first position with a label."""
        return next(i for i, label in enumerate(self.labels) if label >= 0)


class AnyTask(abc.ABC):
    """What tables and runs need to know of a task, of text or of tokens."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name for tables and results."""

    @property
    def size(self) -> int | None:
        """How many samples there are; None where they are drawn without end."""
        return None

    @property
    def wording(self) -> str:
        """Whose prompt template: "own", or "suite" where it comes from the user's copy of a published suite."""
        return "own"

    @property
    def metric(self) -> str:
        """Name of the score, for tables."""
        return "match_all"

    @property
    def aggregation(self) -> bool:
        """Whether the answer depends on much of the context at once, so that attention has to be spread."""
        return False


class Task(AnyTask):
    """A family of text samples; sample `index` of a `seed` is always the same text."""

    @property
    @abc.abstractmethod
    def reply_tokens(self) -> int:
        """Longest reply, tokens."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a reply; each is cut off with what follows."""
        return ("\n",)

    @abc.abstractmethod
    def sample(
        self, index: int, *, seed: int, target_tokens: int, count_tokens: Callable[[Sample], int]
    ) -> Sample:
        """Returns a sample that, with the longest reply, never exceeds `target_tokens`.

        Args:
          count_tokens: length of a sample as the model will read it, chat template included.

        Raises:
          ValueError: the length is too short for the task.
        """

    def score(self, sample: Sample, reply: str) -> float:
        """Returns how right a reply is, 0 to 1; here the share of the answers that it holds, whatever their case."""
        return match_all(sample.answers, reply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How large a sample is to be.

    Args:
      units: repeated pieces, at least 1.
      filler: neutral text that takes what is left of the budget, to stand where it does no harm; may be empty.
      target_tokens: the whole budget, for constructions that change with it.
    """

    units: int
    filler: str
    target_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedTask(Task):
    """A task whose samples are made up, of as many pieces as fit.

    Args:
      fill: keep room for the longest reply and fill the rest with neutral text, to within 1% of the budget from some
        thousand tokens on. False: whole pieces only, the prompt alone may take the whole budget, and random numbers are
        drawn from a stream that does not depend on the task.
    """

    fill: bool = True

    @abc.abstractmethod
    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Returns a sample of that size; its length grows with the units, up to the luck of the words drawn."""

    def sample(
        self,
        index: int,
        *,
        seed: int,
        target_tokens: int,
        count_tokens: Callable[[Sample], int],
        split: Split = "test",
    ) -> Sample:
        """See `Task.sample`. Samples of the two splits never share a stream of random numbers."""

        @functools.cache
        def build(units: int, words: int, target: int = target_tokens) -> Sample:
            # A fresh generator each time: the random draws do not depend on the path of the search.
            plan = Plan(units=units, filler=filler_words(words), target_tokens=target)
            stream = generator(seed, index, split, task=self.name if self.fill else "")
            return self.build(stream, index, plan)

        @functools.cache
        def length(units: int, words: int) -> int:
            return count_tokens(build(units, words))

        reserved = self.reply_tokens if self.fill else 0
        if length(1, 0) + reserved > target_tokens:
            least, needed = target_tokens, length(1, 0) + reserved
            while needed > least:  # some tasks grow with the target
                least, needed = needed, count_tokens(build(1, 0, needed)) + reserved
            raise ValueError(
                f"{self.name}: target_tokens got {target_tokens}, wanted at least {least} for one unit"
            )
        if self.fill:
            return build(*fit_budget(length, target_tokens - reserved))
        return build(fit_whole_units(lambda units: length(units, 0), target_tokens), 0)


class TokenTask(AnyTask):
    """A family of token sequences, scored by the share of labels that are the most likely next token."""

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "token_accuracy"

    @abc.abstractmethod
    def sample(self, index: int, *, seed: int, target_tokens: int, vocab_size: int) -> TokenSample:
        """Returns a sample of `target_tokens`, with ids below `vocab_size`."""

    def score(self, sample: TokenSample, predictions: Sequence[int]) -> float:
        """Returns the share of labels met by the predictions, one a position of the sample."""
        if len(predictions) != len(sample.labels):
            raise ValueError(f"predictions: got {len(predictions)}, wanted {len(sample.labels)}")
        pairs = zip(sample.labels, predictions, strict=True)
        asked = [int(label == predicted) for label, predicted in pairs if label >= 0]
        return sum(asked) / len(asked)


def match_all(answers: Sequence[str], reply: str) -> float:
    """Returns the share of `answers` that stand in `reply`; upper and lower case, and runs of spaces, are the same."""
    reply = _normalised(reply)
    return sum(_normalised(answer) in reply for answer in answers) / len(answers)


def match_any(answers: Sequence[str], reply: str) -> float:
    """Returns 1 if any of `answers` stands in `reply`, in the sense of `match_all`; else 0."""
    reply = _normalised(reply)
    return float(any(_normalised(answer) in reply for answer in answers))


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())
