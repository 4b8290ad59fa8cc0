"""HELMET's questions on retrieved documents (KILT), each asked with the right document at several depths."""

import dataclasses
import functools
import math
import pathlib

from jaxtopk.evaluation.answers import best_reading, substring_match
from jaxtopk.evaluation.suites.base import Draft
from jaxtopk.evaluation.suites.files import Records, Row, objects, read_records, text
from jaxtopk.evaluation.suites.helmet_base import (
    Drawn,
    FilesTask,
    draw_keys,
    examples_file,
    pick_examples,
    present_files,
    seed_of,
    shuffled,
)
from jaxtopk.evaluation.tasks.base import Sample

_POPULAR = 3  # log10 of page views; questions of PopQA on better-known subjects are left out
# File of the questions, with {k} for the number of documents, and file of the examples.
_KILT = {
    "nq": ("nq-dev-multikilt_1000_k{k}_dep6", "nq-train-multikilt_1000_k3_dep6"),
    "triviaqa": ("triviaqa-dev-multikilt_1000_k{k}_dep6", "triviaqa-train-multikilt_1000_k3_dep6"),
    "hotpotqa": ("hotpotqa-dev-multikilt_1000_k{k}_dep3", "hotpotqa-train-multikilt_1000_k3_dep3"),
    "popqa": ("popqa_test_1000_k{k}_dep6", "popqa_test_1000_k3_dep6"),
}
_DOCUMENTS = (20, 50, 105, 220, 440, 1000)  # at each length
NAMES = tuple(_KILT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionTask(FilesTask):
    """A short answer from many documents, after two worked examples.

    Args:
      examples: the file that examples come from; its notes are the questions' keys.
    """

    examples: Records

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "substring_match"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        row = self.row(index, target_tokens)
        keys = [note for note in enumerate(self.examples.notes) if note[1] is not None]
        own = _key(row)
        if self.subtask == "popqa":  # it has no training questions
            keys = [(place, key) for place, key in keys if key != own]
        order = shuffled(len(keys), seed_of(own))
        picked = pick_examples([key for _, key in keys], order)
        shown = [self.examples[keys[place][0]] for place in picked]
        blocks = [f"{_pages(demo)}\n\n{_asked(demo)}\nAnswer: {_wanted(demo)[0]}" for demo in shown]
        head = "Documents, and a question on them that takes a few words to answer.\n\n"
        return Draft(
            before=head + "".join(f"{block}\n\n" for block in blocks),
            context=_pages(row),
            after=f"\n\n{_asked(row)}",
            reply_start=self.opening("Answer:"),
            joint=self.joint,
            answers=_wanted(row),
            meta=self.meta,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """See `Task.score`."""
        return best_reading(substring_match, sample.answers, reply)


def open_subtask(name: str, data: pathlib.Path, *, chat: bool) -> QuestionTask | None:
    """Returns a sub-task, None where none of its files is there."""
    pattern, examples = (f"kilt/{part}.jsonl" for part in _KILT[name])
    paths = present_files(lambda k: data / pattern.format(k=k), _DOCUMENTS)
    if not paths:
        return None
    note = functools.partial(_note_question, popular=name == "popqa")

    @functools.cache
    def drawn(path: pathlib.Path) -> Drawn:
        return draw_keys(read_records(path, note))

    return QuestionTask(
        subtask=name,
        chat=chat,
        category="RAG",
        longest_reply=20,
        one_line=True,
        paths=paths,
        drawn=drawn,
        examples=read_records(examples_file(data / examples), note),
    )


def _note_question(row: Row, *, popular: bool) -> str | None:
    """The key of a question; None where it is left out."""
    text(row, "question")
    objects(row, "ctxs", "title", "text")
    _wanted(row)
    if not popular:
        return _key(row)
    views = row.get("s_pop")
    if isinstance(views, bool) or not isinstance(views, int | float) or views <= 0:
        raise ValueError(f"s_pop: got {views!r}, wanted a number above 0")
    return _key(row) if math.log10(views) < _POPULAR else None


def _key(row: Row) -> str:
    return str(row["id"]) if "id" in row else row["question"]


def _wanted(row: Row) -> tuple[str, ...]:
    found = row.get("answers")
    parts = found if isinstance(found, list) else []
    flat = [x for part in parts for x in (part if isinstance(part, list) else [part])]
    if not flat or not all(isinstance(answer, str) and answer.strip() for answer in flat):
        raise ValueError(f"answers: got {found!r:.60}, wanted a list of texts that are not empty")
    return tuple(flat)


def _asked(row: Row) -> str:
    return f"Question: {row['question']}"


def _pages(row: Row) -> str:
    return "\n\n".join(f"[{page['title']}]\n{page['text']}" for page in row["ctxs"])
