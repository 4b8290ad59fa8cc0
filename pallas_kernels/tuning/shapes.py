"""Sizes of the inputs that kernels are tuned and timed on: attention to a cache, and a lightning indexer's."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

type Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """Attention of each sequence to its cache; the default heads are those of Llama 3 8B.

    Args:
      batch: sequences.
      keys: of each.
    """

    batch: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128

    @property
    def cache_letters(self) -> Mapping[str, int]:
        """The heads, by the letters of the ops' docstrings."""
        return {"N": self.heads, "K": self.kv_heads, "H": self.head_size}

    def cache_shapes(self, *rows: int) -> tuple[Shape, Shape, Shape]:
        """Returns the shapes of query [B, N, H], or [B, T, N, H] of so many `rows`, and of key and value [B, S, K, H]."""
        cache = (self.batch, self.keys, self.kv_heads, self.head_size)
        return (self.batch, *rows, self.heads, self.head_size), cache, cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexSizes:
    """A lightning indexer over the keys of each sequence; the default heads are those of DeepSeek-V3.2.

    Args:
      batch: sequences.
      keys: of each.
    """

    batch: int
    keys: int
    index_heads: int = 64
    index_size: int = 128

    @property
    def index_letters(self) -> Mapping[str, int]:
        """The heads, by the letters of the ops' docstrings."""
        return {"I": self.index_heads, "D": self.index_size}

    def index_shapes(self, rows: int) -> tuple[Shape, Shape, Shape]:
        """Returns the shapes of index_query [B, T, I, D], index_key [B, S, D] and head_weights [B, T, I]."""
        weights = (self.batch, rows, self.index_heads)
        return (*weights, self.index_size), (self.batch, self.keys, self.index_size), weights


def normal(rng: jax.Array, shapes: Iterable[Shape], dtype: str) -> tuple[jax.Array, ...]:
    """Draws an array of each shape."""
    shapes = tuple(shapes)
    return tuple(
        jax.random.normal(key, shape, jnp.dtype(dtype))
        for key, shape in zip(jax.random.split(rng, len(shapes)), shapes, strict=True)
    )
