"""What a sub-task of a published suite is: finitely many samples from local files, cut to a token budget where too long."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from jaxtopk.evaluation.tasks.base import Sample, Task

type Keep = Literal["start", "ends", "all"]

_CHARACTERS = 6  # a token: a context of more of them is hardly ever short enough
_START = 8  # part of the limit, in characters, that a first look at a longer context takes
_MARGIN = 1.1  # of the size then expected to be too long
_PROBES = 12  # encodings of a search at most
_HALVE_EVERY = 3  # steps of a search, in case the tokens lie too unevenly for straight lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteSample(Sample):
    """A sample whose prompt may run on into the reply without a new line.

    Args:
      joint: what stands between the prompt and the start of the reply.
    """

    joint: str = "\n"

    @property
    def text(self) -> str:
        """See `Sample.text`."""
        return f"{self.prompt}{self.joint}{self.reply_start}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt before it is cut to size.

    Args:
      before, context, after: the prompt; only `context` may lose a part.
      reply_start, joint, answers, meta: as in `SuiteSample`.
      needle: what stands in the context at the depth of the answer; None where the answer has no single place.
    """

    before: str = ""
    context: str
    after: str
    reply_start: str
    answers: tuple[str, ...]
    joint: str = "\n"
    needle: str | None = None
    meta: tuple[tuple[str, str], ...] = ()

    def cut(self, kept: int, keep: Keep) -> SuiteSample:
        """Returns the sample with `kept` characters of the context; what is lost is counted in `meta`."""
        lost = len(self.context) - kept
        head = kept if keep == "start" else (kept + 1) // 2
        context = self.context
        if lost:
            context = context[:head] + context[len(context) - (kept - head) :]
        prompt = f"{self.before}{context}{self.after}"
        return SuiteSample(
            prompt=prompt,
            reply_start=self.reply_start,
            joint=self.joint,
            answers=self.answers,
            depth=self._depth(prompt),
            num_units=1,
            meta=(*self.meta, ("characters_cut", str(lost))) if lost else self.meta,
        )

    def _depth(self, prompt: str) -> float | None:
        place = -1 if self.needle is None else prompt.find(self.needle)
        return None if place < 0 else place / len(prompt)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteTask(Task):
    """One sub-task. Its samples are the suite's own, in the suite's own draw, so that `seed` changes nothing.

    Args:
      suite, subtask: names.
      chat: prompts go through a chat template, so that a reply is not begun for the model.
    """

    suite: str
    subtask: str
    chat: bool = False

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return f"{self.suite}.{self.subtask}"

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """See `AnyTask.size`; always finite."""

    @property
    def keep(self) -> Keep:
        """What stays of a context that is too long; with "all" such a sample is an error."""
        return "start"

    @abc.abstractmethod
    def draft(self, index: int, target_tokens: int) -> Draft:
        """Returns sample `index`, uncut."""

    def sample(
        self, index: int, *, seed: int, target_tokens: int, count_tokens: Callable[[Sample], int]
    ) -> SuiteSample:
        """Returns sample `index`, cut to fit where it has to be.

        Raises:
          ValueError: there is no such sample, or even without its context it does not fit.
        """
        del seed  # what is drawn is drawn as the suite does
        if not 0 <= index < self.size:
            raise ValueError(f"{self.name}: index got {index}, wanted 0 to {self.size - 1}")
        draft = self.draft(index, target_tokens)
        limit = target_tokens - self.reply_tokens
        fitted, least = fit(draft, limit, keep=self.keep, count_tokens=count_tokens)
        if fitted is None:
            raise ValueError(
                f"{self.name}, sample {index}: target_tokens got {target_tokens}, "
                f"wanted at least {least + self.reply_tokens}"
            )
        return fitted


def fit(
    draft: Draft, limit: int, *, keep: Keep, count_tokens: Callable[[Sample], int]
) -> tuple[SuiteSample | None, int]:
    """Returns the sample with as much context as `limit` allows, to some thousandths, and its tokens.

    A sample that fits is never cut. Where not even an empty context fits: None, and the tokens that would be needed.
    """
    length = lambda kept: count_tokens(draft.cut(kept, keep))
    whole = len(draft.context)
    under = length(whole if keep == "all" else 0)
    if under > limit or keep == "all" or not whole:
        return (None if under > limit else draft.cut(whole, keep)), under
    high = whole
    # A context may be a thousand times too long: it is not encoded whole unless it may well fit.
    if whole > _CHARACTERS * limit:
        look = max(limit // _START, 1)
        density = max(length(look) - under, 1) / look
        high = min(whole, math.ceil(_MARGIN * limit / density) + 1)
    while (over := length(high)) <= limit:
        if high == whole:
            return draft.cut(whole, keep), over
        high = min(whole, 2 * high)
    low, slack = 0, limit // 500
    for step in range(1, _PROBES + 1):
        if limit - under <= slack or high - low <= 1:
            break
        share = 0.5 if step % _HALVE_EVERY == 0 else (limit - under - slack / 2) / (over - under)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        if (size := length(middle)) <= limit:
            low, under = middle, size
        else:
            high, over = middle, size
    return draft.cut(low, keep), under
