"""Seeded draws that samples are made of: random streams, keys, words, numbers and depths."""

import functools
import uuid
import zlib

import numpy as np

from jaxtopk.evaluation.words import ADJECTIVES, NOUNS, OTHERS

_SPLITS = {"test": 0, "train": 1}
_DEPTHS = 40


def generator(seed: int, index: int, split: str = "test", *, task: str = "") -> np.random.Generator:
    """Returns the random stream of one sample; no two samples, seeds, splits or tasks share one.

    Raises:
      ValueError: a number is not of 32 bits, or there is no such split.
    """
    for name, value in (("seed", seed), ("index", index)):
        # A larger number would take two words of the entropy, and could meet another sample's stream.
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}: got {value}, wanted 0 to {2**32 - 1}")
    if split not in _SPLITS:
        raise ValueError(f"split: got {split!r}, wanted one of {', '.join(_SPLITS)}")
    return np.random.default_rng([seed, index, _SPLITS[split], zlib.crc32(task.encode())])


def grid_depth(index: int) -> float:
    """Returns the depth of a sample: forty places from 0 to 1, visited in an order that spreads few samples over them."""
    # 17 and 40 have no common factor: every depth is visited once in 40 samples.
    return 17 * index % _DEPTHS / (_DEPTHS - 1)


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


def draw_words(rng: np.random.Generator, count: int) -> list[str]:
    """Draws distinct words; where the lists have too few, all of them and adjective-noun pairs, mixed."""
    words = list(_all_words())
    if count > len(words):
        words += draw_keys(rng, count - len(words))
    return [words[i] for i in rng.choice(len(words), size=count, replace=False)]


def draw_numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """Draws distinct numbers of exactly `digits` digits, none with a leading zero."""
    low, high = 10 ** (digits - 1), 10**digits
    if count > high - low:
        raise ValueError(f"digits: got {digits} for {count} distinct numbers, wanted more digits")
    drawn: dict[int, None] = {}  # keeps the order of drawing
    while len(drawn) < count:
        drawn.update(dict.fromkeys(rng.integers(low, high, size=count - len(drawn)).tolist()))
    return [str(number) for number in drawn]


def draw_uuids(rng: np.random.Generator, count: int) -> list[str]:
    """Draws random UUIDs, in lower-case hexadecimal."""
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def draw_letters(rng: np.random.Generator, count: int, letters: int) -> list[str]:
    """Draws distinct words of `letters` random lower-case letters.

    Raises:
      ValueError: more than half of all such words.
    """
    if count > 26**letters // 2:
        raise ValueError(f"letters: got {letters} for {count} distinct words, wanted more letters")
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        rows = rng.integers(ord("a"), ord("z") + 1, size=(count - len(drawn), letters))
        drawn.update(dict.fromkeys(bytes(row).decode() for row in rows.astype(np.uint8)))
    return list(drawn)


@functools.cache
def _all_words() -> tuple[str, ...]:
    return tuple(dict.fromkeys((*ADJECTIVES, *NOUNS, *OTHERS)))
