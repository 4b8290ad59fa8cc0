"""Needle in a haystack: sentences bind keys to values, somewhere in a long text that does not matter."""

import dataclasses
from typing import Literal

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.drawing import draw_keys, draw_numbers, draw_uuids, grid_depth
from jaxtopk.evaluation.tasks.haystack import Haystack, insert

_REPLY_TOKENS = {"numbers": 24, "words": 24, "uuids": 48}  # for one value
_INTRODUCTION = "A code is hidden in the text below. Remember it, you will be asked for it."
_INTRODUCTION_OF_SEVERAL = (
    "Codes are hidden in the text below. Remember them, you will be asked for them."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleInHaystack(GeneratedTask):
    """Keys are asked for; the values bound to them are the answer.

    After the needle tasks of RULER (arXiv:2404.06654), in words of our own.

    Args:
      haystack: "filler": four sentences over and over, as `Haystack.noise()`. "needles": every sentence is a needle with a
        key and a value of its own, so that the right one must be told from its like.
      keys: two words, or a UUID.
      values: a number, two words, or a UUID.
      digits: of each number.
      distractors: needles beside those asked for, not with the haystack "needles".
      values_per_key: needles of each key; all of its values are asked for.
      queries: keys asked for.
      depth: of the needle asked for, 0 to 1; None: forty depths in turn. Several needles stand at random depths.
      label: name of the task in tables; None: "niah" or "niah_multikey", by the haystack.
    """

    haystack: Haystack | Literal["filler", "needles"] = "filler"
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "words", "uuids"] = "numbers"
    digits: int = 7
    distractors: int = 0
    values_per_key: int = 1
    queries: int = 1
    depth: float | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.haystack, str) and self.haystack not in ("filler", "needles"):
            raise ValueError(
                f"haystack: got {self.haystack!r}, wanted 'filler', 'needles' or a Haystack"
            )
        if self.keys not in ("words", "uuids"):
            raise ValueError(f"keys: got {self.keys!r}, wanted 'words' or 'uuids'")
        if self.values not in _REPLY_TOKENS:
            raise ValueError(f"values: got {self.values!r}, wanted 'numbers', 'words' or 'uuids'")
        if not 1 <= self.digits <= 15:
            raise ValueError(f"digits: got {self.digits}, wanted 1 to 15")
        for name, least in (("distractors", 0), ("values_per_key", 1), ("queries", 1)):
            got = getattr(self, name)
            if got < least:
                raise ValueError(f"{name}: got {got}, wanted at least {least}")
            if got > least and self.haystack == "needles":
                raise ValueError(f"{name}: got {got} among needles only, wanted {least}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth: got {self.depth}, wanted 0 to 1")
        if self.depth is not None and self.num_answers > 1:
            raise ValueError(f"depth: got {self.depth} with several needles asked, wanted None")

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return self.label or ("niah_multikey" if self.haystack == "needles" else "niah")

    @property
    def num_answers(self) -> int:
        """How many values are asked for."""
        return self.queries * self.values_per_key

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return _REPLY_TOKENS[self.values] * self.num_answers

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Puts the needle at its depth, or several needles at random ones."""
        depth = grid_depth(index) if self.depth is None else self.depth
        if self.haystack == "needles":
            needles = self._needles(rng, plan.units + 1)
            asked = [needles[round(plan.units * depth)]]
            pieces = [_sentence(*needle) for needle in needles]
            pieces += [f"{plan.filler} "] if plan.filler else []
        else:
            needles = self._needles(rng, self.queries + self.distractors)
            asked = needles[: self.num_answers]
            source = Haystack.noise() if isinstance(self.haystack, str) else self.haystack
            pieces = source.draw(rng, plan.units, plan.filler)
            depths = [depth, *rng.random(len(needles) - 1).tolist()]
            if self.num_answers > 1:
                depths[0] = float(rng.random())
            sentences = (_sentence(*needle) for needle in needles)
            pieces = insert(pieces, zip(depths, sentences, strict=True))
        several = self.num_answers > 1
        named = _listed(list(dict.fromkeys(key for key, _ in asked)))
        prompt = (
            (_INTRODUCTION_OF_SEVERAL if several else _INTRODUCTION)
            + "\n\n"
            + "".join(pieces).strip()
            + "\n\n"
            + (
                f"What are all the codes for {named}?"
                if several
                else f"What is the code for {named}?"
            )
        )
        place = prompt.index(_sentence(*asked[0]).strip()) + len(_sentence(asked[0][0], "")) - 2
        return Sample(
            prompt=prompt,
            reply_start=f"The codes for {named} are" if several else f"The code for {named} is",
            answers=tuple(value for _, value in asked),
            depth=None if several else place / len(prompt),
            num_units=plan.units,
            meta=() if several else (("depth", f"{depth:.3f}"),),
        )

    def _needles(self, rng: np.random.Generator, num_keys: int) -> list[tuple[str, str]]:
        """Draws keys, each with its values; pairs of one key stand together."""
        count = num_keys * self.values_per_key
        word_values = count if self.values == "words" else 0
        word_keys = num_keys if self.keys == "words" else 0
        # In one draw: no word is both a key and a value.
        words = draw_keys(rng, word_keys + word_values)
        keys = words[:word_keys] or draw_uuids(rng, num_keys)
        if self.values == "numbers":
            values = draw_numbers(rng, count, self.digits)
        else:
            values = words[word_keys:] or draw_uuids(rng, count)
        return [(keys[i // self.values_per_key], values[i]) for i in range(count)]


def _sentence(key: str, value: str) -> str:
    return f"The code for {key} is {value}. "


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
