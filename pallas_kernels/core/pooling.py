"""Shared selections: how the scores of several heads become the one score that ranks their keys."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.core import online_softmax

SCOPES = ("head", "group", "layer")
POOLINGS = ("prob_sum", "prob_max", "score_mean", "score_max")


def num_sets(scope: str, num_query_heads: int, num_kv_heads: int) -> int:
    """Returns G, how many sets a row selects: N, K or 1."""
    return {"head": num_query_heads, "group": num_kv_heads, "layer": 1}[scope]


def needs_lse(scope_sets: int, num_query_heads: int, pooling: str) -> bool:
    """Whether ranking needs each head's log-sum-exp over all visible keys first."""
    return scope_sets != num_query_heads and pooling.startswith("prob")


def full_lse(
    scores: Float[Array, "B N *rows S"], visible: Bool[Array, "..."]
) -> Float[Array, "B N *rows"]:
    """Returns ln sum exp of the visible scores of each head; NaN scores are left out, -inf where none is left."""
    m, total, _ = online_softmax.weights(scores, visible & ~jnp.isnan(scores))
    return online_softmax.log_sum_exp(m, total)


def pool(
    scores: Float[Array, "B N *rows S"],
    visible: Bool[Array, "..."],
    num_pools: int,
    pooling: str,
    lse: Float[Array, "B N *rows"] | None = None,
) -> Float[Array, "B G *rows S"]:
    """Pools the scores of N heads, adjacent heads together, into `num_pools` rankings.

    The probabilities are those of the full softmax over the visible keys. Their sum is ranked as
    logsumexp_h(s - lse_h), the same order without float32 underflow plateaus. A pool of one head ranks s itself. A key that
    is NaN in one head of a pool is NaN in the pool, and so never selected. Given `lse`, the work is elementwise over keys
    and adds the heads in order: the same scores give the same bits wherever they are pooled again.

    Args:
      scores: attention scores, finite or not; values where not visible are ignored.
      visible: broadcasts to `scores`.
      num_pools: G, divides N.
      pooling: one of `POOLINGS`.
      lse: what `full_lse` returned, if it is at hand; else it is computed where the pooling needs it.
    """
    b, n, *rest = scores.shape
    if num_pools == n:
        return scores
    if pooling.startswith("prob"):
        lse = full_lse(scores, visible) if lse is None else lse
        scores = scores - online_softmax.finite_max(lse)[..., None]
    parts = scores.reshape(b, num_pools, n // num_pools, *rest)
    if pooling in ("prob_max", "score_max"):
        return jnp.max(parts, axis=2)
    heads = [parts[:, :, i] for i in range(n // num_pools)]
    if pooling == "score_mean":
        return sum(heads[1:], start=heads[0]) / len(heads)
    m = jnp.max(parts, axis=2)
    base = jnp.where(jnp.isfinite(m), m, 0)
    weights = [jnp.exp(head - base) for head in heads]
    return base + jnp.log(sum(weights[1:], start=weights[0]))
