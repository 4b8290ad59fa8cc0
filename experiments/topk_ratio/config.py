"""What the study measures: presets for an accelerator and for a test of seconds.

No import of JAX here: the command line is read before JAX looks for devices.
"""

import dataclasses
from typing import Self

RATIOS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
TOPKS = (64, 128, 256, 512, 1024)
# RULER's thirteen but for the two that need a file of questions; these join with one.
TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
)  # fmt: skip
QUESTION_TASKS = ("qa_1", "qa_2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One run; full attention is always measured beside the budgets. Ranges are checked by the evaluation's own config."""

    model: str = "smollm2-135m"  # as `load_pretrained` takes it, or "random": a tiny model with random weights
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (2048, 4096, 8192)  # tokens, prompt and reply together
    ratios: tuple[float, ...] = RATIOS
    topks: tuple[int, ...] = TOPKS
    sparse_suffix: int = (
        1  # last prompt tokens that are Top-k rows; the others are prefilled with full attention
    )
    samples: int = 100  # of each task and length
    haystack: str = "shakespeare"
    dtype: str = "bfloat16"
    seed: int = 0

    @classmethod
    def gpu(cls) -> Self:
        """One accelerator."""
        return cls()

    @classmethod
    def tiny(cls) -> Self:
        """Random weights over bytes: shows that everything runs, in seconds, and nothing about quality."""
        return cls(
            model="random",
            tasks=("niah_single_1", "fwe"),
            lengths=(1000,),
            ratios=(1.0, 0.1),
            topks=(16,),
            samples=2,
            haystack="noise",
            dtype="float32",
        )
