"""Exact Top-k attention: each row attends to its k best keys, in decoding and, where asked, in every row."""

import dataclasses
from typing import Literal, cast

import jax
import jax.numpy as jnp

import pallas_kernels
from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.attention.full import FullAttention
from pallas_kernels import Implementation, budget_from_ratio
from pallas_kernels.core.selection import row_budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKAttention(AttentionStrategy):
    """Softmax over the `topk` best keys of each row, renormalised.

    Source: arXiv:2512.03494. Exactly one of `topk` and `topk_ratio` is given. In a whole-sequence call (training, scoring)
    every row is sparse; in generation, prompt rows follow `prefill`.

    Args:
      topk: keys a row keeps; a tuple gives one budget to each sequence of a batch.
      topk_ratio: share of the visible keys a row keeps, clip(ceil(ratio * visible), min_topk, visible), in (0, 1]; a tuple
        gives one share to each sequence of a batch. Generated tokens count, so the budget grows while decoding.
      min_topk: the least a ratio keeps.
      scope: "head", "group" or "layer": which heads share one set.
      pooling: how a shared scope ranks its keys.
      prefill: "full" leaves prompt rows dense, "topk" makes them sparse too.
      sparse_suffix: how many last prompt tokens go through Top-k rows even when the prefill is full; with 0 the first new
        token comes from a dense row.
      layers: the layers that are sparse; None means all. The others run full attention.
      implementation: which kernels; None takes the platform's own.
    """

    topk: int | tuple[int, ...] | None = None
    topk_ratio: float | tuple[float, ...] | None = None
    min_topk: int = 1
    scope: Literal["head", "group", "layer"] = "head"
    pooling: Literal["prob_sum", "prob_max", "score_mean", "score_max"] = "prob_sum"
    prefill: Literal["full", "topk"] = "full"
    sparse_suffix: int = 1
    layers: tuple[int, ...] | None = None
    implementation: Implementation = None

    def __post_init__(self):
        if (self.topk is None) == (self.topk_ratio is None):
            raise ValueError(
                f"TopKAttention: got topk {self.topk} and topk_ratio {self.topk_ratio}, wanted exactly one of them"
            )
        for name in ("topk", "topk_ratio"):
            if getattr(self, name) == ():
                raise ValueError(f"TopKAttention: {name} got (), wanted at least one budget")
        for topk in _each(self.topk):
            if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk < 2**31:
                raise ValueError(
                    f"TopKAttention: topk got {topk!r}, wanted an int >= 1 and below 2**31"
                )
        for ratio in _each(self.topk_ratio):
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
                raise ValueError(
                    f"TopKAttention: topk_ratio got {ratio!r}, wanted a number in (0, 1]"
                )
        if self.min_topk < 1:
            raise ValueError(f"TopKAttention: min_topk got {self.min_topk}, wanted at least 1")
        if self.sparse_suffix < 0:
            raise ValueError(
                f"TopKAttention: sparse_suffix got {self.sparse_suffix}, wanted at least 0"
            )
        for name, wanted in (
            ("scope", ("head", "group", "layer")),
            ("pooling", ("prob_sum", "prob_max", "score_mean", "score_max")),
            ("prefill", ("full", "topk")),
        ):
            if (got := getattr(self, name)) not in wanted:
                raise ValueError(
                    f"TopKAttention: {name} got {got!r}, wanted one of {', '.join(map(repr, wanted))}"
                )

    def attend(
        self,
        query,
        key,
        value,
        *,
        scale=None,
        window=None,
        lengths=None,
        segment_ids=None,
        sparse_rows=None,
    ):
        """See `AttentionStrategy.attend`: every row keeps its own budget of keys."""
        if isinstance(self.topk_ratio, tuple):
            raise ValueError(
                f"TopKAttention: topk_ratio got {self.topk_ratio} for whole sequences, wanted one number (tuples are for decoding)"
            )
        out = pallas_kernels.topk_attention(
            query,
            key,
            value,
            topk=self._per_row(self.topk, query.shape[0]),
            topk_ratio=self.topk_ratio,
            min_topk=self.min_topk,
            causal=True,
            lengths=lengths,
            query_segment_ids=segment_ids,
            key_segment_ids=segment_ids,
            scope=self.scope,
            pooling=self.pooling,
            window=window,
            dense_rows=None if sparse_rows is None else ~sparse_rows,
            scale=scale,
            implementation=self.implementation,
        )
        return cast(jax.Array, out)  # a pair only with residuals

    def budget(self, visible, *, sparse_rows=None):
        """Returns how many of its visible keys each row of whole sequences keeps, int32 [B, T] from int32 [B, T]."""
        return row_budget(
            visible,
            self._per_row(self.topk, visible.shape[0]),
            cast("float | None", self.topk_ratio),  # `attend` refuses a tuple
            self.min_topk,
            None if sparse_rows is None else ~sparse_rows,
        )

    def decode(self, query, key, value, *, lengths, scale=None, window=None):
        """See `AttentionStrategy.decode`."""
        out = self._decode(query, key, value, lengths, scale, window, return_residuals=False)
        return cast(jax.Array, out)  # a pair only with residuals

    def decode_with_residuals(
        self, query, key, value, *, lengths, scale=None, window=None
    ) -> tuple[jax.Array, pallas_kernels.TopKDecodeResiduals]:
        """Returns what `decode` returns and the `TopKDecodeResiduals` of the rows: what was kept, and its log-sum-exp."""
        found = self._decode(query, key, value, lengths, scale, window, return_residuals=True)
        return cast("tuple[jax.Array, pallas_kernels.TopKDecodeResiduals]", found)

    def _decode(self, query, key, value, lengths, scale, window, *, return_residuals):
        batch = query.shape[0]
        topk = self._per_row(self.topk, batch)
        if topk is None:
            visible = lengths if window is None else jnp.minimum(lengths, window)
            ratios = _each(self.topk_ratio)
            self._check_batch(len(ratios), batch)
            budgets = [budget_from_ratio(visible, ratio, self.min_topk) for ratio in ratios]
            rows = jnp.arange(batch) % len(ratios)
            # A row without keys keeps nothing whatever its budget, but budgets start at 1.
            topk = jnp.maximum(jnp.stack(budgets)[rows, jnp.arange(batch)], 1)[:, None]
        return pallas_kernels.topk_decode_attention(
            query,
            key,
            value,
            topk=topk,
            lengths=lengths,
            scope=self.scope,
            pooling=self.pooling,
            window=window,
            scale=scale,
            implementation=self.implementation,
            return_residuals=return_residuals,
        )

    def layer(self, index, num_layers):
        """See `AttentionStrategy.layer`; refuses layers that the model does not have."""
        if self.layers is None:
            return self
        for wrong in (i for i in self.layers if not 0 <= i < num_layers):
            raise ValueError(f"TopKAttention: layers got {wrong}, wanted 0 to {num_layers - 1}")
        return dataclasses.replace(self, layers=None) if index in self.layers else FullAttention()

    def prefill_strategy(self):
        """See `AttentionStrategy.prefill_strategy`."""
        return FullAttention() if self.prefill == "full" else self

    @property
    def suffix_tokens(self):
        """Prompt tokens decoded after a full prefill; a sparse prefill needs none."""
        return self.sparse_suffix if self.prefill == "full" else 0

    def _check_batch(self, settings: int, batch: int) -> None:
        if batch % settings:
            raise ValueError(
                f"TopKAttention: got {settings} budgets for a batch of {batch}, wanted a divisor of the batch"
            )

    def _per_row(self, topk, batch: int):
        """Returns the fixed budget as the kernels take it; sequence b has budget b modulo the tuple's length."""
        if not isinstance(topk, tuple):
            return topk
        self._check_batch(len(topk), batch)
        return jnp.asarray(topk, jnp.int32)[jnp.arange(batch) % len(topk)][:, None]


def _each(value) -> tuple:
    return value if isinstance(value, tuple) else () if value is None else (value,)
