"""HELMET's synthetic recall: entries of a JSON object, and four tasks of RULER in HELMET's own files."""

import dataclasses
import functools
import pathlib

from jaxtopk.evaluation.answers import best_reading, contains_share, substring_match
from jaxtopk.evaluation.suites.base import Draft
from jaxtopk.evaluation.suites.files import Row, answers, read_records, text
from jaxtopk.evaluation.suites.helmet_base import (
    LENGTHS,
    SAMPLES,
    SEED,
    SHOTS,
    Drawn,
    FilesTask,
    present_files,
    shuffled,
)
from jaxtopk.evaluation.tasks.base import Sample

_PAIRS = (50, 105, 220, 440, 900, 1800)  # of the JSON object at each length
# Folder and longest reply, tokens.
_RULER = {
    "ruler_niah_mk_2": ("niah_multikey_2", 50),
    "ruler_niah_mk_3": ("niah_multikey_3", 100),
    "ruler_niah_mv": ("niah_multivalue", 50),
    "ruler_cwe": ("cwe", 100),
}
NAMES = ("json_kv", *_RULER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonKvTask(FilesTask):
    """The value of one of many keys, after two look-ups in the same object."""

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "substring_match"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        row = self.row(index, target_tokens)
        shown = "".join(f"Key: {key}\nValue: {value}\n\n" for key, value in row["demos"][:SHOTS])
        return Draft(
            context=row["context"],
            after=f"\n\nWhich value has a key in this JSON object?\n\n{shown}Key: {row['question']}",
            reply_start=self.opening("Value:"),
            joint=self.joint,
            answers=answers(row, "answer"),
            needle=answers(row, "answer")[0],
            meta=self.meta,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """See `Task.score`."""
        return best_reading(substring_match, sample.answers, reply, label="Value:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallTask(FilesTask):
    """A task of RULER."""

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "ruler_recall"

    @property
    def aggregation(self) -> bool:
        """See `AnyTask.aggregation`."""
        return self.subtask == "ruler_cwe"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        row = self.row(index, target_tokens)
        wanted = answers(row, "answer", "outputs")
        if self.aggregation:
            example = row.get("example") or ""
            return Draft(
                before=f"{example}\n\n" if example else "",
                context=row["context"],
                after="\n\nWhich ten words does this list repeat most?",
                reply_start=self.opening("The ten words that it repeats most are:"),
                joint=self.joint,
                answers=wanted,
                meta=self.meta,
            )
        what, query = row["type_needle_v"], row["query"]
        every = "Name all of them." if self.subtask == "ruler_niah_mv" else "Name it."
        return Draft(
            before=f"Special magic {what} are told in this text. They will be asked for.\n\n",
            context=row["context"],
            after=f"\n\nWhich special magic {what} does the text tell for {query}? {every}",
            reply_start=self.opening(f"For {query} the text tells:"),
            joint=self.joint,
            answers=wanted,
            needle=wanted[0],
            meta=self.meta,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """See `Task.score`."""
        return contains_share(sample.answers, reply)


def open_subtask(name: str, data: pathlib.Path, *, chat: bool) -> FilesTask | None:
    """Returns a sub-task, None where none of its files is there."""
    if name == "json_kv":
        paths = present_files(lambda pairs: data / f"json_kv/test_k{pairs}_dep6.jsonl", _PAIRS)
        make, check, longest = JsonKvTask, _check_json_kv, 100
    else:
        folder, longest = _RULER[name]
        file = lambda length: data / f"ruler/{folder}/validation_{length}.jsonl"
        paths = present_files(file, LENGTHS)
        make, check = RecallTask, functools.partial(_check_ruler, name)
    if not paths:
        return None

    @functools.cache
    def drawn(path: pathlib.Path) -> Drawn:
        records = read_records(path, check)
        return Drawn(records=records, chosen=shuffled(len(records), SEED)[:SAMPLES])

    return make(
        subtask=name, chat=chat, category="Recall", longest_reply=longest, paths=paths, drawn=drawn
    )


def _check_json_kv(row: Row) -> None:
    text(row, "context")
    text(row, "question")
    answers(row, "answer")
    demos = row.get("demos")
    pairs = demos if isinstance(demos, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"demos: got {demos!r:.60}, wanted a list of pairs")


def _check_ruler(name: str, row: Row) -> None:
    text(row, "context")
    answers(row, "answer", "outputs")
    if name != "ruler_cwe":
        text(row, "query")
        text(row, "type_needle_v")
