"""What a run measures: presets for an accelerator and for a test of seconds.

No import of JAX here: the command line is read before JAX looks for devices.
"""

import dataclasses
from typing import Self

GROUPS = ("main", "pages", "quantized", "budget", "ragged", "adversarial", "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelLatencyConfig:
    """One run.

    Raises:
      ValueError: a number is out of its range, or a group is unknown; names it.
    """

    sizes: str = "full"  # "full" or "tiny": which list of workloads
    groups: tuple[str, ...] = GROUPS  # of workloads, in the order in which they run
    implementations: tuple[str, ...] = ("mosaic_gpu", "xla")
    peers: bool = True
    rounds: int = 7  # differences that a median is taken of
    round_ms: float = 5.0  # device time that a difference lasts at least
    working_set_mib: int = 128  # read by the different inputs of a workload together: over twice the second-level cache
    most_inputs: int = 8  # whatever the working set: each is a call that has to be compiled
    probe_mib: int = 2048  # array whose copy and read give the card's bandwidth
    probe_matmul: int = 8192  # side of the square matrices whose product gives its arithmetic rate
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "working_set_mib", "most_inputs", "probe_mib", "probe_matmul"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.round_ms <= 0:
            raise ValueError(f"round_ms: got {self.round_ms}, wanted more than 0")
        if self.sizes not in ("full", "tiny"):
            raise ValueError(f"sizes: got {self.sizes!r}, wanted full or tiny")
        if not self.groups or not set(self.groups) <= set(GROUPS):
            raise ValueError(f"groups: got {self.groups}, wanted some of {', '.join(GROUPS)}")
        if not self.implementations:
            raise ValueError("implementations: got none, wanted at least one")

    @classmethod
    def gpu(cls) -> Self:
        """One GPU, all workloads."""
        return cls()

    @classmethod
    def tpu(cls) -> Self:
        """One TPU, all workloads."""
        return cls(implementations=("mosaic_tpu", "xla"))

    @classmethod
    def tiny(cls) -> Self:
        """Shapes of seconds on a CPU: shows that everything runs and is checked, and nothing about speed."""
        return cls(
            sizes="tiny",
            implementations=("xla", "reference"),
            rounds=2,
            round_ms=1.0,
            working_set_mib=1,
            most_inputs=1,
            probe_mib=1,
            probe_matmul=64,
        )
