"""Timing of decode steps: models with an indexer and without take turns on one cache, and write what generation writes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtopk.attention import FullAttention, IndexerAttention, TopKAttention
from jaxtopk.decoding import loops
from jaxtopk.decoding.timing import time_steps
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM

PROMPTS = [[5, 3, 8, 13, 2, 9], [7, 1, 4, 4, 6, 2]]


def test_models_with_an_indexer_and_without_take_turns_on_one_cache():
    plain = DecoderLM(DecoderConfig.tiny(), rngs=nnx.Rngs(params=0)).unstacked()
    indexed = plain.with_indexer(rngs=nnx.Rngs(params=1))
    models = {
        "indexer": indexed.with_attention(IndexerAttention(topk=2)),
        "full": plain.with_attention(FullAttention()),
        "topk": plain.with_attention(TopKAttention(topk=2)),
    }
    dense = indexed.with_attention(FullAttention())
    prefill = lambda: loops.prefill(dense, PROMPTS, new_tokens=5)
    runs = []
    times, drawn = time_steps(
        models, prefill(), new_tokens=4, rounds=2, done=lambda: runs.append(None)
    )
    assert len(runs) == 3 * 3
    assert {name: len(found.rounds) for name, found in times.items()} == dict.fromkeys(models, 2)
    prefilled = prefill()
    first = jnp.argmax(prefilled.logits, axis=-1, keepdims=True).astype(jnp.int32)
    for name, model in models.items():
        cache = prefilled.cache
        if model.config.indexer is None:
            cache = dataclasses.replace(cache, index_key=None)
        wanted = loops.continue_tokens(model, cache, first, max_new_tokens=4)
        np.testing.assert_array_equal(drawn[name][:, :1], first)
        np.testing.assert_array_equal(drawn[name][:, 1:], wanted.tokens)
    assert len({tokens.tobytes() for tokens in drawn.values()}) > 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"new_tokens": 0, "rounds": 1}, "max_new_tokens: got 0"),
        ({"new_tokens": 1, "rounds": 0}, "rounds: got 0, wanted at least 1"),
    ],
)
def test_numbers_below_one_are_refused(numbers, message):
    plain = DecoderLM(DecoderConfig.tiny(), rngs=nnx.Rngs(params=0))
    prefilled = loops.prefill(plain, PROMPTS, new_tokens=5)
    with pytest.raises(ValueError, match=message):
        time_steps({}, prefilled, **numbers)
