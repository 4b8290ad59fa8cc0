"""LongBench v2 (arXiv:2412.15204): 503 questions with four choices each, on texts of up to two million words."""

import dataclasses
import pathlib
import re

from jaxtopk.evaluation.answers import stated_letter
from jaxtopk.evaluation.suites.base import Draft, Keep, SuiteTask
from jaxtopk.evaluation.suites.files import Records, Row, first_file, read_records, text
from jaxtopk.evaluation.tasks.base import Sample

REMEDY = (
    "put data.json of the Hugging Face data set THUDM/LongBench-v2 into FOLDER, "
    "and prompts/ of github.com/THUDM/LongBench beside it for the suite's own wording"
)
SUBTASKS = {"0shot": 128}  # longest reply, tokens
NOT_RUN = {"0shot_cot": "it asks twice, the second time with the model's own first reply"}

_GROUPS = ("difficulty", "length", "domain", "sub_domain")
_LETTERS = ("A", "B", "C", "D")
_OWN_TEMPLATE = """A long text stands below, and after it a question with four choices, one of which is right.

[Beginning of the text]
$DOC$
[End of the text]

$Q$
A: $C_A$
B: $C_B$
C: $C_C$
D: $C_D$

Reply with one sentence that names the letter, in this form: The correct answer is (X)"""
_SLOTS = ("$DOC$", "$Q$", *(f"$C_{letter}$" for letter in _LETTERS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongBenchV2Task(SuiteTask):
    """The questions with the text given. `meta` of a sample has the groups that results are reported by.

    Args:
      template: the prompt with its slots; None for our own.
    """

    records: Records
    template: str | None = None

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
        """Nothing: the suite looks for the letter in the whole reply."""
        return ()

    @property
    def wording(self) -> str:
        """See `AnyTask.wording`."""
        return "own" if self.template is None else "suite"

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "accuracy"

    @property
    def keep(self) -> Keep:
        """The first and the last half."""
        return "ends"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        row = self.records[index]
        filled = {"$Q$": row["question"].strip()}
        filled |= {f"$C_{letter}$": row[f"choice_{letter}"].strip() for letter in _LETTERS}
        before, after = (self.template or _OWN_TEMPLATE).split("$DOC$")
        fill = lambda part: re.sub(r"\$(Q|C_[A-D])\$", lambda slot: filled[slot[0]], part)
        opened = self.template is None and not self.chat
        return Draft(
            before=fill(before),
            context=row["context"].strip(),
            after=fill(after),
            reply_start="The correct answer is (" if opened else "",
            joint="\n" if opened else "",
            answers=(row["answer"],),
            meta=tuple((name, str(row[name])) for name in _GROUPS if name in row),
        )

    def score(self, sample: Sample, reply: str) -> float:
        """Returns 1 where the reply states the right letter; a reply without a letter is wrong."""
        return float(stated_letter(sample.reply_start + reply) == sample.answers[0])


def open_subtask(name: str, folder: pathlib.Path, *, chat: bool) -> LongBenchV2Task | None:
    """Returns a sub-task, None where its file is missing."""
    path = first_file(folder, ("data.json", "data.jsonl", "data/data.json", "data/data.jsonl"))
    if path is None:
        return None
    prompt = first_file(folder, (f"prompts/{name}.txt",))
    return LongBenchV2Task(
        suite="longbench_v2",
        subtask=name,
        chat=chat,
        records=read_records(path, _check),
        template=None if prompt is None else _read_template(prompt),
    )


def _read_template(path: pathlib.Path) -> str:
    template = path.read_text(encoding="utf-8")
    for slot in _SLOTS:
        if template.count(slot) != 1:
            raise ValueError(f"{path}: got {template.count(slot)} slots {slot}, wanted 1")
    return template


def _check(row: Row) -> None:
    for field in ("question", "context", *(f"choice_{letter}" for letter in _LETTERS)):
        text(row, field)
    for field, wanted in (
        ("answer", _LETTERS),
        ("difficulty", ("easy", "hard")),
        ("length", ("short", "medium", "long")),
    ):
        if row.get(field) not in wanted:
            raise ValueError(f"{field}: got {row.get(field)!r}, wanted one of {', '.join(wanted)}")
