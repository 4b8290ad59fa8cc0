"""The indexer of a decoder: what it says of rows, its place in the model and the cache, and that models without one stay as they were."""

import collections
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtopk.attention import FullAttention, IndexerAttention, TopKAttention
from jaxtopk.attention.rope import Llama3Rope, rope_tables
from jaxtopk.decoding import loops
from jaxtopk.decoding.kv_cache import KVCache
from jaxtopk.models.decoder_lm.config import DecoderConfig, IndexerConfig
from jaxtopk.models.decoder_lm.indexer import Indexer
from jaxtopk.models.decoder_lm.modeling import DecoderLM, param_shapes
from jaxtopk.models.decoder_lm.params import check_checkpoint
from jaxtopk.models.decoder_lm.safetensors_io import SafetensorsFolder
from jaxtopk.sharding import ShardingConfig, param_name

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
INDEXER = IndexerConfig(num_heads=3, head_dim=8)


@functools.cache
def make_model(**changes) -> DecoderLM:
    sizes = dict(
        vocab_size=50,
        num_layers=2,
        embed_dim=16,
        mlp_dim=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
    )
    config = DecoderConfig(**(sizes | changes))
    return jax.jit(lambda: DecoderLM(config, rngs=nnx.Rngs(params=0)))()


@functools.cache
def make_indexed(**changes) -> DecoderLM:
    return make_model(**changes).with_indexer(INDEXER, rngs=nnx.Rngs(params=1))


def make_tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(7), shape, 0, 50)


def close(got, wanted, tolerance: float = 1e-5) -> None:
    """Compares with an error relative to the largest wanted value."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    assert np.max(np.abs(got - wanted)) <= tolerance * np.max(np.abs(wanted))


@jax.jit
def decode_all(model: DecoderLM, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Decodes the given tokens [B, T] one after another; returns logits [B, T, V]."""

    def step(cache, column):
        logits, cache = model.decode(column, cache)
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, tokens.T)
    return jnp.moveaxis(logits, 0, 1), cache


@jax.jit
def prefill(model: DecoderLM, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    lengths = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    hidden, cache = model.prefill(tokens, lengths=lengths, cache=cache)
    return model.head(hidden), cache


# ------------------------------------------------------------------------------------------------- what it says of rows


def drawn_indexer(seed: int = 0) -> Indexer:
    """An indexer whose norm is no identity either."""
    indexer = Indexer(make_indexed().config, rngs=nnx.Rngs(params=seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), indexer
    )


def test_queries_keys_and_weights_are_those_of_the_formulas():
    indexer = drawn_indexer()
    rng = np.random.default_rng(3)
    x, angles = rng.normal(size=(5, 16)), rng.normal(size=(5, 2))
    single = lambda array: jnp.asarray(array, jnp.float32)
    got = indexer(single(x), single(np.cos(angles)), single(np.sin(angles)))
    weight = lambda name: np.asarray(getattr(indexer, name)[...], np.float64)

    def rotated(vector, angle):
        # Of 8 channels the first 4 are rotated, as the pairs (0, 2) and (1, 3); the others stay.
        out = vector.copy()
        for pair, (real, imaginary) in enumerate(((0, 2), (1, 3))):
            c, s = np.cos(angle[pair]), np.sin(angle[pair])
            out[real] = c * vector[real] - s * vector[imaginary]
            out[imaginary] = s * vector[real] + c * vector[imaginary]
        return out

    for row in range(5):
        key = x[row] @ weight("key_weight")
        key = (key - key.mean()) / np.sqrt(key.var() + 1e-6)
        key = key * weight("key_norm") + weight("key_norm_bias")
        np.testing.assert_allclose(got.key[row], rotated(key, angles[row]), atol=1e-5)
        for head in range(3):
            query = x[row] @ weight("query_weight")[:, head]
            np.testing.assert_allclose(got.query[row, head], rotated(query, angles[row]), atol=1e-5)
        wanted = x[row] @ weight("head_weight") * 3**-0.5 * 8**-0.5
        np.testing.assert_allclose(got.head_weights[row], wanted, atol=1e-6)


def test_scores_depend_on_the_distance_of_a_key_only():
    indexer = drawn_indexer()
    x = jax.random.normal(jax.random.key(0), (2, 16))

    def products(*positions):
        cos, sin = rope_tables(make_indexed().config.rope, jnp.asarray(positions), 4)
        index = indexer(x, cos, sin)
        return jnp.einsum("ij,j->i", index.query[1], index.key[0])

    close(products(3, 10), products(23, 30))
    assert np.max(np.abs(products(3, 10) - products(3, 14))) > 1e-3


def test_half_precision_keeps_the_head_weights_in_float32():
    indexer = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn_indexer())
    x = jnp.ones((2, 16), jnp.bfloat16)
    index = indexer(x, jnp.ones((2, 2)), jnp.zeros((2, 2)))
    assert [leaf.dtype for leaf in index] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_default_sizes_are_a_quarter_of_the_heads_at_half_their_size():
    sizes = lambda config: dataclasses.astuple(IndexerConfig.for_decoder(config))[:2]
    assert sizes(DecoderConfig.llama31_8b()) == (8, 64)
    assert sizes(DecoderConfig.smollm2_135m()) == (2, 32)
    assert sizes(DecoderConfig.tiny()) == (1, 16)  # half a head is one head


def test_llama31_8b_has_the_shape_of_its_checkpoint():
    config = DecoderConfig.llama31_8b()
    total = sum(int(np.prod(shape)) for shape in param_shapes(config).values())
    assert total == 8_030_261_248
    assert isinstance(config.rope, Llama3Rope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "indexer num_heads: got 0, wanted at least 1"),
        ({"head_dim": 0}, "indexer head_dim: got 0, wanted at least 1"),
        ({"rope_share": 0.0}, r"indexer rope_share: got 0.0, wanted a number in \(0, 1\]"),
        ({"head_dim": 6}, "got 0.5 of head_dim 6, wanted an even number of channels"),
        ({"rope_share": 0.3}, "got 0.3 of head_dim 8, wanted an even number of channels"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(INDEXER, **changes)


# ------------------------------------------------------------------------------------------------- its place in the model


def test_it_adds_parameters_and_shares_the_others():
    model, indexed = make_model(), make_indexed()
    plain, more = (param_shapes(one.config) for one in (model, indexed))
    assert {name: more[name] for name in more.keys() - plain.keys()} == {
        "layers.indexer.query_weight": (2, 16, 3, 8),
        "layers.indexer.key_weight": (2, 16, 8),
        "layers.indexer.head_weight": (2, 16, 3),
        "layers.indexer.key_norm": (2, 8),
        "layers.indexer.key_norm_bias": (2, 8),
    }
    by_name = lambda model: {
        param_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }
    ours, theirs = by_name(model), by_name(indexed)
    assert {name: leaf.shape for name, leaf in theirs.items()} == more
    assert all(theirs[name] is leaf for name, leaf in ours.items())
    assert model.config.indexer is None  # the first model is as it was
    again = DecoderLM.from_params(indexed.config, theirs)
    assert jax.tree.structure(again) == jax.tree.structure(indexed)
    for name, shape in more.items():
        assert len(ShardingConfig().param_spec(name)) in (0, len(shape)), name


def test_layers_apart_may_be_drawn_so_or_get_an_indexer_later():
    indexed = make_indexed()
    structure = jax.tree.structure(indexed.unstacked())
    later = make_model().unstacked().with_indexer(INDEXER, rngs=nnx.Rngs(params=1))
    assert jax.tree.structure(later) == structure
    first, second = (layer.indexer.query_weight[...] for layer in later.layers)
    assert np.max(np.abs(first - second)) > 0.01
    drawn = DecoderLM(indexed.config, rngs=nnx.Rngs(params=0), stacked=False)
    assert jax.tree.structure(drawn) == structure


def test_a_second_indexer_is_refused_and_so_are_checkpoints_that_cannot_hold_one():
    indexed = make_indexed()
    with pytest.raises(ValueError, match="with_indexer: got a model that has IndexerConfig"):
        indexed.with_indexer(rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"config.indexer: got .*, wanted None: these files"):
        check_checkpoint(indexed.config, SafetensorsFolder(GOLDENS / "smollm2"))
    with pytest.raises(ValueError, match="config.indexer: got None, wanted an IndexerConfig"):
        Indexer(make_model().config, rngs=nnx.Rngs(params=0))


def test_other_strategies_give_the_same_bits_with_it_and_without():
    tokens = make_tokens(2, 9)
    for attention in (FullAttention(), TopKAttention(topk=3)):
        found = []
        for model in (make_model(), make_indexed()):
            one = model.with_attention(attention)
            logits, cache = prefill(one, tokens, KVCache.create(one.config, 2, 16))
            found.append((logits, *decode_all(one.unstacked(), tokens[:, :3], cache)))
        (plain, plain_steps, plain_cache), (other, other_steps, other_cache) = found
        np.testing.assert_array_equal(plain, other)
        np.testing.assert_array_equal(plain_steps, other_steps)
        assert plain_cache.index_key is None
        assert len(jax.tree.leaves(plain_cache)) == 2 * 2 + 1
        for ours, theirs in zip(plain_cache.key, other_cache.key, strict=True):
            np.testing.assert_array_equal(ours, theirs)


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


def test_a_model_without_one_computes_no_more_than_its_own_layers():
    def products(model):
        one = model.with_attention(FullAttention())
        cache = KVCache.create(one.config, 2, 16)
        step = lambda tokens, cache: one.decode(tokens, cache)
        return count_primitives(jax.make_jaxpr(step)(make_tokens(2), cache).jaxpr)["dot_general"]

    # q, k, v, out, gate, up, down and, on a CPU, three of attention in each of two layers, and the head; an indexer has three.
    assert products(make_model().unstacked()) == 2 * 10 + 1
    assert products(make_indexed().unstacked()) == 2 * 13 + 1


# ------------------------------------------------------------------------------------------------- decoding by it


def test_keeping_all_keys_decodes_as_full_attention_does():
    prompts = [np.asarray(make_tokens(11)).tolist(), [3, 1, 4]]
    last = jnp.asarray([prompt[-1:] for prompt in prompts])
    found = {}
    for name, attention in (("full", FullAttention()), ("indexer", IndexerAttention(topk=64))):
        model = make_indexed().with_attention(attention)
        # A sparse strategy leaves the last token of a prompt to the decoding; a dense one is made to.
        cached = [prompt[: len(prompt) - 1 + attention.suffix_tokens] for prompt in prompts]
        cache = loops.prefill(model, cached, new_tokens=13).cache
        logits = loops.decode_forced(model, last, cache).logits
        found[name] = logits, loops.continue_tokens(model, cache, last, max_new_tokens=12).tokens
    close(found["indexer"][0], found["full"][0], 2e-5)
    np.testing.assert_array_equal(found["indexer"][1], found["full"][1])


@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_cached_decoding_equals_the_rows_of_one_sparse_pass(form):
    model = make_indexed().with_attention(IndexerAttention(topk=3, prefill="topk"))
    model = model if form == "stacked" else model.unstacked()
    tokens = make_tokens(2, 11)
    wanted = jax.jit(model)(tokens)
    steps, from_steps = decode_all(model, tokens, KVCache.create(model.config, 2, 16))
    close(steps, wanted)
    rows, from_rows = prefill(model, tokens[:, :7], KVCache.create(model.config, 2, 16))
    close(rows, wanted[:, :7])
    later, _ = decode_all(model, tokens[:, 7:], from_rows)
    close(later, wanted[:, 7:])
    for one, other in zip(from_steps.index_key, from_rows.index_key, strict=True):
        close(one[:, :7], other[:, :7])
    dense = jax.jit(model.with_attention(FullAttention()))(tokens)
    assert np.max(np.abs(wanted - dense)) > 1e-3


def test_a_window_is_obeyed_in_decoding():
    indexed = make_indexed(windows=(None, 4))
    tokens = make_tokens(2, 10)
    full = decode_all(indexed, tokens, KVCache.create(indexed.config, 2, 16))[0]
    all_kept = indexed.with_attention(IndexerAttention(topk=16))
    close(decode_all(all_kept, tokens, KVCache.create(indexed.config, 2, 16))[0], full)


def test_remat_changes_no_gradient_and_selects_no_second_time():
    model = make_indexed().with_attention(IndexerAttention(topk=3))
    tokens = make_tokens(1, 12)
    loss = lambda model, remat: jnp.mean(jnp.sin(model(tokens, remat=remat)))
    gradients, searches = [], []
    for remat in (False, True):
        of_model = jax.grad(functools.partial(loss, remat=remat))
        counts = count_primitives(jax.make_jaxpr(of_model)(model).jaxpr)
        searches.append(counts["while"])
        gradients.append(jax.jit(of_model)(model))
    assert searches[0] == searches[1] > 0
    for ours, theirs in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    # The choice is a constant to the loss, so the indexer learns nothing from it.
    assert not np.any(gradients[0].layers.indexer.query_weight[...])
    assert np.any(gradients[0].layers.q_weight[...])


def test_a_cache_keeps_index_keys_for_models_with_an_indexer_only():
    model, indexed = make_model(), make_indexed()
    cache = KVCache.create(indexed.config, 2, 16, jnp.bfloat16)
    cache.validate()
    assert [(key.shape, key.dtype) for key in cache.index_key] == 2 * [((2, 16, 8), jnp.bfloat16)]
    without = dataclasses.replace(cache, index_key=None)
    without.validate()
    tokens = make_tokens(2)
    with pytest.raises(ValueError, match="cache: got index keys of size None, wanted 8"):
        indexed.decode(tokens, without)
    with pytest.raises(ValueError, match="cache: got index keys of size 8, wanted None"):
        model.decode(tokens, cache)
    for wrong, message in (
        (cache.index_key[:1], r"index_key: got 1 layers, wanted 2, or None"),
        ((cache.index_key[0], jnp.zeros((2, 16, 8))), r"index_key\[1\]: got float32\[2, 16, 8\]"),
        (2 * (jnp.zeros((2, 9, 8), jnp.bfloat16),), r"index_key\[0\]: got bfloat16\[2, 9, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cache, index_key=wrong).validate()


def test_a_model_without_an_indexer_is_refused_before_any_work():
    model = make_model().with_attention(IndexerAttention(topk=2))
    cache = KVCache.create(model.config, 2, 16)
    message = "for a model without indexer parameters, wanted DecoderLM.with_indexer before it"
    with pytest.raises(ValueError, match=message):
        model(make_tokens(2, 4))
    with pytest.raises(ValueError, match=message):
        model.decode(make_tokens(2), cache)
    with pytest.raises(ValueError, match=message):  # although prompts are dense
        model.prefill(make_tokens(2, 4), lengths=jnp.asarray([4, 4], jnp.int32), cache=cache)


def test_decode_loop_updates_index_keys_in_place():
    model = make_indexed().with_attention(IndexerAttention(topk=8))
    config, capacity = model.config, 2048
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, capacity))

    def generate(model, cache, tokens):
        def step(_, state):
            logits, cache = model.decode(*state)
            return jnp.argmax(logits, axis=-1), cache

        return jax.lax.fori_loop(0, 8, step, (tokens, cache))

    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = jax.jit(generate, donate_argnums=1).lower(model.unstacked(), cache, tokens).compile()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    layer = 4 * capacity * config.num_kv_heads * config.head_dim
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= whole - 4
    assert memory.temp_size_in_bytes < 2 * layer
