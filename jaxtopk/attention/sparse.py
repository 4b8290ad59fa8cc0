"""What sparse strategies have in common: which layers and which rows of a prompt they leave dense."""

import dataclasses
from typing import Literal

from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.attention.full import FullAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttention(AttentionStrategy):
    """Attends to some keys only, where it is not exempted.

    Args:
      prefill: "full" leaves prompt rows dense, "topk" makes them sparse too.
      sparse_suffix: how many last prompt tokens go through sparse rows even when the prefill is full; with 0 the first new
        token comes from a dense row.
      layers: the layers that are sparse; None means all. The others run full attention.
    """

    prefill: Literal["full", "topk"] = "full"
    sparse_suffix: int = 1
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.sparse_suffix < 0:
            raise ValueError(
                f"{self._name}: sparse_suffix got {self.sparse_suffix}, wanted at least 0"
            )
        self._check_choice("prefill", ("full", "topk"))

    def layer(self, index, num_layers):
        """See `AttentionStrategy.layer`; refuses layers that the model does not have."""
        if self.layers is None:
            return self
        for wrong in (i for i in self.layers if not 0 <= i < num_layers):
            raise ValueError(f"{self._name}: layers got {wrong}, wanted 0 to {num_layers - 1}")
        return dataclasses.replace(self, layers=None) if index in self.layers else FullAttention()

    def prefill_strategy(self):
        """See `AttentionStrategy.prefill_strategy`."""
        return FullAttention() if self.prefill == "full" else self

    @property
    def suffix_tokens(self):
        """Prompt tokens decoded after a full prefill; a sparse prefill needs none."""
        return self.sparse_suffix if self.prefill == "full" else 0

    def __repr__(self):
        """What makes a strategy itself first; for subclasses with `repr=False`."""
        shared = {field.name for field in dataclasses.fields(SparseAttention)}
        fields = sorted(dataclasses.fields(self), key=lambda field: field.name in shared)
        return f"{self._name}({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in fields)})"

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_choice(self, name: str, wanted: tuple[str, ...]) -> None:
        if (got := getattr(self, name)) not in wanted:
            raise ValueError(
                f"{self._name}: {name} got {got!r}, wanted one of {', '.join(map(repr, wanted))}"
            )

    def _check_topk(self, topk) -> None:
        if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk < 2**31:
            raise ValueError(f"{self._name}: topk got {topk!r}, wanted an int >= 1 and below 2**31")
