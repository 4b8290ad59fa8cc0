"""HELMET's many-shot classification: thousands of labelled texts in the prompt, their labels changed into numbers."""

import dataclasses
import math
import pathlib
import random
from collections.abc import Mapping

from jaxtopk.evaluation.answers import answer_line, exact_match
from jaxtopk.evaluation.suites.base import Draft
from jaxtopk.evaluation.suites.files import Row, answers, first_file, read_records, text
from jaxtopk.evaluation.suites.helmet_base import (
    LENGTHS,
    SEED,
    HelmetTask,
    nearest_length,
    seed_of,
    shuffled,
)
from jaxtopk.evaluation.tasks.base import Sample

# Labels of each set, and examples in the prompt at each length.
SETS = {
    "trec_coarse": (6, (200, 400, 800, 1600, 3300, 6600)),
    "trec_fine": (50, (200, 400, 800, 1600, 3200, 6400)),
    "banking77": (77, (180, 360, 720, 1450, 2900, 5900)),
    "clinic150": (151, (220, 440, 880, 1750, 3525, 7050)),
    "nlu": (68, (250, 510, 1020, 2040, 4080, 8296)),
}
NAMES = tuple(SETS)
_SAMPLES = 500
_HELD_OUT = 0.1  # of a set that comes as one file


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyShotTask(HelmetTask):
    """The label of a text, from examples in balanced rounds: each round has an example of every label, in random order.

    Which number stands for which label is drawn anew for each text asked, so that names of labels are of no help.

    Args:
      shown: texts to take examples from, each with its label.
      asked: texts to label, each with its right label.
      places: the place of each label in the list of numbers.
    """

    shown: tuple[tuple[str, str], ...]
    asked: tuple[tuple[str, str], ...]
    places: Mapping[str, int]

    @property
    def size(self) -> int:
        """See `AnyTask.size`."""
        return len(self.asked)

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "exact_match"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        said, label = self.asked[index]
        shots = SETS[self.subtask][1][LENGTHS.index(nearest_length(LENGTHS, target_tokens))]
        numbers = list(range(len(self.places)))
        random.Random((seed_of(said) + SEED) % 2**31).shuffle(numbers)
        number = lambda label: str(numbers[self.places[label]])
        return Draft(
            before="Each text has a label, a number. Reply with the label of the last text alone, "
            "in this form: label: 3\n\n",
            context="\n\n".join(
                f"{shown}\nlabel: {number(its)}" for shown, its in self._balanced(shots)
            ),
            after=f"\n\n{said}",
            reply_start=self.opening("label:"),
            joint=self.joint,
            answers=(number(label),),
            meta=self.meta,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """See `Task.score`."""
        return exact_match(sample.answers, answer_line(reply, label="label:"))

    def _balanced(self, shots: int) -> list[tuple[str, str]]:
        rng = random.Random(SEED)
        by_label: dict[str, list[tuple[str, str]]] = {}
        for pair in self.shown:
            by_label.setdefault(pair[1], []).append(pair)
        rounds = math.ceil(shots / len(by_label))
        columns = []
        for pairs in by_label.values():
            # A label with fewer texts than rounds gives all of them, as often as it takes.
            drawn = rng.sample(pairs, rounds % len(pairs))
            while len(drawn) < rounds:
                drawn += rng.sample(pairs, min(rounds - len(drawn), len(pairs)))
            columns.append(drawn)
        chosen = []
        for row in zip(*columns, strict=True):
            order = list(row)
            rng.shuffle(order)
            chosen += order
        return chosen[:shots]


def open_subtask(name: str, data: pathlib.Path, *, chat: bool) -> ManyShotTask | None:
    """Returns a sub-task, None where its file is missing."""
    path = first_file(data, (f"icl/{name}/train.jsonl",))
    if path is None:
        return None
    shown = read_records(path, _note).notes
    other = first_file(data, (f"icl/{name}/test.jsonl", f"icl/{name}/validation.jsonl"))
    if other is not None:
        asked = read_records(other, _note).notes
    else:
        mixed = [shown[place] for place in shuffled(len(shown), SEED)]
        held_out = math.ceil(_HELD_OUT * len(mixed))
        asked, shown = mixed[:held_out], mixed[held_out:]
    if len(asked) > _SAMPLES:
        asked = [asked[place] for place in shuffled(len(asked), SEED)[:_SAMPLES]]
    if not shown:
        raise ValueError(f"{path}: got one text and no test.jsonl, wanted more texts")
    labels = {label for _, label in (*shown, *asked)}
    return ManyShotTask(
        subtask=name,
        chat=chat,
        category="ICL",
        longest_reply=20,
        one_line=True,
        shown=tuple(shown),
        asked=tuple(asked),
        places=_label_places(path, labels, SETS[name][0]),
    )


def _note(row: Row) -> tuple[str, str]:
    return text(row, "text"), answers(row, "label")[0]


def _label_places(path: pathlib.Path, labels: set[str], wanted: int) -> dict[str, int]:
    """Numbers the labels: by themselves where they are numbers, else by the alphabet."""
    if len(labels) > wanted:
        raise ValueError(f"{path}: got {len(labels)} labels, wanted at most {wanted}")
    if labels <= set(map(str, range(wanted))):
        return {str(place): place for place in range(wanted)}
    return {label: place for place, label in enumerate(sorted(labels))}
