"""Frequent words extraction: the words that a text in code uses most often, by Zipf's law."""

import dataclasses
import math

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.drawing import draw_letters
from jaxtopk.evaluation.tasks.haystack import after_filler

_LETTERS = 6
_EXPONENT = 2.0
_ZETA = math.pi**2 / 6  # zeta(2), which makes the shares of all ranks sum to one
_TOKENS_PER_WORD = 50  # of the whole length, for one word of the vocabulary
_FEWEST = 100  # words; from here on the ranks 2 to 5 come up at different counts
_DOTS = "..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords(GeneratedTask):
    """Rank r of n words comes up floor(n / (zeta(2) r^2)) times; rank 1 is dots, ranks 2 to 4 are asked for.

    After RULER (arXiv:2404.06654), in words of our own.
    """

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "fwe"

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 40

    @property
    def aggregation(self) -> bool:
        """See `AnyTask.aggregation`."""
        return True

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Draws one word more than 99 for each unit, words whose rank comes up less than once left out."""
        total = plan.units + _FEWEST - 1
        ranks = np.arange(1, max(plan.target_tokens // _TOKENS_PER_WORD, 5) + 1)
        counts = np.floor(total * ranks**-_EXPONENT / _ZETA).astype(int)
        words = [_DOTS, *draw_letters(rng, len(ranks) - 1, _LETTERS)]
        text = np.repeat(np.asarray(words), counts)
        rng.shuffle(text)
        prompt = (
            "Below is a text in code. Keep count of its words; dots stand for nothing.\n\n"
            + " ".join(text.tolist())
            + "\n\nQuestion: Which three words of the text, not counting dots, come up most often?"
        )
        return Sample(
            prompt=after_filler(plan.filler, prompt),
            reply_start="Answer: The three words are",
            answers=tuple(words[1:4]),
            depth=None,
            num_units=plan.units,
        )
