"""What is timed: each op at each workload, with its inputs, its least bytes and operations, and what a right result is."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_latency import oracles
from pallas_kernels import (
    QuantizedKeys,
    gather_attention,
    indexer_select,
    quantize_keys,
    topk_decode_attention,
    topk_select,
)

Arrays = tuple[jax.Array, ...]

_HEADS, _KV_HEADS, _HEAD_SIZE = 32, 8, 128
_INDEX_HEADS, _INDEX_SIZE = 64, 128
_CHECKED_ROWS = 64  # of a prefill
_SHORTEST = 1024  # of a ragged batch
_SLACK = 1e-3  # standard deviations by which two float32 routines' scores may differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload(abc.ABC):
    """One op at one size.

    Args:
      topk: keys kept by each row.
      group: of `config.GROUPS`: "main", or how it differs from a main one.
      pattern: how the inputs are drawn, or "ragged": drawn at random, with lengths spread evenly in the logarithm.
      target_ms: what is wanted of the best implementation on an NVIDIA H200.
    """

    op: ClassVar[str]
    topk: int
    group: str = "main"
    pattern: str = "random"
    target_ms: float | None = None

    @property
    @abc.abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Sizes by the letters of the op's docstring."""

    @property
    def name(self) -> str:
        """Sizes, budget and pattern, as tables and `--only` have them."""
        parts = [f"{letter} {size}" for letter, size in self.sizes.items()]
        return ", ".join([*parts, f"k {self.topk}", *self._pattern_word()])

    @property
    @abc.abstractmethod
    def least_bytes(self) -> int:
        """Bytes that any implementation has to read; results are small beside them and are not counted."""

    @property
    def least_flops(self) -> int:
        """Operations of matrix products that any implementation has to make; causal halves are not counted."""
        return 0

    def limit_ms(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Returns the larger of the times that the bytes and the operations take [ms]."""
        return 1e3 * max(self.least_bytes / bytes_per_s, self.least_flops / flops_per_s)

    @property
    def lengths(self) -> np.ndarray:
        """Valid keys of each row or sequence, int32."""
        rows, longest = self.sizes[self._rows_letter], self.sizes["S"]
        if self.pattern != "ragged":
            return np.full(rows, longest, np.int32)
        return np.rint(np.geomspace(min(_SHORTEST, longest), longest, rows)).astype(np.int32)

    @abc.abstractmethod
    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns the arguments of `count` calls."""

    @abc.abstractmethod
    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the op as a function of the arguments drawn."""

    @abc.abstractmethod
    def check(self, arguments: Arrays, result: Any) -> None:
        """Raises AssertionError where the op's result is not right."""

    def check_of(self, implementation: str, arguments: Arrays, result: Any) -> None:
        """Raises AssertionError where the result is not right, or not what this implementation has to give."""
        del implementation
        self.check(arguments, result)

    _rows_letter: ClassVar[str] = "B"

    def _pattern_word(self) -> tuple[str, ...]:
        return () if self.pattern == "random" else (self.pattern,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select(Workload):
    """`topk_select` of float32 rows with their lists."""

    op: ClassVar[str] = "topk_select"
    _rows_letter: ClassVar[str] = "R"
    rows: int
    keys: int

    @property
    def sizes(self) -> Mapping[str, int]:
        """Rows and keys of each."""
        return {"R": self.rows, "S": self.keys}

    @property
    def least_bytes(self) -> int:
        """One read of the valid scores."""
        return 4 * int(self.lengths.sum())

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (scores, lengths) of each call; scores beyond a length are -inf, for peers that know no lengths."""
        keys = jax.random.split(_seeded(seed), count)
        lengths = jnp.asarray(self.lengths)
        draw = jax.jit(functools.partial(_scores, self))
        return [(draw(key, lengths), jnp.asarray(self.lengths)) for key in keys]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the selection with its list."""
        return lambda scores, lengths: topk_select(
            scores, self.topk, lengths=lengths, implementation=implementation
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks every field exactly."""
        scores, lengths = arguments
        oracles.assert_selected(scores, lengths, self.topk, result)

    def check_list(self, arguments: Arrays, indices) -> None:
        """Checks a peer's list, which may come in any order."""
        oracles.assert_largest(arguments[0], indices)


def _scores(workload: Select, key, lengths):
    """Draws scores [R, S] of the workload's pattern."""
    shape = workload.rows, workload.keys
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    normal = jax.random.normal(key, shape, jnp.float32)
    match workload.pattern:
        case (
            "relu plateau"
        ):  # fewer positive scores than are wanted: the last places are among equals, at 0
            share = workload.topk / (2 * workload.keys)
            positive = jax.random.uniform(jax.random.fold_in(key, 1), shape) < share
            normal = jnp.where(positive, jnp.abs(normal), jnp.float32(0))
        case "recent span":  # all the best keys are neighbours, which misleads whoever samples
            recent = place >= workload.keys - 2 * workload.topk
            normal = jnp.where(recent, 8 + normal, normal)
    return jnp.where(place < lengths[:, None], normal, -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Workload):
    """`topk_decode_attention` in bfloat16, scope "head"."""

    op: ClassVar[str] = "topk_decode_attention"
    batch: int
    keys: int
    heads: int = _HEADS
    kv_heads: int = _KV_HEADS
    head_size: int = _HEAD_SIZE

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences and keys of each."""
        return {"B": self.batch, "S": self.keys}

    @property
    def least_bytes(self) -> int:
        """All valid keys, and the values that each head selects, as if no two heads chose the same."""
        keys = int(self.lengths.sum()) * self.kv_heads
        values = int(np.minimum(self.lengths, self.topk).sum()) * self.heads
        return 2 * self.head_size * (keys + min(values, keys))

    @property
    def least_flops(self) -> int:
        """Scores of all keys, and the weighted sum over the selected."""
        selected = int(np.minimum(self.lengths, self.topk).sum())
        return 2 * self.heads * self.head_size * (int(self.lengths.sum()) + selected)

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, lengths) of each call."""
        keys = jax.random.split(_seeded(seed), count)
        return [
            (*_query_key_value(self, key, self.keys), jnp.asarray(self.lengths)) for key in keys
        ]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output."""
        return lambda query, key, value, lengths: topk_decode_attention(
            query, key, value, topk=self.topk, lengths=lengths, implementation=implementation
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row."""
        oracles.assert_rows_close(
            result, oracles.attention(*arguments, topk=self.topk), topk=self.topk
        )

    def check_full(self, arguments: Arrays, out) -> None:
        """Checks a peer that attends to all keys."""
        query, key, value, lengths = arguments
        want = oracles.attention(query, key, value, lengths, topk=None)
        oracles.assert_rows_close(out, want, topk=self.keys, rounding=0.03)

    def check_naive(self, arguments: Arrays, out) -> None:
        """Checks a peer that selects on scores rounded to bfloat16, which swaps some keys near the last place."""
        want = oracles.attention(*arguments, topk=self.topk)
        oracles.assert_rows_close(out, want, topk=self.topk, rounding=0.3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gather(Workload):
    """`gather_attention` of one bfloat16 query row a sequence, one list a key/value head."""

    op: ClassVar[str] = "gather_attention"
    batch: int
    keys: int
    heads: int = _HEADS
    kv_heads: int = _KV_HEADS
    head_size: int = _HEAD_SIZE

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences and keys of each."""
        return {"B": self.batch, "S": self.keys}

    @property
    def _listed(self) -> np.ndarray:
        return np.minimum(self.lengths, self.topk)

    @property
    def least_bytes(self) -> int:
        """The listed keys and values, and the lists."""
        rows = int(self._listed.sum()) * self.kv_heads
        return 4 * rows + 2 * 2 * self.head_size * rows

    @property
    def least_flops(self) -> int:
        """Scores and weighted sum over the listed keys."""
        return 4 * self.heads * self.head_size * int(self._listed.sum())

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, indices) of each call; calls share key and value, not the lists."""
        keys = jax.random.split(_seeded(seed), 1 + count)
        query, key, value = _query_key_value(self, keys[0], self.keys)
        rng = np.random.default_rng(seed)
        # A copy each: the smallest argument of a call is its own.
        return [(query + 0, key, value, jnp.asarray(self._lists(rng))) for _ in keys[1:]]

    def _lists(self, rng: np.random.Generator) -> np.ndarray:
        lists = np.full((self.batch, 1, self.kv_heads, self.topk), -1, np.int32)
        for b, length in enumerate(self.lengths):
            for head in range(self.kv_heads):
                if self.pattern == "clustered":  # runs of 64 neighbours
                    runs = rng.choice(length // 64, -(-self._listed[b] // 64), replace=False)
                    chosen = (64 * runs[:, None] + np.arange(64)).ravel()[: self._listed[b]]
                else:
                    chosen = rng.choice(length, self._listed[b], replace=False)
                lists[b, 0, head, : chosen.size] = np.sort(chosen)
        return lists

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output."""

        def attend(query, key, value, indices):
            out = gather_attention(
                query[:, None], key, value, indices, implementation=implementation
            )
            assert isinstance(out, jax.Array)  # no residuals were asked for
            return out[:, 0]

        return attend

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row; lists of a ragged batch are checked where they are whole."""
        query, key, value, indices = arguments
        whole = np.flatnonzero(self._listed == self.topk)
        part = jnp.asarray(whole)
        got = jnp.asarray(result)[part]
        want = oracles.listed_attention(query[part], key[part], value[part], indices[part, 0])
        oracles.assert_rows_close(got, want, topk=self.topk)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedDecode(Decode):
    """`Decode` from a pool of pages in random order; beside it, what paging costs shows."""

    page: int
    pattern: str = "pages"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences, keys of each, tokens of a page."""
        return {**super().sizes, "page": self.page}

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, lengths, page_table) of each call."""
        rng = np.random.default_rng(seed)
        return [
            (query, *_in_pages(self, key, value), lengths, _page_table(self, rng))
            for query, key, value, lengths in super().draw(seed, count)
        ]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output."""
        return lambda query, key, value, lengths, page_table: topk_decode_attention(
            query,
            key,
            value,
            topk=self.topk,
            lengths=lengths,
            page_table=page_table,
            implementation=implementation,
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row."""
        query, key, value, lengths, page_table = arguments
        super().check((query, *_out_of_pages(page_table, key, value), lengths), result)

    def _pattern_word(self) -> tuple[str, ...]:
        return ()  # the sizes say it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedGather(Gather):
    """`Gather` from a pool of pages in random order; beside it, what paging costs shows."""

    page: int
    pattern: str = "pages"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences, keys of each, tokens of a page."""
        return {**super().sizes, "page": self.page}

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, indices, page_table) of each call; calls share key and value, not the lists."""
        drawn = super().draw(seed, count)
        pools = _in_pages(self, *drawn[0][1:3])
        page_table = _page_table(self, np.random.default_rng(seed))
        # A copy each, for the same reason as that of the query.
        return [(query, *pools, indices, page_table + 0) for query, _, _, indices in drawn]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output."""

        def attend(query, key, value, indices, page_table):
            out = gather_attention(
                query[:, None],
                key,
                value,
                indices,
                page_table=page_table,
                implementation=implementation,
            )
            assert isinstance(out, jax.Array)  # no residuals were asked for
            return out[:, 0]

        return attend

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row."""
        query, key, value, indices, page_table = arguments
        super().check((query, *_out_of_pages(page_table, key, value), indices), result)

    def _pattern_word(self) -> tuple[str, ...]:
        return ()  # the sizes say it


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiedDecode(Decode):
    """`Decode` with an eight-bit copy of the keys; beside it, what the copy saves shows.

    Args:
      pattern: "int8 keys", ranked by the copy, or "certified", bit for bit as without it.
    """

    pattern: str = "int8 keys"

    @property
    def _certified(self) -> bool:
        return self.pattern == "certified"

    @property
    def least_bytes(self) -> int:
        """The copy of all valid keys, their scales and errors, and the keys and values that each head selects."""
        keys = int(self.lengths.sum()) * self.kv_heads
        selected = int(np.minimum(self.lengths, self.topk).sum()) * self.heads
        copy = self.head_size + 4 * (2 if self._certified else 1)
        return copy * keys + 2 * 2 * self.head_size * min(selected, keys)

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, lengths, the copy's values, scale, error) of each call."""
        return [
            (*arguments, *jax.jit(quantize_keys)(arguments[1]))
            for arguments in super().draw(seed, count)
        ]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output."""
        return lambda query, key, value, lengths, *copy: topk_decode_attention(
            query,
            key,
            value,
            topk=self.topk,
            lengths=lengths,
            quantized_key=QuantizedKeys(*copy),
            certified=self._certified,
            implementation=implementation,
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row."""
        *exact, values, scale, _ = arguments
        ranked_by = None if self._certified else (values, scale)
        want = oracles.attention(*exact, topk=self.topk, ranked_by=ranked_by)
        oracles.assert_rows_close(result, want, topk=self.topk)

    def check_of(self, implementation: str, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row, and where it is certified, against the call without a copy, bit for bit."""
        self.check(arguments, result)
        if self._certified:
            plain = _without_a_copy(self, implementation)(*arguments[:4])
            oracles.assert_same_bits(result, plain)


@functools.cache
def _without_a_copy(workload: CopiedDecode, implementation: str) -> Callable[..., Any]:
    return jax.jit(Decode.call(workload, implementation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerDecode(Workload):
    """`indexer_select` of one row a sequence, bfloat16."""

    op: ClassVar[str] = "indexer_select"
    batch: int
    keys: int
    index_heads: int = _INDEX_HEADS
    index_size: int = _INDEX_SIZE

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences, rows and keys of each."""
        return {"B": self.batch, "T": 1, "S": self.keys}

    @property
    def least_bytes(self) -> int:
        """One read of the valid keys."""
        return 2 * self.index_size * int(self.lengths.sum())

    @property
    def least_flops(self) -> int:
        """Products of all index heads with all valid keys."""
        return 2 * self.index_heads * self.index_size * int(self.lengths.sum())

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (index_query, index_key, head_weights, lengths) of each call."""
        keys = jax.random.split(_seeded(seed), count)
        return [(*_indexer_inputs(self, key, rows=1), jnp.asarray(self.lengths)) for key in keys]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the selection with its list."""
        return lambda index_query, index_key, head_weights, lengths: indexer_select(
            index_query,
            index_key,
            head_weights,
            topk=self.topk,
            causal=False,
            lengths=lengths,
            implementation=implementation,
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks that clearly larger keys are in and clearly smaller ones out."""
        self.check_list(arguments, result.indices[:, 0], count=result.count[:, 0])

    def check_list(self, arguments: Arrays, indices, *, count=None, slack: float = _SLACK) -> None:
        """Checks lists [B, k] in any order."""
        index_query, index_key, head_weights, lengths = arguments
        scores = jnp.concatenate(
            [
                oracles.indexer_scores(q, k, w)
                for q, k, w in zip(index_query, index_key, head_weights, strict=True)
            ]
        )
        visible = jnp.arange(self.keys, dtype=jnp.int32)[None] < lengths[:, None]
        oracles.assert_nearly_selected(scores, visible, self.topk, count, indices, slack=slack)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerPrefill(Workload):
    """`indexer_select` of all rows of one prompt, causal, bfloat16."""

    op: ClassVar[str] = "indexer_select"
    keys: int
    index_heads: int = _INDEX_HEADS
    index_size: int = _INDEX_SIZE

    @property
    def sizes(self) -> Mapping[str, int]:
        """One sequence, as many rows as keys."""
        return {"B": 1, "T": self.keys, "S": self.keys}

    @property
    def least_bytes(self) -> int:
        """One read of queries and keys."""
        return 2 * self.index_size * self.keys * (self.index_heads + 1)

    @property
    def least_flops(self) -> int:
        """Products of all index heads with the keys up to each row: half of the square."""
        return self.index_heads * self.index_size * self.keys**2

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (index_query, index_key, head_weights) of each call."""
        keys = jax.random.split(_seeded(seed), count)
        return [_indexer_inputs(self, key, rows=self.keys) for key in keys]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the selection with its list."""
        return lambda index_query, index_key, head_weights: indexer_select(
            index_query, index_key, head_weights, topk=self.topk, implementation=implementation
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks some rows, the first and the last among them."""
        index_query, index_key, head_weights = arguments
        rows = np.unique(np.linspace(0, self.keys - 1, min(_CHECKED_ROWS, self.keys)).astype(int))
        part = jnp.asarray(rows, jnp.int32)
        scores = oracles.indexer_scores(index_query[0, part], index_key[0], head_weights[0, part])
        visible = jnp.arange(self.keys, dtype=jnp.int32)[None] <= part[:, None]
        oracles.assert_nearly_selected(
            scores,
            visible,
            self.topk,
            result.count[0, part],
            result.indices[0, part],
            slack=_SLACK,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerThenGather(Workload):
    """A whole decode step of indexed attention: `indexer_select`, then `gather_attention` of all heads to its list."""

    op: ClassVar[str] = "indexer_select + gather_attention"
    batch: int
    keys: int
    heads: int = _HEADS
    kv_heads: int = _KV_HEADS
    head_size: int = _HEAD_SIZE
    index_heads: int = _INDEX_HEADS
    index_size: int = _INDEX_SIZE

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences and keys of each."""
        return {"B": self.batch, "S": self.keys}

    @property
    def least_bytes(self) -> int:
        """The valid index keys, and keys and values of all heads at the listed places."""
        index = 2 * self.index_size * int(self.lengths.sum())
        rows = int(np.minimum(self.lengths, self.topk).sum()) * self.kv_heads
        return index + 2 * 2 * self.head_size * rows

    @property
    def least_flops(self) -> int:
        """Products of the index heads; those of attention are few beside them."""
        return 2 * self.index_heads * self.index_size * int(self.lengths.sum())

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (index_query, index_key, head_weights, query, key, value, lengths) of each call."""
        keys = jax.random.split(_seeded(seed), count)
        return [
            (
                *_indexer_inputs(self, key, rows=1),
                *_query_key_value(self, jax.random.fold_in(key, 1), self.keys),
                jnp.asarray(self.lengths),
            )
            for key in keys
        ]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output; both ops run the same implementation."""

        def step(index_query, index_key, head_weights, query, key, value, lengths):
            chosen = indexer_select(
                index_query,
                index_key,
                head_weights,
                topk=self.topk,
                causal=False,
                lengths=lengths,
                implementation=implementation,
            )
            assert chosen.indices is not None  # a list was asked for
            out = gather_attention(
                query[:, None],
                key,
                value,
                chosen.indices[:, :, None],
                lengths=lengths,
                implementation=implementation,
            )
            assert isinstance(out, jax.Array)  # no residuals were asked for
            return out[:, 0]

        return step

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row; batches of full length only."""
        index_query, index_key, head_weights, query, key, value, lengths = arguments
        places = []
        for q, k, w, length in zip(index_query, index_key, head_weights, lengths, strict=True):
            scores = oracles.indexer_scores(q, k, w)
            visible = jnp.arange(self.keys, dtype=jnp.int32)[None] < length
            places.append(jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), self.topk)[1])
        whole = jnp.asarray(np.flatnonzero(self.lengths >= self.topk))
        want = oracles.listed_attention(
            query[whole], key[whole], value[whole], jnp.stack(places)[whole]
        )
        oracles.assert_rows_close(jnp.asarray(result)[whole], want, topk=self.topk)

    def check_full(self, arguments: Arrays, out) -> None:
        """Checks a peer that attends to all keys."""
        want = oracles.attention(*arguments[3:], topk=None)
        oracles.assert_rows_close(out, want, topk=self.keys, rounding=0.03)


def _seeded(seed: int) -> jax.Array:
    """Returns a key of the device's own generator, which fills gigabytes, and compiles, faster than the default one."""
    return jax.random.key(seed, impl="rbg")


def _query_key_value(workload: Decode | Gather | IndexerThenGather, key, keys: int) -> Arrays:
    """Draws query [B, N, H], key and value [B, S, K, H], bfloat16."""
    b, k, h = workload.batch, workload.kv_heads, workload.head_size
    shapes = (b, workload.heads, h), (b, keys, k, h), (b, keys, k, h)
    return tuple(
        jax.random.normal(one, shape, jnp.bfloat16)
        for one, shape in zip(jax.random.split(key, 3), shapes, strict=True)
    )


def _in_pages(workload: PagedDecode | PagedGather, *caches) -> Arrays:
    """Cuts caches [B, S, K, H] into pools of pages [P, page, K, H]."""
    return tuple(cache.reshape(-1, workload.page, *cache.shape[2:]) for cache in caches)


def _page_table(workload: PagedDecode | PagedGather, rng: np.random.Generator) -> jax.Array:
    """Deals all pages of the pool out at random, int32 [B, pages]."""
    count = workload.batch * workload.keys // workload.page
    return jnp.asarray(rng.permutation(count).reshape(workload.batch, -1), jnp.int32)


@jax.jit
def _out_of_pages(page_table, *pools) -> Arrays:
    """Copies each sequence's pages into one cache [B, S, K, H]."""
    return tuple(
        pool[page_table].reshape(page_table.shape[0], -1, *pool.shape[2:]) for pool in pools
    )


def _indexer_inputs(
    workload: IndexerDecode | IndexerPrefill | IndexerThenGather, key, *, rows: int
) -> Arrays:
    """Draws index_query [B, T, I, D] and index_key [B, S, D], bfloat16, and head_weights [B, T, I], float32, above 0."""
    b, i, d = workload.sizes["B"], workload.index_heads, workload.index_size
    one, two, three = jax.random.split(key, 3)
    scaled = d**-0.5 * jax.random.normal(one, (b, rows, i, d), jnp.bfloat16)
    weights = i**-0.5 * jnp.abs(jax.random.normal(three, (b, rows, i), jnp.float32))
    return scaled, jax.random.normal(two, (b, workload.keys, d), jnp.bfloat16), weights


_BUDGETS = (64, 512, 4096)


def full() -> list[Workload]:
    """Returns the workloads of an accelerator, the most important ones first."""
    select = [
        Select(rows=1024, keys=131072, topk=2048, target_ms=0.40),
        Select(rows=32, keys=131072, topk=2048, target_ms=0.040),
        Select(rows=64, keys=1048576, topk=2048, target_ms=0.20),
        Select(rows=4096, keys=8192, topk=512, target_ms=0.10),
    ]
    decode = [
        Decode(batch=8, keys=131072, topk=2048, target_ms=0.68),
        Decode(batch=1, keys=131072, topk=2048, target_ms=0.11),
        Decode(batch=1, keys=1048576, topk=2048, target_ms=0.66),
        Decode(batch=16, keys=32768, topk=2048),
    ]
    gather = [Gather(batch=8, keys=131072, topk=2048, target_ms=0.06)]
    indexer = [IndexerDecode(batch=8, keys=131072, topk=2048, target_ms=0.12)]
    whole = [IndexerThenGather(batch=8, keys=131072, topk=2048, target_ms=0.18)]
    prefill = [IndexerPrefill(keys=32768, topk=2048, target_ms=20.0)]
    pages: list[Workload] = [
        paged(batch=8, keys=131072, topk=2048, page=page, group="pages")
        for paged in (PagedDecode, PagedGather)
        for page in (64, 16)
    ]
    copied: list[Workload] = [
        CopiedDecode(batch=batch, keys=keys, topk=2048, pattern=pattern, group="quantized")
        for batch, keys in ((8, 131072), (1, 131072), (1, 1048576))
        for pattern in ("int8 keys", "certified")
    ]
    main: list[Workload] = [*select, *decode, *gather, *indexer, *whole, *prefill]
    # The prefill has no lengths: one prompt.
    batched: list[Workload] = [*select, *decode, *gather, *indexer, *whole]
    return [
        *main,
        *_with(batched, "ragged", (2048,), ("ragged",)),
        *pages,
        *copied,
        *_with([*batched, *prefill], "budget", _BUDGETS, ("random",)),
        *_with(select, "adversarial", (2048,), ("relu plateau", "recent span")),
        *_with(gather, "adversarial", (2048,), ("clustered",)),
        *(Select(rows=64, keys=s, topk=2048, group="length") for s in (8192, 32768, 131072)),
        *(Decode(batch=8, keys=s, topk=2048, group="length") for s in (8192, 32768)),
        *(IndexerDecode(batch=8, keys=s, topk=2048, group="length") for s in (8192, 32768)),
    ]


def tiny() -> list[Workload]:
    """Returns one workload of each op in shapes of a test, and a hard one of some."""
    heads = dict(heads=4, kv_heads=2, head_size=16)
    index = dict(index_heads=4, index_size=16)
    main: list[Workload] = [
        Select(rows=4, keys=512, topk=16),
        Decode(batch=2, keys=256, topk=16, **heads),
        Gather(batch=2, keys=256, topk=16, **heads),
        IndexerDecode(batch=2, keys=256, topk=16, **index),
        IndexerThenGather(batch=2, keys=256, topk=16, **heads, **index),
        IndexerPrefill(keys=128, topk=16, **index),
    ]
    paged = dict(batch=2, keys=256, topk=16, page=16, group="pages")
    return [
        *main,
        PagedDecode(**heads, **paged),
        PagedGather(**heads, **paged),
        *(
            CopiedDecode(batch=2, keys=256, topk=16, pattern=pattern, group="quantized", **heads)
            for pattern in ("int8 keys", "certified")
        ),
        *_with(main[:1], "ragged", (16,), ("ragged",)),
        *_with(main[:1], "adversarial", (16,), ("relu plateau", "recent span")),
    ]


def _with(
    workloads: Iterable[Workload], group: str, budgets: Iterable[int], patterns: Iterable[str]
) -> list[Workload]:
    """Returns variants of workloads: `budgets` where the group is "budget", else each one's own."""
    return [
        dataclasses.replace(
            workload,
            topk=budget if group == "budget" else workload.topk,
            pattern=pattern,
            group=group,
            target_ms=None,
        )
        for workload in workloads
        for budget in budgets
        for pattern in patterns
        if group != "budget" or budget != workload.topk
    ]
