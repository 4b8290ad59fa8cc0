"""Integers in the replies of models, and whether they are the ones wanted."""

import re

# Thousands may be set off by commas; a minus sign counts unless it follows a digit or letter, as in "3-4".
_INTEGER = re.compile(r"(?<![\w.])[-\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)")


def integers(text: str) -> list[int]:
    """Returns the integers of a text in order; "1,234" is one, "12, 34" are two."""
    found = (match.group() for match in _INTEGER.finditer(text))
    return [int(number.replace(",", "").replace("\u2212", "-")) for number in found]


def match_first_integer(answer: str, reply: str) -> float:
    """Returns 1 if the first integer of the reply equals the answer, else 0."""
    return float(integers(reply)[:1] == [int(answer)])
