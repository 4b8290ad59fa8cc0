"""Indexer attention: each row attends to the keys that a small scorer of its own ranks highest, one set for all heads."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels
from jaxtopk.attention.base import Index
from jaxtopk.attention.full import FullAttention
from jaxtopk.attention.sparse import SparseAttention
from pallas_kernels import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class IndexerAttention(SparseAttention):
    """Softmax over the `topk` keys with the largest indexer scores, renormalised; all heads of a layer share them.

    The scores are those of `pallas_kernels.indexer_scores`, from the model's own indexer (`DecoderLM.with_indexer`). A row
    reads one small index key for each key it may see, then `topk` whole keys and values: where the keys are many, far less
    than their number. A row that sees no more than `topk` keys keeps them all. In a whole-sequence call every row is sparse,
    and gradients flow through the attended keys, none through the choice.

    Source: DeepSeek Sparse Attention, arXiv:2512.02556.

    Args:
      topk: keys a row keeps.
      implementation: which kernels; None takes the platform's own.
    """

    topk: int
    implementation: Implementation = None

    def __post_init__(self):
        super().__post_init__()
        self._check_topk(self.topk)

    @property
    def needs_index(self):
        """Whether it is to be given an `Index`: always."""
        return True

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
        """See `AttentionStrategy.attend`.

        Raises:
          NotImplementedError: rows see less than all keys before them, by `segment_ids` or `window`; the indexer's kernels
            know neither for whole sequences.
        """
        index = self._given(index)
        s = key.shape[1]
        if segment_ids is not None:
            raise NotImplementedError(
                "IndexerAttention: segment_ids got packed documents, wanted None for whole sequences"
            )
        if window is not None and window < s:
            raise NotImplementedError(
                f"IndexerAttention: window got {window}, wanted None or at least the {s} keys of a whole sequence"
            )
        indices = self._select(index, s, lengths=lengths)
        # Kept for the backward pass: selecting again is dear, and may come out otherwise.
        indices = checkpoint_name(indices, "index_selection")
        out = self._gather(query, key, value, indices, scale)
        if sparse_rows is None:
            return out
        dense = FullAttention().attend(query, key, value, scale=scale, lengths=lengths)
        return jnp.where(sparse_rows[..., None, None], out, dense)

    def decode(self, query, key, value, *, lengths, scale=None, window=None, index=None):
        """See `AttentionStrategy.decode`."""
        index = self._given(index)
        s = key.shape[1]
        first = None
        if window is not None and window < s:
            # The keys in sight, cut out of the cache; shorter sequences have theirs at its beginning.
            first = jnp.clip(lengths - window, 0, s - window)
            cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, window))
            index = index._replace(key=cut(index.key, first))
            lengths, s = lengths - first, window
        index = index._replace(query=index.query[:, None], head_weights=index.head_weights[:, None])
        indices = self._select(index, s, lengths=lengths)
        if first is not None:
            indices = jnp.where(indices >= 0, indices + first[:, None, None], -1)
        return self._gather(query[:, None], key, value, indices, scale)[:, 0]

    def _given(self, index: Index | None) -> Index:
        if index is None:
            raise ValueError(
                "IndexerAttention: got no index, wanted a model with indexer parameters (DecoderLM.with_indexer adds them)"
            )
        return index

    def _select(self, index: Index, num_keys: int, *, lengths):
        """Returns int32 [B, T, topk or all keys], -1 at the tail."""
        selection = pallas_kernels.indexer_select(
            index.query,
            index.key,
            index.head_weights,
            topk=min(self.topk, num_keys),
            lengths=lengths,
            implementation=self.implementation,
        )
        return cast(jax.Array, selection.indices)  # None only where no list is asked for

    def _gather(self, query, key, value, indices, scale):
        out = pallas_kernels.gather_attention(
            query, key, value, indices[:, :, None], scale=scale, implementation=self.implementation
        )
        return cast(jax.Array, out)  # a pair only with residuals
