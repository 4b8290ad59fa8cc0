"""Text that does not matter, for needles to be hidden in: noise, a corpus, or a text of the user's."""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from jaxtopk.data.corpora import shakespeare_plays

NOISE = (
    "The kettle is on the stove. ",
    "Rain falls on the roof all day. ",
    "A boat comes back to the shore. ",
    "Someone left the gate open. ",
)
_LONGEST = 100  # words; a sentence beyond is cut, so that a needle can stand near any depth of a text without stops
_FEWEST = 100  # words; below, a text would come round and round within the shortest prompts
_SENTENCE_END = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?]["')\]])\s+""")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Haystack:
    """Pieces of text, in order; a sample takes as many as it needs from a drawn one on, and begins again at the end.

    Args:
      name: for results.
      pieces: sentences, each with the space that follows it.
    """

    name: str
    pieces: tuple[str, ...] = dataclasses.field(repr=False)

    @classmethod
    def noise(cls) -> "Haystack":
        """Four short sentences, over and over; one piece holds them all."""
        return cls(name="noise", pieces=("".join(NOISE),))

    @classmethod
    def shakespeare(cls) -> "Haystack":
        """The plays of Shakespeare, one after the other; fetched on first use."""
        return cls(name="shakespeare", pieces=_plays())

    @classmethod
    def from_text(cls, text: str, *, name: str) -> "Haystack":
        """Cuts a text at the ends of its sentences; line breaks become spaces.

        Raises:
          ValueError: the text has too few words.
        """
        if (words := len(text.split())) < _FEWEST:
            raise ValueError(f"haystack: got {words} words in {name}, wanted at least {_FEWEST}")
        return cls(name=name, pieces=tuple(_pieces(text)))

    @classmethod
    def named(cls, source: str | os.PathLike[str]) -> "Haystack":
        """Returns what a command line names: "noise", "shakespeare", or a file of UTF-8 text.

        Raises:
          ValueError: there is no such file, or it cannot be read, or has too few words.
        """
        if source == "noise":
            return cls.noise()
        if source == "shakespeare":
            return cls.shakespeare()
        path = pathlib.Path(source)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"haystack: got {os.fspath(source)!r} ({type(error).__name__}), wanted noise, shakespeare or a UTF-8 text file"
            ) from None
        return cls.from_text(text, name=path.name)

    def draw(self, rng: np.random.Generator, count: int, filler: str = "") -> list[str]:
        """Returns `count` pieces from a drawn one on, and `filler` as the last, if any."""
        start = int(rng.integers(len(self.pieces)))
        drawn = [self.pieces[i % len(self.pieces)] for i in range(start, start + count)]
        return [*drawn, f"{filler} "] if filler else drawn


def insert(pieces: Sequence[str], inserted: Iterable[tuple[float, str]]) -> list[str]:
    """Puts texts between pieces, each at the place nearest to its depth, a share of the characters of the pieces.

    Texts at the same place keep their order.
    """
    ends = np.cumsum([0, *map(len, pieces)])
    count = len(pieces)
    at: dict[int, list[str]] = {}
    for depth, text in inserted:
        place = round(float(np.interp(depth * float(ends[-1]), ends, np.arange(count + 1))))
        at.setdefault(place, []).append(text)
    whole: list[str] = []
    for place in range(count + 1):
        whole += at.get(place, [])
        whole += pieces[place : place + 1]
    return whole


def filler_words(count: int) -> str:
    """Returns `count` words of the noise sentences, the last one closed by a full stop."""
    words = itertools.islice(itertools.cycle("".join(NOISE).split()), count)
    text = " ".join(words)
    return text if not text or text.endswith(".") else f"{text}."


def after_filler(filler: str, prompt: str) -> str:
    """Puts filler before a prompt whose context is not a text that filler could be part of."""
    return f"{filler}\n\n{prompt}" if filler else prompt


def _pieces(text: str) -> Iterable[str]:
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        for start in range(0, len(words), _LONGEST):
            yield " ".join(words[start : start + _LONGEST]) + " "


@functools.cache
def _plays() -> tuple[str, ...]:
    return tuple(piece for play in shakespeare_plays() for piece in _pieces(play.text))
