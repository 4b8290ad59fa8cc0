"""HELMET's questions on whole books, from the files of InfiniteBench."""

import dataclasses
import pathlib

from jaxtopk.evaluation.answers import answer_line, best_reading, exact_match
from jaxtopk.evaluation.rouge import rouge_l
from jaxtopk.evaluation.suites import infinitebench
from jaxtopk.evaluation.suites.base import Draft
from jaxtopk.evaluation.suites.files import Records, Row, answers, first_file, read_records
from jaxtopk.evaluation.suites.helmet_base import SAMPLES, SEED, SHOTS, HelmetTask, shuffled
from jaxtopk.evaluation.tasks.base import Sample

_FILES = {"infbench_qa": "longbook_qa_eng", "infbench_choice": "longbook_choice_eng"}
NAMES = tuple(_FILES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BookTask(HelmetTask):
    """A question on a book, with two questions on other books, without those, shown first.

    Args:
      records: notes are the ids of the questions.
      chosen: which are asked.
    """

    records: Records
    chosen: tuple[int, ...]

    @property
    def size(self) -> int:
        """See `AnyTask.size`."""
        return len(self.chosen)

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "exact_match" if self._has_choices else "rouge_l"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        place = self.chosen[index]
        row, notes = self.records[place], self.records.notes
        others = [other for other in range(len(notes)) if notes[other] != notes[place]]
        shown = [self.records[others[i]] for i in shuffled(len(others), SEED)[:SHOTS]]
        blocks = [
            f"(a book)\n{self._asked(demo)}\nAnswer: {self._wanted(demo)[0]}" for demo in shown
        ]
        examples = "".join(f"{block}\n\n" for block in blocks)
        short = "the letter alone" if self._has_choices else "a few words"
        return Draft(
            before=f"A book, and a question on it. Reply with {short}.\n\n{examples}",
            context=row["context"],
            after=f"\n\n{self._asked(row)}",
            reply_start=self.opening("Answer:"),
            joint=self.joint,
            answers=self._wanted(row),
            meta=self.meta,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """ROUGE-L F1; of a choice, whether the reply is the letter or holds the letter with its option."""
        if not self._has_choices:
            return best_reading(rouge_l, sample.answers, reply)
        if sample.answers[1].lower() in reply.lower():
            return 1.0
        return max(exact_match(sample.answers, part) for part in (reply, answer_line(reply)))

    @property
    def _has_choices(self) -> bool:
        return self.subtask == "infbench_choice"

    def _asked(self, row: Row) -> str:
        options = ""
        if self._has_choices:
            lines = zip("ABCD", row["options"], strict=True)
            options = "\n" + "\n".join(f"{letter}. {option}" for letter, option in lines)
        return f"Question: {row['input']}{options}"

    def _wanted(self, row: Row) -> tuple[str, ...]:
        if not self._has_choices:
            return answers(row, "answer")
        option, letter = infinitebench.choice(row)
        return letter, f"{letter}. {option}"


def open_subtask(name: str, data: pathlib.Path, *, chat: bool) -> BookTask | None:
    """Returns a sub-task, None where its file is missing."""
    file = _FILES[name]
    path = first_file(data, (f"infbench/{file}.jsonl", f"{file}.jsonl"))
    if path is None:
        return None

    def note(row: Row) -> str:
        infinitebench.check_row(file, row)
        if "id" not in row:
            raise ValueError("id: got nothing, wanted the id of the question")
        return str(row["id"])

    records = read_records(path, note)
    return BookTask(
        subtask=name,
        chat=chat,
        category="LongQA",
        longest_reply=10,
        records=records,
        chosen=tuple(shuffled(len(records), SEED)[:SAMPLES]),
    )
