"""Entropy in pieces: equal to the sum written out for any shift, tiling and order of merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtopk.analysis.online_entropy import EntropyPartials, entropy_partials, merge_entropy

TILES = 5


def direct(scores: np.ndarray) -> tuple[float, float]:
    """Returns (entropy, log-sum-exp) of one row, in float64, from the definition."""
    top = scores.max()
    total = np.exp(scores - top).sum()
    p = np.exp(scores - top) / total
    p = p[p > 0]
    return -(p * np.log(p)).sum(), top + np.log(total)


@jax.jit
def in_pieces(scores, tile_of, order):
    """Merges the tiles of a row one by one in the given order; and two by two, as a tree."""
    tiles = jax.vmap(lambda tile: entropy_partials(scores, tile_of == tile))(order)
    parts = [jax.tree.map(lambda x, i=i: x[i], tiles) for i in range(TILES)]
    chain = parts[0]
    for part in parts[1:]:
        chain = merge_entropy(chain, part)
    tree = merge_entropy(merge_entropy(*parts[:2]), merge_entropy(*parts[2:]))
    return [(part.entropy, part.lse) for part in (entropy_partials(scores), chain, tree)]


@given(
    length=st.sampled_from([1, 7, 97, 257]),
    spread=st.sampled_from([0.0, 1.0, 4.0, 300.0]),
    shift=st.sampled_from([-1000.0, 0.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_any_tiling_and_order_equals_the_definition(length, spread, shift, seed):
    rng = np.random.default_rng(seed)
    scores = spread * rng.normal(size=length) + shift
    tile_of = rng.integers(0, TILES, size=length)  # some tiles are empty
    entropy, lse = direct(scores)
    with jax.enable_x64(True):
        found = in_pieces(
            jnp.asarray(scores), jnp.asarray(tile_of), jnp.asarray(rng.permutation(TILES))
        )
    for got_entropy, got_lse in found:
        assert float(got_entropy) == pytest.approx(entropy, abs=1e-9)
        assert float(got_lse) == pytest.approx(lse, abs=1e-9)


def test_a_constant_added_to_whole_scores_changes_no_bit():
    scores = jnp.asarray(np.random.default_rng(0).integers(-9, 9, size=(4, 97)), jnp.float32)
    plain, moved = entropy_partials(scores), entropy_partials(scores + 1000)
    np.testing.assert_array_equal(plain.entropy, moved.entropy)
    np.testing.assert_array_equal(plain.l, moved.l)


def test_one_key_has_no_entropy_and_no_key_no_weight():
    kept = jnp.asarray([[False, True, False], [False, False, False]])
    scores = jnp.asarray([[jnp.nan, 812.5, jnp.inf]] * 2)
    row = entropy_partials(scores, kept)
    np.testing.assert_array_equal(row.entropy, [0, 0])
    np.testing.assert_array_equal(row.lse, [812.5, -jnp.inf])
    both = merge_entropy(row, row)
    np.testing.assert_allclose(both.entropy, [np.log(2), 0], rtol=1e-6)
    np.testing.assert_array_equal(both.lse[1], -jnp.inf)


def test_scores_of_minus_infinity_have_no_weight():
    row = entropy_partials(jnp.asarray([[1.0, -jnp.inf, 1.0], [-jnp.inf] * 3]))
    np.testing.assert_allclose(row.entropy, [np.log(2), 0], rtol=1e-6)
    np.testing.assert_array_equal(row.u, [0, 0])


def test_short_types_are_summed_in_float32():
    scores = jnp.zeros((4096,), jnp.bfloat16)
    row = entropy_partials(scores)
    assert row.l.dtype == jnp.float32
    assert float(row.entropy) == pytest.approx(np.log(4096), rel=1e-6)


def test_a_merge_that_leaves_u_where_it_was_is_noticed():
    """The sum u has to move with the maximum: without that, the test above would not pass."""
    scores = jnp.asarray([0.0, 1.0, 5.0, 6.0])
    first, second = entropy_partials(scores[:2]), entropy_partials(scores[2:])
    m = jnp.maximum(first.m, second.m)
    scale = jnp.exp(first.m - m)
    careless = EntropyPartials(m, scale * first.l + second.l, scale * first.u + second.u)
    right = merge_entropy(first, second)
    wanted = direct(np.asarray(scores))[0]
    assert float(right.entropy) == pytest.approx(wanted, abs=1e-6)
    assert abs(float(careless.entropy) - wanted) > 0.01


def test_nothing_to_merge_is_refused():
    with pytest.raises(ValueError, match="parts: got none"):
        merge_entropy()
