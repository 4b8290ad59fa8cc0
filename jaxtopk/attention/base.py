"""What a model asks of an attention strategy: whole sequences, one decoded row, and which layers and prompt rows it exempts.

A strategy is frozen configuration, hashable and static under `jit`; it holds no arrays. Models know strategies, and only
strategies call kernels.
"""

import abc
import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Float32, Int32


class Index(NamedTuple):
    """What a model's lightning indexer says of the rows and the keys at hand: I heads of size J, positions already encoded.

    query: [B, T, I, J] of whole sequences; [B, I, J] of one decoded row a sequence.
    key: [B, S, J], one for all heads, in the order of the attention's own keys.
    head_weights: [B, T, I], or [B, I]; scales included.
    """

    query: Float[Array, "B *T I J"]
    key: Float[Array, "B S J"]
    head_weights: Float32[Array, "B *T I"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionStrategy(abc.ABC):
    """How the layers of a decoder attend. B batch, T rows, S keys, N query heads, K key/value heads, H head size."""

    @abc.abstractmethod
    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        *,
        scale: float | None = None,
        window: int | None = None,
        lengths: Int32[Array, "B"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        sparse_rows: Bool[Array, "B T"] | None = None,
        index: Index | None = None,
    ) -> Float[Array, "B T N V"]:
        """Attends the causal rows of whole sequences: training, scoring and prefill.

        Args:
          query, key, value: RoPE already applied; the last query is aligned with the last key.
          scale: None means H ** -0.5.
          window: rows see only their last `window` keys, themselves included.
          lengths: valid keys of each sequence; None means all. Where T == S, rows past them are garbage, but finite.
          segment_ids: documents of a packed batch (T == S); rows see their own document only.
          sparse_rows: False where a row is to be dense whatever the strategy; None means the strategy's rule everywhere.
          index: where `needs_index`, what the model's indexer says of these rows and keys.
        """

    @abc.abstractmethod
    def decode(
        self,
        query: Float[Array, "B N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        *,
        lengths: Int32[Array, "B"],
        scale: float | None = None,
        window: int | None = None,
        index: Index | None = None,
    ) -> Float[Array, "B N V"]:
        """Attends one new row a sequence to the first `lengths` keys of its cache, its own key being the last of them."""

    def layer(self, index: int, num_layers: int) -> "AttentionStrategy":
        """Returns what layer `index` runs: by default the same in all layers."""
        del index, num_layers
        return self

    def prefill_strategy(self) -> "AttentionStrategy":
        """Returns the attention of the prompt's rows; the last `suffix_tokens` of them are decoded instead."""
        return self

    @property
    def needs_index(self) -> bool:
        """Whether it chooses keys by an `Index`, so that the model has to have an indexer."""
        return False

    @property
    def suffix_tokens(self) -> int:
        """How many last prompt tokens go through `decode` after the prefill."""
        return 0

    def replace(self, **changes) -> "AttentionStrategy":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)
