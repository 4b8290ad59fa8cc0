"""Look-up in one large JSON object: the value that belongs to a key."""

import dataclasses
import json
from typing import Literal

import numpy as np

from jaxtopk.evaluation.tasks.base import GeneratedTask, Plan, Sample
from jaxtopk.evaluation.tasks.drawing import draw_keys, draw_numbers, draw_uuids, grid_depth
from jaxtopk.evaluation.tasks.haystack import after_filler

_DEPTHS = 6  # places the asked key takes in turn, evenly from the start to the end
_EXAMPLES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonKeyValue(GeneratedTask):
    """The value of one key of a JSON object is asked for, two worked look-ups given first.

    After the synthetic recall task of HELMET (arXiv:2410.02694) and "Lost in the Middle" (arXiv:2307.03172), in words of
    our own.

    Args:
      entries: "uuid": keys and values are UUIDs, as in those works. "words": keys are two words and values are numbers,
        which leaves the look-up as it is and asks less copying of a small model.
      digits: of each number, with "words".
    """

    entries: Literal["uuid", "words"] = "uuid"
    digits: int = 5

    def __post_init__(self) -> None:
        if self.entries not in ("uuid", "words"):
            raise ValueError(f"entries: got {self.entries!r}, wanted 'uuid' or 'words'")
        if not 1 <= self.digits <= 15:
            raise ValueError(f"digits: got {self.digits}, wanted 1 to 15")

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "json_kv" if self.entries == "uuid" else "json_kv_words"

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 48 if self.entries == "uuid" else 24

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Draws two pairs more than the units; asks for the one at depth `index` of the grid."""
        count = plan.units + _EXAMPLES
        if self.entries == "uuid":
            keys, values = draw_uuids(rng, count), draw_uuids(rng, count)
        else:
            keys, values = draw_keys(rng, count), draw_numbers(rng, count, self.digits)
        place = round((count - 1) * (index % _DEPTHS) / (_DEPTHS - 1))
        others = [i for i in range(count) if i != place]
        shown = rng.choice(len(others), size=_EXAMPLES, replace=False)
        entry = lambda i: json.dumps({keys[i]: values[i]})[1:-1]
        examples = "\n".join(entry(others[i]) for i in shown)
        prompt = after_filler(
            plan.filler,
            f"JSON data:\n{_object(keys, values)}\n\nSome of its entries:\n{examples}",
        )
        return _asked(keys[place], values[place], prompt, plan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValueRetrieval(GeneratedTask):
    """The value of one UUID of a JSON object of UUIDs is asked for, without an example.

    After the retrieval task of InfiniteBench (arXiv:2402.13718), in words of our own; forty depths in turn.
    """

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "kv_retrieval"

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return 48

    def build(self, rng: np.random.Generator, index: int, plan: Plan) -> Sample:
        """Draws as many pairs as units; asks for the one at its depth of the grid."""
        keys, values = draw_uuids(rng, plan.units), draw_uuids(rng, plan.units)
        place = round((plan.units - 1) * grid_depth(index))
        prompt = after_filler(
            plan.filler,
            f"JSON data:\n{_object(keys, values)}\n\nWhich value belongs to the key {keys[place]}?",
        )
        return _asked(keys[place], values[place], prompt, plan)


def _object(keys: list[str], values: list[str]) -> str:
    return json.dumps(dict(zip(keys, values, strict=True)), indent=0)


def _asked(key: str, value: str, prompt: str, plan: Plan) -> Sample:
    return Sample(
        prompt=prompt,
        # Opens as the entry itself does, so that what is tested is finding it, not its layout.
        reply_start=f'{json.dumps(key)}: "',
        answers=(value,),
        depth=prompt.index(value) / len(prompt),
        num_units=plan.units,
    )
