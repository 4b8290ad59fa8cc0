"""A strategy on a mesh: nothing is sent between devices, and the result is that of the strategy alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.attention.over_mesh import OverMesh
from jaxtopk.sharding import make_mesh


def _arrays(batch, heads=4, kv_heads=2):
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(batch, 6, n, 8)), jnp.float32)
        for n in (heads, kv_heads, kv_heads)
    )
    return query, key, value, jnp.arange(batch, dtype=jnp.int32) % 3 + 3


STRATEGIES = [
    FullAttention(),
    TopKAttention(topk=2),
    TopKAttention(topk=(1, 3)),
    TopKAttention(topk_ratio=0.5, scope="layer"),
]


@pytest.mark.multidevice
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_rows_stay_on_their_devices(strategy):
    query, key, value, lengths = _arrays(8)
    attend = lambda strategy: lambda: strategy.decode(query[:, -1], key, value, lengths=lengths)
    wanted = jax.jit(attend(strategy))()
    over = OverMesh(strategy=strategy)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        traced = jax.jit(attend(over)).trace()
        found = jax.jit(attend(over))()
    text = str(traced.jaxpr)
    assert "shard_map" in text
    assert not any(name in text for name in ("psum", "all_gather", "ppermute", "all_to_all"))
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_allclose(jax.jit(attend(over))(), wanted, atol=2e-6)  # outside of any mesh


@pytest.mark.multidevice
def test_whole_sequences_are_split_too():
    query, key, value, lengths = _arrays(8)
    strategy = TopKAttention(topk=2)
    attend = lambda strategy: lambda: strategy.attend(query, key, value, lengths=lengths)
    wanted = np.asarray(jax.jit(attend(strategy))())
    with jax.set_mesh(make_mesh(data=4, fsdp=1, tensor=2)):
        found = np.asarray(jax.jit(attend(OverMesh(strategy=strategy)))())
    valid = np.arange(6)[None] < np.asarray(lengths)[:, None]
    np.testing.assert_allclose(found[valid], wanted[valid], atol=2e-6)


@pytest.mark.multidevice
def test_a_batch_that_does_not_divide_is_refused():
    query, key, value, lengths = _arrays(6)
    with (
        jax.set_mesh(make_mesh(data=4, fsdp=1, tensor=2)),
        pytest.raises(ValueError, match="batch: got 6 sequences, wanted a multiple of the 4"),
    ):
        OverMesh(strategy=FullAttention()).decode(query[:, -1], key, value, lengths=lengths)


def test_it_asks_of_a_model_what_its_strategy_asks():
    over = OverMesh(strategy=TopKAttention(topk=2, sparse_suffix=3, layers=(1,)))
    assert over.suffix_tokens == 3
    assert over.prefill_strategy() == OverMesh(strategy=FullAttention())
    assert over.layer(0, 2) == OverMesh(strategy=FullAttention())
    assert over.layer(1, 2).strategy.topk == 2
