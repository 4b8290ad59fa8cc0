"""Public entry of `gather_attention`: checks, then the chosen implementation."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.core import checks, dispatch, paging
from pallas_kernels.ops.gather_attention import mosaic_gpu, mosaic_tpu, reference, xla
from pallas_kernels.ops.gather_attention.block_sizes import GatherAttentionBlockSizes

_OP = "gather_attention"
_TABLE = {
    "reference": reference.gather_attention,
    "xla": xla.gather_attention,
    "mosaic_tpu": mosaic_tpu.gather_attention,
    "mosaic_gpu": mosaic_gpu.gather_attention,
}


class GatherAttentionResiduals(NamedTuple):
    """What each row knows besides its output.

    lse: [B, N, T], float32 (float64 for float64 inputs), natural log-sum-exp over the gathered keys; -inf for a row with
      none. Differentiable.
    """

    lse: Float[Array, "B N T"]


def gather_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"] | Float[Array, "P page K H"],
    value: Float[Array, "B S K V"] | Float[Array, "P page K V"],
    indices: Int32[Array, "B T G k"],
    *,
    lengths: Int32[Array, "B"] | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation = None,
    block_sizes: GatherAttentionBlockSizes | None = None,
    return_residuals: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], GatherAttentionResiduals]:
    """Attends each query row to the keys listed for it; softmax over those alone.

    s_tj = scale <q_t, k_j> in float32 for each listed j. The list is the whole rule: no causal edge is added to it. Slots
    come in any order, and a key listed m times weighs as m equal keys would. A slot is masked where its index is outside
    [0, lengths[b]), -1 by convention; under `jit` and outside it alike, a stray index is no error. Masked slots read
    nothing, and what no row lists, NaN included, never reaches a result. Rows that list no valid key give out 0, lse -inf,
    zero gradients; a listed NaN makes its row NaN.

    Differentiable in query, key and value, in out and in lse; keys that no row lists get zero gradient. The forward takes
    time T x k. Gradients are summed in a fixed order on every device; on a GPU the price is a backward of time T x S, in
    chunks, never in memory.

    Source: the index-list form of arXiv:2512.03494 and of DeepSeek Sparse Attention, arXiv:2512.02556.

    Args:
      query, key, value: one dtype; N a multiple of K, query head n reads key/value head n // (N / K).
      indices: one list for each of G scopes: all heads (G = 1), the heads of a key/value head (K), or each head (N).
      lengths: valid keys of each sequence; None means all S.
      page_table: key and value are pools of pages (16, 32, 64, 128 or 256 tokens each), and these are the pages of each
        sequence, in order; S is then pages * page. Entries of pages past a sequence's length are never followed. For
        decoding: only "reference" differentiates it where B > 1.
      scale: None means H ** -0.5.
      implementation: "reference", "xla", "mosaic_tpu", "mosaic_gpu" (their backward is that of "xla"), or names in order of
        preference.
      block_sizes: None takes the heuristic ones.
      return_residuals: also return `GatherAttentionResiduals`.

    Raises:
      ValueError: a shape or dtype is wrong; names the argument, the got and the wanted.
      NotImplementedError: the implementation does not exist for this op, cannot take this shape or dtype, or is not of this
        device.
    """
    query, key, value, indices = (
        jnp.asarray(query),
        jnp.asarray(key),
        jnp.asarray(value),
        jnp.asarray(indices),
    )
    if page_table is None:
        b, t, s = checks.attention(_OP, query, key, value)
    else:
        checks.paged_attention(_OP, query, key, value)
        b, t = query.shape[:2]
        page_table, s = paging.check(_OP, key, value, page_table, b)
    n, h = query.shape[2:]
    k = key.shape[2]
    checks.integer(_OP, "indices", indices)
    checks.shape(_OP, "indices", indices, "B T G k", B=b, T=t)
    if indices.shape[2] not in (1, k, n):
        scopes = ", ".join(str(g) for g in sorted({1, k, n}))
        raise ValueError(
            f"{_OP}: indices got {indices.shape[2]} scopes on axis 2, wanted one of {scopes}"
        )
    if indices.shape[3] < 1:
        raise ValueError(
            f"{_OP}: indices got shape {tuple(indices.shape)}, wanted at least one entry a row"
        )
    lengths = checks.optional_integer(_OP, "lengths", lengths, "B", B=b)
    bound = jnp.full((b,), s, jnp.int32) if lengths is None else jnp.minimum(lengths, s)
    indices = jnp.where((indices >= 0) & (indices < bound[:, None, None, None]), indices, -1)
    if page_table is not None:
        key, value, indices = _as_one_table(key, value, indices, page_table, lengths)
    out, lse = dispatch.call(
        _OP,
        implementation,
        _TABLE,
        query,
        key,
        value,
        indices,
        scale=float(h**-0.5 if scale is None else scale),
        block_sizes=block_sizes,
    )
    return (out, GatherAttentionResiduals(lse)) if return_residuals else out


def _as_one_table(key, value, indices, page_table, lengths):
    """Returns the pools as tables [1, P * page, K, ...] that all sequences share, and the lists in their rows.

    Implementations read the same table for each sequence where key and value have a batch axis of 1.
    """
    num_pages, page, k, _ = key.shape
    table = paging.safe_table(page_table, lengths, page=page, num_pages=num_pages)
    rows = lambda pool: pool.reshape(1, num_pages * page, k, -1)
    return rows(key), rows(value), paging.pool_rows(indices, table, page)
