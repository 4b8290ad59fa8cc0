"""What a run measures: presets for an accelerator and for a test of seconds.

No import of JAX here: the command line is read before JAX looks for devices.
"""

import dataclasses
from typing import Self

from experiments.kernel_latency.config import KernelLatencyConfig

ATTENTIONS = ("full", "topk", "indexer")
MODELS = ("smollm2-135m", "llama-3.1-8b-shape", "tiny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One cache to decode from.

    Raises:
      ValueError: a number is below 1, or the model is unknown; names it.
    """

    model: str  # one of `MODELS`
    context: int  # tokens in the cache after the last step that is timed
    batch: int = 1

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model: got {self.model!r}, wanted one of {', '.join(MODELS)}")
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongDecodeConfig:
    """One run.

    Raises:
      ValueError: a number is out of its range, or an attention is unknown; names it.
    """

    workloads: tuple[Workload, ...]  # in this order; those of one model beside one another
    attentions: tuple[str, ...] = ATTENTIONS
    topk: int = 2048  # keys that a row keeps, of Top-k and indexer
    new_tokens: int = 32  # steps of one timing, in one compiled loop
    rounds: int = 5  # timings of each attention that count, in turn
    dtype: str = "bfloat16"  # of weights and cache
    pretrained: str = "smollm2-135m"  # where the weights of that model are
    probe: KernelLatencyConfig = KernelLatencyConfig()  # how the device's read rate is measured
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("topk", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if not self.workloads:
            raise ValueError("workloads: got none, wanted at least one")
        if not self.attentions or not set(self.attentions) <= set(ATTENTIONS):
            raise ValueError(
                f"attentions: got {self.attentions}, wanted some of {', '.join(ATTENTIONS)}"
            )
        for workload in self.workloads:
            if workload.context <= self.new_tokens:
                raise ValueError(
                    f"context: got {workload.context}, wanted more than new_tokens = {self.new_tokens}"
                )

    @classmethod
    def accelerator(cls) -> Self:
        """One GPU or TPU with 80 GB."""
        return cls(
            workloads=(
                Workload(model="llama-3.1-8b-shape", context=131072),
                Workload(model="llama-3.1-8b-shape", context=8192),
                Workload(model="llama-3.1-8b-shape", context=8192, batch=8),
                Workload(model="llama-3.1-8b-shape", context=32768),
                Workload(model="smollm2-135m", context=8192),
                Workload(model="smollm2-135m", context=8192, batch=8),
            )
        )

    @classmethod
    def tiny(cls) -> Self:
        """Two small layers of random weights: shows that everything runs, in seconds, and nothing about speed."""
        return cls(
            workloads=(
                Workload(model="tiny", context=128),
                Workload(model="tiny", context=256, batch=2),
            ),
            topk=16,
            new_tokens=2,
            rounds=2,
            dtype="float32",
            probe=KernelLatencyConfig.tiny(),
        )
