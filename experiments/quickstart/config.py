"""What a run measures and how much of it: presets for a CPU, an accelerator, and a test of seconds.

No import of JAX here: the command line is read before JAX looks for devices.
"""

import dataclasses
from typing import Self

from jaxtopk.evaluation.tasks import JsonKeyValue, NeedleInHaystack, Task

RATIOS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """One run. Full attention is always measured beside the ratios.

    Raises:
      ValueError: a number is out of its range; names it.
    """

    model: str = "smollm2-135m"  # as `load_pretrained` takes it, or "random": a tiny model with random weights
    contexts: tuple[int, ...] = (1024,)  # tokens of the prompt
    ratios: tuple[float, ...] = (
        RATIOS  # `topk_ratio` of each setting; 1.0 is the control that must equal full attention
    )
    sparse_suffix: int = 1  # last prompt tokens that go through Top-k rows; the others are prefilled with full attention
    windows: int = 4  # pieces of text whose continuation is scored
    scored_tokens: int = 24  # of each window, decoded one by one
    samples: int = 6  # of each task
    tasks: tuple[Task, ...] = (
        NeedleInHaystack(fill=False),
        JsonKeyValue(entries="words", fill=False),
    )
    reply_tokens: int = 9  # longest reply to a task
    shown_tokens: int = 16  # of the example completions, after the first window
    batch: int = 4  # windows or samples at a time; each takes one row a setting
    timed_steps: int = 10  # decode steps of one timing
    timed_rounds: int = 3  # timings of each setting, taken in turn; the median counts
    dtype: str = "float32"  # of quality: the control is compared to 1e-5
    timing_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "sparse_suffix", "windows", "scored_tokens", "samples", "reply_tokens", "shown_tokens", "batch", "timed_steps",
            "timed_rounds",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if not self.contexts or min(self.contexts) <= self.sparse_suffix:
            raise ValueError(
                f"contexts: got {self.contexts}, wanted lengths above sparse_suffix = {self.sparse_suffix}"
            )
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios: got {self.ratios}, wanted numbers in (0, 1]")
        if self.ratios[0] != 1.0 or len(set(self.ratios)) != len(self.ratios):
            raise ValueError(
                f"ratios: got {self.ratios}, wanted 1.0 first, the control, and each once"
            )

    @property
    def room(self) -> int:
        """Tokens that a cache holds beside the prompt; one number for all uses, so that they share compilations."""
        return max(self.scored_tokens + self.shown_tokens, self.reply_tokens, self.timed_steps) + 1

    @classmethod
    def cpu(cls) -> Self:
        """Two cores, three minutes."""
        return cls()

    @classmethod
    def gpu(cls) -> Self:
        """One accelerator: longer contexts, enough samples for narrow intervals, timings in bfloat16."""
        return cls(
            contexts=(2048, 8000),
            windows=32,
            scored_tokens=96,
            samples=80,
            shown_tokens=48,
            timed_steps=64,
            timed_rounds=9,
            timing_dtype="bfloat16",
        )

    @classmethod
    def tiny(cls) -> Self:
        """Random weights and made-up text: shows that everything runs, in seconds, and nothing about quality."""
        return cls(
            model="random",
            contexts=(384,),
            ratios=(1.0, 0.25, 0.05),
            windows=2,
            scored_tokens=4,
            samples=2,
            tasks=(
                NeedleInHaystack(digits=3, fill=False),
                JsonKeyValue(entries="words", digits=3, fill=False),
            ),
            reply_tokens=3,
            shown_tokens=4,
            batch=2,
            timed_steps=2,
            timed_rounds=2,
        )
