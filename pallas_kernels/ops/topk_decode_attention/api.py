"""Public entry of `topk_decode_attention`: checks, then the chosen implementation."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.core import checks, dispatch
from pallas_kernels.core.pooling import POOLINGS, SCOPES
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_decode_attention import mosaic_gpu, mosaic_tpu, reference, xla
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes

_OP = "topk_decode_attention"
_TABLE = {
    "reference": reference.topk_decode_attention,
    "xla": xla.topk_decode_attention,
    "mosaic_tpu": mosaic_tpu.topk_decode_attention,
    "mosaic_gpu": mosaic_gpu.topk_decode_attention,
}


class TopKDecodeResiduals(NamedTuple):
    """What a decode step knows besides its output.

    lse: [B, N], float32 (float64 for float64 inputs), natural log-sum-exp over the selected keys; -inf for a row with none.
    selection: the selected keys of each head, [B, N, ...]; a shared scope repeats its values over its heads. `indices` are
      listed when `topk` is an int. In a shared scope `threshold` is in pooled units.
    """

    lse: Float[Array, "B N"]
    selection: TopKSelection


def topk_decode_attention(
    query: Float[Array, "B N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    topk: int | Int32[Array, "..."],
    lengths: Int32[Array, "B"] | None = None,
    scope: str = "head",
    pooling: str = "prob_sum",
    window: int | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation = None,
    block_sizes: TopKDecodeBlockSizes | None = None,
    return_residuals: bool = False,
) -> Float[Array, "B N V"] | tuple[Float[Array, "B N V"], TopKDecodeResiduals]:
    """Attends each sequence's one query row to its `topk` best keys.

    s_j = scale <q, k_j> in float32; the `topk` largest visible s_j are kept, lowest index first on ties; the output is the
    softmax over the kept keys alone times their values. A sequence of length 0 gives out 0, lse -inf. Unselected and
    invalid memory never reaches the result. Not differentiable: training uses `topk_attention`.

    Source: arXiv:2512.03494 (exact Top-k decoding).

    Args:
      query, key, value: one dtype; N a multiple of K, query head n reads key/value head n // (N / K).
      topk: an int >= 1, or int32 that broadcasts to the rows [B, N] (so [B, 1] for a budget a sequence); more than the
        visible keys keeps all of them.
      lengths: valid keys of each sequence, the row's own included; None means all S.
      scope: "head" (each query head picks its own keys), "group" (one set per key/value head) or "layer" (one for all).
      pooling: how a shared scope ranks: "prob_sum" (sum over heads of softmax), "prob_max", "score_mean", "score_max".
      window: only the last `window` valid keys are visible; None means all.
      scale: None means H ** -0.5.
      implementation: "reference", "xla", "mosaic_tpu", "mosaic_gpu", or names in order of preference.
      block_sizes: tile sizes of the kernels; None takes the tuned or the heuristic ones.
      return_residuals: also return `TopKDecodeResiduals`.

    Raises:
      ValueError: a shape, dtype or range is wrong; names the argument, the got and the wanted.
      NotImplementedError: the implementation cannot take this shape, dtype or scope, or is not of this device.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    checks.shape(_OP, "query", query, "B N H")
    b, n, h = query.shape
    checks.shape(_OP, "key", key, "B S K H", B=b, H=h)
    _, s, k, _ = key.shape
    checks.shape(_OP, "value", value, "B S K V", B=b, S=s, K=k)
    checks.heads(_OP, n, k)
    checks.floating(_OP, "query", query)
    checks.same_dtype(_OP, query=query, key=key, value=value)
    checks.choice(_OP, "scope", scope, SCOPES)
    checks.choice(_OP, "pooling", pooling, POOLINGS)
    topk = checks.topk(_OP, topk, (b, n))
    if window is not None:
        checks.at_least_one(_OP, "window", window)
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        checks.integer(_OP, "lengths", lengths)
        checks.shape(_OP, "lengths", lengths, "B", B=b)
    out, lse, selection = dispatch.call(
        _OP,
        implementation,
        _TABLE,
        query,
        key,
        value,
        topk=topk,
        lengths=lengths,
        scope=scope,
        pooling=pooling,
        window=window,
        scale=float(h**-0.5 if scale is None else scale),
        block_sizes=block_sizes,
        with_indices=return_residuals and isinstance(topk, int),
    )
    return (out, TopKDecodeResiduals(lse, selection)) if return_residuals else out
