"""Pooled order keys of a shared scope, made in VMEM of the order keys of its heads (Mosaic TPU)."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.core import online_softmax, selection, tpu_tiles
from pallas_kernels.core.tpu_tiles import LANES


def pool_order_keys(
    scores_ref, pooled_ref, begin, end, *, chunk: int, num_sets: int, per_set: int, pooling: str
):
    """Pools each `per_set` neighbouring rows of a buffer, by "prob_sum" and so on (`core/pooling.py`).

    Args:
      scores_ref: int32 [R, S'] order keys in VMEM, `DEAD` where not visible or NaN; rows from num_sets * per_set on are ignored.
      pooled_ref: int32 [Q, S'] in VMEM; rows from `num_sets` on become `DEAD`.
      begin, end: int32 scalars; only chunks begin <= c < end are read and written.
      chunk: keys of each row read at a time, a multiple of 128.
    """
    lanes = functools.partial(jnp.full, (scores_ref.shape[0], LANES))
    at = lambda c: pl.ds(pl.multiple_of(c * chunk, LANES), chunk)

    def scan(step, init):  # step(order keys, carry)
        return lax.fori_loop(begin, end, lambda c, carry: step(scores_ref[:, at(c)], carry), init)

    def fold(x, combine):  # [R, chunk] -> [R, 128]: whole registers, nothing crosses a lane
        parts = [x[:, i : i + LANES] for i in range(0, chunk, LANES)]
        return functools.reduce(combine, parts)

    lse = 0.0
    if pooling.startswith("prob"):
        best = scan(
            lambda order, best: jnp.maximum(best, fold(order, jnp.maximum)),
            lanes(selection.DEAD, dtype=jnp.int32),
        )
        best = jnp.max(best, axis=1, keepdims=True)
        m = selection.key_to_score(best)
        m = jnp.where((best == selection.DEAD) | (m == -jnp.inf), 0.0, m)

        def add(order, total):
            p = jnp.where(order == selection.DEAD, 0.0, jnp.exp(selection.key_to_score(order) - m))
            return total + fold(p, jnp.add)

        total = jnp.sum(scan(add, lanes(0.0, dtype=jnp.float32)), axis=1, keepdims=True)
        lse = m + jnp.log(jnp.where(total == 0, 1.0, total))

    def pool_chunk(c, carry):
        order = scores_ref[:, at(c)]
        score = selection.key_to_score(order) - lse
        pooled = jnp.full((pooled_ref.shape[0], chunk), selection.DEAD, jnp.int32)
        for g in range(num_sets):
            own = tpu_tiles.rows_between(order.shape, g * per_set, (g + 1) * per_set)
            value = selection.order_key(_pool_rows(score, own, per_set, pooling))
            dead = jnp.where(own & (order == selection.DEAD), 1, 0)
            dead = jnp.max(dead, axis=0, keepdims=True) > 0
            # A pool that one head sees as not a number has no rank, like a score that is not one.
            value = jnp.where(dead | (value == selection.NAN), selection.DEAD, value)
            mine = tpu_tiles.rows_between(pooled.shape, g, g + 1)
            pooled = jnp.where(mine, jnp.broadcast_to(value, pooled.shape), pooled)
        pooled_ref[:, at(c)] = pooled
        return carry

    lax.fori_loop(begin, end, pool_chunk, None)


def _pool_rows(score, own, size: int, pooling: str):
    """Pools the rows of `own` into one: [R, n] -> [1, n]; logsumexp for "prob_sum", as the scores are log-probabilities."""
    if pooling == "score_mean":
        return jnp.sum(jnp.where(own, score, 0.0), axis=0, keepdims=True) / size
    best = jnp.max(jnp.where(own, score, -jnp.inf), axis=0, keepdims=True)
    if pooling != "prob_sum":
        return best
    safe = online_softmax.finite_max(best)
    total = jnp.sum(jnp.where(own, jnp.exp(score - safe), 0.0), axis=0, keepdims=True)
    return online_softmax.log_sum_exp(safe, total)
