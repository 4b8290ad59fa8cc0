"""What every workload is: one op at one size, with its inputs, its least bytes and operations, and what a right result is."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

type Arrays = tuple[jax.Array, ...]

_SHORTEST = 1024  # of a ragged batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload(abc.ABC):
    """One op at one size.

    Args:
      topk: keys kept by each row.
      group: of `config.GROUPS`: "main", or how it differs from a main one.
      pattern: how the inputs are drawn, or "ragged": drawn at random, with lengths spread evenly in the logarithm.
      target_ms: what is wanted of the best implementation on an NVIDIA H200.
    """

    op: ClassVar[str]
    topk: int
    group: str = "main"
    pattern: str = "random"
    target_ms: float | None = None

    @property
    @abc.abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Sizes by the letters of the op's docstring; the first one counts rows or sequences, S the keys of each."""

    @property
    def name(self) -> str:
        """Sizes, budget and pattern, as tables and `--only` have them."""
        parts = [f"{letter} {size}" for letter, size in self.sizes.items()]
        return ", ".join([*parts, f"k {self.topk}", *self._pattern_word()])

    @property
    @abc.abstractmethod
    def least_bytes(self) -> int:
        """Bytes that any implementation has to read; results are small beside them and are not counted."""

    @property
    def least_flops(self) -> int:
        """Operations of matrix products that any implementation has to make; causal halves are not counted."""
        return 0

    def limit_ms(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Returns the larger of the times that the bytes and the operations take [ms]."""
        return 1e3 * max(self.least_bytes / bytes_per_s, self.least_flops / flops_per_s)

    @property
    def lengths(self) -> np.ndarray:
        """Valid keys of each row or sequence, int32."""
        rows, longest = next(iter(self.sizes.values())), self.sizes["S"]
        if self.pattern != "ragged":
            return np.full(rows, longest, np.int32)
        return np.rint(np.geomspace(min(_SHORTEST, longest), longest, rows)).astype(np.int32)

    @property
    def all_valid(self) -> int:
        """Valid keys of all rows or sequences together."""
        return int(self.lengths.sum())

    @property
    def kept(self) -> np.ndarray:
        """Keys that a row of each sequence keeps, int32."""
        return np.minimum(self.lengths, self.topk)

    @property
    def all_kept(self) -> int:
        """Keys that a row of each sequence keeps, together."""
        return int(self.kept.sum())

    @abc.abstractmethod
    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns the arguments of `count` calls."""

    @abc.abstractmethod
    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the op as a function of the arguments drawn."""

    @abc.abstractmethod
    def check(self, arguments: Arrays, result: Any) -> None:
        """Raises AssertionError where the op's result is not right."""

    def check_of(self, implementation: str, arguments: Arrays, result: Any) -> None:
        """Raises AssertionError where the result is not right, or not what this implementation has to give."""
        del implementation
        self.check(arguments, result)

    def _pattern_word(self) -> tuple[str, ...]:
        return () if self.pattern == "random" else (self.pattern,)


def keys_of(seed: int, count: int) -> jax.Array:
    """Returns random keys of the device's own generator, which fills gigabytes, and compiles, faster than the default one."""
    return jax.random.split(jax.random.key(seed, impl="rbg"), count)
