"""Shared selections: how the scores of several heads become the one score that ranks their keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SCOPES = ("head", "group", "layer")
POOLINGS = ("prob_sum", "prob_max", "score_mean", "score_max")


def num_sets(scope: str, num_query_heads: int, num_kv_heads: int) -> int:
    """Returns G, how many sets a row selects: N, K or 1."""
    return {"head": num_query_heads, "group": num_kv_heads, "layer": 1}[scope]


def pool(
    scores: Float[Array, "B N *rows S"], visible: Bool[Array, "..."], num_pools: int, pooling: str
) -> Float[Array, "B G *rows S"]:
    """Pools the scores of N heads, adjacent heads together, into `num_pools` rankings.

    The probabilities are those of the full softmax over the visible keys. Their sum is ranked as
    logsumexp_h(s - lse_h), the same order without float32 underflow plateaus. A pool of one head ranks s itself.

    Args:
      scores: attention scores, finite or not; values where not visible are ignored.
      visible: broadcasts to `scores`.
      num_pools: G, divides N.
      pooling: one of `POOLINGS`.
    """
    b, n, *rest = scores.shape
    if num_pools == n:
        return scores
    grouped = (b, num_pools, n // num_pools, *rest)
    visible = jnp.broadcast_to(visible, scores.shape)
    if pooling.startswith("prob"):
        masked = jnp.where(visible, scores, -jnp.inf)
        lse = jax.nn.logsumexp(masked, axis=-1, keepdims=True)
        scores = masked - jnp.where(lse == -jnp.inf, 0, lse)
    parts = scores.reshape(grouped)
    if pooling == "prob_sum":
        return jax.nn.logsumexp(parts, axis=2)
    return jnp.mean(parts, axis=2) if pooling == "score_mean" else jnp.max(parts, axis=2)
