"""Entropy of a softmax in pieces: three sums a row that absorb keys in any order, and the exact merge of finished pieces.

With m the largest score of a piece, l = sum exp(s - m) and u = sum exp(s - m) (s - m):

    H = ln l - u / l    lse = m + ln l    moving m by d = m - m' <= 0:  u <- e^d (u + d l),  l <- e^d l

Only differences of scores enter, so a constant added to all of them changes nothing. A piece without keys has m = -inf,
l = 0, u = 0.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.core import online_softmax, precision


class EntropyPartials(NamedTuple):
    """The sums of one piece of a row; float32, or float64 where the scores are.

    m: largest score, -inf where there is no key.
    l: sum of exp(s - m), at least 1 where there is a key.
    u: sum of exp(s - m) (s - m), at most 0.
    """

    m: Float[Array, "..."]
    l: Float[Array, "..."]
    u: Float[Array, "..."]

    @property
    def entropy(self) -> Float[Array, "..."]:
        """Entropy of the softmax over the piece's keys [nats]; 0 for one key or none."""
        total = jnp.where(self.l == 0, 1, self.l)
        return jnp.log(total) - self.u / total

    @property
    def lse(self) -> Float[Array, "..."]:
        """Natural log-sum-exp of the piece's scores; -inf without keys."""
        return online_softmax.log_sum_exp(self.m, self.l)


def entropy_partials(
    scores: Float[Array, "... S"], kept: Bool[Array, "..."] | None = None
) -> EntropyPartials:
    """Returns the sums of a piece from its scores.

    Args:
      scores: attention scores or logits; bfloat16 and float16 are summed in float32.
      kept: broadcasts to `scores`; False where a key is not part of the row. None: all are. What is not kept, NaN included,
        adds nothing; nor do scores of -inf, whose weight is 0.
    """
    x = scores.astype(precision.accumulator(scores.dtype))
    if kept is not None:
        x = jnp.where(kept, x, -jnp.inf)
    m = jnp.max(x, axis=-1)
    below = x - online_softmax.finite_max(m)[..., None]
    weights = jnp.exp(below)
    weighted = weights * jnp.where(below == -jnp.inf, 0, below)  # 0 ln 0 is 0
    return EntropyPartials(m, jnp.sum(weights, axis=-1), jnp.sum(weighted, axis=-1))


def merge_entropy(*parts: EntropyPartials) -> EntropyPartials:
    """Returns the sums of the union of disjoint pieces; associative and commutative up to rounding.

    Raises:
      ValueError: no piece.
    """
    if not parts:
        raise ValueError("parts: got none, wanted at least one piece")
    m = functools.reduce(jnp.maximum, (part.m for part in parts))

    def moved(part: EntropyPartials) -> tuple[Array, Array]:
        shift = jnp.where(part.l == 0, 0, part.m - online_softmax.finite_max(m))
        scale = jnp.exp(shift)
        # Far below the maximum the scale underflows to 0 while the shift stays finite, so no product is 0 * inf.
        return scale * part.l, scale * (part.u + shift * part.l)

    l, u = moved(parts[0])
    for part in parts[1:]:
        of_part = moved(part)
        l, u = l + of_part[0], u + of_part[1]
    return EntropyPartials(m, l, u)


__all__ = ["EntropyPartials", "entropy_partials", "merge_entropy"]
