"""Public entry of `topk_attention`: checks, then the chosen implementation."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.core import checks, dispatch
from pallas_kernels.core.pooling import POOLINGS, SCOPES
from pallas_kernels.ops.topk_attention import reference, xla
from pallas_kernels.ops.topk_attention.block_sizes import TopKAttentionBlockSizes

_OP = "topk_attention"
_TABLE = {"reference": reference.topk_attention, "xla": xla.topk_attention}


class TopKAttentionResiduals(NamedTuple):
    """What each row knows besides its output; a shared scope repeats its values over its heads.

    lse: [B, N, T], float32 (float64 for float64 inputs), natural log-sum-exp over the selected keys; -inf for a row with none. Differentiable.
    threshold: float32 [B, N, T], the smallest kept score (pooled units in a shared scope); +inf where nothing is kept.
    tie_cut: int32 [B, N, T], the largest kept index among scores equal to the threshold; -1 where nothing is kept.
    """

    lse: Float[Array, "B N T"]
    threshold: Float32[Array, "B N T"]
    tie_cut: Int32[Array, "B N T"]


def topk_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    topk: int | Int32[Array, "..."] | None = None,
    topk_ratio: float | None = None,
    min_topk: int = 1,
    causal: bool = True,
    lengths: Int32[Array, "B"] | None = None,
    query_segment_ids: Int32[Array, "B T"] | None = None,
    key_segment_ids: Int32[Array, "B S"] | None = None,
    window: int | None = None,
    dense_rows: Bool[Array, "B T"] | None = None,
    scope: str = "head",
    pooling: str = "prob_sum",
    scale: float | None = None,
    implementation: dispatch.Implementation = None,
    block_sizes: TopKAttentionBlockSizes | None = None,
    return_residuals: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], TopKAttentionResiduals]:
    """Attends each query row to its best visible keys; softmax over the kept keys alone.

    s_tj = scale <q_t, k_j> in float32. Row t keeps min(W_t, visible) keys, the largest s_tj, lowest index first on ties,
    with W_t = topk or clip(ceil(topk_ratio * visible), min_topk, visible). Differentiable in query, key and value, in out
    and in lse; the selected set is a constant, so keys that no row selects get zero gradient, and with W_t = 1 the weights
    are constant and only `value` learns. Rows that see no key give out 0, lse -inf, zero gradients. What a row does not
    select, NaN included, never reaches its output. `threshold` and `tie_cut` carry the `checkpoint_name`s "topk_threshold"
    and "topk_tie_cut": a remat policy that saves them (and, for shared "prob" pooling, "topk_pool_lse") never selects twice.

    Source: arXiv:2512.03494 (native Top-k training).

    Args:
      query, key, value: one dtype; N a multiple of K, query head n reads key/value head n // (N / K).
      topk: an int >= 1, or int32 that broadcasts to the rows [B, T]. Exactly one of `topk` and `topk_ratio` is given.
      topk_ratio: share of the visible keys, in (0, 1].
      min_topk: the least that `topk_ratio` keeps.
      causal: query t sees keys j <= t + S - T: the last query is aligned with the last key.
      lengths: valid keys of each sequence; None means all.
      query_segment_ids, key_segment_ids: packed documents; a row sees, ranks and counts its own document only. Both or none.
      window: rows see only their last `window` keys, their own included; needs `causal`.
      dense_rows: True where a row keeps all of its visible keys whatever the budget.
      scope: "head" (each query head picks its own keys), "group" (one set per key/value head) or "layer" (one for all).
      pooling: how a shared scope ranks: "prob_sum" (sum over heads of softmax), "prob_max", "score_mean", "score_max".
      scale: None means H ** -0.5.
      implementation: "reference", "xla", or names in order of preference.
      block_sizes: None takes the heuristic ones.
      return_residuals: also return `TopKAttentionResiduals`.

    Raises:
      ValueError: a shape, dtype or range is wrong; names the argument, the got and the wanted.
      NotImplementedError: the implementation does not exist for this op, or is not of this device.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    b, t, s = checks.attention(_OP, query, key, value)
    h = query.shape[-1]
    checks.choice(_OP, "scope", scope, SCOPES)
    checks.choice(_OP, "pooling", pooling, POOLINGS)
    if (topk is None) == (topk_ratio is None):
        raise ValueError(
            f"{_OP}: got topk {topk} and topk_ratio {topk_ratio}, wanted exactly one of them"
        )
    checks.at_least_one(_OP, "min_topk", min_topk)
    if topk_ratio is not None:
        checks.topk_ratio(_OP, topk_ratio)
    else:
        topk = checks.topk(_OP, topk, (b, t))
    if window is not None:
        checks.at_least_one(_OP, "window", window)
        if not causal:
            raise ValueError(
                f"{_OP}: window got {window} with causal=False, wanted None (a window ends at the row itself)"
            )
    if (query_segment_ids is None) != (key_segment_ids is None):
        missing = "query_segment_ids" if query_segment_ids is None else "key_segment_ids"
        raise ValueError(f"{_OP}: {missing} got None, wanted both segment ids or neither")
    lengths = checks.optional_integer(_OP, "lengths", lengths, "B", B=b)
    query_segment_ids = checks.optional_integer(
        _OP, "query_segment_ids", query_segment_ids, "B T", B=b, T=t
    )
    key_segment_ids = checks.optional_integer(
        _OP, "key_segment_ids", key_segment_ids, "B S", B=b, S=s
    )
    if dense_rows is not None:
        dense_rows = jnp.asarray(dense_rows)
        if dense_rows.dtype != jnp.bool_:
            raise ValueError(f"{_OP}: dense_rows got dtype {dense_rows.dtype.name}, wanted bool")
        checks.shape(_OP, "dense_rows", dense_rows, "B T", B=b, T=t)
    out, lse, threshold, tie_cut = dispatch.call(
        _OP,
        implementation,
        _TABLE,
        query,
        key,
        value,
        topk=topk,
        topk_ratio=topk_ratio,
        min_topk=int(min_topk),
        causal=bool(causal),
        lengths=lengths,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        window=window,
        dense_rows=dense_rows,
        scope=scope,
        pooling=pooling,
        scale=float(h**-0.5 if scale is None else scale),
        block_sizes=block_sizes,
    )
    return (out, TopKAttentionResiduals(lse, threshold, tie_cut)) if return_residuals else out
