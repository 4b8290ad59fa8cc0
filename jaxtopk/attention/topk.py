"""Exact Top-k attention: each row attends to its k best keys, in decoding and, where asked, in every row."""

import dataclasses
from typing import Literal, cast

import jax
import jax.numpy as jnp

import pallas_kernels
from jaxtopk.attention.sparse import SparseAttention
from pallas_kernels import Implementation, budget_from_ratio
from pallas_kernels.core.selection import row_budget


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TopKAttention(SparseAttention):
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
      implementation: which kernels; None takes the platform's own.
    """

    topk: int | tuple[int, ...] | None = None
    topk_ratio: float | tuple[float, ...] | None = None
    min_topk: int = 1
    scope: Literal["head", "group", "layer"] = "head"
    pooling: Literal["prob_sum", "prob_max", "score_mean", "score_max"] = "prob_sum"
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
            self._check_topk(topk)
        for ratio in _each(self.topk_ratio):
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
                raise ValueError(
                    f"TopKAttention: topk_ratio got {ratio!r}, wanted a number in (0, 1]"
                )
        if self.min_topk < 1:
            raise ValueError(f"TopKAttention: min_topk got {self.min_topk}, wanted at least 1")
        super().__post_init__()
        self._check_choice("scope", ("head", "group", "layer"))
        self._check_choice("pooling", ("prob_sum", "prob_max", "score_mean", "score_max"))

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
        index=None,
    ):
        """See `AttentionStrategy.attend`: every row keeps its own budget of keys."""
        del index
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

    def decode(self, query, key, value, *, lengths, scale=None, window=None, index=None):
        """See `AttentionStrategy.decode`."""
        del index
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
