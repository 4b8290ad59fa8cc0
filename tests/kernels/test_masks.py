"""Which keys a row sees: one rule for causal edges, windows, lengths and documents, by its words."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core import masks


@pytest.mark.parametrize(("t", "s"), [(5, 5), (3, 7), (7, 3)])
@pytest.mark.parametrize("window", [None, 2])
def test_the_last_row_sees_the_last_key_and_windows_end_at_the_row(t, s, window):
    tile = slice(1, 3)
    got = masks.visible_keys(
        jnp.arange(t)[tile],
        jnp.arange(s),
        offset=s - t,
        causal=True,
        window=window,
        lengths=jnp.asarray([s, 2], jnp.int32),
        query_segment_ids=jnp.asarray([[0] * t, [i % 2 for i in range(t)]], jnp.int32)[:, tile],
        key_segment_ids=jnp.asarray([[0] * s, [j % 2 for j in range(s)]], jnp.int32),
    )
    for b, row, j in np.ndindex(2, 2, s):
        position = row + 1 + s - t
        want = j <= position and (window is None or position - j < window)
        if b == 1:
            want = want and j < 2 and (row + 1) % 2 == j % 2
        assert got[b, row, j] == want


def test_without_a_rule_everything_is_seen():
    assert np.all(masks.visible_keys(jnp.arange(2), jnp.arange(3), offset=1, causal=False))


def test_a_decoded_row_sees_the_end_of_its_valid_keys():
    lengths = jnp.asarray([0, 1, 4, 6], jnp.int32)
    got = np.asarray(masks.visible_to_decode(6, lengths, 3, 4))
    np.testing.assert_array_equal(got.sum(1), [0, 1, 3, 3])
    np.testing.assert_array_equal(got[2], [0, 1, 1, 1, 0, 0])
    assert masks.visible_to_decode(6, None, None, 4).all()
