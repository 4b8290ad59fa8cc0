"""Attention and output entropy of every row of a model on given tokens: measured layer by layer, inside the model."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxtopk.analysis.entropy import RowEntropy, attention_entropy, check_topks
from jaxtopk.analysis.online_entropy import entropy_partials
from jaxtopk.models.decoder_lm.modeling import DecoderLM

_LOGIT_BYTES = 2**26  # float32 logits of the rows whose output is measured side by side


class TokenAnalysis(NamedTuple):
    """What a model did at each token.

    rows: attention, arrays [layer, sequence, head, token]; `visible` is [layer, sequence, token].
    output_entropy: of the distribution of the next token [nats], at most ln V.
    """

    rows: RowEntropy
    output_entropy: Float32[Array, "B T"]


def analyze_tokens(
    model: DecoderLM,
    tokens: Int[Array, "B T"],
    *,
    topks: Sequence[int] = (),
    lengths: Int32[Array, "B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    sparse_rows: Bool[Array, "B T"] | None = None,
) -> TokenAnalysis:
    """Runs the model over whole sequences, under its own strategy, and measures every row of every head.

    The residual stream is the strategy's: each layer reads what sparse layers below it wrote. What is measured at a row is
    the full softmax over its visible keys, the mass of its best keys, and what the strategy attends to. Compiled once for
    each shape, strategy and `topks`.

    Args:
      model: any strategy; every row is one of `strategy.attend`.
      topks: sizes of the sets of best keys.
      lengths: valid tokens of right-padded sequences; None means all. Rows past them are to be dropped.
      segment_ids: documents packed into a row; a token sees its own document only.
      sparse_rows: False where the strategy leaves a row dense; None means its rule everywhere.

    Raises:
      ValueError: tokens of another shape, more of them than the model's context, or a topk below 1.
    """
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens: got shape {list(tokens.shape)}, wanted [B, T], both at least 1")
    if tokens.shape[1] > model.config.max_positions:
        raise ValueError(
            f"tokens: got {tokens.shape[1]} a row, wanted at most the model's context of {model.config.max_positions}"
        )
    return _analyze(
        model,
        jnp.asarray(tokens, jnp.int32),
        lengths,
        segment_ids,
        sparse_rows,
        topks=tuple(check_topks(topks)),
    )


@functools.partial(jax.jit, static_argnames="topks")
def _analyze(model, tokens, lengths, segment_ids, sparse_rows, *, topks) -> TokenAnalysis:
    def attend(strategy, query, key, value, *, window, segment_ids, sparse_rows):
        common = {"window": window, "lengths": lengths, "sparse_rows": sparse_rows}
        out = strategy.attend(query, key, value, segment_ids=segment_ids, **common)
        found = attention_entropy(
            query,
            key,
            topks=topks,
            strategy=strategy,
            query_segment_ids=segment_ids,
            key_segment_ids=segment_ids,
            **common,
        )
        return out, found

    hidden, rows = model.hidden_captured(
        tokens, attend, segment_ids=segment_ids, sparse_rows=sparse_rows
    )
    return TokenAnalysis(rows, output_entropy(model, hidden))


def output_entropy(model: DecoderLM, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T"]:
    """Returns the entropy of the next token's distribution at each row [nats], a few rows' logits at a time.

    Args:
      hidden: the residual stream that `DecoderLM.hidden` returned.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    at_once = max(1, _LOGIT_BYTES // (4 * model.config.vocab_size))
    entropy = jax.lax.map(
        lambda row: token_entropy(model.head(row)), rows, batch_size=min(at_once, rows.shape[0])
    )
    return entropy.reshape(hidden.shape[:-1])


def token_entropy(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Returns the entropy of softmax(logits) [nats]."""
    return entropy_partials(logits).entropy


__all__ = ["TokenAnalysis", "analyze_tokens", "output_entropy", "token_entropy"]
