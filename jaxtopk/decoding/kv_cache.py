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

    @classmethod
    def create(
        cls, config: DecoderConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.float32
    ) -> "KVCache":
        """Returns an empty cache.

        Args:
          config: gives L, K and H.
          batch: B, sequences.
          capacity: S, tokens of the prompt and the continuation together.
          dtype: of keys and values.

        Raises:
          ValueError: `batch` or `capacity` is below 1.
        """
        for name, got in (("batch", batch), ("capacity", capacity)):
            if got < 1:
                raise ValueError(f"{name}: got {got}, wanted at least 1")
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def layers() -> tuple[Array, ...]:
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(key=layers(), value=layers(), lengths=jnp.zeros((batch,), jnp.int32))

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
        for name, layers in (("key", self.key), ("value", self.value)):
            for index, layer in enumerate(layers):
                if (layer.shape, layer.dtype) != wanted:
                    raise ValueError(
                        f"KVCache.{name}[{index}]: got {layer.dtype}{list(layer.shape)}, "
                        f"wanted {wanted[1]}{list(wanted[0])}"
                    )
        if self.lengths.shape != wanted[0][:1] or self.lengths.dtype != jnp.int32:
            raise ValueError(
                f"KVCache.lengths: got {self.lengths.dtype}{list(self.lengths.shape)}, wanted int32[{wanted[0][0]}]"
            )


def write_prefix(
    cached: Float[Array, "B S K H"], new: Float[Array, "B T K H"]
) -> Float[Array, "B S K H"]:
    """Returns `cached` with rows 0..T-1 replaced by `new`."""
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), (0, 0, 0, 0))


def write_row(
    cached: Float[Array, "B S K H"], new: Float[Array, "B K H"], lengths: Int32[Array, "B"]
) -> Float[Array, "B S K H"]:
    """Returns `cached` with row `lengths[b]` of each sequence replaced; `lengths` must be below the capacity."""
    new = new.astype(cached.dtype)
    if cached.shape[0] == 1:
        written = jax.lax.dynamic_update_slice(cached, new[:, None], (0, lengths[0], 0, 0))
    else:
        batch = jnp.arange(cached.shape[0], dtype=lengths.dtype)
        written = cached.at[batch, lengths].set(
            new, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
        )
    # Without the barrier XLA fuses the write into whatever reads the cache in another shape, and then copies the cache for
    # each of the two writes.
    return jax.lax.optimization_barrier(written)


__all__ = ["KVCache", "write_prefix", "write_row"]
