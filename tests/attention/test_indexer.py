"""Indexer attention as a strategy: its rows are those of a plain loop, and it refuses what it cannot select from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtopk.attention import FullAttention, IndexerAttention, TopKAttention
from jaxtopk.attention.base import Index
from jaxtopk.attention.over_mesh import OverMesh
from jaxtopk.sharding import make_mesh

B, T, N, K, H, I, J = 2, 13, 4, 2, 8, 3, 6


def _inputs(batch=B):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(batch, T, *shape)), jnp.float32)
    index = Index(query=draw(I, J), key=draw(J), head_weights=draw(I))
    return draw(N, H), draw(K, H), draw(K, H), index


def _loop(query, key, value, index, *, topk, visible):
    """Attends row by row in float64; visible(b, t) lists the keys in sight. Rows [B, T, N, H]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    index = Index(*(np.asarray(x, np.float64) for x in index))
    out = np.zeros(query.shape)
    for b, t in np.ndindex(*query.shape[:2]):
        seen = np.asarray(visible(b, t), int)
        fired = np.maximum(index.query[b, t] @ index.key[b, seen].T, 0.0)  # [I, seen]
        scores = index.head_weights[b, t] @ fired
        kept = seen[np.argsort(-scores, kind="stable")[:topk]]
        for n in range(N):
            logits = key[b, kept, n // (N // K)] @ query[b, t, n] * H**-0.5
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights / weights.sum() @ value[b, kept, n // (N // K)]
    return out


def test_rows_of_whole_sequences_are_those_of_the_loop():
    query, key, value, index = _inputs()
    strategy = IndexerAttention(topk=4)
    out = strategy.attend(query, key, value, index=index)
    wanted = _loop(query, key, value, index, topk=4, visible=lambda b, t: range(t + 1))
    np.testing.assert_allclose(out, wanted, atol=2e-6)

    lengths = np.asarray([T, 7], np.int32)
    out = strategy.attend(query, key, value, lengths=jnp.asarray(lengths), index=index)
    wanted = _loop(
        query, key, value, index, topk=4, visible=lambda b, t: range(min(t + 1, lengths[b]))
    )
    np.testing.assert_allclose(out, wanted, atol=2e-6)


def test_rows_that_are_not_sparse_are_dense():
    query, key, value, index = _inputs()
    sparse = np.arange(B * T).reshape(B, T) % 3 == 0
    strategy = IndexerAttention(topk=2)
    out = strategy.attend(query, key, value, sparse_rows=jnp.asarray(sparse), index=index)
    all_sparse = strategy.attend(query, key, value, index=index)
    dense = FullAttention().attend(query, key, value)
    np.testing.assert_array_equal(out[sparse], all_sparse[sparse])
    np.testing.assert_array_equal(out[~sparse], dense[~sparse])


@pytest.mark.parametrize("window", [None, 5, 2], ids=["all", "window", "window below topk"])
def test_a_decoded_row_is_that_of_the_loop_over_its_cache(window):
    query, key, value, index = _inputs()
    places = np.asarray([10, 3])
    # A cache that is longer than both sequences, with garbage where nothing was written.
    unwritten = jnp.arange(T)[None] > places[:, None]
    spoil = lambda x: jnp.where(unwritten.reshape(B, T, *(1,) * (x.ndim - 2)), jnp.nan, x)
    rows = jnp.arange(B), jnp.asarray(places)
    out = IndexerAttention(topk=3).decode(
        query[rows],
        spoil(key),
        spoil(value),
        lengths=jnp.asarray(places + 1, jnp.int32),
        window=window,
        index=Index(index.query[rows], spoil(index.key), index.head_weights[rows]),
    )
    first = lambda t: 0 if window is None else max(0, t + 1 - window)
    wanted = _loop(query, key, value, index, topk=3, visible=lambda b, t: range(first(t), t + 1))
    np.testing.assert_allclose(out, wanted[np.arange(B), places], atol=2e-6)


def test_a_row_that_may_keep_all_its_keys_is_full_attention():
    query, key, value, index = _inputs()
    lengths = jnp.asarray([9, 5], jnp.int32)
    row = Index(index.query[:, 0], index.key, index.head_weights[:, 0])
    for topk in (9, T, 1000):
        strategy = IndexerAttention(topk=topk)
        out = strategy.decode(query[:, 0], key, value, lengths=lengths, index=row)
        full = FullAttention().decode(query[:, 0], key, value, lengths=lengths)
        np.testing.assert_allclose(out, full, atol=2e-6)


def test_heads_share_one_set():
    query, key, value, index = _inputs()
    row = Index(index.query[:, 0], index.key, index.head_weights[:, 0])
    lengths = jnp.asarray([T, T], jnp.int32)
    # With one key kept, every head returns the value of that key.
    out = IndexerAttention(topk=1).decode(query[:, 0], key, value, lengths=lengths, index=row)
    distance = np.abs(np.asarray(value)[:, :, [0, 0, 1, 1]] - np.asarray(out)[:, None]).sum((2, 3))
    assert (np.min(distance, axis=1) < 1e-5).all()


@pytest.mark.multidevice
def test_on_a_mesh_each_device_selects_for_what_it_holds():
    query, key, value, index = _inputs(batch=8)
    row = Index(index.query[:, 0], index.key, index.head_weights[:, 0])
    lengths = jnp.arange(8, dtype=jnp.int32) + 3
    decode = lambda strategy: (
        lambda: strategy.decode(query[:, 0], key, value, lengths=lengths, index=row)
    )
    strategy = IndexerAttention(topk=3)
    wanted = jax.jit(decode(strategy))()
    over = OverMesh(strategy=strategy)
    assert over.needs_index
    assert not OverMesh(strategy=FullAttention()).needs_index
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        text = str(jax.jit(decode(over)).trace().jaxpr)
        found = jax.jit(decode(over))()
    assert "shard_map" in text
    assert not any(name in text for name in ("psum", "all_gather", "ppermute", "all_to_all"))
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_gradients_flow_through_the_attended_keys_and_not_through_the_choice():
    query, key, value, index = _inputs()
    strategy = IndexerAttention(topk=2)
    loss = lambda query, key, value, index: jnp.sum(
        jnp.sin(strategy.attend(query, key, value, index=index))
    )
    of_query, of_value, of_index = jax.grad(loss, argnums=(0, 2, 3))(query, key, value, index)
    assert np.abs(of_query).max() > 0
    assert np.abs(of_value).max() > 0
    for leaf in of_index:
        np.testing.assert_array_equal(leaf, 0.0)


def test_layers_and_prompts_are_exempted_as_for_topk():
    strategy = IndexerAttention(topk=3, layers=(1,), sparse_suffix=2)
    assert [strategy.layer(i, 3) for i in range(3)] == [
        FullAttention(),
        IndexerAttention(topk=3, sparse_suffix=2),
        FullAttention(),
    ]
    assert (strategy.prefill_strategy(), strategy.suffix_tokens) == (FullAttention(), 2)
    sparse = IndexerAttention(topk=3, prefill="topk")
    assert (sparse.prefill_strategy(), sparse.suffix_tokens) == (sparse, 0)
    assert IndexerAttention(topk=3).suffix_tokens == TopKAttention(topk=3).suffix_tokens == 1
    assert [s.needs_index for s in (FullAttention(), TopKAttention(topk=1), sparse)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 0}, "topk got 0, wanted an int >= 1"),
        ({"topk": True}, "topk got True, wanted an int >= 1"),
        ({"topk": 2, "sparse_suffix": -1}, "sparse_suffix got -1, wanted at least 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"IndexerAttention: {message}"):
        IndexerAttention(**settings)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="IndexerAttention: layers got 3, wanted 0 to 2"):
        IndexerAttention(topk=1, layers=(3,)).layer(0, 3)


def test_what_it_cannot_select_from_is_refused():
    query, key, value, index = _inputs()
    strategy = IndexerAttention(topk=2)
    wanted = "got no index, wanted a model with indexer parameters"
    with pytest.raises(ValueError, match=wanted):
        strategy.attend(query, key, value)
    with pytest.raises(ValueError, match=wanted):
        strategy.decode(query[:, 0], key, value, lengths=jnp.asarray([1, 1], jnp.int32))
    segments = jnp.zeros((B, T), jnp.int32)
    with pytest.raises(NotImplementedError, match="segment_ids got packed documents"):
        strategy.attend(query, key, value, segment_ids=segments, index=index)
    with pytest.raises(NotImplementedError, match="window got 4, wanted None or at least the 13"):
        strategy.attend(query, key, value, window=4, index=index)
    assert dataclasses.replace(strategy, topk=3) == IndexerAttention(topk=3)
