"""Measures pieces one after another: texts at every row, tasks only where they are answered."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from jaxtopk.analysis.analyze import analyze_reply, analyze_tokens
from jaxtopk.analysis.measured_rows import MeasuredRows
from jaxtopk.analysis.pieces import Piece
from jaxtopk.models.decoder_lm.modeling import DecoderLM

_LEAST_ROWS = 8


def measure(
    model: DecoderLM,
    pieces: Sequence[Piece],
    *,
    topks: Sequence[int] = (),
    ratios: Sequence[float] = (),
) -> Iterator[MeasuredRows]:
    """Yields the rows that count of each piece, in order, under the model's strategy.

    Sequences are padded to the longest of their kind, rows around a reply to a power of two, so that few programs serve all.

    Args:
      topks: sizes of the sets of best keys.
      ratios: sizes as shares of the visible keys; for pieces with a prompt.

    Raises:
      ValueError: `ratios` for a piece without a prompt.
    """
    width = {
        prompted: max(
            (len(piece.tokens) for piece in pieces if bool(piece.prompt_tokens) == prompted),
            default=0,
        )
        for prompted in (False, True)
    }
    for piece in pieces:
        if ratios and not piece.prompt_tokens:
            raise ValueError(
                f"ratios: got {tuple(ratios)} for {piece.group!r}, wanted none where there is no prompt"
            )
        size, padded = len(piece.tokens), width[bool(piece.prompt_tokens)]
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, :size] = piece.tokens
        measured = np.zeros((1, padded), bool)
        measured[0, :size] = piece.measured
        if not piece.prompt_tokens:
            lengths = jnp.asarray([size], jnp.int32)
            found = analyze_tokens(model, jnp.asarray(tokens), topks=topks, lengths=lengths)
            yield MeasuredRows.of(found, measured, topks)
            continue
        first = int(np.argmax(piece.measured))
        first = max(min(first, piece.prompt_tokens - model.attention.suffix_tokens), 0)
        num_rows = min(max(_LEAST_ROWS, 1 << (size - first - 1).bit_length()), padded)
        # A block that would reach past the end begins earlier instead.
        first = min(first, padded - num_rows)
        found = analyze_reply(
            model,
            jnp.asarray(tokens),
            prompt_tokens=[piece.prompt_tokens],
            first=[first],
            num_rows=num_rows,
            topks=topks,
            ratios=ratios,
        )
        yield MeasuredRows.of(found, measured[:, first : first + num_rows], topks, ratios)


__all__ = ["measure"]
