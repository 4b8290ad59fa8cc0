"""Selection by a lightning indexer: one row of each sequence, alone and with the attention that follows, and whole prompts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_latency import oracles
from experiments.kernel_latency.workloads.attention import CacheWorkload, attend_to_listed
from experiments.kernel_latency.workloads.base import Arrays, Workload, keys_of
from pallas_kernels import TopKSelection, indexer_select
from pallas_kernels.tuning.shapes import IndexSizes

_CHECKED_ROWS = 64  # of a prefill
_SLACK = 1e-3  # standard deviations by which two float32 routines' scores may differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexWorkload(IndexSizes, Workload):
    """`indexer_select`, bfloat16; what is said of bytes and operations holds for one row of each sequence."""

    @property
    def least_bytes(self) -> int:
        """One read of the valid keys."""
        return 2 * self.index_size * self.all_valid

    @property
    def least_flops(self) -> int:
        """Products of all index heads with all valid keys."""
        return 2 * self.index_heads * self.index_size * self.all_valid

    def index_inputs(self, key: jax.Array, *, rows: int) -> Arrays:
        """Draws index_query [B, T, I, D] and index_key [B, S, D], bfloat16, and head_weights [B, T, I], float32, above 0."""
        query, keys, weights = self.index_shapes(rows)
        one, two, three = jax.random.split(key, 3)
        scaled = self.index_size**-0.5 * jax.random.normal(one, query, jnp.bfloat16)
        above_0 = jnp.abs(jax.random.normal(three, weights, jnp.float32))
        return (
            scaled,
            jax.random.normal(two, keys, jnp.bfloat16),
            self.index_heads**-0.5 * above_0,
        )

    def select(
        self, index_query, index_key, head_weights, lengths, implementation: str
    ) -> TopKSelection:
        """Returns the selection, with its list, of one row of each sequence."""
        return indexer_select(
            index_query,
            index_key,
            head_weights,
            topk=self.topk,
            causal=False,
            lengths=lengths,
            implementation=implementation,
        )

    def oracle_scores(self, index_query, index_key, head_weights, lengths) -> Arrays:
        """Returns the scores of one row of each sequence, and which are of valid keys, [B, S] both."""
        scores = [
            oracles.indexer_scores(q, k, w)
            for q, k, w in zip(index_query, index_key, head_weights, strict=True)
        ]
        visible = jnp.arange(self.keys, dtype=jnp.int32)[None] < lengths[:, None]
        return jnp.concatenate(scores), visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerDecode(IndexWorkload):
    """`indexer_select` of one row of each sequence."""

    op: ClassVar[str] = "indexer_select"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences, rows and keys of each."""
        return {"B": self.batch, "T": 1, "S": self.keys}

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (index_query, index_key, head_weights, lengths) of each call."""
        return [
            (*self.index_inputs(key, rows=1), jnp.asarray(self.lengths))
            for key in keys_of(seed, count)
        ]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the selection with its list."""
        return lambda index_query, index_key, head_weights, lengths: self.select(
            index_query, index_key, head_weights, lengths, implementation
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks that clearly larger keys are in and clearly smaller ones out."""
        self.check_list(arguments, result.indices[:, 0], count=result.count[:, 0])

    def check_list(self, arguments: Arrays, indices, *, count=None, slack: float = _SLACK) -> None:
        """Checks lists [B, k] in any order."""
        scores, visible = self.oracle_scores(*arguments)
        oracles.assert_nearly_selected(scores, visible, self.topk, count, indices, slack=slack)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerPrefill(IndexWorkload):
    """`indexer_select` of all rows of one prompt, causal."""

    op: ClassVar[str] = "indexer_select"
    batch: int = 1

    @property
    def sizes(self) -> Mapping[str, int]:
        """One sequence, as many rows as keys."""
        return {"B": self.batch, "T": self.keys, "S": self.keys}

    @property
    def least_bytes(self) -> int:
        """One read of queries and keys."""
        return 2 * self.index_size * self.keys * (self.index_heads + 1)

    @property
    def least_flops(self) -> int:
        """Products of all index heads with the keys up to each row: half of the square."""
        return self.index_heads * self.index_size * self.keys**2

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (index_query, index_key, head_weights) of each call."""
        return [self.index_inputs(key, rows=self.keys) for key in keys_of(seed, count)]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the selection with its list."""
        return lambda index_query, index_key, head_weights: indexer_select(
            index_query, index_key, head_weights, topk=self.topk, implementation=implementation
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks some rows, the first and the last among them."""
        index_query, index_key, head_weights = arguments
        rows = np.unique(np.linspace(0, self.keys - 1, min(_CHECKED_ROWS, self.keys)).astype(int))
        part = jnp.asarray(rows, jnp.int32)
        scores = oracles.indexer_scores(index_query[0, part], index_key[0], head_weights[0, part])
        visible = jnp.arange(self.keys, dtype=jnp.int32)[None] <= part[:, None]
        oracles.assert_nearly_selected(
            scores,
            visible,
            self.topk,
            result.count[0, part],
            result.indices[0, part],
            slack=_SLACK,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerThenGather(IndexWorkload, CacheWorkload):
    """A whole decode step of indexed attention: `indexer_select`, then `gather_attention` of all heads to its list."""

    op: ClassVar[str] = "indexer_select + gather_attention"

    @property
    def least_bytes(self) -> int:
        """The valid index keys, and keys and values of all heads at the listed places."""
        return super().least_bytes + 2 * 2 * self.head_size * self.all_kept * self.kv_heads

    # `least_flops` are those of the indexer; those of attention are few beside them.

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (index_query, index_key, head_weights, query, key, value, lengths) of each call."""
        return [
            (
                *self.index_inputs(key, rows=1),
                *self.query_key_value(jax.random.fold_in(key, 1)),
                jnp.asarray(self.lengths),
            )
            for key in keys_of(seed, count)
        ]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output; both ops run the same implementation."""

        def step(index_query, index_key, head_weights, query, key, value, lengths):
            chosen = self.select(index_query, index_key, head_weights, lengths, implementation)
            assert chosen.indices is not None  # a list was asked for
            indices = chosen.indices[:, :, None]
            return attend_to_listed(
                query, key, value, indices, lengths=lengths, implementation=implementation
            )

        return step

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row; lists of a ragged batch are checked where they are whole."""
        index_query, index_key, head_weights, query, key, value, lengths = arguments
        scores, visible = self.oracle_scores(index_query, index_key, head_weights, lengths)
        places = jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), self.topk)[1][:, None]
        part = jnp.asarray(np.flatnonzero(self.kept == self.topk))
        want = oracles.listed_attention(query[part], key[part], value[part], places[part])
        oracles.assert_rows_close(jnp.asarray(result)[part], want, topk=self.topk)

    def check_full(self, arguments: Arrays, out) -> None:
        """Checks a peer that attends to all keys."""
        want = oracles.attention(*arguments[3:], topk=None)
        oracles.assert_rows_close(out, want, topk=self.keys, rounding=0.03)
