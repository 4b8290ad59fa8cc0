"""Questions over paragraphs, from a local file: the paragraphs of a question among those of the other questions."""

import dataclasses

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample, match_any
from jaxtopk.evaluation.tasks.drawing import grid_depth
from jaxtopk.evaluation.tasks.haystack import after_filler
from jaxtopk.evaluation.tasks.question_file import all_paragraphs, read_entries


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnswering(GeneratedTask):
    """Documents are numbered, and one question is asked about them; sample i asks question i of the file.

    After RULER (arXiv:2404.06654), in words of our own. The other documents are drawn from the other questions; where a
    file has too few, they come again.

    Args:
      path: one JSON object a line, as `read_entries` takes it.
      label: name of the task in tables.
    """

    path: str
    label: str = "qa"

    def __post_init__(self) -> None:
        read_entries(self.path)

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return self.label

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 32

    @property
    def size(self) -> int:
        """See `AnyTask.size`."""
        return len(read_entries(self.path))

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "match_any"

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Hides the paragraphs of question `index` among as many others as units; a single one at its depth."""
        entries = read_entries(self.path)
        if index >= len(entries):
            raise ValueError(f"{self.name}: index got {index}, wanted less than {len(entries)}")
        entry = entries[index]
        others = [text for text in all_paragraphs(self.path) if text not in entry.paragraphs]
        if not others:
            raise ValueError(
                f"{self.path}: got no paragraph beside those of {entry.question!r}, wanted some"
            )
        rounds = -(-plan.units // len(others))
        order = np.concatenate([rng.permutation(len(others)) for _ in range(rounds)])
        documents = [others[i] for i in order[: plan.units]]
        single = len(entry.paragraphs) == 1
        for text in entry.paragraphs:
            place = grid_depth(index) * plan.units if single else rng.integers(len(documents) + 1)
            documents.insert(round(float(place)), text)
        context = "\n\n".join(f"Document {n}: {text}" for n, text in enumerate(documents, 1))
        prompt = after_filler(
            plan.filler,
            f"Answer the question at the end from the documents below, in a few words.\n\n{context}\n\n"
            f"Question: {entry.question}",
        )
        depth = None
        if single:
            text = entry.paragraphs[0]
            depth = (prompt.index(text) + max(text.find(entry.answers[0]), 0)) / len(prompt)
        return Sample(
            prompt=prompt,
            reply_start="Answer:",
            answers=entry.answers,
            depth=depth,
            num_units=plan.units,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """Returns 1 if the reply holds any of the answers, else 0."""
        return match_any(sample.answers, reply)
