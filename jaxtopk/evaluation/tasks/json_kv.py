"""Look-up in one large JSON object: the value that belongs to a key, two worked look-ups given first."""

import dataclasses
import json
import uuid
from typing import Literal

import numpy as np

from jaxtopk.evaluation.tasks.base import Sample, Task, draw_keys, draw_numbers

_DEPTHS = 6  # places the asked key takes in turn, evenly from the start to the end
_EXAMPLES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonKeyValue(Task):
    """The value of one key of a JSON object is asked for.

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
        """See `Task.name`."""
        return "json_kv" if self.entries == "uuid" else "json_kv_words"

    def build(self, rng: np.random.Generator, index: int, num_units: int) -> Sample:
        """Draws `num_units` pairs and two more; asks for the one at depth `index` of the grid."""
        count = num_units + _EXAMPLES
        if self.entries == "uuid":
            keys, values = _draw_uuids(rng, count), _draw_uuids(rng, count)
        else:
            keys, values = draw_keys(rng, count), draw_numbers(rng, count, self.digits)
        place = round((count - 1) * (index % _DEPTHS) / (_DEPTHS - 1))
        others = [i for i in range(count) if i != place]
        shown = rng.choice(len(others), size=_EXAMPLES, replace=False)
        pairs = json.dumps(dict(zip(keys, values, strict=True)), indent=0)
        entry = lambda i: json.dumps({keys[i]: values[i]})[1:-1]
        examples = "\n".join(entry(others[i]) for i in shown)
        prompt = f"JSON data:\n{pairs}\n\nSome of its entries:\n{examples}"
        return Sample(
            prompt=prompt,
            # Opens as the entry itself does, so that what is tested is finding it, not its layout.
            reply_start=f'{json.dumps(keys[place])}: "',
            answers=(values[place],),
            depth=place / (count - 1),
            num_units=num_units,
        )


def _draw_uuids(rng: np.random.Generator, count: int) -> list[str]:
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
