"""Attention of one row of each sequence to its cache: to its best keys or to listed ones; in pages, with a copy of the keys."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_latency import oracles
from experiments.kernel_latency.workloads.base import Arrays, Workload, keys_of
from pallas_kernels import QuantizedKeys, gather_attention, quantize_keys, topk_decode_attention
from pallas_kernels.tuning.shapes import CacheSizes, normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheWorkload(CacheSizes, Workload):
    """One bfloat16 query row of each sequence, and its cache."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences and keys of each."""
        return {"B": self.batch, "S": self.keys}

    def query_key_value(self, key: jax.Array) -> Arrays:
        """Draws query [B, N, H], key and value [B, S, K, H]."""
        return normal(key, self.cache_shapes(), "bfloat16")

    def _options(self, *more: jax.Array) -> dict[str, Any]:
        """Returns what the op is given for the arguments after the plain ones."""
        assert not more
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(CacheWorkload):
    """`topk_decode_attention`, scope "head"."""

    op: ClassVar[str] = "topk_decode_attention"

    @property
    def _keys_read(self) -> int:
        """Valid keys of all key/value heads."""
        return self.all_valid * self.kv_heads

    @property
    def _values_read(self) -> int:
        """Values that each head selects, as if no two heads chose the same."""
        return min(self.all_kept * self.heads, self._keys_read)

    @property
    def least_bytes(self) -> int:
        """All valid keys, and the selected values."""
        return 2 * self.head_size * (self._keys_read + self._values_read)

    @property
    def least_flops(self) -> int:
        """Scores of all keys, and the weighted sum over the selected."""
        return 2 * self.heads * self.head_size * (self.all_valid + self.all_kept)

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, lengths) of each call."""
        return [
            (*self.query_key_value(key), jnp.asarray(self.lengths)) for key in keys_of(seed, count)
        ]

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output."""
        return lambda query, key, value, lengths, *more: topk_decode_attention(
            query,
            key,
            value,
            topk=self.topk,
            lengths=lengths,
            implementation=implementation,
            **self._options(*more),
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row."""
        want = oracles.attention(*arguments, topk=self.topk)
        oracles.assert_rows_close(result, want, topk=self.topk)

    def check_full(self, arguments: Arrays, out) -> None:
        """Checks a peer that attends to all keys."""
        want = oracles.attention(*arguments, topk=None)
        oracles.assert_rows_close(out, want, topk=self.keys, rounding=0.03)

    def check_naive(self, arguments: Arrays, out) -> None:
        """Checks a peer that selects on scores rounded to bfloat16, which swaps some keys near the last place."""
        want = oracles.attention(*arguments, topk=self.topk)
        oracles.assert_rows_close(out, want, topk=self.topk, rounding=0.3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gather(CacheWorkload):
    """`gather_attention`, one list a key/value head."""

    op: ClassVar[str] = "gather_attention"

    @property
    def least_bytes(self) -> int:
        """The listed keys and values, and the lists."""
        rows = self.all_kept * self.kv_heads
        return 4 * rows + 2 * 2 * self.head_size * rows

    @property
    def least_flops(self) -> int:
        """Scores and weighted sum over the listed keys."""
        return 4 * self.heads * self.head_size * self.all_kept

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, indices) of each call; calls share key and value, not the lists."""
        keys = keys_of(seed, 1 + count)
        query, key, value = self.query_key_value(keys[0])
        rng = np.random.default_rng(seed)
        # A copy each: the smallest argument of a call is its own.
        return [(query + 0, key, value, jnp.asarray(self._lists(rng))) for _ in keys[1:]]

    def _lists(self, rng: np.random.Generator) -> np.ndarray:
        lists = np.full((self.batch, 1, self.kv_heads, self.topk), -1, np.int32)
        for b, (length, listed) in enumerate(zip(self.lengths, self.kept, strict=True)):
            for head in range(self.kv_heads):
                if self.pattern == "clustered":  # runs of 64 neighbours
                    runs = rng.choice(length // 64, -(-listed // 64), replace=False)
                    chosen = (64 * runs[:, None] + np.arange(64)).ravel()[:listed]
                else:
                    chosen = rng.choice(length, listed, replace=False)
                lists[b, 0, head, : chosen.size] = np.sort(chosen)
        return lists

    def call(self, implementation: str) -> Callable[..., Any]:
        """Returns the attention's output."""
        return lambda query, key, value, indices, *more: attend_to_listed(
            query, key, value, indices, implementation=implementation, **self._options(*more)
        )

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row; lists of a ragged batch are checked where they are whole."""
        query, key, value, indices = arguments
        part = jnp.asarray(np.flatnonzero(self.kept == self.topk))
        want = oracles.listed_attention(query[part], key[part], value[part], indices[part, 0])
        oracles.assert_rows_close(jnp.asarray(result)[part], want, topk=self.topk)


def attend_to_listed(query, key, value, indices, **options) -> jax.Array:
    """Returns `gather_attention` [B, N, H] of one row of each sequence, [B, N, H], with lists [B, 1, G, k]."""
    out = gather_attention(query[:, None], key, value, indices, **options)
    assert isinstance(out, jax.Array)  # no residuals were asked for
    return out[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Paged(CacheWorkload):
    """A workload from a pool of pages in random order; beside the same one without, what paging costs shows."""

    page: int
    pattern: str = "pages"

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sequences, keys of each, tokens of a page."""
        return {**super().sizes, "page": self.page}

    def _in_pages(self, *caches: jax.Array) -> Arrays:
        """Cuts caches [B, S, K, H] into pools of pages [P, page, K, H]."""
        return tuple(cache.reshape(-1, self.page, *cache.shape[2:]) for cache in caches)

    def _page_table(self, rng: np.random.Generator) -> jax.Array:
        """Deals all pages of the pool out at random, int32 [B, pages]."""
        count = self.batch * self.keys // self.page
        return jnp.asarray(rng.permutation(count).reshape(self.batch, -1), jnp.int32)

    def _options(self, *more: jax.Array) -> dict[str, Any]:
        (page_table,) = more
        return {"page_table": page_table}

    def _out_of_pages(self, arguments: Arrays) -> Arrays:
        """Returns the arguments as they would be without pages."""
        query, key, value, last, page_table = arguments
        return query, *_copy_pages(page_table, key, value), last

    def _pattern_word(self) -> tuple[str, ...]:
        return ()  # the sizes say it


@jax.jit
def _copy_pages(page_table, *pools) -> Arrays:
    """Copies each sequence's pages into one cache [B, S, K, H]."""
    return tuple(
        pool[page_table].reshape(page_table.shape[0], -1, *pool.shape[2:]) for pool in pools
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedDecode(_Paged, Decode):
    """`Decode` from a pool of pages."""

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, lengths, page_table) of each call."""
        rng = np.random.default_rng(seed)
        return [
            (query, *self._in_pages(key, value), lengths, self._page_table(rng))
            for query, key, value, lengths in super().draw(seed, count)
        ]

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row."""
        super().check(self._out_of_pages(arguments), result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedGather(_Paged, Gather):
    """`Gather` from a pool of pages."""

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, indices, page_table) of each call; calls share key and value, not the lists."""
        drawn = super().draw(seed, count)
        pools = self._in_pages(*drawn[0][1:3])
        page_table = self._page_table(np.random.default_rng(seed))
        # A copy each, for the same reason as that of the query.
        return [(query, *pools, indices, page_table + 0) for query, _, _, indices in drawn]

    def check(self, arguments: Arrays, result: Any) -> None:
        """Checks the output row by row."""
        super().check(self._out_of_pages(arguments), result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiedDecode(Decode):
    """`Decode` with an eight-bit copy of the keys; beside it, what the copy saves shows.

    Args:
      pattern: "int8 keys" or "float8 keys", ranked by the copy; "certified" or "float8 certified", bit for bit as without it.
    """

    pattern: str = "int8 keys"

    @property
    def _certified(self) -> bool:
        return self.pattern.endswith("certified")

    @property
    def least_bytes(self) -> int:
        """The copy of all valid keys, their scales and errors, and the keys and values that each head selects."""
        copy = self.head_size + 4 * (2 if self._certified else 1)
        return copy * self._keys_read + 2 * 2 * self.head_size * self._values_read

    def draw(self, seed: int, count: int) -> list[Arrays]:
        """Returns (query, key, value, lengths, the copy's values, scale, error) of each call."""
        dtype = "float8_e4m3fn" if self.pattern.startswith("float8") else "int8"
        copy = jax.jit(functools.partial(quantize_keys, dtype=dtype))
        return [(*arguments, *copy(arguments[1])) for arguments in super().draw(seed, count)]

    def _options(self, *more: jax.Array) -> dict[str, Any]:
        return {"quantized_key": QuantizedKeys(*more), "certified": self._certified}

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
            plain = _without_a_copy(self.topk, implementation)(*arguments[:4])
            oracles.assert_same_bits(result, plain)


@functools.cache
def _without_a_copy(topk: int, implementation: str) -> Callable[..., Any]:
    return jax.jit(
        lambda query, key, value, lengths: topk_decode_attention(
            query, key, value, topk=topk, lengths=lengths, implementation=implementation
        )
    )
