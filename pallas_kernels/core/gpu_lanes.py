"""What Mosaic GPU has no operation for: places that differ from lane to lane. Written below it, each with an interpretable twin.

Pallas on GPUs moves whole vectors: it can neither read at computed places nor pack the selected elements of a vector. Both
need instructions of single lanes (warp votes, predicated stores), which `inline_mgpu` reaches. The interpreter does not know
those, so each function here takes `interpreted` and then computes the same by plain operations on whole references.

All functions are for one warpgroup of 128 lanes and, but for rows and columns of `plgpu.Layout.WGMMA`, vectors in
`plgpu.Layout.WG_STRIDED`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf

from pallas_kernels.core.compat import llvm, nvvm

_LANES, _WARP, _WARPS = 128, 32, 4
_EVERY_LANE = 0xFFFFFFFF
_BYTES = 4  # of a word
_ROWS_IN_FLIGHT = 16  # rows that a lane reads a part of before it uses the first
GROUP = 8  # neighbours that `sampled_load` reads together: 32 bytes of float32, one sector of global memory
_SWIZZLE = 128  # bytes of a row of a tile that tensor cores read
MAX_VECTORS = 8  # register vectors a lane may hand to one `append`
MAX_SCALARS = 16  # that one `reduce` returns
# int32 of shared memory that a kernel lends to `append` and `reduce`
SCRATCH = _WARPS * max(MAX_VECTORS, MAX_SCALARS)
_SCALAR = plgpu.Layout.WG_SPLAT(())
_INT32, _FLOAT32 = jnp.dtype(jnp.int32), jnp.dtype(jnp.float32)


def sampled_load(ref, begin, span, size: int, *, interpreted: bool):
    """Reads groups of eight neighbours, spread evenly over a part of a 1-D reference.

    Group g begins at `begin` + g * `span` / (size / 8), rounded down to a multiple of eight after `begin`.

    Args:
      ref: [S] in global memory; begin + span + 8 <= S.
      begin, span: int32 scalars, at least 0.
      size: elements to read; a power of two of at least 128.

    Returns:
      [size], laid out as WG_STRIDED of vectors of one.
    """
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=1)
    shift = (size // GROUP).bit_length() - 1
    if interpreted:
        place = lax.iota(jnp.int32, size)
        # Two halves of the span, as there may be no 64-bit integers here: (g * span) >> shift without overflow.
        group, low = lax.div(place, GROUP), span & ((1 << shift) - 1)
        at = group * (span >> shift) + ((group * low) >> shift)
        return ref[...][begin + (at & -GROUP) + lax.rem(place, GROUP)]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SCALAR, _SCALAR),
        return_type=plgpu.ShapeDtypeStruct((size,), ref.dtype, layout=layout),
    )
    def load(ctx, ref, begin, span):
        del ctx
        begin, span = begin.registers.item(), span.registers.item()
        lane = _thread()
        element = ir.MemRefType(ref.type).element_type
        pointer = mgpu.utils.memref_ptr(ref)
        vector = ir.VectorType.get((1,), element)
        group, inside = arith.shrui(lane, _c(3)), arith.andi(lane, _c(GROUP - 1))
        whole, low = arith.shrui(span, _c(shift)), arith.andi(span, _c((1 << shift) - 1))
        registers = []
        for step in range(size // _LANES):
            index = arith.addi(group, _c(step * (_LANES // GROUP)))
            place = arith.addi(
                arith.muli(index, whole), arith.shrui(arith.muli(index, low), _c(shift))
            )
            place = arith.addi(begin, arith.addi(arith.andi(place, _c(-GROUP)), inside))
            at = mgpu.utils.getelementptr(pointer, [place], element)
            registers.append(llvm.load(vector, at))
        return mgpu.FragmentedArray(
            _registers=np.array(registers, object), _layout=layout.to_mgpu(), _is_signed=None
        )

    return load(ref, begin, span)


def bitcast_scalar(value, dtype, *, interpreted: bool):
    """Returns the float32 or int32 scalar of the same bits; `lax.bitcast_convert_type` lowers for vectors only."""
    if interpreted:
        return lax.bitcast_convert_type(value, dtype)
    dtype = jnp.dtype(dtype)

    @plgpu.inline_mgpu(
        arg_types=(_SCALAR,), return_type=plgpu.ShapeDtypeStruct((), dtype, layout=_SCALAR)
    )
    def cast(ctx, value):
        del ctx
        signed = None if dtype == _FLOAT32 else True
        return mgpu.FragmentedArray.bitcast(
            value, mgpu.utils.dtype_to_ir_type(dtype), output_is_signed=signed
        )

    return cast(value)


def append(hit, payloads: Sequence, lists: Sequence, base, scratch, *, layout, interpreted: bool):
    """Writes the elements of vectors where `hit` to the ends of lists, in the order of the vectors.

    Every lane has passed a barrier when this returns, so that lists in shared memory may be read.

    Args:
      hit: bool [n].
      payloads: 32-bit vectors [n].
      lists: as many 1-D references, in shared or global memory, all of one length; what does not fit is dropped.
      base: int32 scalar, elements that the lists hold already.
      scratch: int32 [SCRATCH] in shared memory.
      layout: of the vectors, WG_STRIDED with at most `MAX_VECTORS` register vectors a lane.

    Returns:
      int32 scalar, base plus the number of hits, whether they fitted or not.
    """
    capacity = lists[0].shape[0]
    if interpreted:
        rank = jnp.cumsum(hit.astype(jnp.int32)) - 1
        slot = jnp.where(hit & (base + rank < capacity), base + rank, capacity)
        for payload, target in zip(payloads, lists, strict=True):
            target[...] = target[...].at[slot].set(payload, mode="drop")
        return base + jnp.sum(hit.astype(jnp.int32))
    count = len(payloads)

    @plgpu.inline_mgpu(
        arg_types=(
            layout,
            *[layout] * count,
            *[plgpu.RefType()] * count,
            _SCALAR,
            plgpu.RefType(),
        ),
        return_type=plgpu.ShapeDtypeStruct((), _INT32, layout=_SCALAR),
    )
    def pack(ctx, hit, *rest):
        del ctx
        base, scratch = rest[-2].registers.item(), rest[-1]
        total = _pack(hit, rest[:count], rest[count : 2 * count], base, scratch, capacity)
        return mgpu.FragmentedArray.splat(arith.addi(base, total), (), is_signed=True)

    return pack(hit, *payloads, *lists, base, scratch)


def reduce(vectors: Sequence, scratch, *, layout, kind: str, interpreted: bool):
    """Returns the sum, or the largest element, of each of up to `MAX_SCALARS` int32 vectors, in one exchange between warps.

    Args:
      vectors: int32 [n] each.
      scratch: int32 [SCRATCH] in shared memory.
      layout: of the vectors, WG_STRIDED.
      kind: "add" or "max".
    """
    if interpreted:
        return [{"add": jnp.sum, "max": jnp.max}[kind](vector) for vector in vectors]

    @plgpu.inline_mgpu(
        arg_types=(*[layout] * len(vectors), plgpu.RefType()),
        return_type=tuple(plgpu.ShapeDtypeStruct((), _INT32, layout=_SCALAR) for _ in vectors),
    )
    def fold(ctx, *args):
        del ctx
        return tuple(
            mgpu.FragmentedArray.splat(value, (), is_signed=True)
            for value in _reduce(args[:-1], args[-1], kind)
        )

    return list(fold(*vectors, scratch))


def _reduce(vectors, scratch, kind):
    """Emits the body of `reduce`."""
    combine, warp_kind = {
        "add": (arith.addi, nvvm.ReductionKind.ADD),
        "max": (arith.maxsi, nvvm.ReductionKind.MAX),
    }[kind]
    lane, warp = _lane_and_warp()
    first_lane = arith.cmpi(arith.CmpIPredicate.eq, lane, _c(0))
    i32 = ir.IntegerType.get_signless(32)
    for v, vector in enumerate(vectors):
        whole = functools.reduce(combine, vector.registers.flat)
        parts = [_extract(whole, j) for j in range(vector.layout.vec_size)]
        value = mgpu.utils.redux(functools.reduce(combine, parts), _c(_EVERY_LANE), warp_kind)
        _store(scratch, arith.addi(warp, _c(_WARPS * v)), value, first_lane)
    mgpu.utils.warpgroup_barrier()
    quad = ir.VectorType.get((_WARPS,), i32)
    base = mgpu.utils.memref_ptr(scratch)
    found = []
    for v in range(len(vectors)):
        at = mgpu.utils.getelementptr(base, [_c(_WARPS * v)], i32)
        of_warps = llvm.load(quad, at, alignment=4 * _WARPS)
        found.append(functools.reduce(combine, [_extract(of_warps, w) for w in range(_WARPS)]))
    mgpu.utils.warpgroup_barrier()
    return found


def _pack(hit, payloads, lists, base, scratch, capacity):
    """Emits the body of `append`; returns the number of hits."""
    i32 = ir.IntegerType.get_signless(32)
    vectors, width = hit.registers.size, hit.layout.vec_size
    lane, warp = _lane_and_warp()

    # A word holds four register vectors, a byte each: first the lane's hits as bits, then how many they are, then how many there
    # are in this and all lower lanes of the warp, which is at most 128.
    marks, before, totals = [], [], []
    for first in range(0, vectors, _BYTES):
        mark = _c(0)
        for v in range(first, min(first + _BYTES, vectors)):
            for j in range(width):
                flag = _extract(hit.registers.flat[v], j)
                bit = _c(1 << (8 * (v - first) + j))
                mark = arith.ori(mark, arith.select(flag, bit, _c(0)))
        own = mark
        if width > 1:  # the sum of a byte's low four bits
            own = arith.subi(own, arith.andi(arith.shrui(own, _c(1)), _c(0x55555555)))
        if width > 2:
            pairs = arith.andi(arith.shrui(own, _c(2)), _c(0x33333333))
            own = arith.addi(arith.andi(own, _c(0x33333333)), pairs)
        running = _sum_below(own, _WARP)
        marks.append(mark)
        before.append(arith.subi(running, own))
        totals.append(_pick(running, _c(_WARP - 1)))
    byte_of = lambda words, v: arith.andi(
        arith.shrui(words[v // _BYTES], _c(8 * (v % _BYTES))), _c(0xFF)
    )

    # Vectors follow each other, and within a vector the warps: a sum over both, one a lane, says where each begins.
    total = totals[0]
    for word, other in enumerate(totals[1:], 1):
        later = arith.cmpi(arith.CmpIPredicate.uge, lane, _c(word * _BYTES))
        total = arith.select(later, other, total)
    shift = arith.muli(arith.andi(lane, _c(_BYTES - 1)), _c(8))
    slot = arith.addi(warp, arith.muli(lane, _c(_WARPS)))
    has_vector = arith.cmpi(arith.CmpIPredicate.ult, lane, _c(vectors))
    _store(scratch, slot, arith.andi(arith.shrui(total, shift), _c(0xFF)), has_vector)
    mgpu.utils.warpgroup_barrier()
    parts = _WARPS * vectors
    own = _load(scratch, lane)
    running = _sum_below(own, parts)
    begin = arith.addi(base, arith.subi(running, own))
    for v in range(vectors):
        start = _pick(begin, arith.addi(warp, _c(_WARPS * v)))
        some = arith.cmpi(arith.CmpIPredicate.ne, byte_of(totals, v), _c(0))
        branch = scf.IfOp(some)
        with ir.InsertionPoint(branch.then_block):
            slot = arith.addi(start, byte_of(before, v))
            for j in range(width):
                bit = arith.andi(marks[v // _BYTES], _c(1 << (8 * (v % _BYTES) + j)))
                flag = arith.cmpi(arith.CmpIPredicate.ne, bit, _c(0))
                fits = arith.cmpi(arith.CmpIPredicate.ult, slot, _c(capacity))
                wanted = arith.andi(flag, fits)
                for payload, target in zip(payloads, lists, strict=True):
                    _store(target, slot, _extract(payload.registers.flat[v], j), wanted)
                if j + 1 < width:
                    slot = arith.addi(slot, arith.extui(i32, flag))
            scf.yield_([])
    total = _pick(running, _c(parts - 1))
    mgpu.utils.warpgroup_barrier()
    return total


def _sum_below(value, lanes: int):
    """Adds to each of the first `lanes` lanes of a warp what all lower lanes hold."""
    i32 = ir.IntegerType.get_signless(32)
    both = llvm.StructType.get_literal([i32, ir.IntegerType.get_signless(1)])
    distance = 1
    while distance < lanes:
        moved = nvvm.shfl_sync(
            _c(_EVERY_LANE),
            value,
            _c(distance),
            _c(0),
            nvvm.ShflKind.up,
            return_value_and_is_valid=True,
            results=[both],
        )
        lower, has_lower = (
            llvm.extractvalue(i32, moved, [0]),
            llvm.extractvalue(ir.IntegerType.get_signless(1), moved, [1]),
        )
        value = arith.select(has_lower, arith.addi(value, lower), value)
        distance *= 2
    return value


def _pick(value, lane):
    """Returns what a lane of the warp holds."""
    i32 = ir.IntegerType.get_signless(32)
    return nvvm.shfl_sync(_c(_EVERY_LANE), value, lane, _c(31), nvvm.ShflKind.idx, results=[i32])


def check_table(op: str, name: str, array) -> None:
    """Refuses a cache [B, S, K, size] whose rows int32 cannot number; those of a batch axis of 1 are one table for all.

    Raises:
      NotImplementedError: names the argument, the got and the wanted.
    """
    if array.shape[1] >= 2**31:
        raise NotImplementedError(
            f"{op} got {name} with {array.shape[1]} rows in one table, wanted fewer than 2**31"
        )


def row_vector(dtype) -> int:
    """Elements of a row that a lane reads together: 16 bytes."""
    return 16 // jnp.dtype(dtype).itemsize


def rows_at_once(width: int, dtype) -> int:
    """How many rows of `width` elements a warpgroup reads together; lanes past a row's end repeat its last elements."""
    lanes_per_row = 1 << (max(width // row_vector(dtype), 1) - 1).bit_length()
    return max(_LANES // lanes_per_row, 1)


def add_rows(accs: Sequence, table, places, weights, size: int, *, interpreted: bool) -> list:
    """Adds weights[a, i] * table[places[i]] for i < size to each acc a; rows of weight 0 are read, but not added, whatever they hold.

    Args:
      accs: float32 [rows_at_once * lanes_per_row * row_vector] each, WG_STRIDED of vectors of `row_vector`: `rows_at_once`
        partial sums, one after the other, to be added up at the end.
      table: [S, width] in global memory, width a multiple of `row_vector`, rows contiguous and aligned to 16 bytes.
      places: int32 [>= size] in shared memory, all of them inside the table.
      weights: float32 [accs, size] in shared memory.
      size: a multiple of `rows_at_once`.
    """
    width, dtype = table.shape[1], table.dtype
    vector, together = row_vector(dtype), rows_at_once(width, dtype)
    if interpreted:
        rows = table[...][places[...][:size]].astype(jnp.float32)
        beyond = ((0, 0), (0, accs[0].size // together - width))
        results = []
        for index, acc in enumerate(accs):
            weight = weights[index, ...][:, None]
            terms = jnp.where(weight != 0, weight * rows, 0).reshape(-1, together, width)
            partial = acc.reshape(together, -1)
            # In the order of the kernel: each partial sum takes its rows one after the other.
            for step in range(terms.shape[0]):
                partial += jnp.pad(lax.index_in_dim(terms, step, keepdims=False), beyond)
            results.append(partial.reshape(acc.shape))
        return results
    layout = plgpu.Layout.WG_STRIDED(accs[0].shape, vec_size=vector)

    @plgpu.inline_mgpu(
        arg_types=(*[layout] * len(accs), *[plgpu.RefType()] * 3),
        return_type=tuple(
            plgpu.ShapeDtypeStruct(acc.shape, _FLOAT32, layout=layout) for acc in accs
        ),
    )
    def add(ctx, *args):
        del ctx
        *accs, table, places, weights = args
        f32 = ir.F32Type.get()
        sums = [[_extract(acc.registers.item(), j) for j in range(vector)] for acc in accs]
        for rows in _read_rows(table, places, size, together, vector):
            for index, register in rows:
                row = _floats(register, vector)
                for a, total in enumerate(sums):
                    weight = _load(weights, arith.addi(index, _c(a * size)))
                    # Unordered: a weight of NaN does count.
                    counts = arith.cmpf(arith.CmpFPredicate.UNE, weight, mgpu.c(0.0, f32))
                    for j in range(vector):
                        term = arith.addf(total[j], arith.mulf(weight, row[j]))
                        total[j] = arith.select(counts, term, total[j])
        results = []
        for total in sums:
            register = llvm.mlir_undef(ir.VectorType.get((vector,), f32))
            for j in range(vector):
                register = llvm.insertelement(register, total[j], _c(j))
            results.append(
                mgpu.FragmentedArray(
                    _registers=np.array([register], object),
                    _layout=layout.to_mgpu(),
                    _is_signed=None,
                )
            )
        return tuple(results)

    return list(add(*accs, table, places, weights))


def folded_size(width: int, dtype) -> int:
    """Size of what `fold_rows` returns: a row, and lanes past its end."""
    return max(_LANES * row_vector(dtype) // rows_at_once(width, dtype), _LANES)


def fold_room(dtype) -> int:
    """Float32 of shared memory that `fold_rows` needs."""
    return _LANES * row_vector(dtype) + _LANES


def fold_rows(acc, scratch, width: int, dtype):
    """Adds up the partial sums of `add_rows`, in order; past `width` the result holds anything."""
    size, together = acc.size, rows_at_once(width, dtype)
    row, wide = size // together, folded_size(width, dtype)
    scratch[pl.ds(0, size)] = acc
    layout = plgpu.Layout.WG_STRIDED((wide,), vec_size=1)
    parts = [
        plgpu.load(scratch.at[pl.ds(index * row, wide)], layout=layout) for index in range(together)
    ]
    return functools.reduce(lambda a, b: a + b, parts)


def dot_rows(queries, table, places, scores, size: int, *, interpreted: bool) -> None:
    """Writes scores[a, i] = <queries[a, :width], table[places[i]]> for i < size, summed in float32.

    Every lane has passed a barrier when this returns.

    Args:
      queries: float32 [A, >= width] in shared memory.
      table, places, size: as for `add_rows`; width at most 32 * `row_vector`.
      scores: float32 [A, size] in shared memory.
    """
    width, dtype = table.shape[1], table.dtype
    vector, together = row_vector(dtype), rows_at_once(width, dtype)
    if interpreted:
        rows = table[...][places[...][:size]].astype(jnp.float32)
        query = lax.slice_in_dim(queries[...], 0, width, axis=1)
        scores[...] = lax.dot_general(
            query, rows, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)
    def dot(ctx, queries, table, places, scores):
        del ctx
        f32 = ir.F32Type.get()
        count, pitch = ir.MemRefType(queries.type).shape
        lanes_per_row = _LANES // together
        lane = arith.andi(mgpu.utils.thread_idx(), _c(lanes_per_row - 1))
        column = arith.muli(lane, _c(vector))
        inside = arith.cmpi(arith.CmpIPredicate.ult, column, _c(width))
        column = arith.minsi(column, _c(width - vector))
        first_lane = arith.cmpi(arith.CmpIPredicate.eq, lane, _c(0))
        words = ir.VectorType.get((vector,), f32)
        base = mgpu.utils.memref_ptr(queries)
        for rows in _read_rows(table, places, size, together, vector):
            for a in range(count):
                at = mgpu.utils.getelementptr(base, [arith.addi(column, _c(a * pitch))], f32)
                query = llvm.load(words, at, alignment=16)
                query = [_extract(query, j) for j in range(vector)]
                # Lanes past the row's end repeat its last elements.
                query = [arith.select(inside, x, mgpu.c(0.0, f32)) for x in query]
                for index, register in rows:
                    row = _floats(register, vector)
                    total = arith.mulf(query[0], row[0])
                    for j in range(1, vector):
                        total = arith.addf(total, arith.mulf(query[j], row[j]))
                    distance = lanes_per_row // 2
                    while distance:
                        total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
                        distance //= 2
                    _store(scores, arith.addi(index, _c(a * size)), total, first_lane)
        mgpu.utils.warpgroup_barrier()

    dot(queries, table, places, scores)


def gather_rows(table, places, tile, *, transforms: tuple, interpreted: bool) -> None:
    """Copies table[places[i]] to row i of a tile in shared memory; `plgpu.commit_smem` is to follow.

    Args:
      table: as for `add_rows`, of two bytes an element; with transforms, of a width that is a multiple of 64.
      places: int32 [rows] in shared memory, all of them inside the table.
      tile: [rows, width] in shared memory; rows a multiple of `rows_at_once`.
      transforms: of the tile: those of `swizzled`, as tensor cores read it, or none, row after row.
    """
    size, width = tile.shape
    vector, together = row_vector(table.dtype), rows_at_once(width, table.dtype)
    if interpreted:
        tile[...] = table[...][places[...]]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(transforms)))
    def copy(ctx, table, places, tile):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        base = mgpu.utils.memref_ptr(tile)
        begin, pointer = llvm.ptrtoint(i32, base), base.type
        # A lane's 16 bytes of a row: in which of the tiles of 8 rows and 128 bytes, and where in its row.
        lane = arith.andi(_thread(), _c(_LANES // together - 1))
        byte = arith.minsi(arith.muli(lane, _c(16)), _c(2 * width - 16))
        across, inside = arith.shrui(byte, _c(7)), arith.andi(byte, _c(_SWIZZLE - 1))
        of_lane = arith.addi(arith.muli(across, _c(8 * _SWIZZLE)), inside)
        for rows in _read_rows(table, places, size, together, vector):
            for index, register in rows:
                if not transforms:
                    at = arith.addi(begin, arith.addi(arith.muli(index, _c(2 * width)), byte))
                    llvm.store(register, llvm.inttoptr(pointer, at), alignment=16)
                    continue
                down = arith.muli(arith.shrui(index, _c(3)), _c(16 * width))
                row = arith.muli(arith.andi(index, _c(7)), _c(_SWIZZLE))
                at = arith.addi(begin, arith.addi(of_lane, arith.addi(down, row)))
                # Swizzling exchanges the 16 bytes of a row by the row's number, as found in the address.
                at = arith.xori(at, arith.andi(arith.shrui(at, _c(3)), _c(_SWIZZLE - 16)))
                llvm.store(register, llvm.inttoptr(pointer, at), alignment=16)

    copy(table, places, tile)


def swizzled(dtype) -> tuple:
    """The transforms of a tile in shared memory that tensor cores read, its width a multiple of 128 bytes."""
    tiling = plgpu.TilingTransform((8, _SWIZZLE // jnp.dtype(dtype).itemsize))
    return tiling, plgpu.SwizzleTransform(_SWIZZLE)


def read_tokens(
    pools: Sequence,
    page_table,
    sequence,
    head,
    begin,
    first,
    last,
    size: int,
    *,
    interpreted: bool,
) -> list:
    """Reads the numbers of neighbouring tokens of one sequence and head from pools of pages.

    Args:
      pools: float32 [P, page, K] each, in global memory.
      page_table: int32 [B, pages] in global memory.
      sequence, head, begin: int32 scalars, the last one the first token.
      first, last: int32 scalars, the pages of the sequence that may be read; tokens outside get numbers of the nearest.
      size: tokens, a multiple of 64.

    Returns:
      [size] for each pool, laid out as the rows of `plgpu.Layout.WGMMA`.
    """
    _, page, heads = pools[0].shape
    if interpreted:
        token = begin + lax.iota(jnp.int32, size)
        pages = page_table[...][sequence, jnp.clip(lax.div(token, page), first, last)]
        return [pool[...][pages, lax.rem(token, page), head] for pool in pools]
    layout, count = plgpu.Layout.WGMMA.reduce(1), len(pools)

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * (count + 1), *[_SCALAR] * 5),
        return_type=(plgpu.ShapeDtypeStruct((size,), _FLOAT32, layout=layout),) * count,
    )
    def read(ctx, *args):
        del ctx
        pools, page_table = args[:count], args[count]
        sequence, head, begin, first, last = (x.registers.item() for x in args[count + 1 :])
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        element = ir.VectorType.get((1,), ir.F32Type.get())
        (table_pitch, _), _ = ir.MemRefType(page_table.type).get_strides_and_offset()
        entries = arith.muli(sequence, _c(table_pitch))
        bases = [mgpu.utils.memref_ptr(pool) for pool in pools]
        tiled = layout.to_mgpu()
        registers = [np.empty(tiled.registers_shape((size,)), object) for _ in pools]
        places = np.ndindex(registers[0].shape)
        for place, (row,) in zip(places, tiled.thread_idxs((size,)), strict=True):
            token = arith.addi(begin, arith.index_cast(i32, row))
            entry = arith.shrui(token, _c(page.bit_length() - 1))
            entry = arith.maxsi(first, arith.minsi(last, entry))
            number = arith.extsi(i64, _load(page_table, arith.addi(entries, entry)))
            inside = arith.muli(arith.andi(token, _c(page - 1)), _c(heads))
            # Of 64 bits: a pool may hold more numbers than int32 counts.
            at = arith.muli(number, mgpu.c(page * heads, i64))
            at = arith.addi(at, arith.extsi(i64, arith.addi(inside, head)))
            for of_pool, base in zip(registers, bases, strict=True):
                of_pool[place] = llvm.load(element, mgpu.utils.getelementptr(base, [at], element))
        return tuple(
            mgpu.FragmentedArray(_registers=x, _layout=tiled, _is_signed=None) for x in registers
        )

    return list(read(*pools, page_table, sequence, head, begin, first, last))


def _read_rows(table, places, size: int, together: int, vector: int):
    """Emits the reads of some rows at a time; yields, of the rows of this lane, (index, register) pairs."""
    kind = ir.MemRefType(table.type)
    element, width = kind.element_type, kind.shape[1]
    (row_stride, _), _ = kind.get_strides_and_offset()
    lanes_per_row = _LANES // together
    thread = _thread()
    first = arith.shrui(thread, _c(lanes_per_row.bit_length() - 1))
    column = arith.muli(arith.andi(thread, _c(lanes_per_row - 1)), _c(vector))
    column = arith.minsi(column, _c(width - vector))
    base = mgpu.utils.memref_ptr(table)
    words = ir.VectorType.get((vector,), element)
    steps = size // together
    # Of 64 bits: a pool of pages holds more elements than int32 counts.
    i64 = ir.IntegerType.get_signless(64)
    column, pitch = arith.extsi(i64, column), mgpu.c(row_stride, i64)
    for begin in range(0, steps, _ROWS_IN_FLIGHT):
        rows = []
        for step in range(begin, min(begin + _ROWS_IN_FLIGHT, steps)):
            index = arith.addi(first, _c(step * together))
            row = arith.extsi(i64, _load(places, index))
            at = arith.addi(arith.muli(row, pitch), column)
            pointer = mgpu.utils.getelementptr(base, [at], element)
            rows.append((index, llvm.load(words, pointer, alignment=16)))
        yield rows


def _floats(register, vector: int):
    """The elements of a register vector as float32."""
    f32 = ir.F32Type.get()
    parts = [_extract(register, j) for j in range(vector)]
    return parts if parts[0].type == f32 else [arith.extf(f32, part) for part in parts]


def store_columns(acc, ref, begin, columns: int, *, interpreted: bool):
    """Stores the first columns of a matrix as rows: ref[j, begin + i] = acc[i, j], 32 bytes of neighbours at a time.

    Args:
      acc: float32 [rows, >= columns] in `plgpu.Layout.WGMMA`.
      ref: [columns, S] in global memory.
      begin: int32 scalar.
    """
    if interpreted:
        ref[:, pl.ds(begin, acc.shape[0])] = lax.slice_in_dim(acc, 0, columns, axis=1).T
        return
    shape = acc.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), _SCALAR))
    def store(ctx, acc, ref, begin):
        del ctx
        begin = begin.registers.item()
        base = mgpu.utils.memref_ptr(ref)
        (row_stride, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
        lane, warp = _lane_and_warp()
        # A warp holds 16 rows of each 64; four lanes share a row, two neighbours each, and then come rows 8 further.
        row = arith.addi(arith.muli(warp, _c(16)), arith.shrui(lane, _c(2)))
        column = arith.muli(arith.andi(lane, _c(3)), _c(2))
        flat = acc.registers.reshape(shape[0] // 64, shape[1] // 8, 2)
        for block, tile, half in np.ndindex(flat.shape):
            for j in range(2):
                at_column = arith.addi(column, _c(8 * tile + j))
                wanted = arith.cmpi(arith.CmpIPredicate.ult, at_column, _c(columns))
                place = arith.addi(begin, arith.addi(row, _c(64 * block + 8 * half)))
                offset = arith.addi(arith.muli(at_column, _c(row_stride)), place)
                at = mgpu.utils.getelementptr(base, [offset], ir.F32Type.get())
                value = _extract(flat[block, tile, half], j)
                mgpu.utils.inline_ptx("st.global.f32 [$0], $1;", at, value, predicate=wanted)

    store(acc, ref, begin)


def _c(value: int) -> Any:
    """An int32 constant; its type in MLIR's stubs is wider than what their operations take."""
    return mgpu.c(value if value < 2**31 else value - 2**32, ir.IntegerType.get_signless(32))


def _thread():
    """The lane's number in its warpgroup, 0 to 127."""
    return arith.andi(mgpu.utils.thread_idx(), _c(_LANES - 1))


def _lane_and_warp():
    """The lane's number in its warp, and the warp's in its warpgroup."""
    thread = _thread()
    return arith.andi(thread, _c(_WARP - 1)), arith.shrui(thread, _c(_WARP.bit_length() - 1))


def _extract(register, index: int):
    return llvm.extractelement(register, _c(index))


def _load(ref, place):
    element = ir.MemRefType(ref.type).element_type
    return llvm.load(
        element, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], element)
    )


def _store(ref, place, value, wanted):
    """Stores one element, in the lanes where `wanted`, without a branch."""
    at = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], value.type)
    space = "shared" if mgpu.utils.is_smem_ref(ref) else "global"
    mgpu.utils.inline_ptx(f"st.{space}.b32 [$0], $1;", at, value, predicate=wanted)
