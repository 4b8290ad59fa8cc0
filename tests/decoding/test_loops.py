"""The decoding loops on a tiny random model: cached decoding equals forward passes, whatever the batch and the slicing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.decoding import loops
from jaxtopk.decoding.kv_cache import KVCache
from jaxtopk.decoding.sampling import SamplingConfig, random_streams
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM

# Ragged: one token, fewer than a suffix of three, and more. All of them fit one granule of the padding, as compiling is
# what these tests cost.
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7], list(range(10, 50))]


@functools.cache
def _model() -> DecoderLM:
    config = dataclasses.replace(
        DecoderConfig.tiny(), vocab_size=97, num_heads=4, num_kv_heads=2, head_dim=16
    )
    return DecoderLM(config, rngs=nnx.Rngs(1))


@functools.cache
def _forward(attention):
    return jax.jit(lambda model, tokens: model(tokens)), _model().with_attention(attention)


def _next_logits(attention, tokens):
    """Logits after the last of the tokens, by a forward pass over all of them (padded, so that it compiles once)."""
    forward, model = _forward(attention)
    padded = jnp.zeros((1, 64), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
    return np.asarray(forward(model, padded)[0, len(tokens) - 1])


def _greedy(attention, prompt, count, ends=()):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(_next_logits(attention, tokens))))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


def _run(attention, prompts, count, *, sampling=SamplingConfig(), ends=(), slices=None, seed=0):
    model = _model().with_attention(attention)
    settings = {
        "streams": random_streams(seed, prompts),
        "sampler": sampling.arrays(),
        "end_tokens": ends,
        "max_new_tokens": count,
    }
    state = loops.start(loops.prefill(model, prompts, new_tokens=count), **settings)
    for until in slices or (None,):
        state = loops.advance(model.unstacked(), state, until=until, **settings)
    return state


def _lists(state, ends=()):
    tokens, counts = loops.drawn(state, ends)
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]


@pytest.mark.parametrize(
    "attention",
    [
        FullAttention(),
        TopKAttention(topk=4, prefill="topk"),
        TopKAttention(topk_ratio=0.3, prefill="topk", layers=(1,)),
    ],
    ids=["full", "topk", "ratio_one_layer"],
)
def test_greedy_decoding_of_a_ragged_batch_is_that_of_forward_passes(attention):
    # The prefill is of the same kind as the decode rows, so that a forward pass over everything says the same.
    expected = [_greedy(attention, prompt, 6) for prompt in PROMPTS]
    assert _lists(_run(attention, PROMPTS, 6)) == expected


@pytest.mark.parametrize("suffix", [0, 3])
def test_a_ragged_batch_is_each_prompt_alone(suffix):
    attention = TopKAttention(topk=3, sparse_suffix=suffix)
    sampling = SamplingConfig(temperature=1.0, top_p=0.9)
    together = _lists(_run(attention, PROMPTS, 5, sampling=sampling))
    alone = [_lists(_run(attention, [prompt], 5, sampling=sampling))[0] for prompt in PROMPTS]
    assert together == alone


@pytest.mark.parametrize(
    "attention",
    [TopKAttention(topk=2**31 - 1), TopKAttention(topk_ratio=1.0)],
    ids=["topk", "ratio"],
)
def test_a_budget_of_all_keys_draws_the_tokens_of_full_attention(attention):
    assert _lists(_run(attention, PROMPTS, 8)) == _lists(_run(FullAttention(), PROMPTS, 8))


def test_the_suffix_decides_whether_the_first_new_token_comes_from_a_sparse_row():
    prompt = PROMPTS[3]
    model = _model()
    dense = _next_logits(FullAttention(), prompt)
    sparse = {}
    for suffix in (0, 1):
        attention = TopKAttention(topk=1, sparse_suffix=suffix)
        prefilled = loops.prefill(model.with_attention(attention), [prompt], new_tokens=4)
        assert prefilled.forced.shape == (1, suffix)
        sparse[suffix] = prefilled.logits
        if suffix:
            forced = loops.decode_forced(
                model.with_attention(attention), prefilled.forced, prefilled.cache
            )
            sparse[suffix] = forced.logits
    np.testing.assert_allclose(sparse[0][0], dense, atol=1e-5)
    assert np.argmax(sparse[1][0]) != np.argmax(dense)
    first = [
        _lists(_run(TopKAttention(topk=1, sparse_suffix=suffix), [prompt], 1))[0][0]
        for suffix in (0, 1)
    ]
    assert first == [int(np.argmax(dense)), int(np.argmax(sparse[1][0]))]


def test_slices_of_the_loop_are_the_whole_loop():
    attention, sampling = (
        TopKAttention(topk=3, sparse_suffix=3),
        SamplingConfig(temperature=0.8, top_p=0.9),
    )
    whole = _run(attention, PROMPTS, 7, sampling=sampling)
    sliced = _run(attention, PROMPTS, 7, sampling=sampling, slices=(2, 3, 6, 7, None))
    assert _lists(whole) == _lists(sliced)


def test_sequences_end_one_by_one_and_the_loop_with_the_last():
    free = [_greedy(FullAttention(), prompt, 12) for prompt in PROMPTS]
    ends = (free[0][2], free[3][4])
    state = _run(FullAttention(), PROMPTS[::3], 12, ends=ends)
    expected = [_greedy(FullAttention(), prompt, 12, ends) for prompt in PROMPTS[::3]]
    assert all(row[-1] in ends for row in expected)
    assert _lists(state, ends) == [row[:-1] for row in expected]
    assert _lists(state) == expected  # the end token itself was drawn
    # Columns after the end say so, and the loop did not run to its limit.
    assert (np.asarray(state.tokens)[0, len(expected[0]) :] == -1).all()
    assert int(state.step) == max(map(len, expected)) < 12
    # The caches stopped growing: prompt, and every drawn token but the last, which was never fed back.
    lengths = [
        len(prompt) + len(row) - 1 for prompt, row in zip(PROMPTS[::3], expected, strict=True)
    ]
    assert np.asarray(state.cache.lengths).tolist() == lengths


def test_prompts_of_similar_length_share_one_compilation():
    compiled = lambda: [f._cache_size() for f in (loops._prefill, loops._start, loops._advance)]
    attention = TopKAttention(topk=3, sparse_suffix=3)
    _run(attention, [[1] * 20], 4)
    before = compiled()
    _run(attention, [[2] * 41], 9)
    assert compiled() == before


def test_prompts_of_other_lengths_share_one_compilation_where_room_is_made():
    model = _model().with_attention(TopKAttention(topk=3))
    compiled = lambda: [f._cache_size() for f in (loops._prefill, loops._start)]

    def begin(prompt, count):
        settings = {"streams": random_streams(0, [prompt]), "sampler": SamplingConfig().arrays()}
        prefilled = loops.prefill(model, [prompt], new_tokens=count, padded_to=128)
        return loops.start(prefilled, **settings, max_new_tokens=count, columns=70)

    state = begin([1] * 100, 9)
    assert (state.cache.capacity, state.tokens.shape) == (128, (1, 128))
    before = compiled()
    begin([2] * 20, 65)
    assert compiled() == before


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, 1023, 1024, 1025, 8191, 8193, 131073])
def test_padding_is_little_and_the_padded_sizes_few(size):
    padded = loops.padded_size(size)
    assert padded >= size
    assert padded % 64 == 0
    assert padded - size <= max(64, size / 8)
    assert loops.padded_size(padded) == padded
    assert len({loops.padded_size(n) for n in range(1, 2049)}) == 16 + 8
    capacity = loops.cache_capacity(size)
    assert capacity >= padded
    assert capacity % 128 == 0
    assert capacity - padded < 128


@pytest.mark.parametrize(
    "attention",
    [FullAttention(), TopKAttention(topk=4), TopKAttention(topk_ratio=0.2)],
    ids=["full", "topk", "ratio"],
)
def test_forced_decoding_equals_the_rows_of_a_forward_pass(attention):
    model = _model().with_attention(attention)
    text = jnp.asarray([[5, 3, 8, 2, 9, 1, 7, 4], [1, 2, 3, 4, 5, 6, 7, 8]], jnp.int32)
    rows = np.asarray(model(text))
    cache = KVCache.create(model.config, 2, 64)
    forced = loops.decode_forced(model, text, cache, keep_logits=True)
    np.testing.assert_allclose(forced.logits, rows, atol=2e-5)
    np.testing.assert_array_equal(forced.likeliest, np.argmax(forced.logits, axis=-1))
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(rows[:, :-1]), text[:, 1:, None], axis=-1)[
        ..., 0
    ]
    np.testing.assert_allclose(forced.log_probs, log_probs, atol=2e-5)
    assert np.asarray(forced.cache.lengths).tolist() == [8, 8]
    last = loops.decode_forced(model, text, cache)
    np.testing.assert_allclose(last.logits, forced.logits[:, -1], atol=2e-5)


def test_one_prefill_serves_many_settings():
    prompts = [PROMPTS[0], PROMPTS[3]]
    ratios = (1.0, 0.05)
    model = _model()
    prefilled = loops.prefill(
        model.with_attention(TopKAttention(topk_ratio=ratios)), prompts, new_tokens=8
    )
    forced = jnp.asarray([[11, 12, 13], [21, 22, 23]], jnp.int32)
    text = jnp.concatenate([prefilled.forced, forced], axis=1)
    cache = loops.repeat_cache(prefilled.cache, len(ratios))
    together = loops.decode_forced(
        model.with_attention(TopKAttention(topk_ratio=ratios)),
        jnp.repeat(text, len(ratios), axis=0),
        cache,
    )
    continued = loops.continue_tokens(
        model.with_attention(TopKAttention(topk_ratio=ratios)),
        cache,
        jnp.repeat(text, len(ratios), axis=0),
        max_new_tokens=4,
    )
    for index, ratio in enumerate(ratios):
        one = model.with_attention(TopKAttention(topk_ratio=ratio))
        alone = loops.decode_forced(one, text, prefilled.cache)
        np.testing.assert_allclose(
            together.log_probs[index :: len(ratios)], alone.log_probs, atol=1e-5
        )
    expected = loops.continue_tokens(one, prefilled.cache, text, max_new_tokens=4)
    np.testing.assert_array_equal(continued.tokens[1 :: len(ratios)], expected.tokens)
    # The settings do differ, so that the above is no comparison of equals.
    assert np.abs(together.log_probs[0] - together.log_probs[1]).max() > 1e-2


def test_continuing_a_cache_is_decoding_the_whole_prompt_and_spares_the_cache():
    prompt = PROMPTS[3]
    model = _model()
    expected = _lists(_run(FullAttention(), [prompt], 6))[0]
    prefilled = loops.prefill(model, [prompt[:-3]], new_tokens=16)
    for _ in range(2):
        tokens = jnp.asarray([prompt[-3:]], jnp.int32)
        continued = loops.continue_tokens(model, prefilled.cache, tokens, max_new_tokens=6)
        assert continued.tokens.tolist() == [expected]
        assert continued.counts.tolist() == [6]
    ended = loops.continue_tokens(
        model, prefilled.cache, tokens, max_new_tokens=6, end_tokens=(expected[2],)
    )
    stop = expected.index(expected[2])
    assert ended.counts.tolist() == [stop]
    assert ended.tokens[0].tolist() == expected[: stop + 1] + [-1] * (5 - stop)


def test_bad_arguments_are_refused_by_name():
    model = _model()
    cache = KVCache.create(model.config, 1, 8)
    text = jnp.zeros((1, 9), jnp.int32)
    with pytest.raises(
        ValueError, match="cache: got 0 tokens and 9 more to write, wanted at most its capacity = 8"
    ):
        loops.decode_forced(model, text, cache)
    with pytest.raises(ValueError, match="cache: got 0 tokens and 9 more"):
        loops.continue_tokens(model, cache, text[:, :4], max_new_tokens=6)
    with pytest.raises(
        ValueError, match=r"tokens: got shape \[1, 0\], wanted \[B, T\] with T >= 1"
    ):
        loops.decode_forced(model, text[:, :0], cache)
    with pytest.raises(ValueError, match=r"last_tokens: got shape \[1, 0\]"):
        loops.continue_tokens(model, cache, text[:, :0], max_new_tokens=6)
    with pytest.raises(ValueError, match="max_new_tokens: got 0, wanted an int of at least 1"):
        loops.continue_tokens(model, cache, text[:, :1], max_new_tokens=0)
    with pytest.raises(ValueError, match="repeats: got 0, wanted at least 1"):
        loops.repeat_cache(cache, 0)
    with pytest.raises(ValueError, match=r"prompts: got lengths \[2, 0\]"):
        loops.prefill(model, [[1, 2], []], new_tokens=1)


def test_the_loop_is_one_while_loop_that_updates_its_cache_in_place():
    model = _model().unstacked()
    prefilled = loops.prefill(model, [PROMPTS[0]], new_tokens=400)
    settings = {
        "streams": random_streams(0, [[1]]),
        "sampler": SamplingConfig().arrays(),
        "max_new_tokens": 9,
    }
    state = loops.start(prefilled, **settings)
    arguments = (
        model,
        state,
        settings["streams"],
        settings["sampler"],
        loops._ends(()),
        jnp.int32(9),
        jnp.int32(9),
    )
    jaxpr = jax.make_jaxpr(loops._advance.__wrapped__)(*arguments)
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("while") == 1
    memory = loops._advance.lower(*arguments).compile().memory_analysis()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.cache.key, state.cache.value)))
    assert memory.alias_size_in_bytes >= cache_bytes  # the result lies where the argument did
    assert memory.temp_size_in_bytes < cache_bytes // 2  # and no second cache stands beside it
