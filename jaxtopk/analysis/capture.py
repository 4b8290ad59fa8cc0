"""What each decode row attended to: measured inside the model, layer by layer, by way of `DecoderLM.decode_captured`."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jaxtopk.analysis.online_entropy import EntropyPartials, entropy_partials
from jaxtopk.attention.base import AttentionStrategy, Index
from jaxtopk.attention.full import FullAttention
from jaxtopk.attention.topk import TopKAttention


class RowStatistics(NamedTuple):
    """Of one decode row a sequence, in every head.

    mass: share of the full softmax that lies on the attended keys, exp(lse_attended - lse_full); 1 where all are attended.
    attended: keys in the softmax.
    visible: keys there were to choose from.
    entropy: of the full softmax over them [nats]; from scores that the mass of a sparse row needs anyway. A compiled step
      that drops it does not compute it.
    """

    mass: Float32[Array, "B N"]
    attended: Int32[Array, "B N"]
    visible: Int32[Array, "B N"]
    entropy: Float32[Array, "B N"]


def attend_with_statistics(
    strategy: AttentionStrategy,
    query: Float[Array, "B N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    lengths: Int32[Array, "B"],
    window: int | None,
    index: Index | None = None,
) -> tuple[Float[Array, "B N V"], RowStatistics]:
    """Attends as the strategy does, and measures each row's entropy and kept mass; scores once more to know all there is.

    Dropping keys of mass 1 - a costs KL(sparse || full) = -ln a. To be passed to `DecoderLM.decode_captured`.

    Raises:
      ValueError: the strategy is not one whose decode rows are full or exact Top-k.
    """
    del index  # of strategies that are refused below
    b, n, h = query.shape
    counts = lengths if window is None else jnp.minimum(lengths, window)
    visible = jnp.broadcast_to(counts[:, None], (b, n))
    if not isinstance(strategy, FullAttention | TopKAttention):
        raise ValueError(
            f"strategy: got {type(strategy).__name__}, wanted FullAttention or TopKAttention"
        )
    full = _full_softmax(query, key, lengths, counts)
    if isinstance(strategy, FullAttention):
        out = strategy.decode(query, key, value, lengths=lengths, window=window)
        mass = (visible > 0).astype(jnp.float32)
        return out, RowStatistics(mass, visible, visible, full.entropy)
    out, residuals = strategy.decode_with_residuals(
        query, key, value, lengths=lengths, window=window
    )
    # The two sums are rounded apart from each other: a row that keeps all may come out a hair above 1.
    mass = jnp.where(visible > 0, jnp.minimum(jnp.exp(residuals.lse - full.lse), 1.0), 0.0)
    return out, RowStatistics(mass, residuals.selection.count, visible, full.entropy)


def _full_softmax(query, key, lengths, counts) -> EntropyPartials:
    """Returns the sums of each row's [B, N] softmax over the last `counts` of its `lengths` keys."""
    b, n, h = query.shape
    _, s, k, _ = key.shape
    scores = h**-0.5 * jnp.einsum(
        "bkgh,bskh->bkgs",
        query.reshape(b, k, n // k, h),
        key,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).reshape(b, n, s)
    index = jnp.arange(s, dtype=jnp.int32)[None, :]
    seen = (index < lengths[:, None]) & (index >= (lengths - counts)[:, None])
    return entropy_partials(scores, seen[:, None])
