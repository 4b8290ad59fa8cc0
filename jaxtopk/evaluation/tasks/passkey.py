"""Digits to be copied out of a long text: a pass key, or a longer string with repeated digits."""

import dataclasses
import re
from typing import Literal

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.drawing import grid_depth
from jaxtopk.evaluation.tasks.haystack import Haystack, insert

_DIGITS = 5
_DOUBLINGS = 5  # of a number string
_TITLES = {"passkey": "pass key", "number_string": "number string"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassKey(GeneratedTask):
    """A sentence states some digits twice; they are to be repeated exactly.

    After the retrieval tasks of InfiniteBench (arXiv:2402.13718), in words of our own; forty depths in turn.

    Args:
      digits: "passkey": five random digits, leading zeros allowed. "number_string": five random digits, then five times
        one digit of the string is doubled in place.
      haystack: the text around.
      depth: of the sentence, 0 to 1; None: the depths in turn.
    """

    digits: Literal["passkey", "number_string"] = "passkey"
    haystack: Haystack = dataclasses.field(default_factory=Haystack.noise)
    depth: float | None = None

    def __post_init__(self) -> None:
        if self.digits not in _TITLES:
            raise ValueError(f"digits: got {self.digits!r}, wanted 'passkey' or 'number_string'")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth: got {self.depth}, wanted 0 to 1")

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return self.digits

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 24

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "exact_digits"

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Puts the sentence at its depth."""
        depth = grid_depth(index) if self.depth is None else self.depth
        digits = [str(digit) for digit in rng.integers(10, size=_DIGITS)]
        if self.digits == "number_string":
            for _ in range(_DOUBLINGS):
                place = int(rng.integers(len(digits)))
                digits.insert(place, digits[place])
        answer, title = "".join(digits), _TITLES[self.digits]
        needle = f"The {title} is {answer}. Keep it in mind: {answer} is the {title}. "
        pieces = insert(self.haystack.draw(rng, plan.units, plan.filler), [(depth, needle)])
        prompt = (
            f"Somewhere in the text below there is a {title}. Find it and remember it.\n\n"
            + "".join(pieces).strip()
            + f"\n\nWhat is the {title}?"
        )
        place = prompt.index(needle.strip()) + needle.index(answer)
        return Sample(
            prompt=prompt,
            reply_start=f"The {title} is",
            answers=(answer,),
            depth=place / len(prompt),
            num_units=plan.units,
            meta=(("depth", f"{depth:.3f}"),),
        )

    def score(self, sample: Sample, reply: str) -> float:
        """Returns 1 if the first run of digits of the reply is the answer, else 0."""
        first = re.search(r"[0-9]+", reply)
        return float(first is not None and first.group() == sample.answers[0])
