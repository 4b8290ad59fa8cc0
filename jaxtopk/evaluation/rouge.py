"""ROUGE-L: how much of a wanted text a reply says in the same order."""

import collections
import re
from collections.abc import Sequence

from jaxtopk.evaluation.stemming import stem


def rouge_l(answers: Sequence[str], reply: str, *, stems: bool = True) -> float:
    """Returns the F1 of the longest common subsequence of words, at its best over `answers`.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries" (2004); words are runs of a-z and 0-9.

    Args:
      stems: compare the stems of words of more than three letters.
    """
    said = _words(reply, stems)

    def score(answer: str) -> float:
        wanted = _words(answer, stems)
        return _f1(_common_length(wanted, said), len(wanted), len(said))

    return max(map(score, answers))


def rouge_lsum(answers: Sequence[str], reply: str, *, stems: bool = False) -> float:
    """Returns ROUGE-L of a summary, at its best over `answers`: a line counts the words it shares with any line of the reply.

    Each word of the reply is used up by the first line that has it.
    """
    lines = lambda text: [_words(line, stems) for line in text.split("\n") if line]
    said = lines(reply)
    size = lambda parts: sum(map(len, parts))

    def score(answer: str) -> float:
        wanted = lines(answer)
        left = collections.Counter(word for line in wanted for word in line)
        left &= collections.Counter(word for line in said for word in line)
        hits = 0
        for line in wanted:
            shared = set[int]().union(*(_common_places(line, other) for other in said))
            for place in sorted(shared):
                if left[line[place]] > 0:
                    left[line[place]] -= 1
                    hits += 1
        return _f1(hits, size(wanted), size(said))

    return max(map(score, answers))


def _words(text: str, stems: bool) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [stem(word) if len(word) > 3 else word for word in words] if stems else words


def _f1(hits: int, wanted: int, said: int) -> float:
    # 2 P R / (P + R) with P = hits / said and R = hits / wanted.
    return 2 * hits / (wanted + said) if hits else 0.0


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a column of the table at a time in the bits of one integer."""
    places: dict[str, int] = collections.defaultdict(int)
    for place, word in enumerate(first):
        places[word] |= 1 << place
    whole = (1 << len(first)) - 1
    rows = whole
    for word in second:
        match = rows & places[word] if word in places else 0
        rows = ((rows + match) | (rows - match)) & whole
    return len(first) - rows.bit_count()


def _common_places(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Places in `first` of one longest common subsequence; of several, the one that ends latest in `first`'s partner."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        table.append(row)
    places = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places
