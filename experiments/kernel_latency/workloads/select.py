"""Selection from scores that are there already."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from experiments.kernel_latency import oracles
from experiments.kernel_latency.workloads.base import Arrays, Workload, keys_of
from pallas_kernels import topk_select


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select(Workload):
    """`topk_select` of float32 rows with their lists."""

    op: ClassVar[str] = "topk_select"
    rows: int
    keys: int

    @property
    def sizes(self) -> Mapping[str, int]:
        """Rows and keys of each."""
        return {"R": self.rows, "S": self.keys}

    @property
    def least_bytes(self) -> int:
        """One read of the valid scores."""
        return 4 * self.all_valid

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (scores, lengths) of each call; scores beyond a length are -inf, for peers that know no lengths."""
        lengths = jnp.asarray(self.lengths)
        draw = jax.jit(functools.partial(_scores, self))
        return [(draw(key, lengths), jnp.asarray(self.lengths)) for key in keys_of(seed, count)]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the selection with its list."""
        return lambda scores, lengths: topk_select(
            scores, self.topk, lengths=lengths, implementation=implementation
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks every field exactly."""
        scores, lengths = arguments
        oracles.assert_selected(scores, lengths, self.topk, result)

    def check_list(self, arguments: Arrays, indices) -> None:
        """Checks a peer's list, which may come in any order."""
        oracles.assert_largest(arguments[0], indices)


def _scores(workload: Select, key, lengths):
    """Draws scores [R, S] of the workload's pattern."""
    shape = workload.rows, workload.keys
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    normal = jax.random.normal(key, shape, jnp.float32)
    match workload.pattern:
        case "relu plateau":
            # Fewer positive scores than are wanted: the last places are among equals, at 0.
            share = workload.topk / (2 * workload.keys)
            positive = jax.random.uniform(jax.random.fold_in(key, 1), shape) < share
            normal = jnp.where(positive, jnp.abs(normal), jnp.float32(0))
        case "recent span":  # all the best keys are neighbours, which misleads whoever samples
            recent = place >= workload.keys - 2 * workload.topk
            normal = jnp.where(recent, 8 + normal, normal)
    return jnp.where(place < lengths[:, None], normal, -jnp.inf)
