"""Attention to listed keys: rows of keys and values are copied from where they lie in HBM, a part of a list at a time (Mosaic TPU).

1. A part of a list comes to SMEM, where the copies read it, and to VMEM, where it masks scores; two parts ahead.
2. Each slot's rows of keys and values are copied, one part ahead, so that hundreds of copies are in flight.
3. The part's scores leave the matrix unit; the softmax is online: what was summed before is scaled down when the max grows.
4. After the last part of a list its heads' rows are divided and written.

One list for all heads (G = 1) fetches a token's heads in one copy, [K, H]; as the tokens' heads follow each other in VMEM, a
head is read with a stride. A list of one key/value head fetches that head's row alone. Of bfloat16 both fetch words, which hold
two neighbouring heads, since neither a copy nor a stride of less than a word exists; the half that is wanted is shifted out.
Heads of more than 128 take a copy for each 128. The parts of all lists of a query row follow each other without a break.
Masked slots fetch row 0, which enters no sum, whatever it holds; parts past a list's last valid slot are left out.

Products accumulate in float32; float32 inputs are multiplied in full precision, bfloat16 weights as the sum of two bfloat16
parts. The backward is that of `xla`.

On a device only caches that XLA lays out as [S, K, H] are taken, for all others would be copied at every call, and `xla` reads
those in place; an interpreter has no layouts, and takes all.

Grid (B * T,), parallel. SMEM: four parts of a list. VMEM: two parts of keys and of values. Compiled ahead of time for v5e, v5p,
v6e and tpu7x, and interpreted, but for the view of bfloat16 as words, which the simulators lack; never executed on a TPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import block_sizes as block_sizes_
from pallas_kernels.core import online_softmax, tpu_launch, tpu_tiles, varying
from pallas_kernels.core.interpret import interpret_options
from pallas_kernels.core.tpu_launch import check_vmem
from pallas_kernels.core.tpu_tiles import LANES, SUBLANES, as_row, round_up
from pallas_kernels.ops.gather_attention import xla
from pallas_kernels.ops.gather_attention.block_sizes import GatherAttentionBlockSizes

_OP = "gather_attention"
_PART_OF_TOKENS = 128  # slots taken at a time where each fetches all heads
_PART_OF_ROWS = 256  # where each fetches one head
_LIST_BUFFERS = 4  # three would do, but a power of two is chosen from by a mask
_UNROLL = 8
_HALF = 16  # bits
_MASKED = -(2**31)  # a slot's place that is none; without its one bit it is 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Refs:
    """What the kernel reads and writes, one query row at a time; Q heads read a list, R slots make a part."""

    # inputs
    parts: jax.Ref  # [1, 1, G + 1] i32, SMEM: parts to be read of each list, at least 1, and of all
    query: jax.Ref  # [1, G, Q, H] f32, VMEM
    lists: jax.Ref  # [B * T * G * parts, 1, R] i32, HBM
    key: jax.Ref  # [B or 1, S, K, H], HBM
    value: jax.Ref
    # outputs
    out: jax.Ref  # [1, G, Q, V] f32, VMEM
    lse: jax.Ref  # [1, 1, N] f32, VMEM
    # scratch
    taken: jax.Ref  # [4] i32, SMEM: which list and part are in each buffer of these two
    places: jax.Ref  # [4, 1, R] i32, SMEM
    slots: jax.Ref  # [4, 1, R] i32, VMEM: the same
    key_rows: jax.Ref  # [2, pieces of H, R * lines, H of a piece] of float32 or of words, VMEM
    value_rows: jax.Ref
    acc: jax.Ref  # [Q, V] f32, VMEM, sum of exp(s - m) * value
    m: jax.Ref  # [Q, 1] f32, VMEM, max of the scores
    total: jax.Ref  # [Q, 1] f32, VMEM, sum of exp(s - m)
    lse_column: jax.Ref  # [N, 1] f32, VMEM
    placed: jax.Ref  # [4] DMA semaphores
    listed: jax.Ref
    key_arrived: jax.Ref  # [2] DMA semaphores
    value_arrived: jax.Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static numbers of one launch."""

    num_rows: int  # T
    num_heads: int
    num_kv_heads: int
    num_lists: int  # G
    most_parts: int  # of a list
    part: int  # R
    form: str  # what a slot fetches: "tokens" (all heads), "rows" (one head), "words" (one head and its neighbour)
    paired_outside: bool  # the words are operands already
    unroll: int  # copies that one step of the loop over them starts
    scale: float
    dtype: jnp.dtype

    @property
    def heads_of_a_list(self) -> int:
        return self.num_heads // self.num_lists

    @property
    def heads_of_a_slot(self) -> int:
        return self.num_kv_heads if self.form == "tokens" else 1

    @property
    def paired(self) -> bool:
        """Whether a line that is fetched holds two heads of bfloat16 in words, as they lie in a cache, or one of float32."""
        return self.dtype != jnp.float32

    @property
    def lines(self) -> int:
        """Lines that a slot fetches."""
        return pl.cdiv(self.heads_of_a_slot, 2 if self.paired else 1)


def _piece(head_size: int) -> int:
    """Returns how many lanes one copy takes: lines of more than a register's lie apart, and cannot be copied alone."""
    return LANES if head_size % LANES == 0 else head_size  # only an interpreter takes others


def _form(num_kv_heads: int, num_lists: int, dtype) -> str:
    if num_lists == 1 and num_kv_heads > 1:
        return "tokens"
    return "rows" if dtype == jnp.float32 else "words"


def _kernel(refs: _Refs, *, plan: _Plan):
    row = pl.program_id(0)
    table = row // plan.num_rows if refs.key.shape[0] > 1 else 0
    heads = plan.heads_of_a_list
    parts_of = lambda g: refs.parts[0, 0, jnp.minimum(g, plan.num_lists - 1)]

    def split(at):
        """Returns the list and the part that a place stands for, one scalar, since registers for scalars are few."""
        if plan.num_lists == 1:
            return 0, at
        return lax.div(at, plan.most_parts), lax.rem(at, plan.most_parts)

    def following(at):
        """Returns the list and part that come after these."""
        g, part = split(at)
        return jnp.where(part + 1 < parts_of(g), at + 1, (g + 1) * plan.most_parts)

    def kv_head(g):
        return g * plan.num_kv_heads // plan.num_lists

    def list_copies(i):
        buffer = i % _LIST_BUFFERS
        source = refs.lists.at[row * plan.num_lists * plan.most_parts + refs.taken[buffer]]
        return (
            pltpu.make_async_copy(source, refs.places.at[buffer], refs.placed.at[buffer]),
            pltpu.make_async_copy(source, refs.slots.at[buffer], refs.listed.at[buffer]),
        )

    def start_list(i, at):
        refs.taken[i % _LIST_BUFFERS] = at
        for copy in list_copies(i):
            copy.start()

    def lines_of(slot):
        return pl.ds(pl.multiple_of(slot * plan.lines, plan.lines), plan.lines)

    def start_rows(i):
        for copy in list_copies(i):
            copy.wait()
        g, _ = split(refs.taken[i % _LIST_BUFFERS])
        head, buffer = kv_head(g), i % 2

        lines = pl.ds(head // 2 if plan.paired else head, 1)

        def streams_of(hbm, rows, arrived):
            if plan.paired and not plan.paired_outside:
                hbm = hbm.bitcast(jnp.int32)
            _, pieces, _, width = rows.shape
            for piece in range(pieces):
                own = slice(None) if plan.form == "tokens" else lines
                source = hbm.at[table, :, own, pl.ds(piece * width, width)]
                yield source, rows.at[buffer, piece], arrived.at[buffer]

        streams = (
            *streams_of(refs.key, refs.key_rows, refs.key_arrived),
            *streams_of(refs.value, refs.value_rows, refs.value_arrived),
        )

        def fetch(turn, carry):
            first = pl.multiple_of(turn * plan.unroll, plan.unroll)
            # A view of the turn's own places: what is constant in their addresses is not computed again for each.
            places = refs.places.at[i % _LIST_BUFFERS, 0, pl.ds(first, plan.unroll)]
            for j in range(plan.unroll):
                place = places[j] & ~_MASKED  # masked slots fetch row 0
                for source, rows, arrived in streams:
                    target = rows.at[lines_of(first + j)]
                    pltpu.make_async_copy(source.at[place], target, arrived).start()
            return carry

        lax.fori_loop(0, plan.part // plan.unroll, fetch, 0)

    def wait_for(rows, arrived, i):
        # One wait for all rows of the part: a semaphore counts bytes.
        buffer = rows.at[i % 2]
        pltpu.make_async_copy(buffer, buffer, arrived.at[i % 2]).wait()

    def blank_masked_values(i):
        """Clears what masked slots have fetched: 0 * NaN is NaN."""

        def blank(j, carry):
            @pl.when(refs.places[i % _LIST_BUFFERS, 0, j] < 0)
            def _clear():
                at = i % 2, slice(None), lines_of(j)
                refs.value_rows[at] = jnp.zeros_like(refs.value_rows[at])

            return carry

        lax.fori_loop(0, plan.part, blank, 0)

    def head_of(words, odd):
        """Returns one head of two, [R, size]; the lower half of a word is the even one's."""
        # Bits in the upper half of a float32 are a bfloat16.
        bits = lax.shift_left(words, jnp.full(words.shape, _HALF * (1 - odd), jnp.int32))
        bits = bits & ~((1 << _HALF) - 1)
        return lax.bitcast_convert_type(bits, jnp.float32).astype(plan.dtype)

    def by_head(rows, i, g):
        """Yields the part's rows of each key/value head that the list serves, [R, size]."""
        for line in range(plan.lines):
            # A token's lines lie together, so that a head's are some apart.
            own = pl.ds(line, plan.part, stride=plan.lines)
            # Of one type, as an interpreter wants the numbers beside a strided slice.
            pieces = [rows[i % 2, jnp.int32(piece), own] for piece in range(rows.shape[1])]
            block = jnp.concatenate(pieces, axis=1)
            if not plan.paired:
                yield block
            elif plan.form == "words":
                yield head_of(block, kv_head(g) % 2)
            else:
                for odd in range(min(2, plan.num_kv_heads - 2 * line)):
                    yield head_of(block, odd)

    def of_own_head(products):
        """Takes each query head's rows from the product with its own key/value head."""
        each = heads // plan.heads_of_a_slot
        result = next(products)
        for head, product in enumerate(products, 1):
            own = tpu_tiles.rows_between(product.shape, head * each, (head + 1) * each)
            result = jnp.where(own, product, result)
        return result

    def attend(i):
        g, part = split(refs.taken[i % _LIST_BUFFERS])

        @pl.when(part == 0)
        def _begin():
            refs.acc[...] = jnp.zeros_like(refs.acc)
            refs.total[...] = jnp.zeros_like(refs.total)
            refs.m[...] = jnp.full_like(refs.m, -jnp.inf)

        slots = refs.slots[i % _LIST_BUFFERS]
        wait_for(refs.key_rows, refs.key_arrived, i)
        query = refs.query[0, g].astype(plan.dtype)
        keys = by_head(refs.key_rows, i, g)
        score = of_own_head(tpu_tiles.dot(query, key, (1, 1)) for key in keys)
        listed = lax.broadcast_in_dim(slots >= 0, score.shape, (0, 1))
        score = jnp.where(listed, plan.scale * score, -jnp.inf)
        before = refs.m[...]
        m = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
        safe = online_softmax.finite_max(m)
        p = jnp.where(listed, jnp.exp(score - safe), 0.0)
        shrink = jnp.exp(before - safe)
        refs.m[...] = m
        refs.total[...] = shrink * refs.total[...] + jnp.sum(p, axis=1, keepdims=True)

        wait_for(refs.value_rows, refs.value_arrived, i)
        pl.when(jnp.min(slots) < 0)(lambda: blank_masked_values(i))
        values = by_head(refs.value_rows, i, g)
        added = of_own_head(tpu_tiles.weigh(p, value, (1, 0)) for value in values)
        refs.acc[...] = shrink * refs.acc[...] + added

        @pl.when(part + 1 == parts_of(g))
        def _end():
            total = refs.total[...]
            empty = total == 0
            quotient = refs.acc[...] / jnp.where(empty, 1.0, total)
            refs.out[0, g] = jnp.where(empty, 0.0, quotient)
            first_head = pl.ds(g * heads, heads) if plan.num_lists > 1 else slice(None)
            refs.lse_column[first_head, :] = online_softmax.log_sum_exp(refs.m[...], total)

    steps = refs.parts[0, 0, plan.num_lists]

    def step(i, after):
        pl.when(i + 2 < steps)(lambda: start_list(i + 2, after))
        pl.when((i + 1 >= 0) & (i + 1 < steps))(lambda: start_rows(i + 1))
        pl.when(i >= 0)(lambda: attend(i))
        return following(after)

    lax.fori_loop(-2, steps, step, jnp.int32(0))
    refs.lse[0] = as_row(refs.lse_column[...])


def _as_words(x):
    """Packs each two neighbouring heads of bfloat16 into words, the even one in the lower half: [.., K, H] -> [.., K / 2, H]."""
    *rest, k, h = x.shape
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    bits = jnp.pad(bits, (*((0, 0) for _ in rest), (0, k % 2), (0, 0)))
    bits = bits.reshape(*rest, -1, 2, h)
    words = bits[..., 0, :] | (bits[..., 1, :] << _HALF)
    return lax.bitcast_convert_type(words, jnp.int32)


def _part(query, key, indices, block_sizes: GatherAttentionBlockSizes | None) -> int:
    """Returns how many slots of a list make a part: the caller's number, else the tuned one, else what keeps copies in flight."""
    b, t, _, h = query.shape
    k, (scopes, size) = key.shape[2], indices.shape[2:]
    usual = _PART_OF_TOKENS if _form(k, scopes, query.dtype) == "tokens" else _PART_OF_ROWS
    sizes = block_sizes_.resolve(
        _OP,
        "mosaic_tpu",
        block_sizes,
        cls=GatherAttentionBlockSizes,
        dtype=query.dtype.name,
        bucket={"lists": b * t * scopes, "slots": size, "head": h},
        heuristic=lambda: GatherAttentionBlockSizes(block_slots=usual),
    )
    return min(round_up(sizes.block_slots or usual, _UNROLL), round_up(size, _UNROLL))


def _attend(query, key, value, indices, scale, part: int):
    """Returns out [B, T, N, V] and lse [B, N, T]; indices hold -1 where masked."""
    b, t, n, h = query.shape
    _, _, k, v = value.shape
    scopes, size = indices.shape[2:]
    dtype, options = query.dtype, interpret_options()
    form = _form(k, scopes, dtype)
    most_parts = pl.cdiv(size, part)
    # The simulators do not know the view of bfloat16 as words, so that there the words are made beforehand.
    paired_outside = dtype != jnp.float32 and options is not None
    plan = _Plan(
        num_rows=t,
        num_heads=n,
        num_kv_heads=k,
        num_lists=scopes,
        most_parts=most_parts,
        part=part,
        form=form,
        paired_outside=paired_outside,
        unroll=1 if options else _UNROLL,  # an interpreter would only compile for longer
        scale=scale,
        dtype=dtype,
    )
    ends = jnp.max(jnp.where(indices >= 0, jnp.arange(1, size + 1, dtype=jnp.int32), 0), axis=-1)
    parts = jnp.maximum(pl.cdiv(ends, jnp.int32(part)), 1).reshape(b * t, 1, scopes)
    padding = most_parts * part - size
    lists = jnp.where(indices < 0, _MASKED, indices)
    lists = jnp.pad(lists, ((0, 0), (0, 0), (0, 0), (0, padding)), constant_values=_MASKED)
    operands = {
        "parts": jnp.concatenate([parts, parts.sum(2, keepdims=True, dtype=jnp.int32)], axis=2),
        "query": query.astype(jnp.float32).reshape(b * t, scopes, n // scopes, h),
        "lists": lists.reshape(-1, 1, part),
        "key": _as_words(key) if paired_outside else key,
        "value": _as_words(value) if paired_outside else value,
    }
    out, lse = _launch(operands, plan, value_head=v)
    return out.reshape(b, t, n, v).astype(dtype), jnp.swapaxes(lse.reshape(b, t, n), 1, 2)


def _launch(operands, plan: _Plan, *, value_head: int):
    """Returns out [B * T, G, Q, V] and lse [B * T, 1, N], both float32."""
    rows, _, _, h = operands["query"].shape
    n = plan.num_heads
    part, k = plan.part, plan.num_kv_heads
    f32, i32 = jnp.float32, jnp.int32
    held = i32 if plan.paired else f32
    key_rows, value_rows = (
        (2, size // _piece(size), part * plan.lines, _piece(size)) for size in (h, value_head)
    )
    heads = plan.heads_of_a_list
    scratch = {
        "taken": pltpu.SMEM((_LIST_BUFFERS,), i32),
        "places": pltpu.SMEM((_LIST_BUFFERS, 1, part), i32),
        "slots": pltpu.VMEM((_LIST_BUFFERS, 1, part), i32),
        "key_rows": pltpu.VMEM(key_rows, held),
        "value_rows": pltpu.VMEM(value_rows, held),
        "acc": pltpu.VMEM((heads, value_head), f32),
        "m": pltpu.VMEM((heads, 1), f32),
        "total": pltpu.VMEM((heads, 1), f32),
        "lse_column": pltpu.VMEM((n, 1), f32),
        "placed": pltpu.SemaphoreType.DMA((_LIST_BUFFERS,)),
        "listed": pltpu.SemaphoreType.DMA((_LIST_BUFFERS,)),
        "key_arrived": pltpu.SemaphoreType.DMA((2,)),
        "value_arrived": pltpu.SemaphoreType.DMA((2,)),
    }
    outputs = {
        "out": jax.ShapeDtypeStruct((rows, plan.num_lists, heads, value_head), f32),
        "lse": jax.ShapeDtypeStruct((rows, 1, n), f32),
    }

    # A part is in two buffers; query, output and its sums are in two as well.
    tiles = tpu_tiles.tiled_size(key_rows) + tpu_tiles.tiled_size(value_rows)
    shown = sum(
        tpu_tiles.tiled_size((plan.num_lists, heads, size)) for size in (h, value_head, value_head)
    )
    needed = 8 * tiles + 8 * shown + 8 * n * LANES
    slots = rows * plan.num_lists * plan.most_parts * part
    # Every place lies in [0, S), whatever the caller listed; checks would be half of what starts a copy.
    return tpu_launch.call_by_name(
        functools.partial(_kernel, plan=plan),
        _Refs,
        operands,
        outputs=outputs,
        scratch=scratch,
        in_hbm=("lists", "key", "value"),
        in_smem=("parts",),
        vmem_limit_bytes=check_vmem(_OP, needed, f"{part} slots of K={k}, H={h}"),
        cost_estimate=pl.CostEstimate(
            flops=2 * slots * plan.heads_of_a_list * (h + value_head),
            bytes_accessed=slots * (4 * plan.lines * (h + value_head) + 8),
            transcendentals=slots * plan.heads_of_a_list,
        ),
        name=f"gather_attention_{plan.dtype.name}_{plan.form}_g{plan.num_lists}_r{part}",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(rule: xla.Rule, part: int, query, key, value, indices):
    indices = jnp.where(indices < key.shape[1], indices, -1)
    return _attend(query, key, value, indices, rule.scale, part)


def _gather_fwd(rule, part, query, key, value, indices):
    return _gather(rule, part, query, key, value, indices), (query, key, value, indices)


_gather.defvjp(_gather_fwd, lambda rule, _, *rest: xla.attend_bwd(rule, *rest))


def _check_layout(key, value):
    """Refuses what XLA does not lay out as [S, K, H]."""
    k, dtype = key.shape[2], key.dtype
    for name, size in (("key", key.shape[3]), ("value", value.shape[3])):
        if size % LANES:
            raise NotImplementedError(
                f"{_OP}: mosaic_tpu got {name} of head size {size}, wanted a multiple of {LANES} ('xla' takes any)"
            )
    if not (k in (2, 4) or k % SUBLANES == 0 or (k == 1 and dtype == jnp.float32)):
        wanted = "2, 4 or a multiple of 8" + (", or 1" if dtype == jnp.float32 else "")
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got key of {k} heads in {dtype.name}, wanted {wanted} ('xla' takes any)"
        )


def gather_attention(query, key, value, indices, *, scale, block_sizes=None):
    """Arguments as the public function, checked, masked slots -1; returns (out, lse).

    Raises:
      NotImplementedError: float16 or float64 inputs, or a cache that XLA does not lay out as [S, K, H].
    """
    dtype = query.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"{_OP}: mosaic_tpu got query of dtype {dtype.name}, wanted float32 or bfloat16"
        )
    if interpret_options() is None:
        _check_layout(key, value)
    rule = xla.rule_of(query, key, value, indices, scale, block_sizes)
    indices = jnp.where(indices < 0, key.shape[1], indices)
    part = _part(query, key, indices, block_sizes)
    return _gather(rule, part, *varying.align(query, key, value, indices))
