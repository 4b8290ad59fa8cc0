"""How replies are scored by the published suites: each metric a pure function from right answers and a reply to 0..1."""

import collections
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence

Metric = Callable[[Sequence[str], str], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CONTROL = re.compile(r"[\x00-\x1f]")


# ------------------------------------------------------------------------------------------------- texts and words
def normalise(text: str) -> str:
    """Returns `text` in lower case without punctuation, English articles and superfluous spaces (as SQuAD does)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answers: Sequence[str], reply: str) -> float:
    """Returns 1 where the normalised reply is one of the normalised answers."""
    return float(normalise(reply) in map(normalise, answers))


def substring_match(answers: Sequence[str], reply: str) -> float:
    """Returns 1 where the normalised reply holds one of the normalised answers."""
    reply = normalise(reply)
    return float(any(normalise(answer) in reply for answer in answers))


def contains_share(answers: Sequence[str], reply: str) -> float:
    """Returns the share of `answers` that stand in the reply letter by letter, whatever their case (RULER, all)."""
    reply = _CONTROL.sub("\n", reply.strip()).lower()
    return sum(answer.lower() in reply for answer in answers) / len(answers)


def contains_any(answers: Sequence[str], reply: str) -> float:
    """Returns 1 where one of `answers` stands in the reply letter by letter, whatever its case (RULER, part)."""
    return float(contains_share(answers, reply) > 0)


def token_f1(answers: Sequence[str], reply: str) -> float:
    """Returns the F1 of the normalised words that reply and answer share, order aside; at its best over `answers`."""
    said = collections.Counter(normalise(reply).split())

    def score(answer: str) -> float:
        wanted = collections.Counter(normalise(answer).split())
        return 2 * (said & wanted).total() / max((said + wanted).total(), 1)

    return max(map(score, answers))


def group_share(groups: Sequence[Sequence[str]], reply: str) -> float:
    """Returns the share of groups of which the reply holds a wording, normalised (string EM of ASQA)."""
    return sum(substring_match(group, reply) for group in groups) / len(groups)


def list_recall(groups: Sequence[Sequence[str]], reply: str, *, enough: int = 5) -> float:
    """Returns how many groups have a wording among the comma-separated entries of the reply, over all of them.

    `enough` right entries are as good as all (top-5 recall of QAMPARI).
    """
    entries = set(map(normalise, reply.rstrip().rstrip(".").rstrip(",").split(","))) - {""}
    hits = sum(not entries.isdisjoint(map(normalise, group)) for group in groups)
    return min(enough, hits) / min(enough, len(groups))


def drop_citations(reply: str) -> str:
    """Returns the reply in one line and without marks such as [3], as ALCE scores it."""
    reply = re.sub(r"\n+", " ", reply)
    return re.sub(r" ?\[\d+", "", reply).replace(" |", "").replace("]", "")


def answer_line(reply: str, *, label: str = "Answer:") -> str:
    """Returns what follows the first `label` on its line, or the first line where there is none."""
    found = re.search(re.escape(label) + r"(.*)", reply, re.IGNORECASE)
    line = found[1] if found else reply.split("\n", 1)[0]
    # A model that is made to begin with the label may well repeat it.
    return re.sub("^" + re.escape(label), "", line.strip(), flags=re.IGNORECASE).strip()


def best_reading(
    metric: Metric, answers: Sequence[str], reply: str, *, label: str = "Answer:"
) -> float:
    """Returns the better score of the whole reply and of its `answer_line` (HELMET)."""
    return max(metric(answers, reply), metric(answers, answer_line(reply, label=label)))


# ---------------------------------------------------------------------------------------------------------- rankings
def ranking(reply: str) -> list[str]:
    """Returns the ids of the longest chain such as "ID3 > ID1 > 2", each once."""
    reply = re.sub(r"[\[\]:]", "", reply).lower().replace("id", "")
    chains = [match[0] for match in re.finditer(r"\d+(?:\s*>\s*\d+)*", reply)]
    longest = max(chains, key=len, default="")
    return list(dict.fromkeys(re.findall(r"\d+", longest)))


def ndcg(relevance: Mapping[str, int], ranked: Sequence[str], *, at: int = 10) -> float:
    """Returns the discounted gain of the first `at` ids over that of the best order; 0 where nothing is relevant.

    sum over ranks r of relevance / log2(r + 1), as trec_eval has it; an id without relevance counts 0.
    """
    discount = lambda gains: sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:at]))
    positive = {name: gain for name, gain in relevance.items() if gain > 0}
    best = discount(sorted(positive.values(), reverse=True))
    return discount([positive.get(name, 0) for name in ranked]) / best if best else 0.0


# ---------------------------------------------------------------------------------------------- letters of a choice
def stated_letter(reply: str) -> str | None:
    """Returns the letter of "The correct answer is (C)", brackets or none; None where it is not said (LongBench v2)."""
    reply = reply.replace("*", "")
    bracketed = re.search(r"The correct answer is \(([A-D])\)", reply)
    found = bracketed or re.search(r"The correct answer is ([A-D])", reply)
    return found[1] if found else None


def book_choice(option: str, letter: str, reply: str) -> float:
    """Returns 1 where the reply chooses `letter`, or is `option` itself (InfiniteBench, multiple choice on books)."""
    wanted, reply = (option, letter), reply.strip()
    if _last_letter("A-D", reply) in wanted:
        return 1.0
    if not reply or reply[0] in "ABCD":
        return float(reply[:1] in wanted)
    if reply in wanted:
        return 1.0
    reply = _spaced(reply, "\n\"'.,?!{}")
    after = _after(reply, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(after.startswith(wanted))
    # Any run of the four letters is read as a choice, and only one letter can be right.
    chosen = next((word for word in reply.split() if word in "ABCD"), None)
    return float(chosen in wanted)


def code_choice(name: str, letter: str, reply: str) -> float:
    """Returns 1 where the reply chooses `letter`, or names the function `name` (InfiniteBench, bug search)."""
    wanted, reply = (letter, name), reply.strip()
    if _last_letter("A-J", reply) == letter:
        return 1.0
    for word in ("Option", "option"):
        reply = reply.replace(word, " ")
    reply = _spaced(reply, "\n`'\"-*")
    if reply.startswith(wanted):
        return 1.0
    after = _after(reply, ("answer is:", "is:", "answer:", "correct option is:"))
    return float(after is not None and after.startswith(wanted))


def _last_letter(letters: str, reply: str) -> str | None:
    """The last letter that stands alone, on the first line that has one."""
    found = re.search(rf"\b[{letters}]\b(?!.*\b[{letters}]\b)", reply)
    return found[0] if found else None


def _spaced(reply: str, characters: str) -> str:
    return re.sub(" {2,}", " ", reply.translate(str.maketrans(dict.fromkeys(characters, " "))))


def _after(reply: str, phrases: Sequence[str]) -> str | None:
    """What follows the first of `phrases` that occurs, less the one character between; None where none occurs."""
    for phrase in phrases:
        if phrase in reply:
            return reply[reply.index(phrase) + len(phrase) + 1 :]
    return None


# ---------------------------------------------------------------------------------------------------------- numbers
def first_digits(answer: str, reply: str) -> float:
    """Returns 1 where the first run of digits in the reply is `answer`."""
    found = re.search(r"[0-9]+", reply)
    return float(found is not None and found[0] == answer)


def holds_word(answer: str, reply: str) -> float:
    """Returns 1 where `answer` is one of the words of the reply, punctuation apart."""
    return float(answer in _spaced(reply, "\n:\"'.,?!{}").split())


def first_number(answer: int | float, reply: str) -> float:
    """Returns 1 where the first number in the reply equals `answer`; an integer is compared with its whole part."""
    found = re.search(r"([0-9]+)(\.[0-9]+)?", reply)
    if found is None:
        return 0.0
    same = _same_integer(found[1], answer) if isinstance(answer, int) else float(found[0]) == answer
    return float(same)


def last_integer(answer: int, reply: str) -> float:
    """Returns 1 where the last word of the reply is the integer `answer`."""
    words = _spaced(reply, "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) == answer)
    except ValueError:
        return 0.0


def leading_numbers(answers: Sequence[int], reply: str) -> float:
    """Returns how many of `answers` the numbers of the reply match before the first miss, over all of them."""
    hits = 0
    for wanted, said in zip(answers, re.findall(r"[0-9]+", reply), strict=False):
        if not _same_integer(said, wanted):
            break
        hits += 1
    return hits / len(answers)


def _same_integer(digits: str, wanted: int) -> bool:
    return (digits.lstrip("0") or "0") == str(
        wanted
    )  # not int(): a reply may be thousands of digits
