"""The key/value cache of decoding: an argument and a result, never hidden in a module."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jaxtopk.models.decoder_lm.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # JAX rebuilds this class with specs and shapes as leaves
class KVCache:
    """Rotated keys, and values, of every layer; grows by one token a decode step, within a fixed capacity.

    Layers are separate arrays: a step then updates each in place (the caller donates the cache or carries it through a
    `lax.while_loop`), and a kernel reads one without a slice copy.
    """

    key: tuple[Float[Array, "B S K H"], ...]  # one per layer; rows past `lengths` are garbage
    value: tuple[Float[Array, "B S K H"], ...]
    lengths: Int32[
        Array, "B"
    ]  # valid tokens of each sequence; the next one is written at this index
    # The indexer's keys, of models that have one, else None.
    index_key: tuple[Float[Array, "B S J"], ...] | None = None

    @classmethod
    def create(
        cls, config: DecoderConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.float32
    ) -> "KVCache":
        """Returns an empty cache.

        Args:
          config: gives L, K and H, and J where there is an indexer.
          batch: B, sequences.
          capacity: S, tokens of the prompt and the continuation together.
          dtype: of keys and values.

        Raises:
          ValueError: `batch` or `capacity` is below 1.
        """
        for name, got in (("batch", batch), ("capacity", capacity)):
            if got < 1:
                raise ValueError(f"{name}: got {got}, wanted at least 1")

        def layers(*row: int) -> tuple[Array, ...]:
            return tuple(
                jnp.zeros((batch, capacity, *row), dtype) for _ in range(config.num_layers)
            )

        row = config.num_kv_heads, config.head_dim
        return cls(
            key=layers(*row),
            value=layers(*row),
            lengths=jnp.zeros((batch,), jnp.int32),
            index_key=None if config.indexer is None else layers(config.indexer.head_dim),
        )

    @property
    def capacity(self) -> int:
        """S, tokens."""
        return self.key[0].shape[1]

    @property
    def batch(self) -> int:
        """B, sequences."""
        return self.key[0].shape[0]

    def validate(self) -> None:
        """Checks that all layers agree in shape and dtype.

        Raises:
          ValueError: names the field, the got and the wanted.
        """
        if len(self.key) != len(self.value) or not self.key:
            raise ValueError(
                f"KVCache: got {len(self.key)} key and {len(self.value)} value layers, wanted equally many, one or more"
            )
        wanted = self.key[0].shape, self.key[0].dtype
        if len(wanted[0]) != 4:
            raise ValueError(f"KVCache.key: got shape {wanted[0]}, wanted [B, S, K, H]")
        checked = [("key", self.key, wanted), ("value", self.value, wanted)]
        if self.index_key is not None:
            if len(self.index_key) != len(self.key):
                raise ValueError(
                    f"KVCache.index_key: got {len(self.index_key)} layers, wanted {len(self.key)}, or None"
                )
            shape = (*wanted[0][:2], *self.index_key[0].shape[2:3])
            checked.append(("index_key", self.index_key, (shape, wanted[1])))
        for name, layers, (shape, dtype) in checked:
            for index, layer in enumerate(layers):
                if (layer.shape, layer.dtype) != (shape, dtype):
                    raise ValueError(
                        f"KVCache.{name}[{index}]: got {layer.dtype}{list(layer.shape)}, "
                        f"wanted {dtype}{list(shape)}"
                    )
        if self.lengths.shape != wanted[0][:1] or self.lengths.dtype != jnp.int32:
            raise ValueError(
                f"KVCache.lengths: got {self.lengths.dtype}{list(self.lengths.shape)}, wanted int32[{wanted[0][0]}]"
            )


def write_prefix(
    cached: Float[Array, "B S *row"], new: Float[Array, "B T *row"]
) -> Float[Array, "B S *row"]:
    """Returns `cached` with rows 0..T-1 replaced by `new`."""
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), (0,) * cached.ndim)


def write_row(
    cached: Float[Array, "B S *row"], new: Float[Array, "B *row"], lengths: Int32[Array, "B"]
) -> Float[Array, "B S *row"]:
    """Returns `cached` with row `lengths[b]` of each sequence replaced; `lengths` must be below the capacity."""
    new = new.astype(cached.dtype)
    if cached.shape[0] == 1:
        place = (0, lengths[0], *(0,) * (cached.ndim - 2))
        written = jax.lax.dynamic_update_slice(cached, new[:, None], place)
    else:
        batch = jnp.arange(cached.shape[0], dtype=lengths.dtype)
        written = cached.at[batch, lengths].set(
            new, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
        )
    # Without the barrier XLA fuses the write into whatever reads the cache in another shape, and then copies the cache for
    # each of the two writes.
    return jax.lax.optimization_barrier(written)


__all__ = ["KVCache", "write_prefix", "write_row"]
