"""Softmax in pieces: the running (max, sum, accumulator) of a row, and the exact merge of finished pieces.

A piece that saw no key has m = -inf, l = 0, acc = 0; no formula here evaluates exp(-inf - -inf).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.core import precision


def finite_max(m: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns a value that is safe to subtract: the maximum, or 0 for a row that has seen nothing."""
    return jnp.where(m == -jnp.inf, jnp.zeros_like(m), m)


def weights(scores: Float[Array, "... S"], kept: Bool[Array, "... S"]):
    """Returns (m, l, p) of one piece: its max, sum, and exp(scores - m) with an explicit zero where not kept.

    m is a constant under differentiation: what it contributes to out and to lse cancels.
    """
    masked = jnp.where(kept, scores, -jnp.inf)
    m = lax.stop_gradient(jnp.max(masked, axis=-1))
    p = jnp.where(kept, jnp.exp(masked - finite_max(m)[..., None]), 0)
    return m, jnp.sum(p, axis=-1), p


def log_sum_exp(m: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns m + ln l, -inf for a row with no weight."""
    empty = total == 0
    return jnp.where(empty, -jnp.inf, finite_max(m) + jnp.log(jnp.where(empty, 1, total)))


def divide(acc: Float[Array, "... V"], total: Float[Array, "..."]) -> Float[Array, "... V"]:
    """Returns acc / l, 0 for a row with no weight."""
    empty = (total == 0)[..., None]
    return jnp.where(empty, 0, acc / jnp.where(empty, 1, total[..., None]))


def weigh_values(
    equation: str, p: Float[Array, "..."], kept: Bool[Array, "..."], value: Float[Array, "..."]
):
    """Returns einsum(equation, p, value), accumulated in p's type, in which a value enters only the rows that keep it.

    0 * NaN is NaN, so a plain product would carry a non-finite value into every row of the tile. Rows that do keep a
    non-finite value give NaN.
    """
    finite = jnp.isfinite(value)
    acc = _product(equation, p.astype(value.dtype), jnp.where(finite, value, 0), p.dtype)
    poison = _product(equation, kept.astype(value.dtype), 1 - finite.astype(value.dtype), p.dtype)
    return jnp.where(poison > 0, jnp.nan, acc)


def weigh_finite_values(
    equation: str, p: Float[Array, "..."], kept: Bool[Array, "..."], value: Float[Array, "..."]
):
    """Returns what `weigh_values` does, at half the cost where all values are finite: a finite plain product proves it."""
    acc = _product(equation, p.astype(value.dtype), value, p.dtype)
    careful = lambda: weigh_values(equation, p, kept, value)
    return lax.cond(jnp.all(jnp.isfinite(acc)), lambda: acc, careful)


def _product(equation, a, b, dtype):
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def merge_attention(
    outs: Sequence[Float[Array, "..."]] | Float[Array, "P ..."],
    lses: Sequence[Float[Array, "..."]] | Float[Array, "P ..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Merges attention over disjoint sets of keys into attention over their union, exactly, by log-sum-exp.

    lse = ln sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i, in float32. A part that saw no key (lse -inf) adds nothing,
    and rows with no key in any part give out 0, lse -inf. Differentiable in both arguments.

    Args:
      outs: parts [B, T, N, V] with lses [B, N, T], as `topk_attention` returns them; or [..., V] with lses [...], as
        `topk_decode_attention` does ([B, N, V] with [B, N]). A sequence, or stacked on a leading axis.
      lses: natural logarithms, float32 or float64.

    Raises:
      ValueError: no part, different numbers of parts, or shapes that do not belong together.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge_attention: got {len(outs)} outs and {len(lses)} lses, wanted as many of both, at least 1"
        )
    for out, lse in zip(outs, lses, strict=True):
        rows = out.shape[:-1]
        wanted = (rows[0], rows[2], rows[1]) if out.ndim == 4 else rows
        if out.shape != outs[0].shape or lse.shape != wanted:
            raise ValueError(
                f"merge_attention: got an out of shape {out.shape} with an lse of shape {lse.shape}, "
                f"wanted {outs[0].shape} with {wanted}"
            )
    lse_stack = jnp.stack([lse.astype(precision.accumulator(lse.dtype)) for lse in lses])
    m = jnp.max(lse_stack, axis=0)
    scale = jnp.exp(jnp.where(lse_stack == -jnp.inf, -jnp.inf, lse_stack - finite_max(m)[None]))
    total = jnp.sum(scale, axis=0)
    share = scale / jnp.where(total == 0, 1, total)[None]
    if outs[0].ndim == 4:
        share = jnp.swapaxes(share, -1, -2)
    out_stack = jnp.stack([out.astype(share.dtype) for out in outs])
    # An empty part may hold anything, NaN included; its share of 0 must not carry that into the sum.
    parts = jnp.where(share[..., None] == 0, 0, share[..., None] * out_stack)
    return jnp.sum(parts, axis=0).astype(outs[0].dtype), log_sum_exp(m, total)
