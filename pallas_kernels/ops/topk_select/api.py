"""Public entry of `topk_select`: checks, then the chosen implementation."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.core import checks, dispatch
from pallas_kernels.core.selection import TopKSelection
from pallas_kernels.ops.topk_select import mosaic_gpu, mosaic_tpu, reference, xla
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes

_OP = "topk_select"
_TABLE = {
    "reference": reference.topk_select,
    "xla": xla.topk_select,
    "mosaic_tpu": mosaic_tpu.topk_select,
    "mosaic_gpu": mosaic_gpu.topk_select,
}


def topk_select(
    scores: Float[Array, "... S"],
    topk: int | Int32[Array, "..."],
    *,
    lengths: Int32[Array, "..."] | None = None,
    with_indices: bool = True,
    implementation: dispatch.Implementation = None,
    block_sizes: TopKSelectBlockSizes | None = None,
) -> TopKSelection:
    """Selects the `topk` largest scores of each row.

    Exact and deterministic: equal scores keep the lowest index, -0.0 equals 0.0, subnormals count as 0.0, NaN is never
    selected. The threshold and tie cut describe the set in 8 bytes a row; the ascending index list is made from them.
    A row with nothing to select has count 0, threshold +inf, tie_cut -1. Scores are ranked as float32. Carries no gradient.

    Source: arXiv:2512.03494 (exact Top-k attention).

    Args:
      scores: float16, bfloat16, float32, or float64 (ranked by its float32 rounding).
      topk: an int >= 1, or int32 that broadcasts to the rows; more than the valid keys keeps all of them.
      lengths: valid keys of each row, broadcasts to the rows; None means all S.
      with_indices: also list the selected positions; needs an int `topk`.
      implementation: "reference", "xla", "mosaic_tpu", "mosaic_gpu", or names in order of preference.
      block_sizes: tile sizes of the kernels; None takes the tuned or the heuristic ones.

    Raises:
      ValueError: a shape, dtype or range is wrong; names the argument, the got and the wanted.
      NotImplementedError: the implementation cannot take this shape or dtype, or is not of this device.
    """
    scores = jnp.asarray(scores)
    if scores.ndim < 1 or scores.shape[-1] < 1:
        raise ValueError(
            f"{_OP}: scores got shape {tuple(scores.shape)}, wanted [..., S] with S >= 1"
        )
    checks.floating(_OP, "scores", scores)
    rows = scores.shape[:-1]
    topk = checks.topk(_OP, topk, rows)
    if with_indices and not isinstance(topk, int):
        raise ValueError(
            f"{_OP}: with_indices=True got an array for topk, wanted an int (the list needs a static size)"
        )
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        checks.integer(_OP, "lengths", lengths)
        try:
            fits = np.broadcast_shapes(lengths.shape, rows) == rows
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{_OP}: lengths got shape {tuple(lengths.shape)}, wanted one that broadcasts to {rows}"
            )
        lengths = jnp.broadcast_to(lengths, rows)
    return dispatch.call(
        _OP,
        implementation,
        _TABLE,
        scores,
        topk,
        lengths=lengths,
        with_indices=with_indices,
        block_sizes=block_sizes,
    )
