"""Needle in a haystack: one sentence binds a key to a number, somewhere in a long text that does not matter."""

import dataclasses
from typing import Literal

import numpy as np

from jaxtopk.evaluation.tasks.base import Sample, Task, draw_keys, draw_numbers

_DEPTHS = 40  # places the needle takes in turn, evenly from the start to the end
_FILLER = (
    "The kettle is on the stove. ",
    "Rain falls on the roof all day. ",
    "A boat comes back to the shore. ",
    "Someone left the gate open. ",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleInHaystack(Task):
    """One key is asked for; its number is the answer.

    After the single-needle and multi-key tasks of RULER (arXiv:2404.06654), in words of our own.

    Args:
      haystack: "filler": four sentences over and over, and one needle. "needles": every sentence is a needle with a key
        and a number of its own, so that the right one must be told from its like.
      digits: of each number.
    """

    haystack: Literal["filler", "needles"] = "filler"
    digits: int = 7

    def __post_init__(self) -> None:
        if self.haystack not in ("filler", "needles"):
            raise ValueError(f"haystack: got {self.haystack!r}, wanted 'filler' or 'needles'")
        if not 1 <= self.digits <= 15:
            raise ValueError(f"digits: got {self.digits}, wanted 1 to 15")

    @property
    def name(self) -> str:
        """See `Task.name`."""
        return "niah" if self.haystack == "filler" else "niah_multikey"

    def build(self, rng: np.random.Generator, index: int, num_units: int) -> Sample:
        """Puts the needle at depth `index` of the grid, visited in an order that spreads small samples over it."""
        # 17 and 40 have no common factor: every depth is visited once in 40 samples.
        step = 17 * index % _DEPTHS
        place = round(num_units * step / (_DEPTHS - 1))
        if self.haystack == "filler":
            keys, values = draw_keys(rng, 1), draw_numbers(rng, 1, self.digits)
            sentences: list[str] = ["".join(_FILLER)] * num_units
            sentences.insert(place, _needle(keys[0], values[0]))
            key, value = keys[0], values[0]
        else:
            keys = draw_keys(rng, num_units + 1)
            values = draw_numbers(rng, num_units + 1, self.digits)
            sentences = [_needle(key, value) for key, value in zip(keys, values, strict=True)]
            key, value = keys[place], values[place]
        prompt = (
            "A code is hidden in the text below. Remember it, you will be asked for it.\n\n"
            + "".join(sentences).strip()
            + f"\n\nWhat is the code for {key}?"
        )
        return Sample(
            prompt=prompt,
            reply_start=f"The code for {key} is",
            answers=(value,),
            depth=place / max(len(sentences) - 1, 1),
            num_units=num_units,
        )


def _needle(key: str, value: str) -> str:
    return f"The code for {key} is {value}. "
