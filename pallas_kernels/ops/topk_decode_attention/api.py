"""Public entry of `topk_decode_attention`: checks, then the chosen implementation."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.core import checks, dispatch, paging, quantization
from pallas_kernels.core.pooling import POOLINGS, SCOPES
from pallas_kernels.core.quantization import QuantizedKeys
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_decode_attention import quantized_gpu, quantized_tpu, reference, xla
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes

_OP = "topk_decode_attention"
_TABLE = {
    "reference": reference.topk_decode_attention,
    "xla": xla.topk_decode_attention,
    "mosaic_tpu": quantized_tpu.topk_decode_attention,
    "mosaic_gpu": quantized_gpu.topk_decode_attention,
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
    key: Float[Array, "B S K H"] | Float[Array, "P page K H"],
    value: Float[Array, "B S K V"] | Float[Array, "P page K V"],
    *,
    topk: int | Int32[Array, "..."],
    lengths: Int32[Array, "B"] | None = None,
    scope: str = "head",
    pooling: str = "prob_sum",
    window: int | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
    quantized_key: QuantizedKeys | None = None,
    certified: bool = False,
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
      page_table: key and value are pools of pages (16, 32, 64, 128 or 256 tokens each), and these are the pages of each
        sequence, in order; S is then pages * page. Entries of pages past a sequence's length are never followed.
      quantized_key: an eight-bit copy of `key` (`quantize_keys`), in the same pages. It is what ranks the keys, so half of the
        bytes are read; the softmax is over the true scores of the kept keys. Its set is not the exact one, unless `certified`.
      certified: with `quantized_key`, return exactly what is returned without it, bit for bit: the copy bounds each score, and
        only keys that the bounds leave undecided are scored again from `key`.
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
    if page_table is None:
        checks.shape(_OP, "key", key, "B S K H", B=b, H=h)
        checks.shape(_OP, "value", value, "B S K V", B=b, S=key.shape[1], K=key.shape[2])
    else:
        page_table, _ = paging.check(_OP, key, value, page_table, b)
        checks.shape(_OP, "key", key, "P page K H", H=h)
        checks.shape(_OP, "value", value, "P page K V", K=key.shape[2])
    k = key.shape[2]
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
    if quantized_key is not None:
        quantized_key = quantization.check(_OP, quantized_key, key)
    elif certified:
        raise ValueError(f"{_OP}: certified got True, wanted False where quantized_key is None")
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
        page_table=page_table,
        quantized_key=quantized_key,
        certified=certified,
        scale=float(h**-0.5 if scale is None else scale),
        block_sizes=block_sizes,
        with_indices=return_residuals and isinstance(topk, int),
    )
    return (out, TopKDecodeResiduals(lse, selection)) if return_residuals else out
