"""Exact merge of partial attentions that split blocks left behind, by log-sum-exp (Mosaic GPU).

XLA makes three kernels of this, which take longer than all of the sums.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import compat
from pallas_kernels.core.interpret import interpret_options

_LANES = 128
_AT_ONCE = 16  # splits whose parts are read together


def _merge_kernel(
    # inputs, global memory
    acc_ref,  # [splits, rows, width] f32
    m_ref,  # [splits, rows] f32
    total_ref,  # [splits, rows] f32
    # outputs, global memory
    out_ref,  # [rows, width]
    lse_ref,  # [rows] f32
):
    index = lax.axis_index("row")
    splits, _, width = acc_ref.shape
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // _LANES)

    def fold(init, use):
        """carry = use(split, real, carry) over the splits, the reads of some of them under way together."""

        def some(group, carry):
            for i in range(min(_AT_ONCE, splits)):
                split = group * _AT_ONCE + i
                carry = use(jnp.minimum(split, splits - 1), split < splits, carry)
            return carry

        return lax.fori_loop(0, pl.cdiv(splits, _AT_ONCE), some, init)

    largest = fold(
        jnp.float32(-jnp.inf), lambda split, _, largest: jnp.maximum(largest, m_ref[split, index])
    )
    shift = jnp.where(largest == -jnp.inf, 0.0, largest)
    spread = lambda x: plgpu.layout_cast(lax.broadcast(x, (width,)), layout)

    def add(split, real, carry):
        acc, total = carry
        part = plgpu.load(acc_ref.at[split, index], layout=layout, optimized=False)
        m = m_ref[split, index]
        weight = jnp.where(real & (m != -jnp.inf), jnp.exp(m - shift), 0.0)
        return acc + spread(weight) * part, total + weight * total_ref[split, index]

    acc, total = fold((spread(jnp.float32(0)), jnp.float32(0)), add)
    empty = total == 0  # and so is the sum
    safe = jnp.where(empty, 1.0, total)
    out_ref[index] = (acc / spread(safe)).astype(out_ref.dtype)
    lse_ref[index] = jnp.where(empty, -jnp.inf, shift + jnp.log(safe))


def merge_splits(acc, m, total, dtype):
    """Adds up parts that were not divided yet, each scaled by exp of its own max; returns (out, lse).

    A part that saw no key has m = -inf, total = 0, acc = 0.

    Args:
      acc: float32 [splits, ..., width], width a power of two of at least 128.
      m, total: float32 [splits, ...].
      dtype: of out.
    """
    splits, *rows, width = acc.shape
    count = m[0].size
    out, lse = plgpu.kernel(
        _merge_kernel,
        out_type=[
            jax.ShapeDtypeStruct((count, width), dtype),
            jax.ShapeDtypeStruct((count,), jnp.float32),
        ],
        grid=(count,),
        grid_names=("row",),
        kernel_name=f"merge_splits_{splits}",
        interpret=compat.gpu_interpret(interpret_options()),
    )(acc.reshape(splits, count, width), m.reshape(splits, count), total.reshape(splits, count))
    return out.reshape(*rows, width), lse.reshape(rows)
