"""Public entries of the lightning indexer: checks, then the chosen implementation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.core import checks, dispatch
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.lightning_indexer import mosaic_gpu, mosaic_tpu, reference, xla
from pallas_kernels.ops.lightning_indexer.block_sizes import LightningIndexerBlockSizes

_SCORES_TABLE = {
    "reference": reference.indexer_scores,
    "xla": xla.indexer_scores,
    "mosaic_tpu": mosaic_tpu.indexer_scores,
    "mosaic_gpu": mosaic_gpu.indexer_scores,
}
_SELECT_TABLE = {
    "reference": reference.indexer_select,
    "xla": xla.indexer_select,
    "mosaic_tpu": mosaic_tpu.indexer_select,
    "mosaic_gpu": mosaic_gpu.indexer_select,
}


def indexer_scores(
    index_query: Float[Array, "B T I D"],
    index_key: Float[Array, "B S D"],
    head_weights: Float[Array, "B T I"],
    *,
    causal: bool = True,
    lengths: Int32[Array, "B"] | None = None,
    implementation: dispatch.Implementation = None,
    block_sizes: LightningIndexerBlockSizes | None = None,
) -> Float32[Array, "B T S"]:
    """Scores each key for each query row: sum_i w_ti relu(<q_ti, k_s>), over I small heads that share one key.

    Accumulates in float32. A key that the row may not see scores -inf, whatever it holds. Scores may be negative, as
    weights may, and many are exactly 0.0, where no head fires. Scales belong into the weights. `reference` and `xla`
    differentiate by autodiff, with the whole score matrix as residuals; the Mosaic kernels do not.

    Source: DeepSeek Sparse Attention, arXiv:2512.02556.

    Args:
      index_query, index_key: one dtype; position encodings, if any, are already applied.
      head_weights: any float dtype; float32 is best, as it is not matrix-multiplied.
      causal: row t sees keys j <= t + S - T only.
      lengths: valid keys of each sequence; None means all S.
      implementation: "reference", "xla", "mosaic_tpu", "mosaic_gpu", or names in order of preference.
      block_sizes: tile sizes; None takes the tuned or the heuristic ones.

    Raises:
      ValueError: a shape or dtype is wrong; names the argument, the got and the wanted.
      NotImplementedError: the implementation cannot take this shape or dtype, or is not of this device.
    """
    op = "indexer_scores"
    index_query, index_key, head_weights = _checked(op, index_query, index_key, head_weights)
    lengths = checks.optional_integer(op, "lengths", lengths, "B", B=index_query.shape[0])
    return dispatch.call(
        op,
        implementation,
        _SCORES_TABLE,
        index_query,
        index_key,
        head_weights,
        causal=causal,
        lengths=lengths,
        block_sizes=block_sizes,
    )


def indexer_select(
    index_query: Float[Array, "B T I D"],
    index_key: Float[Array, "B S D"],
    head_weights: Float[Array, "B T I"],
    *,
    topk: int | Int32[Array, "..."],
    causal: bool = True,
    lengths: Int32[Array, "B"] | None = None,
    with_indices: bool = True,
    implementation: dispatch.Implementation = None,
    block_sizes: LightningIndexerBlockSizes | None = None,
) -> TopKSelection:
    """Selects, for each query row, the `topk` visible keys with the largest `indexer_scores`.

    The rules of `topk_select`: exact, equal scores keep the lowest index (plateaus at 0.0 are common), NaN is never
    selected, a row without keys has count 0, threshold +inf, tie_cut -1. Only `reference` holds a T x S array. The set is a
    constant: nothing is differentiated.

    Source: DeepSeek Sparse Attention, arXiv:2512.02556.

    Args:
      index_query, index_key: one dtype; position encodings, if any, are already applied.
      head_weights: any float dtype; float32 is best, as it is not matrix-multiplied.
      topk: an int >= 1, or int32 that broadcasts to [B, T]; more than the visible keys keeps all of them.
      causal: row t sees keys j <= t + S - T only.
      lengths: valid keys of each sequence; None means all S.
      with_indices: also list the selected positions, [B, T, topk]; needs an int `topk`.
      implementation: "reference", "xla", "mosaic_tpu", "mosaic_gpu", or names in order of preference.
      block_sizes: tile sizes; None takes the tuned or the heuristic ones.

    Raises:
      ValueError: a shape, dtype or range is wrong; names the argument, the got and the wanted.
      NotImplementedError: the implementation cannot take this shape or dtype, or is not of this device.
    """
    op = "indexer_select"
    index_query, index_key, head_weights = _checked(op, index_query, index_key, head_weights)
    b, t = index_query.shape[:2]
    lengths = checks.optional_integer(op, "lengths", lengths, "B", B=b)
    topk = checks.topk(op, topk, (b, t))
    if with_indices and not isinstance(topk, int):
        raise ValueError(
            f"{op}: with_indices=True got an array for topk, wanted an int (the list needs a static size)"
        )
    index_query, index_key, head_weights = map(
        lax.stop_gradient, (index_query, index_key, head_weights)
    )
    return dispatch.call(
        op,
        implementation,
        _SELECT_TABLE,
        index_query,
        index_key,
        head_weights,
        topk=topk,
        causal=causal,
        lengths=lengths,
        with_indices=with_indices,
        block_sizes=block_sizes,
    )


def _checked(op: str, index_query, index_key, head_weights):
    """Checks shapes and types of the three arrays and returns them as JAX arrays."""
    index_query, index_key, head_weights = map(jnp.asarray, (index_query, index_key, head_weights))
    checks.shape(op, "index_query", index_query, "B T I D")
    b, t, i, d = index_query.shape
    checks.shape(op, "index_key", index_key, "B S D", B=b, D=d)
    checks.shape(op, "head_weights", head_weights, "B T I", B=b, T=t, I=i)
    for name, array in (("index_query", index_query), ("index_key", index_key)):
        if 0 in array.shape:
            raise ValueError(
                f"{op}: {name} got shape {tuple(array.shape)}, wanted every axis of at least 1"
            )
        checks.floating(op, name, array)
    checks.floating(op, "head_weights", head_weights)
    checks.same_dtype(op, index_query=index_query, index_key=index_key)
    return index_query, index_key, head_weights
