"""A needle task at chosen depths in turn, so that a heat map has the same number of samples in each of its cells."""

import dataclasses
from collections.abc import Callable

from jaxtopk.evaluation.tasks.base import Sample, Task
from jaxtopk.evaluation.tasks.niah import NeedleInHaystack


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthGrid(Task):
    """Sample i stands at depth i modulo their number.

    Args:
      task: with one needle asked for.
      depths: shares of the context, 0 its beginning and 1 its end.

    Raises:
      ValueError: no depth, one that is out of range or there twice, or a task that asks for several needles.
    """

    task: NeedleInHaystack
    depths: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.depths or len(set(self.depths)) != len(self.depths):
            raise ValueError(f"depths: got {self.depths}, wanted at least one, each once")
        for depth in self.depths:
            dataclasses.replace(self.task, depth=depth)

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return self.task.name

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return self.task.reply_tokens

    @property
    def stop(self) -> tuple[str, ...]:
        """See `Task.stop`."""
        return self.task.stop

    def sample(
        self, index: int, *, seed: int, target_tokens: int, count_tokens: Callable[[Sample], int]
    ) -> Sample:
        """See `Task.sample`."""
        depth = self.depths[index % len(self.depths)]
        at_depth = dataclasses.replace(self.task, depth=depth)
        sample = at_depth.sample(
            index, seed=seed, target_tokens=target_tokens, count_tokens=count_tokens
        )
        # The depth asked for, not the one the cut of sentences came to: cells of a map are what was asked for.
        return dataclasses.replace(sample, depth=depth)


__all__ = ["DepthGrid"]
