"""A long sum of small integers, whose running results are to be listed."""

import dataclasses

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.haystack import after_filler
from jaxtopk.evaluation.tasks.integers import integers

_LARGEST = 9  # integer added or subtracted
_END = 100  # running results are 0 to 99


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathCalc(GeneratedTask):
    """The expression fills the context; the reply lists the results from its start on, up to a number of them.

    After InfiniteBench (arXiv:2402.13718), in words of our own; there, all results are wanted, which takes replies as long
    as the context.

    Args:
      results: wanted, the first number of the expression included.
    """

    results: int = 20

    def __post_init__(self) -> None:
        if self.results < 2:
            raise ValueError(f"results: got {self.results}, wanted at least 2")

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "math_calc"

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 5 * self.results

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "right_prefix"

    @property
    def aggregation(self) -> bool:
        """See `AnyTask.aggregation`."""
        return True

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Draws an operation for each unit beyond the results wanted; signs keep all results between 0 and 99."""
        count = plan.units + self.results - 1
        total = int(rng.integers(1, _LARGEST + 1))
        values = rng.integers(1, _LARGEST + 1, size=count).tolist()
        plus = (rng.random(count) < 0.5).tolist()
        expression, totals = [str(total)], [total]
        for value, positive in zip(values, plus, strict=True):
            if not 0 <= total + (value if positive else -value) < _END:
                positive = not positive
            total += value if positive else -value
            expression.append(f"{'+' if positive else '-'} {value}")
            totals.append(total)
        prompt = (
            "Work out an expression from left to right and list the result at each number, the first number included.\n\n"
            "Expression: 4 + 3 - 2 + 8\nResults: 4, 7, 5, 13\n\n"
            f"Expression: {' '.join(expression)}\n\n"
            f"List the first {self.results} results of this long expression."
        )
        return Sample(
            prompt=after_filler(plan.filler, prompt),
            reply_start="Results:",
            answers=tuple(str(total) for total in totals[: self.results]),
            depth=None,
            num_units=plan.units,
        )

    def score(self, sample: Sample, reply: str) -> float:
        """Returns the share of the answers that the reply lists before its first wrong number."""
        right = 0
        for wanted, got in zip(sample.answers, integers(reply), strict=False):
            if int(wanted) != got:
                break
            right += 1
        return right / len(sample.answers)
