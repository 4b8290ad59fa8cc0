"""Decoder language model in Flax NNX: parameters only, layers stacked and scanned, attention as a strategy.

Data flow of a layer: norm -> q, k, v -> rotate -> the strategy attends -> out, residual -> norm -> gated MLP, residual.
Three entries share it. `__call__` scores whole sequences (training too), `prefill` does the same for a ragged batch of
prompts and fills a cache, `decode` advances every sequence by one token. They differ only in where keys and values come
from, so each is a few lines around `DecoderLayer.project` and `DecoderLayer.combine`.

Matrices are stored [in, out]: a decode step is bound by reading them, and that layout streams best on a CPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxtopk.attention.base import AttentionStrategy, Index
from jaxtopk.attention.full import FullAttention
from jaxtopk.attention.rope import rope_tables, rotate
from jaxtopk.decoding.kv_cache import KVCache, write_prefix, write_row
from jaxtopk.models.decoder_lm.config import DecoderConfig, IndexerConfig
from jaxtopk.models.decoder_lm.indexer import Indexer
from jaxtopk.models.decoder_lm.linear import affine, einsum, normal
from jaxtopk.sharding import ShardingConfig, constrain, param_name

_ACT_BTD = ShardingConfig().act_btd


class _Rotations(NamedTuple):
    """cos and sin of the rows' positions: of attention's heads, and of the indexer's where there is one."""

    attention: tuple[Array, Array]
    index: tuple[Array, Array] | None


class _Written(NamedTuple):
    """What the rows of a layer leave in its cache."""

    key: Array
    value: Array
    index_key: Array | None


# What attention selected and what it found: selecting again is the dearest thing to repeat in a backward pass, and the
# likeliest to come out differently.
_KEPT_IN_REMAT = jax.checkpoint_policies.save_only_these_names(
    "attended", "topk_threshold", "topk_tie_cut", "topk_pool_lse", "index_selection"
)

_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class DecoderLayer(nnx.Module):
    """Parameters of one layer, or of all of them with a leading axis L."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        stacked: bool = False,
    ):
        """Draws weights with variance 1 / fan-in, those that write to the residual stream smaller by 2 L."""
        d, f, h = config.embed_dim, config.mlp_dim, config.head_dim
        n, k = config.num_heads, config.num_kv_heads
        leading = (config.num_layers,) if stacked else ()

        def weight(shape: tuple[int, ...], fan_in: int) -> nnx.Param:
            return nnx.Param(normal(rngs, leading + shape, fan_in**-0.5, dtype))

        def full(shape: tuple[int, ...], value: float) -> nnx.Param:
            return nnx.Param(jnp.full(leading + shape, value, dtype))

        def optional(present: bool, shape: tuple[int, ...], value: float) -> nnx.Param | None:
            return full(shape, value) if present else None

        residual = 2 * config.num_layers
        self.config = config
        self.attention_norm = full((d,), 1.0)
        self.q_weight = weight((d, n, h), d)
        self.k_weight = weight((d, k, h), d)
        self.v_weight = weight((d, k, h), d)
        self.out_weight = weight((n, h, d), n * h * residual)
        self.q_bias = optional(config.qkv_bias, (n, h), 0.0)
        self.k_bias = optional(config.qkv_bias, (k, h), 0.0)
        self.v_bias = optional(config.qkv_bias, (k, h), 0.0)
        self.out_bias = optional(config.out_bias, (d,), 0.0)
        self.q_norm = optional(config.qk_norm, (h,), 1.0)
        self.k_norm = optional(config.qk_norm, (h,), 1.0)
        self.mlp_norm = full((d,), 1.0)
        self.gate_weight = weight((d, f), d)
        self.up_weight = weight((d, f), d)
        self.down_weight = weight((f, d), f * residual)
        self.gate_bias = optional(config.mlp_bias, (f,), 0.0)
        self.up_bias = optional(config.mlp_bias, (f,), 0.0)
        self.down_bias = optional(config.mlp_bias, (d,), 0.0)
        self.indexer = (
            None
            if config.indexer is None
            else Indexer(config, rngs=rngs, dtype=dtype, stacked=stacked)
        )

    def project(
        self,
        x: Float[Array, "*batch D"],
        cos: Float[Array, "*batch half"],
        sin: Float[Array, "*batch half"],
    ) -> tuple[Float[Array, "*batch N H"], Float[Array, "*batch K H"], Float[Array, "*batch K H"]]:
        """Returns rotated query and key, and value, of the normalised residual stream."""
        epsilon = self.config.norm_epsilon
        x = rms_norm(x, self.attention_norm, epsilon)
        query = affine("...d,dnh->...nh", x, self.q_weight, self.q_bias)
        key = affine("...d,dkh->...kh", x, self.k_weight, self.k_bias)
        value = affine("...d,dkh->...kh", x, self.v_weight, self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            query = rms_norm(query, self.q_norm, epsilon)
            key = rms_norm(key, self.k_norm, epsilon)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def index(
        self,
        x: Float[Array, "*batch D"],
        cos: Float[Array, "*batch half"],
        sin: Float[Array, "*batch half"],
    ) -> Index:
        """Returns what the indexer says of the residual stream, of which it sees what `project` sees."""
        assert self.indexer is not None  # callers have looked at the configuration
        return self.indexer(rms_norm(x, self.attention_norm, self.config.norm_epsilon), cos, sin)

    def combine(
        self, x: Float[Array, "*batch D"], attended: Float[Array, "*batch N H"]
    ) -> Float[Array, "*batch D"]:
        """Adds what attention found, then the gated MLP, to the residual stream."""
        # Flattened first: XLA CPU would copy the weight to contract two of its axes.
        attended = attended.reshape(*attended.shape[:-2], -1)
        out_weight = self.out_weight[...].reshape(attended.shape[-1], -1)
        x = x + affine("...c,cd->...d", attended, out_weight, self.out_bias)
        normed = rms_norm(x, self.mlp_norm, self.config.norm_epsilon)
        gate = affine("...d,df->...f", normed, self.gate_weight, self.gate_bias)
        up = affine("...d,df->...f", normed, self.up_weight, self.up_bias)
        hidden = _ACTIVATIONS[self.config.activation](gate) * up
        return x + affine("...f,fd->...d", hidden, self.down_weight, self.down_bias)


class DecoderLM(nnx.Module):
    """Llama-like decoder language model.

    Parameters (L layers, letters as in `DecoderConfig`): embed [V, D]; layers.* as `DecoderLayer` names them, with a
    leading L; layers.indexer.* as `Indexer` names them, where the configuration has one; final_norm [D]; lm_head [D, V], or
    None where the embedding is the head.

    float32 parameters compute in true float32 on every device; bfloat16 parameters compute in bfloat16 with norms, softmax
    and logits in float32. `config` and `attention` are static: a model with another strategy is another pytree structure
    over the same arrays.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        attention: AttentionStrategy = FullAttention(),
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        stacked: bool = True,
    ):
        """Draws random parameters in `dtype`; see `from_params` for given ones.

        Without `stacked` the layers are drawn apart, in the form of `unstacked`, and never lie in memory twice.
        """
        v, d = config.vocab_size, config.embed_dim
        self.config = config
        self.attention = attention
        self.embed = nnx.Param(normal(rngs, (v, d), 0.02, dtype))
        if stacked:
            self.layers = DecoderLayer(config, rngs=rngs, dtype=dtype, stacked=True)
        else:
            self.layers = nnx.List(
                [DecoderLayer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)]
            )
        self.final_norm = nnx.Param(jnp.ones((d,), dtype))
        self.lm_head = (
            None if config.tied_embeddings else nnx.Param(normal(rngs, (d, v), d**-0.5, dtype))
        )

    @classmethod
    def from_params(
        cls,
        config: DecoderConfig,
        params: Mapping[str, Array],
        *,
        attention: AttentionStrategy = FullAttention(),
    ) -> "DecoderLM":
        """Builds a model around given arrays, which are neither copied nor cast.

        Args:
          config: says which parameters there must be.
          params: by dotted name, as `param_shapes(config)` lists them; shapes with the leading L.
          attention: strategy of every layer.

        Raises:
          ValueError: a name is missing or not known, or a shape differs.
        """
        wanted = param_shapes(config)
        for problem, names in (
            ("missing", wanted.keys() - params.keys()),
            ("unknown", params.keys() - wanted.keys()),
        ):
            if names:
                raise ValueError(
                    f"params: got {problem} {', '.join(sorted(names))}, wanted those of param_shapes(config)"
                )
        for name, shape in wanted.items():
            if tuple(params[name].shape) != shape:
                raise ValueError(
                    f"params {name}: got shape {tuple(params[name].shape)}, wanted {shape}"
                )
        abstract = _abstract(cls, config, attention)
        return jax.tree_util.tree_map_with_path(lambda path, _: params[param_name(path)], abstract)

    def with_attention(self, attention: AttentionStrategy) -> "DecoderLM":
        """Returns a model that shares these parameter arrays and attends as `attention` says."""
        model = jax.tree.map(lambda leaf: leaf, self)
        model.attention = attention
        return model

    def with_indexer(self, indexer: IndexerConfig | None = None, *, rngs: nnx.Rngs) -> "DecoderLM":
        """Returns a model that shares these parameter arrays, and has an indexer in each layer, for `IndexerAttention`.

        The indexer's weights are drawn at random, in the embedding's dtype: it costs what a trained one costs, but what it
        selects means nothing until it is trained. Other strategies do not read it.

        Args:
          indexer: its sizes; None means `IndexerConfig.for_decoder`.
          rngs: draws the weights.

        Raises:
          ValueError: the model has an indexer already.
        """
        if self.config.indexer is not None:
            raise ValueError(
                f"with_indexer: got a model that has {self.config.indexer}, wanted one without an indexer"
            )
        indexer = IndexerConfig.for_decoder(self.config) if indexer is None else indexer
        config = dataclasses.replace(self.config, indexer=indexer)
        model = jax.tree.map(lambda leaf: leaf, self)
        model.config = config
        stacked = not isinstance(model.layers, nnx.List)
        for layer in [model.layers] if stacked else model.layers:
            layer.config = config
            # "data": the attribute was None, which holds no parameters.
            layer.indexer = nnx.data(
                Indexer(config, rngs=rngs, dtype=self.embed[...].dtype, stacked=stacked)
            )
        return model

    def unstacked(self) -> "DecoderLM":
        """Returns the same model with one module, and its own arrays, per layer: the form to decode many tokens in.

        `decode` runs the layers one after another, each with its own cache; out of a stack, every step would first copy
        each layer's weights on a CPU. Do this once, outside the decode loop: it copies the layers once.
        """
        model = jax.tree.map(lambda leaf: leaf, self)
        model.layers = nnx.List(self._each_layer())
        return model

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        sparse_rows: Bool[Array, "B T"] | None = None,
        remat: bool = False,
    ) -> Float32[Array, "B T V"]:
        """Returns logits of every position; arguments as `hidden`."""
        return self.head(
            self.hidden(
                tokens,
                positions=positions,
                segment_ids=segment_ids,
                sparse_rows=sparse_rows,
                remat=remat,
            )
        )

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        sparse_rows: Bool[Array, "B T"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns the normalised residual stream that the head reads.

        Args:
          positions: for the rotation; None counts from the start of the row, or of each document where `segment_ids` are
            given.
          segment_ids: documents packed into a row; a token sees its own document only.
          sparse_rows: which rows the strategy may make sparse; None: all.
          remat: for the backward pass keep only each layer's input and what its attention selected and found; compute the rest
            again.
        """
        _check_tokens(tokens, ndim=2)
        if positions is None:
            positions = _positions(tokens, segment_ids)

        def attend(strategy, window, query, key, value, **indexed):
            return strategy.attend(
                query,
                key,
                value,
                window=window,
                segment_ids=segment_ids,
                sparse_rows=sparse_rows,
                **indexed,
            ), None

        x, _, _ = self._sequence(
            self.attention, attend, tokens, positions, remat=remat, keep_kv=False
        )
        return rms_norm(x, self.final_norm, self.config.norm_epsilon)

    def hidden_captured(
        self,
        tokens: Int[Array, "B T"],
        attend: Callable[..., tuple[Array, Any]],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        sparse_rows: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Does what `hidden` does, with every layer's attention done, and watched, by `attend`.

        Args:
          attend: called in each layer as attend(strategy, query [B,T,N,H], key [B,T,K,H], value [B,T,K,H], window=,
            segment_ids=, sparse_rows=), and index= where the strategy needs it; returns what `strategy.attend` would, and a
            pytree of arrays, of the same shapes in all layers. See `jaxtopk.analysis.analyze`.

        Returns:
          What `hidden` returns, and those pytrees stacked over layers on axis 0.
        """
        _check_tokens(tokens, ndim=2)
        if positions is None:
            positions = _positions(tokens, segment_ids)

        def watched(strategy, window, query, key, value, **indexed):
            return attend(
                strategy,
                query,
                key,
                value,
                window=window,
                segment_ids=segment_ids,
                sparse_rows=sparse_rows,
                **indexed,
            )

        x, _, captured = self._sequence(
            self.attention, watched, tokens, positions, remat=False, keep_kv=False
        )
        captured = jax.tree.map(lambda *layers: jnp.concatenate(layers), *captured)
        return rms_norm(x, self.final_norm, self.config.norm_epsilon), captured

    def head(self, hidden: Float[Array, "*batch D"]) -> Float32[Array, "*batch V"]:
        """Returns float32 logits of the residual stream that `hidden` returned."""
        if self.lm_head is None:
            return einsum("...d,vd->...v", hidden, self.embed[...], jnp.float32)
        return einsum("...d,dv->...v", hidden, self.lm_head[...], jnp.float32)

    def prefill(
        self, tokens: Int[Array, "B T"], *, lengths: Int32[Array, "B"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Runs right-padded prompts and fills the cache, overwriting what it held.

        Attention is `attention.prefill_strategy()`'s. Rows at and past `lengths` are garbage, here and in the cache.

        Returns:
          The residual stream as `hidden` returns it, and the cache with keys and values at 0..T-1 and these `lengths`.

        Raises:
          ValueError: the prompts do not fit the cache, or the cache is another model's.
        """
        _check_tokens(tokens, ndim=2)
        self._check_cache(cache, tokens.shape[0])
        if tokens.shape[1] > cache.capacity:
            raise ValueError(
                f"tokens: got {tokens.shape[1]} a row, wanted at most the cache's capacity = {cache.capacity}"
            )

        def attend(strategy, window, query, key, value, **indexed):
            return strategy.attend(
                query, key, value, window=window, lengths=lengths, **indexed
            ), None

        x, written, _ = self._sequence(
            self.attention.prefill_strategy(),
            attend,
            tokens,
            _positions(tokens, None),
            remat=False,
            keep_kv=True,
        )
        write = lambda name: tuple(
            write_prefix(cached, getattr(new, name))
            for cached, new in zip(getattr(cache, name), written, strict=True)
        )
        cache = KVCache(
            key=write("key"),
            value=write("value"),
            lengths=lengths,
            index_key=None if cache.index_key is None else write("index_key"),
        )
        return rms_norm(x, self.final_norm, self.config.norm_epsilon), cache

    def decode(
        self, tokens: Int[Array, "B"], cache: KVCache
    ) -> tuple[Float32[Array, "B V"], KVCache]:
        """Appends one token to every sequence.

        Its keys and values go to index `cache.lengths`, which must be below the capacity, and its rotation is that
        position's. In a loop, carry the cache, and call `unstacked()` before it.

        Returns:
          Logits of the token that follows, and the cache with `lengths` one larger.

        Raises:
          ValueError: the cache is another model's.
        """

        def attend(strategy, query, key, value, **visible):
            return strategy.decode(query, key, value, **visible), None

        return self.decode_captured(tokens, cache, attend)[:2]

    def decode_captured(
        self, tokens: Int[Array, "B"], cache: KVCache, attend: Callable[..., tuple[Array, Any]]
    ) -> tuple[Float32[Array, "B V"], KVCache, Any]:
        """Does what `decode` does, with every layer's attention done, and watched, by `attend`.

        Args:
          attend: called in each layer as attend(strategy, query [B,N,H], key [B,S,K,H], value [B,S,K,H], lengths= [B],
            window=), and index= where the strategy needs it; returns what `strategy.decode` would, and a pytree of arrays,
            of the same shapes in all layers. See `jaxtopk.analysis.capture`.

        Returns:
          What `decode` returns, and those pytrees stacked over layers on axis 0.
        """
        _check_tokens(tokens, ndim=1)
        self._check_cache(cache, tokens.shape[0])
        num_layers = self.config.num_layers
        rotations = self._rotations(cache.lengths)
        lengths = cache.lengths + 1
        x = self.embed[...][tokens]
        written, captured = [], []
        for index, layer in enumerate(self._each_layer()):
            x, of_cache, of_layer = _decode_layer(
                layer,
                x,
                rotations,
                _Written(
                    cache.key[index],
                    cache.value[index],
                    None if cache.index_key is None else cache.index_key[index],
                ),
                lengths,
                attend=attend,
                strategy=self.attention.layer(index, num_layers),
                window=self.config.window(index),
            )
            written.append(of_cache)
            captured.append(of_layer)
        x = rms_norm(x, self.final_norm, self.config.norm_epsilon)
        keys, values, index_keys = zip(*written, strict=True)
        cache = KVCache(
            key=keys,
            value=values,
            lengths=lengths,
            index_key=None if cache.index_key is None else index_keys,
        )
        return self.head(x), cache, jax.tree.map(lambda *layers: jnp.stack(layers), *captured)

    def _sequence(
        self,
        attention: AttentionStrategy,
        attend: Callable[..., tuple[Array, Any]],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        remat: bool,
        keep_kv: bool,
    ) -> tuple[Float[Array, "B T D"], list[_Written], list[Any]]:
        """Runs whole rows through all layers.

        Returns:
          The residual stream; if asked, what each layer leaves in a cache; and what `attend` captured, a pytree for each run of layers,
          which leads its arrays.
        """
        self._check_attention(attention)
        rotations = self._rotations(positions)
        x = constrain(self.embed[...][tokens], _ACT_BTD)
        kept: list[_Written] = []
        captured: list[Any] = []
        for start, stop, strategy, window in self._runs(attention):

            def body(x, layer, strategy=strategy, window=window):
                query, key, value = layer.project(x, *rotations.attention)
                index = None if rotations.index is None else layer.index(x, *rotations.index)
                indexed = {"index": index} if strategy.needs_index else {}
                attended, of_layer = attend(strategy, window, query, key, value, **indexed)
                x = layer.combine(x, checkpoint_name(attended, "attended"))
                x = constrain(x, _ACT_BTD)
                index_key = None if index is None else index.key
                return x, (_Written(key, value, index_key) if keep_kv else None, of_layer)

            if remat:
                body = jax.checkpoint(body, policy=_KEPT_IN_REMAT)
            if isinstance(self.layers, nnx.List):
                for layer in self.layers[start:stop]:
                    x, (written, of_layer) = body(x, layer)
                    captured.append(jax.tree.map(lambda y: y[None], of_layer))
                    if written is not None:
                        kept.append(written)
            else:
                layers = self.layers
                if (start, stop) != (0, self.config.num_layers):
                    layers = jax.tree.map(lambda leaf: leaf[start:stop], layers)  # noqa: B023
                x, (of_layers, of_run) = jax.lax.scan(body, x, layers)
                captured.append(of_run)
                if of_layers is not None:
                    kept.extend(
                        jax.tree.map(lambda y: y[i], of_layers)  # noqa: B023
                        for i in range(stop - start)
                    )
        return x, kept, captured

    def _rotations(self, positions: Int[Array, "*batch"]) -> _Rotations:
        config = self.config
        tables = lambda size: rope_tables(config.rope, positions, size)
        return _Rotations(
            attention=tables(config.head_dim),
            index=None if config.indexer is None else tables(config.indexer.rotated),
        )

    def _runs(
        self, attention: AttentionStrategy
    ) -> Iterator[tuple[int, int, AttentionStrategy, int | None]]:
        """Yields (start, stop, strategy, window) of consecutive layers that attend alike: one scan each."""
        num_layers = self.config.num_layers
        kinds = [
            (attention.layer(index, num_layers), self.config.window(index))
            for index in range(num_layers)
        ]
        start = 0
        for stop in range(1, num_layers + 1):
            if stop == num_layers or kinds[stop] != kinds[start]:
                yield start, stop, *kinds[start]
                start = stop

    def _each_layer(self) -> list[DecoderLayer]:
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        return [
            jax.tree.map(lambda leaf: leaf[index], self.layers)  # noqa: B023
            for index in range(self.config.num_layers)
        ]

    def _check_attention(self, attention: AttentionStrategy) -> None:
        if attention.needs_index and self.config.indexer is None:
            raise ValueError(
                f"attention: got {attention} for a model without indexer parameters, wanted DecoderLM.with_indexer before it"
            )

    def _check_cache(self, cache: KVCache, batch: int) -> None:
        """Refuses another model's cache, and, before a prompt is run for it, a strategy that this model cannot decode by."""
        config = self.config
        self._check_attention(self.attention)
        got = (len(cache.key), cache.batch, *cache.key[0].shape[2:])
        wanted = (config.num_layers, batch, config.num_kv_heads, config.head_dim)
        if got != wanted:
            raise ValueError(f"cache: got (L, B, K, H) = {got}, wanted {wanted}")
        got = None if cache.index_key is None else cache.index_key[0].shape[-1]
        wanted = None if config.indexer is None else config.indexer.head_dim
        if got != wanted:
            raise ValueError(f"cache: got index keys of size {got}, wanted {wanted}")


# Layers of one shape and strategy are traced and lowered once, not once each: with a Mosaic kernel inside, that is seconds
# a layer. The compiler inlines the calls, so the compiled step is the same.
@functools.partial(jax.jit, static_argnames=("attend", "strategy", "window"))
def _decode_layer(layer, x, rotations, cached, lengths, *, attend, strategy, window):
    """Returns the residual stream [B, D] after a layer, its cache with the new row, and what `attend` saw."""
    query, key, value = layer.project(x, *rotations.attention)
    keys = write_row(cached.key, key, lengths - 1)
    values = write_row(cached.value, value, lengths - 1)
    indexed, index_keys = {}, None
    if rotations.index is not None:
        index = layer.index(x, *rotations.index)
        index_keys = write_row(cached.index_key, index.key, lengths - 1)
        if strategy.needs_index:
            indexed = {"index": index._replace(key=index_keys)}
    attended, captured = attend(
        strategy, query, keys, values, lengths=lengths, window=window, **indexed
    )
    return layer.combine(x, attended), _Written(keys, values, index_keys), captured


def param_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of `DecoderLM(config)` by its dotted name, such as layers.q_weight."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_abstract(DecoderLM, config, FullAttention()))
    return {param_name(path): tuple(leaf.shape) for path, leaf in leaves}


def rms_norm(
    x: Float[Array, "*batch C"], weight: nnx.Param | Float[Array, "C"], epsilon: float
) -> Float[Array, "*batch C"]:
    """Divides by the root mean square of the last axis, in float32, then scales; returns x's dtype."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)
    return normed * weight[...].reshape((1,) * (x.ndim - 1) + (-1,))


def _abstract(
    cls: type[DecoderLM], config: DecoderConfig, attention: AttentionStrategy
) -> DecoderLM:
    return nnx.eval_shape(lambda: cls(config, attention=attention, rngs=nnx.Rngs(params=0)))


def _positions(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Int32[Array, "B T"]:
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if segment_ids is None:
        return index
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _check_tokens(tokens: Array, *, ndim: int) -> None:
    if tokens.ndim != ndim or not jnp.issubdtype(tokens.dtype, jnp.integer):
        wanted = "an integer array [B, T]" if ndim == 2 else "an integer array [B]"
        raise ValueError(f"tokens: got {tokens.dtype}{list(tokens.shape)}, wanted {wanted}")


__all__ = ["DecoderLM", "DecoderLayer", "param_shapes", "rms_norm"]
