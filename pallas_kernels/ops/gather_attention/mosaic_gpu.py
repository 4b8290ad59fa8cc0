"""Attention to listed keys: rows of keys and values are read where they lie, straight into registers (Mosaic GPU, Hopper).

A block takes parts of one row's list, for the heads that share both the list and a key/value head. Of a part, all key rows are
in flight together; each is multiplied by every query of the block, in float32, while it is in registers. The softmax is online:
when a part raises the max, what was summed before is scaled down. Then the part's value rows are read and added with their
weights. Masked slots read row 0, with weight 0, and it does not enter the sums, whatever it holds. The splits of a list are
merged by log-sum-exp.

Grid (B * T, blocks of heads, splits), one warpgroup. A cache in pages comes as one table for all sequences, and lists of its
rows. The backward is that of `xla`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import compat, gpu_lanes, gpu_merge, varying
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.ops.gather_attention import xla
from pallas_kernels.ops.gather_attention.block_sizes import GatherAttentionBlockSizes

_OP = "gather_attention: mosaic_gpu"
_LANES = 128
_PART = 128  # slots of the list taken at a time
_BLOCKS = 1056  # wanted in flight: eight on each of the 132 multiprocessors
_MAX_HEADS = 16  # of a block


def _gather_kernel(
    # inputs, global memory
    query_ref,  # [B, T, N, >= H]
    key_ref,  # [B, S, K, H]; a batch axis of 1 is one table for all
    value_ref,  # [B, S, K, V], likewise
    indices_ref,  # [B, T, G, slots] i32
    # outputs, global memory
    acc_ref,  # [splits, B, T, N, >= V] f32, sum of exp(s - m) * value
    m_ref,  # [splits, B, T, N] f32, max of the scores
    total_ref,  # [splits, B, T, N] f32, sum of exp(s - m)
    # scratch, shared memory
    queries_ref,  # [heads, >= H] f32
    places_ref,  # [part] i32
    scores_ref,  # [heads, part] f32, and then the weights
    sums_ref,  # f32
    *,
    heads: int,
    splits: int,
    scale: float,
    interpreted: bool,
):
    _, num_rows, num_heads, pitch = query_ref.shape
    _, _, scopes, slots = indices_ref.shape
    _, _, kv_heads, v_size = value_ref.shape
    dtype = value_ref.dtype
    row, block, split = lax.axis_index("row"), lax.axis_index("block"), lax.axis_index("split")
    b, t = lax.div(row, num_rows), lax.rem(row, num_rows)
    first = block * heads
    kv_head, scope = lax.div(first, num_heads // kv_heads), lax.div(first, num_heads // scopes)
    table = 0 if key_ref.shape[0] == 1 else b
    keys, values = key_ref.at[table, :, kv_head], value_ref.at[table, :, kv_head]

    wide = plgpu.Layout.WG_STRIDED((pitch,), vec_size=1)
    for h in range(heads):
        query = plgpu.load(query_ref.at[b, t, first + h], layout=wide, optimized=False)
        queries_ref[h] = query.astype(jnp.float32)
    one_each = plgpu.Layout.WG_STRIDED((_PART,), vec_size=1)
    vector = gpu_lanes.row_vector(dtype)
    strip = plgpu.Layout.WG_STRIDED((_LANES * vector,), vec_size=vector)

    def full(value, shape, layout):
        return plgpu.layout_cast(lax.broadcast(jnp.float32(value), shape), layout)

    def attend(index, carry):
        part = split + index * splits
        place = plgpu.load(
            indices_ref.at[b, t, scope, pl.ds(part * _PART, _PART)],
            layout=one_each,
            optimized=False,
        )
        listed = place >= 0

        def add_part(carry):
            maxima, totals, accs = (list(x) for x in carry)
            places_ref[...] = jnp.where(listed, place, 0)
            gpu_lanes.dot_rows(
                queries_ref, keys, places_ref, scores_ref, _PART, interpreted=interpreted
            )
            for h in range(heads):
                score = plgpu.load(scores_ref.at[h], layout=one_each) * scale
                m = jnp.maximum(maxima[h], jnp.max(jnp.where(listed, score, -jnp.inf)))
                shift = jnp.where(m == -jnp.inf, 0.0, m)
                weight = jnp.where(listed, jnp.exp(score - shift), 0.0)
                shrink = lambda like, layout, h=h, shift=shift: jnp.exp(
                    full(maxima[h] - shift, like.shape, layout)
                )
                totals[h] = totals[h] * shrink(totals[h], one_each) + weight
                accs[h] *= shrink(accs[h], strip)
                maxima[h] = m
                scores_ref[h] = weight
            accs = gpu_lanes.add_rows(
                accs, values, places_ref, scores_ref, _PART, interpreted=interpreted
            )
            return maxima, totals, accs

        return lax.cond(jnp.max(place) >= 0, add_part, lambda carry: carry, carry)

    steps = lax.div(slots // _PART - split + (splits - 1), splits)
    start = (
        [jnp.float32(-jnp.inf)] * heads,
        [full(0.0, (_PART,), one_each)] * heads,
        [full(0.0, (_LANES * vector,), strip)] * heads,
    )
    maxima, totals, accs = lax.fori_loop(0, steps, attend, start)
    for h in range(heads):
        acc_ref[split, b, t, first + h] = gpu_lanes.fold_rows(accs[h], sums_ref, v_size, dtype)
        m_ref[split, b, t, first + h] = maxima[h]
        total_ref[split, b, t, first + h] = jnp.sum(totals[h])


def _heads_of_a_block(num_heads: int, kv_heads: int, scopes: int) -> int:
    """Returns how many neighbouring heads share a list and a key/value head, and fit a block."""
    shared = min(num_heads // kv_heads, num_heads // scopes)
    return next(n for n in range(min(shared, _MAX_HEADS), 0, -1) if shared % n == 0)


def _splits(query, key, indices, block_sizes: GatherAttentionBlockSizes | None) -> int:
    """Returns how many parts a list is divided into: the caller's number, else the tuned one, else what fills the device."""
    b, t, n, h = query.shape
    k, (scopes, size) = key.shape[2], indices.shape[2:]
    blocks = b * t * (n // _heads_of_a_block(n, k, scopes))
    sizes = block_sizes_.resolve(
        "gather_attention",
        "mosaic_gpu",
        block_sizes,
        cls=GatherAttentionBlockSizes,
        dtype=query.dtype.name,
        bucket={"blocks": blocks, "slots": size, "head": h},
        heuristic=GatherAttentionBlockSizes,
    )
    return block_sizes_.even_splits(
        pl.cdiv(size, _PART), sizes.num_splits or pl.cdiv(_BLOCKS, blocks)
    )


def _attend(query, key, value, indices, scale, splits: int):
    """Returns out [B, T, N, V] and lse [B, N, T]; indices hold -1 where masked."""
    b, t, n, h = query.shape
    _, _, k, v_size = value.shape
    scopes, size = indices.shape[2:]
    options = interpret_options()
    heads = _heads_of_a_block(n, k, scopes)
    slots = pl.cdiv(size, _PART) * _PART
    pitch = pl.cdiv(h, _LANES) * _LANES
    query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, pitch - h)))
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, 0), (0, slots - size)), constant_values=-1)
    partial_row = jax.ShapeDtypeStruct((splits, b, t, n), jnp.float32)
    row = gpu_lanes.folded_size(v_size, value.dtype)
    acc, m, total = plgpu.kernel(
        functools.partial(
            _gather_kernel,
            heads=heads,
            splits=splits,
            scale=scale,
            interpreted=options is not None,
        ),
        out_type=[
            jax.ShapeDtypeStruct((splits, b, t, n, row), jnp.float32),
            partial_row,
            partial_row,
        ],
        scratch_types=[
            plgpu.SMEM((heads, pitch), jnp.float32),
            plgpu.SMEM((_PART,), jnp.int32),
            plgpu.SMEM((heads, _PART), jnp.float32),
            plgpu.SMEM((gpu_lanes.fold_room(value.dtype),), jnp.float32),
        ],
        grid=(b * t, n // heads, splits),
        grid_names=("row", "block", "split"),
        kernel_name=f"gather_attention_h{h}_v{v_size}_n{heads}",
        interpret=compat.gpu_interpret(options),
    )(query, key, value, indices)
    out, lse = gpu_merge.merge_splits(acc, m, total, value.dtype)
    return out[..., :v_size], jnp.swapaxes(lse, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(rule: xla.Rule, splits: int, query, key, value, indices):
    return _attend(query, key, value, indices, rule.scale, splits)


def _gather_fwd(rule, splits, query, key, value, indices):
    return _gather(rule, splits, query, key, value, indices), (query, key, value, indices)


def _gather_bwd(rule, _, residuals, cotangents):
    query, key, value, indices = residuals
    indices = jnp.where(indices < 0, key.shape[1], indices)  # as `xla` masks slots
    return xla.attend_bwd(rule, (query, key, value, indices), cotangents)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather_attention(query, key, value, indices, *, scale, block_sizes=None):
    """Arguments as the public function, checked, masked slots -1; returns (out, lse). A block holds one row, so no block_q."""
    dtype = query.dtype.name
    if dtype not in ("float32", "bfloat16", "float16"):
        raise NotImplementedError(f"{_OP} got dtype {dtype}, wanted float32, bfloat16 or float16")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if 0 in array.shape:
            raise NotImplementedError(
                f"{_OP} got {name} of shape {array.shape}, wanted every axis of at least 1"
            )
    widest = 32 * gpu_lanes.row_vector(query.dtype)
    for name, size in (("key", key.shape[3]), ("value", value.shape[3])):
        if size % 8 or size > widest:
            raise NotImplementedError(
                f"{_OP} got {name} of head size {size}, wanted a multiple of 8 up to {widest} in {dtype}"
            )
        gpu_lanes.check_table(_OP, name, key if name == "key" else value)
    rule = xla.rule_of(query, key, value, indices, scale, block_sizes)
    splits = _splits(query, key, indices, block_sizes)
    return _gather(rule, splits, *varying.align(query, key, value, indices))
