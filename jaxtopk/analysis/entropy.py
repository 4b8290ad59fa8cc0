"""Entropy and Top-k mass of attention rows, from queries and keys alone, without ever holding a T x S array.

What is measured is the full softmax over the keys a row may see; next to it, sets of keys inside it: the best k for
several k, and the set that a strategy attends to. With p the full softmax of a row and U a set of mass a = sum_U p:

    H = - sum p ln p    H_U = - sum_U (p / a) ln (p / a)    TV(sparse, full) = 1 - a    KL(sparse || full) = -ln a

Rows are taken a chunk at a time. Where no set is asked for, keys are taken a tile at a time too, by the online rule of
`jaxtopk.analysis.online_entropy`. A set needs the whole row at hand, since its threshold is searched for: that search is
`pallas_kernels.topk_select` on scores that are there already, some twenty passes over a chunk in cache for each k. The
other way to a mass, exp(lse_k - lse) with lse_k a residual of `topk_attention`, would search just as long, and besides
score again and weigh values, once for each k.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

import pallas_kernels
from jaxtopk.analysis.online_entropy import EntropyPartials, entropy_partials, merge_entropy
from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.attention.full import FullAttention
from jaxtopk.attention.topk import TopKAttention
from pallas_kernels.core import checks, masks, pooling, precision, row_chunks, selection
from pallas_kernels.ops.topk_attention.block_sizes import chunk_rows

_OP = "attention_entropy"
# Rows are cut into pieces, each with the keys that causality leaves it: 3/4 of the work in two, 5/8 in four. Each is code to
# compile, some 4 s on a CPU, so that short rows are better left whole.
_MAX_PIECES = 4
_PIECE_ROWS = 512
_TILE_KEYS = 2048


class SetEntropy(NamedTuple):
    """Of a set of keys inside each row's full softmax; float32, or float64 where the inputs are.

    mass: share of the full softmax that lies on the set; 0 for a row without keys.
    entropy: of the weights renormalised over the set [nats], the truncated entropy. At most ln of the set's size. For the
      best k it is at most the full entropy too, so that alone it shows a drop for free.
    """

    mass: Float[Array, "*L B N T"]
    entropy: Float[Array, "*L B N T"]

    @property
    def support(self) -> Float[Array, "*L B N T"]:
        """Effective number of keys in the set, exp(entropy)."""
        return jnp.exp(self.entropy)


class RowEntropy(NamedTuple):
    """Of each row of each head; with a leading L once a model has stacked its layers. 0 for rows that see no key.

    visible: keys the row may see, n.
    entropy: of the full softmax over them [nats], at most ln n.
    lse: natural log-sum-exp of their scores; -inf without keys.
    topk: one entry for each k asked for: the best k keys of the row's own head; rows with n <= k have mass 1.
    ratio: likewise for each share asked for, the best ceil(share * n) keys.
    attended: the set that the strategy attends to, None where no strategy was given. NaN where the strategy is one whose
      set is not known here.
    attended_count: how many keys that set has; -1 where it is not known.
    """

    visible: Int32[Array, "*L B T"]
    entropy: Float[Array, "*L B N T"]
    lse: Float[Array, "*L B N T"]
    topk: tuple[SetEntropy, ...]
    ratio: tuple[SetEntropy, ...]
    attended: SetEntropy | None
    attended_count: Int32[Array, "*L B N T"] | None

    @property
    def normalised(self) -> Float[Array, "*L B N T"]:
        """Entropy as a share of its largest value, H / ln n; 0 where n < 2."""
        n = jnp.maximum(self.visible, 1)[..., None, :].astype(self.entropy.dtype)
        return jnp.where(n < 2, 0, self.entropy / jnp.log(jnp.maximum(n, 2)))

    @property
    def support(self) -> Float[Array, "*L B N T"]:
        """Effective number of keys, exp(H)."""
        return jnp.exp(self.entropy)


def attention_entropy(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    topks: Sequence[int] = (),
    ratios: Sequence[float] = (),
    strategy: AttentionStrategy | None = None,
    causal: bool = True,
    window: int | None = None,
    lengths: Int32[Array, "B"] | None = None,
    query_segment_ids: Int32[Array, "B T"] | None = None,
    key_segment_ids: Int32[Array, "B S"] | None = None,
    sparse_rows: Bool[Array, "B T"] | None = None,
    scale: float | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> RowEntropy:
    """Measures the full softmax of each row, the mass of its best keys, and what a strategy leaves of it.

    Scores are scale <q_t, k_j>, accumulated in float32 (float64 for float64 inputs). NaN scores have no weight and are
    never among the best. Temporary memory is O(T + S) at fixed blocks: B N block_q S scores with sets, B N block_q block_kv
    without. Carries no gradient.

    Source: arXiv:2512.03494 (entropy and Top-k decoding); online form in `jaxtopk.analysis.online_entropy`.

    Args:
      query, key: RoPE already applied; one dtype; N a multiple of K, query head n reads key head n // (N / K).
      topks: sizes of the sets of best keys, each at least 1.
      ratios: sizes as shares of the row's visible keys, in (0, 1].
      strategy: measure the set that its whole-sequence rows attend to: all visible keys for `FullAttention`; for
        `TopKAttention` those of its budget, scope and pooling.
      causal: row t sees keys j <= t + S - T.
      window: rows see only their last `window` keys, their own included; needs `causal`.
      lengths: valid keys of each sequence; None means all. Rows at and past them, where T == S, are measured all the same:
        drop them.
      query_segment_ids, key_segment_ids: packed documents; a row sees its own document only. Both or none.
      sparse_rows: False where the strategy leaves a row dense; None means its rule everywhere.
      scale: None means H ** -0.5.
      block_q: rows of a chunk; None fits the device.
      block_kv: keys of a tile, where no set is measured; None means 2048.

    Raises:
      ValueError: a shape, dtype or range is wrong; names the argument, the got and the wanted.
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    b, t, s = checks.attention(_OP, query, key, key)
    n = query.shape[2]
    topks, ratios = tuple(check_topks(topks)), tuple(check_ratios(ratios))
    for name, value in (("window", window), ("block_q", block_q), ("block_kv", block_kv)):
        if value is not None:
            checks.at_least_one(_OP, name, value)
    if window is not None and not causal:
        raise ValueError(f"{_OP}: window got {window} with causal=False, wanted None")
    if (query_segment_ids is None) != (key_segment_ids is None):
        missing = "query_segment_ids" if query_segment_ids is None else "key_segment_ids"
        raise ValueError(f"{_OP}: {missing} got None, wanted both segment ids or neither")
    lengths = checks.optional_integer(_OP, "lengths", lengths, "B", B=b)
    optional = functools.partial(checks.optional_integer, _OP, B=b)
    query_segment_ids = optional("query_segment_ids", query_segment_ids, "B T", T=t)
    key_segment_ids = optional("key_segment_ids", key_segment_ids, "B S", S=s)
    if sparse_rows is not None:
        checks.shape(_OP, "sparse_rows", sparse_rows, "B T", B=b, T=t)

    whole_rows = bool(topks or ratios) or isinstance(strategy, TopKAttention)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pieces = max(1, min(_MAX_PIECES, t // _PIECE_ROWS)) if causal else 1
    size = -(-t // pieces)
    found = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        first, last = 0, s
        if causal:
            first = 0 if window is None else max(0, start + (s - t) - window + 1)
            last = max(stop + (s - t), first + 1)

        def visible(rows, keys, segments, start=start, stop=stop, first=first):
            """Returns which of the piece's keys (counted from its first) the piece's rows see, [1 or B, rows, keys]."""
            index, others = rows + start, keys + first
            mask = masks.visible_keys(
                index,
                others,
                offset=s - t,
                causal=causal,
                window=window,
                lengths=lengths,
                query_segment_ids=segments,
                key_segment_ids=None
                if key_segment_ids is None
                else jnp.take(key_segment_ids, others, axis=1, mode="clip"),
            )
            return mask & ((index < stop)[:, None] & (others < s)[None, :])[None]

        rows = stop - start
        keys = last - first if whole_rows else min(block_kv or _TILE_KEYS, last - first)
        chunk = min(chunk_rows(b, rows, n, keys) if block_q is None else block_q, rows)
        measure = functools.partial(
            _whole_rows if whole_rows else functools.partial(_tiled_rows, block_kv=keys),
            key=key[:, first:last],
            visible=visible,
            topks=topks,
            ratios=ratios,
            strategy=strategy,
            scale=scale,
        )
        cut = lambda x, start=start, stop=stop: None if x is None else x[:, start:stop]
        xs = (query[:, start:stop], cut(query_segment_ids), cut(sparse_rows))
        _, ys = row_chunks.scan(
            lambda _, x, measure=measure: (None, measure(x)), None, xs, num_rows=rows, chunk=chunk
        )
        # Rows are the last axis of everything: [B, T] and [B, N, T].
        found.append(
            jax.tree.map(lambda y, r=rows: row_chunks.join(y, axis=y.ndim - 2, num_rows=r), ys)
        )
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=-1), *found)


def check_topks(topks: Sequence[int]) -> Sequence[int]:
    """Refuses a size of a set below one."""
    for topk in topks:
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
            raise ValueError(f"topks: got {topk!r}, wanted ints of at least 1")
    return topks


def check_ratios(ratios: Sequence[float]) -> Sequence[float]:
    """Refuses a share of the keys that is not above 0 and at most 1."""
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(f"ratios: got {ratio!r}, wanted numbers in (0, 1]")
    return ratios


def _whole_rows(chunk, *, key, visible, topks, ratios, strategy, scale) -> RowEntropy:
    """Measures a chunk of rows [B, C] from all their scores [B, N, C, S]."""
    index, query, segments, sparse_rows = chunk
    b, _, n, _ = query.shape
    s = key.shape[1]
    scores = row_chunks.scores(query, key, scale)
    seen = visible(index, jnp.arange(s, dtype=jnp.int32), segments)
    count = jnp.sum(seen, axis=-1, dtype=jnp.int32)
    seen = seen[:, None]
    weighed = seen & ~jnp.isnan(scores)
    row = entropy_partials(scores, weighed)

    def of_set(kept) -> SetEntropy:
        part = entropy_partials(scores, kept)
        total = jnp.where(row.l == 0, 1, row.l)
        share = jnp.exp(jnp.where(part.l == 0, -jnp.inf, part.m - row.m)) * part.l / total
        # The two sums are rounded apart from each other: a row that keeps all may come out a hair above 1.
        return SetEntropy(jnp.minimum(share, 1), part.entropy)

    # Scores of keys that are not seen become NaN, which is never selected.
    candidates = jnp.where(weighed, scores, jnp.nan)
    count = jnp.broadcast_to(count, (b, index.size))
    # One program searches for all sizes in turn; a set as large as the row is the row.
    sizes = sorted({k for k in topks if k < s})
    budgets = [jnp.full_like(count, k) for k in sizes]
    # A row without keys keeps nothing whatever its budget, but budgets start at 1.
    budgets += [jnp.maximum(pallas_kernels.budget_from_ratio(count, ratio), 1) for ratio in ratios]
    if isinstance(strategy, TopKAttention):
        budgets.append(jnp.maximum(strategy.budget(count, sparse_rows=sparse_rows), 1))
    pooled = isinstance(strategy, TopKAttention) and strategy.scope != "head"
    searched = budgets[:-1] if pooled else budgets
    found: list[SetEntropy] = []
    if searched:
        stacked = lax.map(
            lambda budget: of_set(_best(candidates, weighed, budget[:, None])), jnp.stack(searched)
        )
        found = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(searched))]
    sets = dict.fromkeys(topks, SetEntropy(jnp.minimum(row.l, 1), row.entropy))
    sets |= dict(zip(sizes, found, strict=False))
    shares = tuple(found[len(sizes) : len(sizes) + len(ratios)])
    attended = attended_count = None
    if pooled:
        num_sets = pooling.num_sets(strategy.scope, n, key.shape[2])
        ranked = pooling.pool(scores, seen, num_sets, strategy.pooling)
        kept = _best(jnp.where(seen, ranked, jnp.nan), seen, budgets[-1][:, None])
        kept = jnp.repeat(kept, n // num_sets, axis=1)
        attended = of_set(kept & weighed)
        attended_count = jnp.sum(kept, axis=-1, dtype=jnp.int32)
    elif isinstance(strategy, TopKAttention):
        attended = found[-1]
        alive = jnp.sum(weighed, axis=-1, dtype=jnp.int32)
        attended_count = jnp.minimum(budgets[-1][:, None], alive)
    elif strategy is not None:
        shape = (b, n, index.size)
        attended, attended_count = _without_search(strategy, row, count, shape)
    return RowEntropy(
        visible=count,
        entropy=row.entropy,
        lse=row.lse,
        topk=tuple(sets[k] for k in topks),
        ratio=shares,
        attended=attended,
        attended_count=attended_count,
    )


def _tiled_rows(chunk, *, key, visible, topks, ratios, strategy, scale, block_kv) -> RowEntropy:
    """Measures a chunk of rows from a tile of keys at a time; no set is asked for that would have to be searched."""
    del topks, ratios
    index, query, segments, _ = chunk
    b, c, n, _ = query.shape
    s = key.shape[1]
    tiles = -(-s // block_kv)
    key = jnp.pad(key, ((0, 0), (0, tiles * block_kv - s), (0, 0), (0, 0)))
    dtype = precision.accumulator(query.dtype)
    empty = EntropyPartials(
        jnp.full((b, n, c), -jnp.inf, dtype), *(jnp.zeros((b, n, c), dtype) for _ in range(2))
    )

    def absorb(carry, tile):
        row, count = carry
        first = tile * block_kv
        scores = row_chunks.scores(
            query, lax.dynamic_slice_in_dim(key, first, block_kv, axis=1), scale
        )
        position = first + jnp.arange(block_kv, dtype=jnp.int32)
        seen = visible(index, position, segments) & (position < s)[None, None, :]
        row = merge_entropy(row, entropy_partials(scores, seen[:, None] & ~jnp.isnan(scores)))
        return (row, count + jnp.sum(seen, axis=-1, dtype=jnp.int32)), None

    start = (empty, jnp.zeros((b, c), jnp.int32))
    (row, count), _ = lax.scan(absorb, start, jnp.arange(tiles, dtype=jnp.int32))
    attended = attended_count = None
    if strategy is not None:
        attended, attended_count = _without_search(strategy, row, count, (b, n, c))
    return RowEntropy(count, row.entropy, row.lse, (), (), attended, attended_count)


def _best(candidates, visible, topk) -> Bool[Array, "B G C S"]:
    """Returns the set of the `topk` best candidates of each row; NaN is none."""
    found = pallas_kernels.topk_select(candidates, topk, with_indices=False)
    return selection.selected(candidates, visible, found.threshold, found.tie_cut)


def _without_search(strategy, row: EntropyPartials, count, shape) -> tuple[SetEntropy, Array]:
    """Returns what a strategy attends to where that needs no search: everything, or it is not known."""
    if isinstance(strategy, FullAttention):
        mass = jnp.where(row.l == 0, jnp.zeros_like(row.l), 1)
        return SetEntropy(mass, row.entropy), jnp.broadcast_to(count[:, None], shape)
    unknown = jnp.full_like(row.l, jnp.nan)
    return SetEntropy(unknown, unknown), jnp.full(shape, -1, jnp.int32)


__all__ = ["RowEntropy", "SetEntropy", "attention_entropy", "check_ratios", "check_topks"]
