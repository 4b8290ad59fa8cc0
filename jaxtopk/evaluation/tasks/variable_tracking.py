"""Variable tracking: a chain of assignments in a long text; all names that hold one number are asked for."""

import dataclasses

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.drawing import draw_letters, draw_numbers
from jaxtopk.evaluation.tasks.haystack import Haystack, insert

_EXAMPLE_PIECES = 4
_INTRODUCTION = "Variables are set in the texts below. Follow which of them hold the same number."


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking(GeneratedTask):
    """The first variable gets a number, each further one the value of the one before; a worked example is given first.

    After RULER (arXiv:2404.06654), in words of our own.

    Args:
      hops: assignments from one variable to the next.
      haystack: the text around.
    """

    hops: int = 4
    haystack: Haystack = dataclasses.field(default_factory=Haystack.noise)

    def __post_init__(self) -> None:
        if not 1 <= self.hops <= 100:
            raise ValueError(f"hops: got {self.hops}, wanted 1 to 100")

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "vt"

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 8 * (self.hops + 1)

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Puts the assignments, in order, at random places; names have five capitals, those of the example three."""
        numbers = draw_numbers(rng, 2, 5)
        example = self._names(rng, 3)
        names = self._names(rng, 5)
        example_text = self._text(
            rng, Haystack.noise().draw(rng, _EXAMPLE_PIECES), example, numbers[0]
        )
        text = self._text(rng, self.haystack.draw(rng, plan.units, plan.filler), names, numbers[1])
        prompt = (
            f"{_INTRODUCTION}\n\nText: {example_text}\n{_question(numbers[0])}\n"
            f"{_reply_start(numbers[0])} {', '.join(example)}.\n\n"
            f"Text: {text}\n{_question(numbers[1])}"
        )
        return Sample(
            prompt=prompt,
            reply_start=_reply_start(numbers[1]),
            answers=tuple(names),
            depth=None,
            num_units=plan.units,
        )

    def _names(self, rng: np.random.Generator, letters: int) -> list[str]:
        return [name.upper() for name in draw_letters(rng, self.hops + 1, letters)]

    def _text(
        self, rng: np.random.Generator, pieces: list[str], names: list[str], number: str
    ) -> str:
        sources = [number, *(f"the value of {name}" for name in names[:-1])]
        steps = [f"Set {name} to {source}. " for name, source in zip(names, sources, strict=True)]
        depths = np.sort(rng.random(len(steps))).tolist()
        return "".join(insert(pieces, zip(depths, steps, strict=True))).strip()


def _question(number: str) -> str:
    return f"Question: Which variables hold the number {number}?"


def _reply_start(number: str) -> str:
    return f"Answer: The variables that hold {number} are"
