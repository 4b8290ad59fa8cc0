"""Attention and output entropy of a model's rows on given tokens, all of them or a reply's: measured inside the model."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxtopk.analysis.entropy import RowEntropy, attention_entropy, check_ratios, check_topks
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
    _check_tokens(model, tokens)
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
    def attend(strategy, query, key, value, *, window, segment_ids, sparse_rows, index=None):
        common = {"window": window, "lengths": lengths, "sparse_rows": sparse_rows}
        out = strategy.attend(query, key, value, segment_ids=segment_ids, index=index, **common)
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


def analyze_reply(
    model: DecoderLM,
    tokens: Int[Array, "B T"],
    *,
    prompt_tokens: Sequence[int],
    first: Sequence[int],
    num_rows: int,
    topks: Sequence[int] = (),
    ratios: Sequence[float] = (),
) -> TokenAnalysis:
    """Runs prompts and given replies as generation would, and measures only the rows around the replies.

    Prompt rows attend as `prefill_strategy` says, except for the last `suffix_tokens`; these and the reply's are rows of the
    strategy. What is measured is what `analyze_tokens` measures, at all of its rows.

    Args:
      model: any strategy.
      tokens: prompt, then reply, then padding of any kind.
      prompt_tokens: length of each prompt.
      first: of each sequence, the row that is row 0 of what is returned.
      num_rows: T of what is returned. Prompt and padding are measured along where there is no reply, to be dropped: a few
        sizes for many replies compile few times.
      topks: sizes of the sets of best keys.
      ratios: sizes as shares of the visible keys.

    Raises:
      ValueError: tokens as in `analyze_tokens`; not one number a sequence; rows past the end of the tokens; `first` after a
        row that is decoded.
    """
    _check_tokens(model, tokens)
    batch, length = tokens.shape
    if not 1 <= num_rows <= length:
        raise ValueError(f"num_rows: got {num_rows}, wanted 1 to the {length} tokens of a sequence")
    if len(prompt_tokens) != batch or len(first) != batch:
        raise ValueError(
            f"first: got {len(first)} numbers and {len(prompt_tokens)} prompt_tokens, wanted one for each of {batch} sequences"
        )
    suffix = model.attention.suffix_tokens
    for row, size in zip(first, prompt_tokens, strict=True):
        last = min(length - num_rows, max(size - suffix, 0))
        if not 0 <= row <= last:
            raise ValueError(
                f"first: got {row} for {size} prompt tokens, wanted 0 to {last}: {num_rows} rows that start no later than decoding"
            )
    return _analyze_reply(
        model,
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(first, jnp.int32),
        jnp.asarray([size - suffix for size in prompt_tokens], jnp.int32),
        num_rows=num_rows,
        topks=tuple(check_topks(topks)),
        ratios=tuple(check_ratios(ratios)),
    )


@functools.partial(jax.jit, static_argnames=("num_rows", "topks", "ratios"))
def _analyze_reply(
    model, tokens, first, first_decoded, *, num_rows, topks, ratios
) -> TokenAnalysis:
    length = tokens.shape[1]
    offset = jnp.arange(num_rows, dtype=jnp.int32)
    decoded = first[:, None] + offset[None] >= first_decoded[:, None]
    cut = jax.vmap(lambda x, start: lax.dynamic_slice_in_dim(x, start, num_rows, axis=0))
    paste = jax.vmap(lambda x, part, start: lax.dynamic_update_slice_in_dim(x, part, start, axis=0))
    # The rows' own keys last, as a measurement of few rows wants them; what comes after the rows turns up in front.
    turn = length - num_rows - first
    turned = jnp.arange(length, dtype=jnp.int32)[None] >= turn[:, None]

    def attend(strategy, query, key, value, *, window, **_):
        if strategy.needs_index:
            raise ValueError(
                f"model: got attention {strategy}, wanted full or Top-k attention to follow a reply"
            )
        prompt = strategy.prefill_strategy()
        out, rows = prompt.attend(query, key, value, window=window), cut(query, first)
        if prompt != strategy:

            def decode(row):
                query, offset = row
                return strategy.decode(query, key, value, lengths=first + offset + 1, window=window)

            found = jnp.moveaxis(lax.map(decode, (jnp.moveaxis(rows, 1, 0), offset)), 0, 1)
            found = jnp.where(decoded[:, :, None, None], found, cut(out, first))
            out = paste(out, found, first)
        measured = attention_entropy(
            rows,
            jax.vmap(functools.partial(jnp.roll, axis=0))(key, turn),
            topks=topks,
            ratios=ratios,
            strategy=strategy,
            window=window,
            query_segment_ids=jnp.ones_like(decoded, jnp.int32),
            key_segment_ids=turned.astype(jnp.int32),
            sparse_rows=None if prompt == strategy else decoded,
        )
        return out, measured

    hidden, rows = model.hidden_captured(tokens, attend)
    return TokenAnalysis(rows, output_entropy(model, cut(hidden, first)))


def _check_tokens(model: DecoderLM, tokens: Array) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens: got shape {list(tokens.shape)}, wanted [B, T], both at least 1")
    if tokens.shape[1] > model.config.max_positions:
        raise ValueError(
            f"tokens: got {tokens.shape[1]} a row, wanted at most the model's context of {model.config.max_positions}"
        )


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


__all__ = [
    "TokenAnalysis",
    "analyze_reply",
    "analyze_tokens",
    "output_entropy",
    "token_entropy",
]
