"""InfiniteBench (arXiv:2402.13718): retrieval, arithmetic, code and books at 100 thousand tokens and more."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

from jaxtopk.evaluation import answers as metrics
from jaxtopk.evaluation.rouge import rouge_lsum
from jaxtopk.evaluation.suites.base import Draft, Keep, SuiteTask
from jaxtopk.evaluation.suites.files import Records, Row, answers, first_file, read_records, text
from jaxtopk.evaluation.tasks.base import Sample

REMEDY = (
    "put the files of the Hugging Face data set xinrongzhang2022/InfiniteBench into FOLDER, "
    "such as FOLDER/passkey.jsonl"
)
NOT_RUN = {"longbook_qa_chn": "Chinese is not scored"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """How one sub-task asks and scores, in words of our own around the texts of the file.

    Args:
      before, after: around the context; `after` is formatted with `input`, and with `options` where there are some.
      opening: how the reply begins, unless a chat model writes it.
      reply_tokens: longest reply.
      metric, score: its name, and the function of answers and reply.
      located: the answer stands in the context.
    """

    before: str
    after: str
    opening: str = ""
    reply_tokens: int
    metric: str
    score: Callable[[Sequence[str], str], float]
    located: bool = False


_FACT = "The text below goes on about nothing much, but for one fact. Keep that fact in mind.\n\n"
_OPTIONS = "\nA. {0}\nB. {1}\nC. {2}\nD. {3}\n"

KINDS = {
    "passkey": _Kind(
        before=_FACT,
        after="\n\n{input}",
        opening="The pass key is",
        reply_tokens=6,
        metric="first_integer",
        score=lambda wanted, reply: metrics.first_digits(wanted[0], reply),
        located=True,
    ),
    "number_string": _Kind(
        before=_FACT,
        after="\n\n{input}",
        opening="The sequence of digits is",
        reply_tokens=12,
        metric="first_integer",
        score=lambda wanted, reply: metrics.first_digits(wanted[0], reply),
        located=True,
    ),
    "kv_retrieval": _Kind(
        before="Look one entry of this JSON data up.\n\n",
        after="\n\n{input}",
        reply_tokens=50,
        metric="word_match",
        score=lambda wanted, reply: metrics.holds_word(wanted[0], reply),
        located=True,
    ),
    "math_find": _Kind(
        before="A list of numbers:\n\n",
        after="\n\n{input}",
        reply_tokens=3,
        metric="first_number",
        score=lambda wanted, reply: metrics.first_number(json.loads(wanted[0]), reply),
    ),
    "math_calc": _Kind(
        before="Work from left to right and list the result after each number.\n\n"
        "Sum: 5 + 2 - 4\nResults: [5, 7, 3]\n\nSum: 9 - 6 - 1 + 7\nResults: [9, 3, 2, 9]\n\nSum: ",
        after="",
        opening="Results:",
        reply_tokens=30_000,
        metric="leading_numbers",
        score=lambda wanted, reply: metrics.leading_numbers([int(x) for x in wanted], reply),
    ),
    "code_run": _Kind(
        before="Python functions that call one another:\n\n",
        after="\n\n{input}",
        opening="The return value is",
        reply_tokens=5,
        metric="last_integer",
        score=lambda wanted, reply: metrics.last_integer(int(wanted[0]), reply),
    ),
    "code_debug": _Kind(
        before="In the source code below a fault was put into one function, and one only.\n\n",
        after=f"\n\nWhich of these functions has the fault?{_OPTIONS}Give the letter alone.",
        opening="The correct option is:",
        reply_tokens=5,
        metric="accuracy",
        score=lambda wanted, reply: metrics.code_choice(wanted[0], wanted[1], reply),
    ),
    "longbook_choice_eng": _Kind(
        before="A question on this book will follow.\n\n",
        after=f"\n\n{{input}}{_OPTIONS}One of them is right. Give its letter alone.",
        opening="The letter of the right answer is",
        reply_tokens=40,
        metric="accuracy",
        score=lambda wanted, reply: metrics.book_choice(wanted[0], wanted[1], reply),
    ),
    "longbook_qa_eng": _Kind(
        before="A question on this book will follow.\n\n",
        after="\n\nQuestion: {input}\nReply in a few words.",
        opening="Answer:",
        reply_tokens=40,
        metric="token_f1",
        score=metrics.token_f1,
    ),
    "longbook_sum_eng": _Kind(
        before="Tell in short what happens in this book.\n\n",
        after="",
        opening="In short:",
        reply_tokens=1200,
        metric="rouge_lsum",
        score=rouge_lsum,
    ),
    "longdialogue_qa_eng": _Kind(
        before='In this script, "$$MASK$$" stands once in place of the name of a character.\n\n',
        after="\n\nWho is $$MASK$$? Give the name alone, as the script writes it.",
        opening="$$MASK$$ is",
        reply_tokens=40,
        metric="name_match",
        score=metrics.contains_any,
    ),
}
SUBTASKS = {name: kind.reply_tokens for name, kind in KINDS.items()}
_CHOICES = ("code_debug", "longbook_choice_eng")
_NUMBERS = ("math_find", "math_calc", "code_run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniteBenchTask(SuiteTask):
    """A task of InfiniteBench, with the metric of its repository and prompts in our own words."""

    records: Records

    @property
    def size(self) -> int:
        """See `AnyTask.size`."""
        return len(self.records)

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`; `math_calc` asks for tens of thousands."""
        return self._kind.reply_tokens

    @property
    def stop(self) -> tuple[str, ...]:
        """Nothing: the suite scores the whole reply."""
        return ()

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return self._kind.metric

    @property
    def aggregation(self) -> bool:
        """See `AnyTask.aggregation`."""
        return self.subtask in ("math_find", "math_calc")

    @property
    def keep(self) -> Keep:
        """The first and the last half."""
        return "ends"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        row, kind = self.records[index], self._kind
        wanted = _answers(self.subtask, row)
        opening = "" if self.chat else kind.opening
        return Draft(
            before=kind.before,
            context=row["context"],
            after=kind.after.format(*row.get("options") or (), input=row.get("input", "")),
            reply_start=opening,
            joint="\n" if opening else "",
            answers=wanted,
            needle=wanted[0] if kind.located else None,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """See `Task.score`."""
        return self._kind.score(sample.answers, reply)

    @property
    def _kind(self) -> _Kind:
        return KINDS[self.subtask]


def open_subtask(name: str, folder: pathlib.Path, *, chat: bool) -> InfiniteBenchTask | None:
    """Returns a sub-task, None where its file is missing."""
    path = first_file(folder, (f"{name}.jsonl", f"data/{name}.jsonl"))
    if path is None:
        return None
    records = read_records(path, lambda row: check_row(name, row))
    return InfiniteBenchTask(suite="infinitebench", subtask=name, chat=chat, records=records)


def check_row(name: str, row: Row) -> None:
    """Checks one object of a file.

    Raises:
      ValueError: a field is missing or not as it should be.
    """
    text(row, "context")
    if "{input}" in KINDS[name].after:
        text(row, "input")
    elif not isinstance(row.get("input", ""), str):
        raise ValueError(f"input: got {row['input']!r}, wanted text")
    _answers(name, row)


def _answers(name: str, row: Row) -> tuple[str, ...]:
    """The right answers as texts; of a choice, the option and its letter."""
    if name in _CHOICES:
        return choice(row)
    wanted = answers(row, "answer")
    if name in _NUMBERS:
        for answer in wanted:
            _check_number(answer, whole=name != "math_find")
    return wanted


def choice(row: Row) -> tuple[str, str]:
    """Returns the right option of four and its letter.

    Raises:
      ValueError: there are not four options, or the answer is none of them.
    """
    options = row.get("options")
    if not isinstance(options, list) or len(options) != 4:
        raise ValueError(f"options: got {options!r:.60}, wanted four texts")
    for option in options:
        if not isinstance(option, str) or not option.strip():
            raise ValueError(f"options: got {option!r}, wanted texts that are not empty")
    option = answers(row, "answer")[0]
    if option not in options:
        raise ValueError(f"answer: got {option!r}, wanted one of the options")
    return option, "ABCD"[options.index(option)]


def _check_number(answer: str, *, whole: bool) -> None:
    try:
        number = json.loads(answer)
    except ValueError:
        number = None
    if type(number) not in ((int,) if whole else (int, float)):
        raise ValueError(f"answer: got {answer!r}, wanted {'an integer' if whole else 'a number'}")
