"""Public entry of `knn_indices`: checks, then the chosen implementation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.core import checks, dispatch
from pallas_kernels.ops.knn_attention import mosaic_gpu, mosaic_tpu, reference, xla
from pallas_kernels.ops.knn_attention.block_sizes import KnnBlockSizes

_OP = "knn_indices"
_TABLE = {
    "reference": reference.knn_indices,
    "xla": xla.knn_indices,
    "mosaic_tpu": mosaic_tpu.knn_indices,
    "mosaic_gpu": mosaic_gpu.knn_indices,
}


def knn_indices(
    query_positions: Float[Array, "B T P"],
    key_positions: Float[Array, "B S P"],
    *,
    neighbours: int,
    key_valid: Bool[Array, "B S"] | None = None,
    implementation: dispatch.Implementation = None,
    block_sizes: KnnBlockSizes | None = None,
) -> Int32[Array, "B T {neighbours}"]:
    """Finds the valid keys nearest to each query; lists them by ascending index, as every selection here.

    Distance is sum_p (query[p] - key[p]) ** 2 in float32, of the differences themselves; equal distances keep the lower
    index, those below the smallest normal float32 (1e-19 m apart) count as equal, and one that is NaN is never chosen.
    Where fewer than `neighbours` keys qualify, -1 fills the tail. Carries no gradient.

    Source: local attention of Motion Transformer, arXiv:2209.13508.

    Args:
      query_positions, key_positions: [m], one shared frame, one dtype; float32, as bfloat16 is off by up to 0.25 m at
        100 m.
      neighbours: static, may exceed S.
      key_valid: False where a key is padding; None means all valid.
      implementation: "reference", "xla", "mosaic_tpu", "mosaic_gpu", or names in order of preference.
      block_sizes: tile sizes; None takes the tuned or the heuristic ones.

    Raises:
      ValueError: a shape, dtype or range is wrong; names the argument, the got and the wanted.
      NotImplementedError: the implementation cannot take this shape or dtype, or is not of this device.
    """
    query_positions, key_positions = jnp.asarray(query_positions), jnp.asarray(key_positions)
    checks.shape(_OP, "query_positions", query_positions, "B T P")
    b, _, p = query_positions.shape
    checks.shape(_OP, "key_positions", key_positions, "B S P", B=b, P=p)
    for name, array in (("query_positions", query_positions), ("key_positions", key_positions)):
        if 0 in array.shape:
            raise ValueError(
                f"{_OP}: {name} got shape {tuple(array.shape)}, wanted every axis of at least 1"
            )
        checks.floating(_OP, name, array)
    checks.same_dtype(_OP, query_positions=query_positions, key_positions=key_positions)
    if isinstance(neighbours, bool) or not checks.is_static(neighbours):
        raise ValueError(f"{_OP}: neighbours got {neighbours!r}, wanted an int >= 1")
    checks.at_least_one(_OP, "neighbours", neighbours)
    s = key_positions.shape[1]
    if key_valid is None:
        key_valid = jnp.ones((b, s), bool)
    key_valid = jnp.asarray(key_valid)
    checks.shape(_OP, "key_valid", key_valid, "B S", B=b, S=s)
    if key_valid.dtype != jnp.bool_:
        raise ValueError(f"{_OP}: key_valid got dtype {key_valid.dtype.name}, wanted bool")
    return dispatch.call(
        _OP,
        implementation,
        _TABLE,
        lax.stop_gradient(query_positions),
        lax.stop_gradient(key_positions),
        neighbours=int(neighbours),
        key_valid=key_valid,
        block_sizes=block_sizes,
    )
