"""The cache: what a write changes, and what its checks refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtopk.decoding.kv_cache import KVCache, write_prefix, write_row
from jaxtopk.models.decoder_lm.config import DecoderConfig


@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_goes_where_each_sequence_ends_and_nowhere_else(batch):
    cached = np.random.default_rng(0).normal(size=(batch, 6, 2, 4)).astype(np.float32)
    new = np.random.default_rng(1).normal(size=(batch, 2, 4)).astype(np.float32)
    lengths = np.array([5, 0, 2], np.int32)[:batch]
    wanted = cached.copy()
    for sequence, row in enumerate(lengths):
        wanted[sequence, row] = new[sequence]
    got = write_row(jnp.asarray(cached), jnp.asarray(new), jnp.asarray(lengths))
    np.testing.assert_array_equal(got, wanted)


def test_a_prefix_takes_the_caches_dtype_and_leaves_the_rest():
    cached = jnp.full((2, 5, 1, 2), 7, jnp.bfloat16)
    written = write_prefix(cached, jnp.ones((2, 3, 1, 2), jnp.float32))
    assert written.dtype == jnp.bfloat16
    np.testing.assert_array_equal(written[0, :, 0, 0].astype(jnp.float32), [1, 1, 1, 7, 7])


def test_an_empty_cache_has_one_array_a_layer_and_passes_its_check():
    cache = KVCache.create(DecoderConfig.tiny(), 3, 10, jnp.bfloat16)
    cache.validate()
    assert (cache.batch, cache.capacity, len(cache.key)) == (3, 10, 2)
    assert {leaf.dtype for leaf in cache.key + cache.value} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(cache.lengths, [0, 0, 0])
    jax.eval_shape(lambda cache: cache.validate(), cache)


def test_what_does_not_fit_is_named():
    config = DecoderConfig.tiny()
    for name, sizes in (("batch", (0, 4)), ("capacity", (1, 0))):
        with pytest.raises(ValueError, match=f"{name}: got 0, wanted at least 1"):
            KVCache.create(config, *sizes)
    cache = KVCache.create(config, 2, 4)
    shorter = jnp.zeros((2, 3, 2, 32))
    for changes, message in (
        ({"key": cache.key[:1]}, "got 1 key and 2 value layers, wanted equally many"),
        ({"value": (cache.value[0], shorter)}, r"value\[1\]: got float32\[2, 3, 2, 32\], wanted"),
        ({"lengths": jnp.zeros((3,), jnp.int32)}, r"lengths: got int32\[3\], wanted int32\[2\]"),
        (
            {"lengths": jnp.zeros((2,), jnp.float32)},
            r"lengths: got float32\[2\], wanted int32\[2\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cache, **changes).validate()
