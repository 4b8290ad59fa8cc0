"""One integer of a long list: an extreme one, or the one in the middle."""

import dataclasses

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.haystack import after_filler
from jaxtopk.evaluation.tasks.integers import match_first_integer

_END = 100  # integers are 0 to 99
_MARGIN = 20  # the largest one is in the last 20 of these, the smallest one in the first
_FEWEST = 15  # integers
_QUESTIONS = (
    "largest", "smallest", "median", "second largest", "second smallest", "third largest", "third smallest",
)  # fmt: skip
_NOTES = dict.fromkeys(_QUESTIONS[3:], " Equal numbers count once.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathFind(GeneratedTask):
    """The largest, smallest (second and third, of distinct values) or median of integers from 0 to 99, in turn.

    The ends of the range and its skew are drawn, so that no answer can be guessed. After InfiniteBench
    (arXiv:2402.13718), in words of our own.
    """

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "math_find"

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 8

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "first_integer"

    @property
    def aggregation(self) -> bool:
        """See `AnyTask.aggregation`."""
        return True

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Draws two integers for each unit: an odd count, so that the median is one of them."""
        question = _QUESTIONS[index % len(_QUESTIONS)]
        count = 2 * (plan.units - 1) + _FEWEST
        low, high = int(rng.integers(_MARGIN)), _END - 1 - int(rng.integers(_MARGIN))
        skew = 2 ** rng.uniform(-1, 1)
        numbers = low + np.floor((high - low + 1) * rng.random(count) ** skew).astype(int)
        ends = rng.choice(count, size=2, replace=False)
        numbers[ends] = low, high
        prompt = (
            f"Read the list of numbers below.\n\n{', '.join(map(str, numbers))}\n\n"
            f"Question: What is the {question} number in the list?{_NOTES.get(question, '')}"
        )
        return Sample(
            prompt=after_filler(plan.filler, prompt),
            reply_start=f"Answer: The {question} number is",
            answers=(str(_answer(question, numbers)),),
            depth=None,
            num_units=plan.units,
            meta=(("question", question),),
        )

    def score(self, sample: Sample, reply: str) -> float:
        """Returns 1 if the first integer of the reply is the answer, else 0."""
        return match_first_integer(sample.answers[0], reply)


def _answer(question: str, numbers: np.ndarray) -> int:
    if question == "median":
        return int(np.sort(numbers)[len(numbers) // 2])
    distinct = np.unique(numbers)
    rank = {"second": 2, "third": 3}.get(question.split()[0], 1)
    return int(distinct[-rank] if question.endswith("largest") else distinct[rank - 1])
