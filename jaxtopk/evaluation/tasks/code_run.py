"""Small functions that call each other, in a file full of their like; the value of one call is asked for."""

import dataclasses

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.haystack import after_filler
from jaxtopk.evaluation.tasks.integers import match_first_integer

_SHALLOWEST, _DEEPEST = 2, 10
_LARGEST = 20  # constant or argument
_LEAVES = 0.2  # share of the other functions that call none


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeRun(GeneratedTask):
    """Each function adds a constant to, or subtracts it from, its argument or another function's result.

    After InfiniteBench (arXiv:2402.13718), in words of our own; 2 to 10 nested calls, in turn.
    """

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "code_run"

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 12

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "first_integer"

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Draws one function for each unit beside those that the asked call runs through."""
        calls = _SHALLOWEST + index % (_DEEPEST - _SHALLOWEST + 1)
        count = calls + plan.units
        names = [f"func_{i}" for i in rng.permutation(count)]
        constants = rng.integers(1, _LARGEST + 1, size=count) * rng.choice((-1, 1), size=count)
        # The first `calls` functions are the chain; the others call only later ones or the chain, so that none recurs.
        callee: list[int | None] = [*range(1, calls), None]
        for i in range(calls, count):
            other = int(rng.integers(i + 1, count + calls))
            callee.append(None if rng.random() < _LEAVES else other % count)
        argument = int(rng.integers(1, _LARGEST + 1))
        value = argument + int(constants[:calls].sum())
        functions = [
            _function(names[i], None if (j := callee[i]) is None else names[j], int(constants[i]))
            for i in rng.permutation(count)
        ]
        call = f"{names[0]}({argument})"
        prompt = (
            "Read the Python functions below.\n\n"
            + "\n".join(functions)
            + f"\nQuestion: What number does {call} return?"
        )
        return Sample(
            prompt=after_filler(plan.filler, prompt),
            reply_start=f"Answer: {call} returns",
            answers=(str(value),),
            depth=None,
            num_units=plan.units,
            meta=(("calls", str(calls)),),
        )

    def score(self, sample: Sample, reply: str) -> float:
        """Returns 1 if the first integer of the reply is the answer, else 0."""
        return match_first_integer(sample.answers[0], reply)


def _function(name: str, callee: str | None, constant: int) -> str:
    argument = "x" if callee is None else f"{callee}(x)"
    sign = "+" if constant > 0 else "-"
    return f"def {name}(x):\n    return {argument} {sign} {abs(constant)}\n"
