"""Common words extraction: the words that a long list repeats most often."""

import dataclasses

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.drawing import draw_words
from jaxtopk.evaluation.tasks.haystack import after_filler

_COMMON = 10
_LONG = 4096  # tokens; below, words are repeated less often so that there are still many
_INTRODUCTION = "In each numbered list below, ten words come up more often than all others."
_QUESTION = "Question: Which ten words come up most often in this list?"
_REPLY_START = "Answer: The ten words are"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords(GeneratedTask):
    """Ten words of a numbered list come up ten times as often as the others, or six times in a short one.

    From 4,096 tokens on, ten words 30 times each and the others 3 times, below 6 times and once; a worked example comes
    first. After RULER (arXiv:2404.06654), in words of our own.
    """

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "cwe"

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 96

    @property
    def aggregation(self) -> bool:
        """See `AnyTask.aggregation`."""
        return True

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Draws as many uncommon words as units."""
        long = plan.target_tokens >= _LONG
        example_size, example_times = (40, (10, 3)) if long else (20, (3, 1))
        words = draw_words(rng, example_size + _COMMON + plan.units)
        example = _numbered(rng, words[:example_size], *example_times)
        asked = words[example_size:]
        listed = _numbered(rng, asked, *((30, 3) if long else (6, 1)))
        prompt = (
            f"{_INTRODUCTION}\n\nList: {example}\n{_QUESTION}\n{_REPLY_START} "
            f"{', '.join(words[:_COMMON])}.\n\nList: {listed}\n{_QUESTION}"
        )
        return Sample(
            prompt=after_filler(plan.filler, prompt),
            reply_start=_REPLY_START,
            answers=tuple(asked[:_COMMON]),
            depth=None,
            num_units=plan.units,
        )


def _numbered(rng: np.random.Generator, words: list[str], common: int, others: int) -> str:
    """Repeats the first ten words `common` times and the rest `others` times, in random order, with numbers."""
    repeated = words[:_COMMON] * common + words[_COMMON:] * others
    order = rng.permutation(len(repeated))
    return " ".join(f"{number}. {repeated[i]}" for number, i in enumerate(order, 1))
