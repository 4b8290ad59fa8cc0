"""Parameters of one layer's lightning indexer, and what it says of rows and keys.

Queries, keys and head weights are linear in the normalised input of the layer; keys pass a LayerNorm. The first channels are
rotated, in the half-split layout of `jaxtopk.attention.rope` within them: [rotated | as they are], where main heads have no
second part.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxtopk.attention.base import Index
from jaxtopk.attention.rope import rotate
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.linear import einsum, normal


class Indexer(nnx.Module):
    """Parameters of the indexer of one layer, or of all of them with a leading axis L. I heads of size J.

    query_weight [D, I, J], key_weight [D, J], head_weight [D, I], key_norm [J], key_norm_bias [J].

    Source: DeepSeek Sparse Attention, arXiv:2512.02556.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        stacked: bool = False,
    ):
        """Draws weights with variance 1 / D.

        Raises:
          ValueError: the configuration has no indexer.
        """
        if config.indexer is None:
            raise ValueError("config.indexer: got None, wanted an IndexerConfig")
        d, i, j = config.embed_dim, config.indexer.num_heads, config.indexer.head_dim
        leading = (config.num_layers,) if stacked else ()

        def weight(*shape: int) -> nnx.Param:
            return nnx.Param(normal(rngs, leading + shape, d**-0.5, dtype))

        self.config = config.indexer
        self.query_weight = weight(d, i, j)
        self.key_weight = weight(d, j)
        self.head_weight = weight(d, i)
        self.key_norm = nnx.Param(jnp.ones((*leading, j), dtype))
        self.key_norm_bias = nnx.Param(jnp.zeros((*leading, j), dtype))

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        cos: Float[Array, "*batch half"],
        sin: Float[Array, "*batch half"],
    ) -> Index:
        """Returns the rotated query and key, and the head weights, of each row; `cos` and `sin` are of `config.rotated` channels."""
        i, j = self.config.num_heads, self.config.head_dim
        query = einsum("...d,dij->...ij", x, self.query_weight[...], x.dtype)
        key = einsum("...d,dj->...j", x, self.key_weight[...], x.dtype)
        key = _layer_norm(key, self.key_norm, self.key_norm_bias, self.config.norm_epsilon)
        weights = einsum("...d,di->...i", x, self.head_weight[...], jnp.float32)
        return Index(
            query=self._rotate(query, cos, sin),
            key=self._rotate(key[..., None, :], cos, sin)[..., 0, :],
            # Once here instead of in each score; never rounded to x's dtype.
            head_weights=weights * (i * j) ** -0.5,
        )

    def _rotate(self, x, cos, sin):
        turned, still = jnp.split(x, [self.config.rotated], axis=-1)
        return jnp.concatenate([rotate(turned, cos, sin), still], axis=-1)


def _layer_norm(x, weight, bias, epsilon):
    """Takes mean and variance in float32, then scales and shifts; returns x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
    last = (1,) * (x.ndim - 1) + (-1,)
    return normed * weight[...].reshape(last) + bias[...].reshape(last)


__all__ = ["Indexer"]
