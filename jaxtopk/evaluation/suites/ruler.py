"""RULER (arXiv:2404.06654): the files that its own scripts write, a whole prompt a line."""

import dataclasses
import pathlib

from jaxtopk.evaluation.answers import contains_any, contains_share
from jaxtopk.evaluation.suites.base import Draft, Keep, SuiteTask
from jaxtopk.evaluation.suites.files import Records, Row, answers, first_file, read_records, text
from jaxtopk.evaluation.tasks.base import Sample

REMEDY = (
    "write it with the data scripts of github.com/NVIDIA/RULER, a folder a task, "
    "such as FOLDER/niah_single_1/validation.jsonl"
)
_NIAH = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")
# Longest reply of each sub-task, tokens.
SUBTASKS = {
    **{f"niah_{kind}": 128 for kind in (*_NIAH, "multivalue", "multiquery")},
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
NOT_RUN: dict[str, str] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerTask(SuiteTask):
    """A task of RULER. Its files are made for one length and one tokenizer; a prompt that does not fit is an error."""

    records: Records

    @property
    def size(self) -> int:
        """See `AnyTask.size`."""
        return len(self.records)

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return SUBTASKS[self.subtask]

    @property
    def stop(self) -> tuple[str, ...]:
        """Nothing: the suite scores the whole reply."""
        return ()

    @property
    def wording(self) -> str:
        """See `AnyTask.wording`."""
        return "suite"

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "string_match_part" if self._asks_for_one else "string_match_all"

    @property
    def aggregation(self) -> bool:
        """See `AnyTask.aggregation`."""
        return self.subtask in ("cwe", "fwe")

    @property
    def keep(self) -> Keep:
        """See `SuiteTask.keep`."""
        return "all"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        row = self.records[index]
        wanted = answers(row, "outputs")
        return Draft(
            context="",
            after=row["input"],
            # Newer files split off how the reply begins, space included; in older ones the prompt ends with it.
            reply_start=row.get("answer_prefix", ""),
            joint="",
            answers=wanted,
            needle=wanted[0] if self.subtask.startswith("niah") else None,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """See `Task.score`."""
        metric = contains_any if self._asks_for_one else contains_share
        return metric(sample.answers, reply)

    @property
    def _asks_for_one(self) -> bool:
        return self.subtask.startswith("qa")


def open_subtask(name: str, folder: pathlib.Path, *, chat: bool) -> RulerTask | None:
    """Returns a sub-task, None where its file is missing."""
    file, line = f"{name}/validation.jsonl", f"{name}.jsonl"
    path = first_file(folder, (file, f"data/{file}", f"data/{line}", line))
    if path is None:
        return None
    return RulerTask(suite="ruler", subtask=name, chat=chat, records=read_records(path, _check))


def _check(row: Row) -> None:
    text(row, "input")
    answers(row, "outputs")
