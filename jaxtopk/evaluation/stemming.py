"""Porter's stemmer: the form of a word that ROUGE compares, so that "runs" and "running" count as one word."""

import functools

# Words that the rules would spoil, and what they become.
_IRREGULAR = {
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "skies": "sky",
    **{word + ending: word for word in ("inning", "outing", "canning") for ending in ("", "s")},
    **{word: word for word in ("sky", "news", "howe", "proceed", "exceed", "succeed")},
}
_STEP_2 = (
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
)
_STEP_3 = (
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
)
_STEP_4 = (
    *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion"),
    *("ou", "ism", "ate", "iti", "ous", "ive", "ize"),
)


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Returns the stem of a lower-case word.

    Source: M. F. Porter, "An algorithm for suffix stripping", Program 14 (1980), with the departures that its author
    and NLTK made since (NLTK's default mode), which are those of the usual ROUGE program.
    """
    if len(word) <= 2:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for step in (_plural, _past, _final_y, _double_suffix, _long_suffix, _suffix, _tidy):
        word = step(word)
    return word


def _is_consonant(word: str, place: int) -> bool:
    if word[place] == "y":
        return place == 0 or not _is_consonant(word, place - 1)
    return word[place] not in "aeiou"


def _measure(word: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    kinds = [_is_consonant(word, place) for place in range(len(word))]
    return sum(after and not before for before, after in zip(kinds, kinds[1:], strict=False))


def _has_vowel(word: str) -> bool:
    return not all(_is_consonant(word, place) for place in range(len(word)))


def _ends_short(word: str) -> bool:
    """Ends as a short syllable does: consonant, vowel, consonant other than w, x, y ("hop"), or is one ("us")."""
    kinds = [_is_consonant(word, place) for place in range(len(word))]
    if kinds[-3:] == [True, False, True]:
        return word[-1] not in "wxy"
    return kinds == [False, True]


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        base = word.removesuffix(suffix)
        if base != word and _has_vowel(base):
            break
    else:
        return word
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if len(base) >= 2 and base[-1] == base[-2] and _is_consonant(base, len(base) - 1):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _ends_short(base) else base


def _final_y(word: str) -> str:
    turns = word.endswith("y") and len(word) > 2 and _is_consonant(word, len(word) - 2)
    return word[:-1] + "i" if turns else word


def _double_suffix(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _double_suffix(word[:-2])
    if word.endswith("logi"):  # geologi, whose o counts
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, (("alli", "al"), *_STEP_2))


def _long_suffix(word: str) -> str:
    return _replace(word, _STEP_3)


def _replace(word: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Applies the first rule whose suffix the word has, or none where too little would be left."""
    for suffix, new in rules:
        if word.endswith(suffix):
            base = word[: -len(suffix)]
            return base + new if _measure(base) > 0 else word
    return word


def _suffix(word: str) -> str:
    for suffix in _STEP_4:
        if word.endswith(suffix):
            base = word[: -len(suffix)]
            wanted = suffix != "ion" or base.endswith(("s", "t"))
            return base if wanted and _measure(base) > 1 else word
    return word


def _tidy(word: str) -> str:
    if word.endswith("e"):
        base = word[:-1]
        measure = _measure(base)
        if measure > 1 or (measure == 1 and not _ends_short(base)):
            word = base
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
