"""The decoder: parity with recorded checkpoints, and agreement of its three entries with one another."""

import collections
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtopk.attention.full import FullAttention
from jaxtopk.attention.topk import TopKAttention
from jaxtopk.decoding.kv_cache import KVCache
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM, param_shapes
from jaxtopk.models.decoder_lm.params import load_folder
from jaxtopk.sharding import param_name

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
CHECKPOINTS = sorted(
    folder.name for folder in GOLDENS.iterdir() if (folder / "config.json").exists()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastTwoAttention(FullAttention):
    """A strategy whose rows differ visibly from full attention: two keys a row."""

    def attend(self, query, key, value, *, window=None, **settings):
        """Ignores the layer's own window."""
        return super().attend(query, key, value, window=2, **settings)

    def decode(self, query, key, value, *, window=None, **settings):
        """Ignores the layer's own window."""
        return super().decode(query, key, value, window=2, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondLayerOnly(LastTwoAttention):
    """Exempts every layer but the second; prompts are dense."""

    def layer(self, index, num_layers):
        """Full attention, save in layer 1."""
        return LastTwoAttention() if index == 1 else FullAttention()

    def prefill_strategy(self):
        """Dense prompts."""
        return FullAttention()


@functools.cache
def make_model(**changes) -> DecoderLM:
    sizes = dict(
        vocab_size=50,
        num_layers=3,
        embed_dim=16,
        mlp_dim=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
    )
    config = DecoderConfig(**(sizes | changes))
    return jax.jit(lambda: DecoderLM(config, rngs=nnx.Rngs(params=0)))()


@functools.partial(jax.jit, static_argnames="remat")
def score(model: DecoderLM, tokens: jax.Array, **settings) -> jax.Array:
    """Compiled, since most of a test's time would otherwise go into dispatching single operations."""
    return model(tokens, **settings)


@jax.jit
def prefill(model: DecoderLM, tokens: jax.Array, lengths: jax.Array, cache: KVCache):
    """Returns logits [B, T, V] and the cache."""
    hidden, cache = model.prefill(tokens, lengths=lengths, cache=cache)
    return model.head(hidden), cache


decode = jax.jit(lambda model, tokens, cache: model.decode(tokens, cache))


def make_tokens(shape: tuple[int, ...], vocab_size: int = 50) -> jax.Array:
    return jax.random.randint(jax.random.key(7), shape, 0, vocab_size)


def close(got, wanted, tolerance: float = 1e-5) -> None:
    """Compares with an error relative to the largest wanted value."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    assert np.max(np.abs(got - wanted)) <= tolerance * np.max(np.abs(wanted))


def decode_all(model: DecoderLM, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Decodes the given tokens [B, T] one after another; returns logits [B, T, V]."""

    def step(cache, column):
        logits, cache = model.decode(column, cache)
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, tokens.T)
    return jnp.moveaxis(logits, 0, 1), cache


# ------------------------------------------------------------------------------------------------- recorded checkpoints


def test_all_recorded_checkpoints_are_there():
    assert len(CHECKPOINTS) == 7


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_the_recorded_ones(name):
    model = load_folder(GOLDENS / name)
    expected = np.load(GOLDENS / name / "expected.npz")
    close(
        score(model, expected["tokens"]),
        expected["logits"],
        1e-4,
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_decoding_from_the_cache_equals_the_recorded_tokens(name):
    model = load_folder(GOLDENS / name)
    expected = np.load(GOLDENS / name / "expected.npz")
    prompt, wanted = jnp.asarray(expected["tokens"][:, :10]), expected["greedy"]

    @jax.jit
    def generate(model, prompt):
        batch, length = prompt.shape
        cache = KVCache.create(model.config, batch, length + wanted.shape[1])
        lengths = jnp.full((batch,), length, jnp.int32)
        hidden, cache = model.prefill(prompt, lengths=lengths, cache=cache)
        first = jnp.argmax(model.head(hidden[:, -1]), axis=-1)
        model = model.unstacked()

        def step(state, _):
            token, cache = state
            logits, cache = model.decode(token, cache)
            return (jnp.argmax(logits, axis=-1), cache), token

        _, tokens = jax.lax.scan(step, (first, cache), length=wanted.shape[1])
        return tokens.T

    np.testing.assert_array_equal(generate(model, prompt), wanted)


# ------------------------------------------------------------------------------------------------- the entries agree


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param(dict(windows=(None, 3, 3)), id="windows"),
        pytest.param(dict(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True), id="options"),
    ],
)
@pytest.mark.parametrize(
    "attention", [FullAttention(), LastTwoAttention()], ids=["full", "last-two"]
)
def test_decoding_equals_whole_sequences(changes, attention):
    model = make_model(**changes).with_attention(attention)
    tokens = make_tokens((2, 11))
    cache = KVCache.create(model.config, 2, 16)
    logits, cache = jax.jit(decode_all)(model, tokens, cache)
    close(logits, score(model, tokens))
    np.testing.assert_array_equal(cache.lengths, [11, 11])


def test_decoding_continues_ragged_prompts():
    model = make_model(windows=(4, None, None))
    tokens = make_tokens((3, 12))
    lengths = jnp.array([8, 1, 5], jnp.int32)
    cache = KVCache.create(model.config, 3, 12)
    # What was in the cache, and what stands past a prompt's end, must not matter.
    cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, 9), cache)
    garbage = jnp.where(jnp.arange(8)[None] < lengths[:, None], tokens[:, :8], 49)
    logits, cache = prefill(model, garbage, lengths, cache)
    wanted = score(model, tokens)
    rows = jnp.arange(3)
    close(logits[rows, lengths - 1], wanted[rows, lengths - 1])
    for _ in range(4):
        logits, cache = decode(model, tokens[rows, cache.lengths], cache)
        close(logits, wanted[rows, cache.lengths - 1])
    np.testing.assert_array_equal(cache.lengths, lengths + 4)


def test_prefill_takes_its_own_strategy_and_decoding_the_layers_own():
    model = make_model().with_attention(SecondLayerOnly())
    dense = model.with_attention(FullAttention())
    tokens = make_tokens((1, 9))
    lengths = jnp.array([9], jnp.int32)
    logits, cache = prefill(model, tokens, lengths, KVCache.create(model.config, 1, 12))
    close(logits, score(dense, tokens))
    assert np.max(np.abs(score(model, tokens) - score(dense, tokens))) > 1e-3
    token = jnp.array([3])
    sparse_logits, _ = decode(model, token, cache)
    dense_logits, _ = decode(dense, token, cache)
    assert np.max(np.abs(sparse_logits - dense_logits)) > 1e-3


def test_scan_runs_equal_a_python_loop_over_layers():
    # Four kinds of neighbours: runs of length 1, 1 and 2, split by strategy and by window.
    model = make_model(num_layers=4, windows=(None, None, 3, 3)).with_attention(SecondLayerOnly())
    tokens = make_tokens((2, 9))
    close(score(model, tokens), score(model.unstacked(), tokens))
    jaxpr = jax.make_jaxpr(lambda model: model(tokens))(model)
    assert sum(equation.primitive.name == "scan" for equation in jaxpr.eqns) == 3


def test_packed_documents_equal_separate_ones():
    model = make_model()
    first, second = make_tokens((2, 12))[:, :5], make_tokens((2, 12))[:, 5:]
    segment_ids = jnp.broadcast_to(jnp.where(jnp.arange(12) < 5, 4, 2), (2, 12))
    packed = score(model, jnp.concatenate([first, second], axis=1), segment_ids=segment_ids)
    close(packed[:, :5], score(model, first))
    close(packed[:, 5:], score(model, second))


def test_positions_shift_nothing_but_the_rotation():
    model = make_model()
    tokens = make_tokens((1, 8))
    positions = jnp.arange(8, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(score(model, tokens, positions=positions), score(model, tokens))
    # Scores depend on differences of positions only.
    close(score(model, tokens, positions=positions + 21), score(model, tokens), 1e-4)
    assert (
        np.max(np.abs(score(model, tokens, positions=positions * 3) - score(model, tokens))) > 1e-3
    )


def test_remat_changes_no_gradient():
    model = make_model()
    tokens = make_tokens((2, 10))

    def loss(model, remat):
        logits = model(tokens, remat=remat)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

    plain, rematted = (
        jax.jit(jax.grad(loss), static_argnums=1)(model, remat) for remat in (False, True)
    )
    leaves = jax.tree.leaves(plain)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in leaves)
    for got, wanted in zip(jax.tree.leaves(rematted), leaves, strict=True):
        close(got, wanted)


def count_primitives(jaxpr) -> collections.Counter:
    """Counts the operations of a jaxpr and of all it contains."""
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                counts += count_primitives(inner)
    return counts


def test_remat_does_not_select_again():
    model = make_model().with_attention(TopKAttention(topk=3, implementation="xla"))
    tokens = make_tokens((1, 16))

    def searches(remat):  # the bisection for the threshold is the only `while`
        loss = lambda model: jnp.sum(model(tokens, remat=remat))
        counts = count_primitives(jax.make_jaxpr(jax.grad(loss))(model).jaxpr)
        assert bool(counts["remat2"] + counts["checkpoint"]) == remat
        return counts["while"]

    assert searches(True) == searches(False) > 0


def test_bfloat16_parameters_give_float32_logits_near_the_float32_ones():
    model = make_model()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    tokens = make_tokens((2, 10))
    logits = score(half, tokens)
    assert logits.dtype == jnp.float32
    close(logits, score(model, tokens), 0.05)
    cache = KVCache.create(model.config, 2, 10, jnp.bfloat16)
    close(jax.jit(decode_all)(half, tokens, cache)[0], logits, 0.05)


# ------------------------------------------------------------------------------------------------- structure


def test_another_strategy_shares_the_parameter_arrays():
    model = make_model()
    other = model.with_attention(LastTwoAttention())
    assert model.attention == FullAttention()
    assert other.attention == LastTwoAttention()
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        assert ours is theirs


def test_param_shapes_lists_what_the_options_ask_for():
    plain = param_shapes(DecoderConfig.tiny())
    assert plain["layers.q_weight"] == (2, 64, 2, 32)
    assert "lm_head" not in plain
    full = param_shapes(
        dataclasses.replace(
            DecoderConfig.tiny(),
            tied_embeddings=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            qk_norm=True,
        )
    )
    assert full.keys() - plain.keys() == {
        "lm_head",
        *(f"layers.{name}_bias" for name in ("q", "k", "v", "out", "gate", "up", "down")),
        "layers.q_norm",
        "layers.k_norm",
    }
    sizes = param_shapes(DecoderConfig.smollm2_135m())
    assert sum(int(np.prod(shape)) for shape in sizes.values()) == 134_515_008


def test_from_params_keeps_the_arrays_and_checks_names_and_shapes():
    model = make_model()
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    params = {param_name(path): leaf for path, leaf in leaves}
    again = DecoderLM.from_params(model.config, params, attention=LastTwoAttention())
    assert again.attention == LastTwoAttention()
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        assert ours is theirs
    with pytest.raises(ValueError, match="params: got missing embed, wanted"):
        DecoderLM.from_params(model.config, {k: v for k, v in params.items() if k != "embed"})
    with pytest.raises(ValueError, match="params: got unknown extra, wanted"):
        DecoderLM.from_params(model.config, {**params, "extra": params["embed"]})
    with pytest.raises(ValueError, match=r"params embed: got shape \(16, 50\), wanted \(50, 16\)"):
        DecoderLM.from_params(model.config, {**params, "embed": params["embed"].T})


def test_wrong_arguments_raise_before_any_work():
    model = make_model()
    cache = KVCache.create(model.config, 2, 8)
    lengths = jnp.array([4, 4], jnp.int32)
    with pytest.raises(
        ValueError, match=r"tokens: got 9 a row, wanted at most the cache's capacity = 8"
    ):
        model.prefill(make_tokens((2, 9)), lengths=lengths, cache=cache)
    with pytest.raises(
        ValueError, match=r"cache: got \(L, B, K, H\) = \(3, 2, 2, 8\), wanted \(3, 1, 2, 8\)"
    ):
        model.decode(make_tokens((1,)), cache)


# ------------------------------------------------------------------------------------------------- compiled decode loop


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_loop_updates_the_cache_in_place(batch):
    model = make_model()
    config, capacity = model.config, 4096
    cache = jax.eval_shape(lambda: KVCache.create(config, batch, capacity))

    def generate(model, cache, tokens):
        def step(_, state):
            logits, cache = model.decode(*state)
            return jnp.argmax(logits, axis=-1), cache

        return jax.lax.fori_loop(0, 8, step, (tokens, cache))

    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    compiled = jax.jit(generate, donate_argnums=1).lower(model.unstacked(), cache, tokens).compile()
    layer_bytes = 4 * batch * capacity * config.num_kv_heads * config.head_dim
    # Scores of all heads, and at most one layer's keys and values in another layout, never all six arrays.
    scores = 4 * batch * config.num_heads * capacity
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 6 * layer_bytes
    assert memory.temp_size_in_bytes < 2 * layer_bytes + 8 * scores
