"""Sampling: which tokens stay candidates, how often each is drawn, and what a random stream depends on."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtopk.decoding.sampling import SamplingConfig, candidates, random_streams, sample

_candidates = jax.jit(candidates)


def _draw(logits, config, seed=0, copies=1, step=0):
    """Draws one token from each of `copies` streams over one row of logits."""
    streams = random_streams(seed, [[1, 2, 3]] * copies)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (copies, len(logits)))
    return np.asarray(sample(rows, streams, jnp.full((copies,), step), config.arrays()))


def _numpy_candidates(logits, top_p, min_p):
    """The definition as a loop, in float64: tokens by descending probability, lower ids first among equals."""
    probabilities = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    probabilities /= probabilities.sum()
    kept, mass = set(), 0.0
    for token in sorted(range(len(logits)), key=lambda i: (-probabilities[i], i)):
        if mass >= top_p:
            break
        kept.add(token)
        mass += probabilities[token]
    return {i for i in kept if probabilities[i] >= min_p * probabilities.max()}


def test_greedy_takes_the_lowest_id_among_equals():
    assert _draw([0.0, 3.0, 1.0, 3.0], SamplingConfig()).tolist() == [1]


def test_greedy_ignores_the_other_settings():
    config = SamplingConfig(temperature=0.0, top_p=0.1, min_p=0.5)
    assert jax.tree.leaves(config.arrays()) == []


# Probabilities in sixteenths and limits between their sums, so that rounding cannot decide.
@hypothesis.given(
    counts=st.lists(st.integers(1, 6), min_size=8, max_size=8),
    top_p=st.floats(0.01, 1.0, exclude_max=True),
    min_p=st.floats(0.0, 0.99),
)
@hypothesis.example(counts=[3, 1, 3, 3, 1, 1, 1, 1], top_p=0.3, min_p=0.0)
@hypothesis.example(counts=[1, 1, 1, 1, 1, 1, 1, 1], top_p=0.26, min_p=0.9)
@hypothesis.example(counts=[6, 1, 1, 1, 1, 1, 1, 1], top_p=0.01, min_p=0.5)
def test_candidates_are_those_of_the_definition(counts, top_p, min_p):
    total = sum(counts)
    edges = {sum(sorted(counts, reverse=True)[:i]) / total for i in range(len(counts))}
    hypothesis.assume(all(abs(edge - top_p) > 1e-4 for edge in edges))
    hypothesis.assume(all(abs(count / max(counts) - min_p) > 1e-4 for count in counts))
    logits = jnp.log(jnp.asarray([counts], jnp.float32))
    kept = _candidates(logits, jnp.float32(top_p), jnp.float32(min_p) if min_p else None)
    assert set(np.flatnonzero(np.isfinite(np.asarray(kept[0])))) == _numpy_candidates(
        np.log(counts), top_p, min_p
    )


def test_candidates_keep_their_logits():
    logits = jnp.asarray([[1.0, -2.0, 0.5]], jnp.float32)
    kept = candidates(logits, jnp.float32(0.9), None)
    np.testing.assert_array_equal(kept, [[1.0, -np.inf, 0.5]])


def test_tokens_are_drawn_as_often_as_their_probability_says():
    weights = np.array([8.0, 4.0, 2.0, 1.0, 1.0])
    config = SamplingConfig(temperature=2.0, top_p=0.85, min_p=0.3)
    # At temperature 2 the weights become their square roots; top-p keeps three of the five, min-p all of these.
    roots = np.sqrt(weights)
    assert _numpy_candidates(np.log(roots), 0.85, 0.3) == {0, 1, 2, 3}
    expected = np.where(np.arange(5) < 4, roots, 0.0) / roots[:4].sum()
    copies = 4000
    drawn = np.bincount(_draw(np.log(weights), config, copies=copies), minlength=5)
    assert drawn[4] == 0
    chi_square = np.sum((drawn[:4] - copies * expected[:4]) ** 2 / (copies * expected[:4]))
    assert chi_square < 16.3  # 99.9 % quantile for three degrees of freedom


def test_a_seed_reproduces_and_another_does_not():
    logits, config = np.zeros(1000), SamplingConfig(temperature=1.0)
    first = _draw(logits, config, seed=5, copies=8)
    np.testing.assert_array_equal(first, _draw(logits, config, seed=5, copies=8))
    assert (first != _draw(logits, config, seed=6, copies=8)).any()
    assert (first != _draw(logits, config, seed=5, copies=8, step=1)).any()


def test_any_int_is_a_seed():
    assert random_streams(-1, [[1]]).shape == (1,)
    assert random_streams(2**70 + 3, [[1]]) == random_streams(3, [[1]])


def test_a_stream_does_not_depend_on_the_rest_of_the_batch():
    alone = random_streams(7, [[5, 6]])
    batch = random_streams(7, [[1], [5, 6], [5, 6], [2, 3, 4]])
    assert batch[1] == alone[0]
    assert batch[2] != alone[0]  # a copy of the prompt is another sample
    assert len({tuple(jax.random.key_data(stream).tolist()) for stream in batch}) == 4


def test_changed_numbers_do_not_compile_again():
    compiled = jax.jit(sample)
    streams, steps = random_streams(0, [[1]]), jnp.zeros((1,), jnp.int32)
    for temperature, top_p in ((0.5, 0.9), (0.7, 0.8), (1.0, 0.7)):
        config = SamplingConfig(temperature=temperature, top_p=top_p)
        compiled(jnp.zeros((1, 8), jnp.float32), streams, steps, config.arrays())
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1, wanted a number of at least 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_p": 0.0}, r"top_p: got 0.0, wanted a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"min_p": 1.0}, r"min_p: got 1.0, wanted a number in \[0, 1\)"),
        ({"min_p": -0.5}, "min_p: got -0.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
