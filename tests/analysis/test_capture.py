"""The mass, the entropy and the counts that decode rows report, against the softmax written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtopk.analysis.capture import attend_with_statistics
from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.decoding.kv_cache import KVCache
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM

LENGTHS = (0, 1, 9, 24)


@pytest.fixture(scope="module")
def arrays():
    shapes = {"query": (4, 4, 16), "key": (4, 24, 2, 16), "value": (4, 24, 2, 16)}
    return {
        name: jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize(("topk", "window"), [(1, None), (5, 6), (24, 6)])
def test_mass_is_the_share_of_the_softmax_on_the_best_keys(arrays, topk, window):
    strategy = TopKAttention(topk=topk)
    lengths = jnp.asarray(LENGTHS, jnp.int32)

    @jax.jit
    def both(lengths):
        watched = attend_with_statistics(strategy, **arrays, lengths=lengths, window=window)
        return *watched, strategy.decode(**arrays, lengths=lengths, window=window)

    out, seen, wanted = both(lengths)
    np.testing.assert_array_equal(out, wanted)
    query, key = (np.asarray(arrays[name], np.float64) for name in ("query", "key"))
    for b, length in enumerate(LENGTHS):
        first = 0 if window is None else max(0, length - window)
        for n in range(4):
            scores = key[b, first:length, n // 2] @ query[b, n] / 4
            p = np.sort(np.exp(scores) / np.exp(scores).sum()) if length else np.zeros(1)
            assert seen.mass[b, n] == pytest.approx(p[-topk:].sum(), abs=1e-6)
            assert seen.attended[b, n] == min(topk, length - first)
            assert seen.visible[b, n] == length - first
            entropy = -(p * np.log(p)).sum() if length else 0
            assert seen.entropy[b, n] == pytest.approx(entropy, abs=1e-6)


def test_full_attention_keeps_everything(arrays):
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    out, seen = attend_with_statistics(FullAttention(), **arrays, lengths=lengths, window=None)
    np.testing.assert_array_equal(out, FullAttention().decode(**arrays, lengths=lengths))
    np.testing.assert_array_equal(seen.mass[:, 0], [0, 1, 1, 1])
    np.testing.assert_array_equal(seen.attended, seen.visible)
    sparse = attend_with_statistics(TopKAttention(topk=3), **arrays, lengths=lengths, window=None)[
        1
    ]
    np.testing.assert_allclose(seen.entropy, sparse.entropy, atol=1e-6)


def test_a_model_reports_every_layer_and_decodes_as_without():
    model = DecoderLM(DecoderConfig.tiny(), rngs=nnx.Rngs(params=0)).with_attention(
        TopKAttention(topk=2, layers=(1,))
    )
    cache = KVCache.create(model.config, 3, 8)
    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]], jnp.int32)
    watch = jax.jit(
        lambda token, cache: model.decode_captured(token, cache, attend_with_statistics)
    )
    decode = jax.jit(model.decode)
    plain = cache
    for token in tokens:
        logits, cache, seen = watch(token, cache)
        wanted, plain = decode(token, plain)
        np.testing.assert_allclose(logits, wanted, atol=1e-6)
    assert seen.mass.shape == (2, 3, model.config.num_heads)
    np.testing.assert_array_equal(seen.attended[0], 4)  # the layer that stays full
    np.testing.assert_array_equal(seen.attended[1], 2)
    assert (seen.mass[1] < 1).all()
    assert jax.tree.structure(cache) == jax.tree.structure(plain)
