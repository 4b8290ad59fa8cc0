"""HELMET's answers with citations (ALCE); what is scored is the answers, as whether citations hold needs an NLI model."""

import dataclasses
import functools
import json
import pathlib
import random
from collections.abc import Sequence

from jaxtopk.evaluation.answers import drop_citations, group_share, list_recall
from jaxtopk.evaluation.suites.base import Draft
from jaxtopk.evaluation.suites.files import Row, objects, read_records, text
from jaxtopk.evaluation.suites.helmet_base import (
    LENGTHS,
    SAMPLES,
    SEED,
    SHOTS,
    Drawn,
    HelmetTask,
    nearest_length,
    shuffled,
)
from jaxtopk.evaluation.tasks.base import Sample

_DOCUMENTS = (8, 30, 75, 165, 345, 700)  # at each length
NAMES = ("alce_asqa", "alce_qampari")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """How a question is put.

    Args:
      instruction: what is asked for.
      document: pattern of a document, with slots ID, title, text.
      example: pattern of a worked example, with slots instruction, question, context, answer.
      examples: to choose from; may be empty.
      wording: as in `AnyTask.wording`.
    """

    instruction: str
    document: str
    example: str = ""
    examples: Sequence[Row] = ()
    wording: str = "own"

    def listed(self, pages: Sequence[Row]) -> str:
        """Returns the documents, numbered."""
        return "\n\n".join(
            self.document.format(**{**page, "ID": number}) for number, page in enumerate(pages, 1)
        )

    def worked(self, example: Row) -> str:
        """Returns a worked example."""
        context = self.listed(example["docs"])
        return self.example.format(
            **{**example, "instruction": self.instruction, "context": context}
        )


_TASKS = {
    "alce_asqa": "Answer the question in full, with every reading it may have.",
    "alce_qampari": "List all answers to the question, with commas between them.",
}
_OWN_PROMPTS = {
    name: Prompts(
        instruction=f"{task} Rely on the numbered documents alone, and cite them by number, as in [2].",
        document="[{ID}] {title}\n{text}",
    )
    for name, task in _TASKS.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CitedTask(HelmetTask):
    """A long answer or a list of answers, from numbered documents."""

    drawn: Drawn
    prompts: Prompts

    @property
    def size(self) -> int:
        """See `AnyTask.size`."""
        return len(self.drawn.chosen)

    @property
    def wording(self) -> str:
        """See `AnyTask.wording`."""
        return self.prompts.wording

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "string_em" if self.subtask == "alce_asqa" else "recall_top5"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        row = self.drawn[index]
        documents = _DOCUMENTS[LENGTHS.index(nearest_length(LENGTHS, target_tokens))]
        prompts, groups = self.prompts, _groups(self.subtask, row)
        count = min(SHOTS, len(prompts.examples))
        shown = random.Random(SEED + index).sample(prompts.examples, count)
        return Draft(
            before="".join(f"{prompts.worked(example)}\n\n\n" for example in shown)
            + f"{prompts.instruction}\n\nQuestion: {row['question']}\n\n",
            context=prompts.listed(row["docs"][:documents]),
            after="",
            reply_start=self.opening("Answer:"),
            joint="" if self.chat else "\n\n",
            answers=tuple(answer for group in groups for answer in group),
            meta=(*self.meta, ("groups", json.dumps(groups))),
        )

    def score(self, sample: Sample, reply: str) -> float:
        """See `Task.score`."""
        groups = json.loads(dict(sample.meta)["groups"])
        metric = group_share if self.subtask == "alce_asqa" else list_recall
        return metric(groups, drop_citations(reply))


def open_subtask(name: str, data: pathlib.Path, *, chat: bool) -> CitedTask | None:
    """Returns a sub-task, None where its file is missing; prompts come from the suite's folder where it has them."""
    kind = name.removeprefix("alce_")
    path = data / f"alce/{kind}_eval_gtr_top2000.json"
    template = data.parent / f"prompts/{kind}_revised.json"
    if not path.is_file():
        return None
    records = read_records(path, functools.partial(_check, name))
    return CitedTask(
        subtask=name,
        chat=chat,
        category="Cite",
        longest_reply=300,
        drawn=Drawn(records=records, chosen=shuffled(len(records), SEED)[:SAMPLES]),
        prompts=_read_prompts(template) if template.is_file() else _OWN_PROMPTS[name],
    )


def _read_prompts(path: pathlib.Path) -> Prompts:
    try:
        found = json.loads(path.read_bytes())
        prompts = Prompts(
            instruction=text(found, "instruction"),
            document=text(found, "doc_prompt"),
            example=text(found, "demo_prompt"),
            examples=objects(found, "demos", "question", "answer", "docs"),
            wording="suite",
        )
        for example in prompts.examples:
            prompts.worked(example)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: got {error!r}, wanted the suite's prompts for ALCE") from None
    return prompts


def _check(name: str, row: Row) -> None:
    text(row, "question")
    objects(row, "docs", "title", "text")
    _groups(name, row)


def _groups(name: str, row: Row) -> list[list[str]]:
    """The wordings of each thing that a right answer says."""
    if name == "alce_asqa":
        groups = [pair["short_answers"] for pair in objects(row, "qa_pairs", "short_answers")]
    else:
        groups = row.get("answers")
    fine = lambda group: (
        isinstance(group, list) and group and all(isinstance(x, str) and x.strip() for x in group)
    )
    if not isinstance(groups, list) or not groups or not all(map(fine, groups)):
        raise ValueError(f"answers: got {groups!r:.60}, wanted lists of texts that are not empty")
    return groups
