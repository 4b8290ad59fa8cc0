"""`knn_indices`: loops, ties, padding, what a float32 distance must not lose, memory, races, bad input."""

import contextlib
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import knn_indices
from pallas_kernels.ops.knn_attention import block_sizes
from pallas_kernels.ops.knn_attention.block_sizes import KnnBlockSizes
from tests.kernels import aot

HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests cost
SMALL = KnnBlockSizes(block_q=8, block_kv=128)
IMPLEMENTATIONS = ("reference", "xla")
EVERY = (*IMPLEMENTATIONS, "mosaic_tpu")


def draw(seed=0, *, b=2, t=7, s=13, p=3, spread=100.0):
    """Returns positions [m] of queries and keys in a scene of this size."""
    rng = np.random.default_rng(seed)
    shapes = (b, t, p), (b, s, p)
    return tuple(jnp.asarray(rng.uniform(-spread, spread, shape), jnp.float32) for shape in shapes)


def run(query, key, *, implementation, key_valid=None, **options):
    """Runs the op compiled as a whole, the Mosaic kernel interpreted."""
    mosaic = implementation.startswith("mosaic")
    call = lambda query, key, valid: knn_indices(
        query, key, key_valid=valid, implementation=implementation, **options
    )
    with pk.interpret_mode() if mosaic else contextlib.nullcontext():
        return np.asarray(jax.jit(call, compiler_options=HURRY)(query, key, key_valid))


def loop(query, key, valid, neighbours):
    """Returns the lists by a stable sort of float64 distances, one row at a time."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    b, t, _ = query.shape
    lists = np.full((b, t, neighbours), -1)
    for n, row in np.ndindex(b, t):
        distance = np.sum((query[n, row] - key[n]) ** 2, axis=-1)
        near = sorted(np.flatnonzero(valid[n]), key=lambda j: distance[j])[:neighbours]
        lists[n, row, : len(near)] = sorted(near)
    return lists


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    ("t", "neighbours"), [(3, 4), (9, 200)], ids=["few rows", "more than keys"]
)
def test_lists_are_what_loops_give(implementation, t, neighbours):
    query, key = draw(t=t, s=150, p=2)
    valid = np.random.default_rng(1).random((2, 150)) < 0.5
    got = run(
        query,
        key,
        neighbours=neighbours,
        key_valid=jnp.asarray(valid),
        implementation=implementation,
        block_sizes=SMALL,
    )
    np.testing.assert_array_equal(got, loop(query, key, valid, neighbours))


def test_lists_of_a_case_by_hand():
    query = jnp.asarray([[[0.0, 0.0]]])
    key = jnp.asarray([[[3.0, 4.0], [0.0, 5.0], [9.0, 9.0], [1.0, 0.0], [-5.0, 0.0]]])
    for implementation in IMPLEMENTATIONS:
        find = functools.partial(run, query, key, implementation=implementation)
        # Squared distances 25, 25, 162, 1, 25: of three at 5 m, the lowest indices stay.
        np.testing.assert_array_equal(find(neighbours=3), [[[0, 1, 3]]])
        np.testing.assert_array_equal(
            find(neighbours=3, key_valid=jnp.asarray([[False, True, True, False, False]])),
            [[[1, 2, -1]]],
        )


@pytest.mark.parametrize("implementation", EVERY)
def test_keys_that_differ_by_millimetres_far_from_the_origin_are_told_apart(implementation):
    """|q|^2 - 2 <q, k> + |k|^2 loses 0.5 m^2 here, and bfloat16 loses metres."""
    steps = np.random.default_rng(0).permutation(40)
    key = np.stack([2000 + steps / 256, np.full(40, -1500.0)], axis=-1)[None]
    query = np.tile([[[2000.0, -1500.0]]], (1, 8, 1))
    got = run(
        jnp.asarray(query, jnp.float32),
        jnp.asarray(key, jnp.float32),
        neighbours=5,
        implementation=implementation,
    )
    np.testing.assert_array_equal(got, np.tile(np.flatnonzero(steps < 5), (1, 8, 1)))
    if implementation != "reference":
        return
    rounded = run(
        jnp.asarray(query, jnp.bfloat16),
        jnp.asarray(key, jnp.bfloat16),
        neighbours=5,
        implementation=implementation,
    )
    assert (rounded != got).any()


@pytest.mark.parametrize("implementation", EVERY)
def test_padding_may_hold_anything_and_what_is_not_a_number_is_no_neighbour(implementation):
    query, key = draw(t=8, s=140)
    valid = np.arange(140)[None] < np.asarray([[0], [131]])
    dark = jnp.where(jnp.asarray(valid)[..., None], key, jnp.nan)
    dark = dark.at[1, 130, 0].set(jnp.nan)
    query = query.at[1, 2, 1].set(jnp.nan)
    got = run(
        query,
        dark,
        neighbours=6,
        key_valid=jnp.asarray(valid),
        implementation=implementation,
        block_sizes=SMALL,
    )
    valid[1, 130] = False
    want = loop(query, key, valid, 6)
    want[1, 2] = -1
    np.testing.assert_array_equal(got, want)


def test_the_last_chunk_may_be_short():
    query, key = draw(t=7)
    want = run(query, key, neighbours=4, implementation="reference")
    for block_q in (3, 7):
        sizes = KnnBlockSizes(block_q=block_q)
        got = run(query, key, neighbours=4, implementation="xla", block_sizes=sizes)
        np.testing.assert_array_equal(got, want)


@functools.partial(jax.jit, compiler_options=HURRY)
def _find_in_both_frames(query, key, shift):
    find = functools.partial(knn_indices, neighbours=4, implementation="xla")
    return find(query, key), find(query + shift, key + shift)


@hypothesis.given(seed=st.integers(0, 2**16), shift=st.integers(-1000, 1000))
def test_moving_the_whole_scene_changes_nothing(seed, shift):
    query, key = (jnp.round(x) for x in draw(seed))
    still, moved = _find_in_both_frames(query, key, jnp.float32(shift))
    np.testing.assert_array_equal(still, moved)


def test_memory_grows_with_rows_plus_keys():
    def temporaries(size):
        x = jax.ShapeDtypeStruct((1, size, 3), jnp.float32)
        find = functools.partial(knn_indices, neighbours=16, implementation="xla")
        return jax.jit(find).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(2048), temporaries(4096)
    assert large < 2.1 * small
    assert large < 4096 * 4096 * 4 / 4  # a quarter of the distances


def test_a_chunk_keeps_to_its_budget():
    row = 4 * 2 * 512
    chunk, budget = block_sizes.chunk_rows(2, 10_000, 512), block_sizes.CHUNK_BYTES["cpu"]
    assert chunk * row <= budget < (chunk + 16) * row
    assert block_sizes.chunk_rows(2, 10_000, budget) == 1


def test_lists_are_constants_under_differentiation():
    query, key = draw()
    listed = lambda query, key: jnp.sum(
        knn_indices(query, key, neighbours=3, implementation="xla").astype(jnp.float32)
        * jnp.sum(query**2)
    )
    gradient = jax.jit(jax.grad(listed), compiler_options=HURRY)(query, key)
    total = run(query, key, neighbours=3, implementation="xla").sum()
    np.testing.assert_allclose(gradient, 2 * query * jnp.float32(total), rtol=1e-6)


def test_the_kernel_runs_without_races_on_uninitialised_memory():
    query, key = draw(t=17, s=200)
    valid = jnp.arange(200)[None] < jnp.asarray([[200], [3]])
    find = functools.partial(
        knn_indices, neighbours=5, implementation="mosaic_tpu", block_sizes=SMALL
    )
    with pk.interpret_mode(detect_races=True):
        got = jax.jit(find, compiler_options=HURRY)(query, key, key_valid=valid)
        got = np.asarray(jax.block_until_ready(got))
    np.testing.assert_array_equal(got, loop(query, key, np.asarray(valid), 5))


@pytest.mark.parametrize("chip", aot.DEVICE_KINDS)
def test_the_kernel_lowers_for_every_generation(chip):
    spec = jax.ShapeDtypeStruct
    find = functools.partial(knn_indices, neighbours=5, implementation="mosaic_tpu")
    shapes = (2, 20, 3), (2, 300, 3)
    lowered = aot.lower_tpu(find, *(spec(shape, jnp.float32) for shape in shapes), chip=chip)
    assert "knn_indices_p3_r32x1_kv384" in lowered.as_text()


def test_what_the_kernel_cannot_take_is_refused_by_name():
    find = functools.partial(knn_indices, neighbours=5, implementation="mosaic_tpu")
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    with pk.interpret_mode():
        with pytest.raises(NotImplementedError, match="rows of S=4000000, which needs .* MiB"):
            jax.eval_shape(find, spec(1, 9, 3), spec(1, 4_000_000, 3))
        with (
            jax.enable_x64(True),
            pytest.raises(NotImplementedError, match="query_positions of dtype float64, wanted"),
        ):
            find(jnp.zeros((1, 2, 3), jnp.float64), jnp.zeros((1, 2, 3), jnp.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query_positions=np.zeros((2, 7), np.float32)), "query_positions .*wanted 3 axes"),
        (dict(key_positions=np.zeros((3, 13, 3), np.float32)), r"key_positions .*axis 0 \(B\)"),
        (dict(key_positions=np.zeros((2, 13, 2), np.float32)), r"key_positions .*axis 2 \(P\)"),
        (dict(key_positions=np.zeros((2, 0, 3), np.float32)), "key_positions .*at least 1"),
        (dict(key_positions=np.zeros((2, 13, 3), jnp.bfloat16)), "wanted one dtype for all"),
        (dict(neighbours=0), "neighbours got 0, wanted at least 1"),
        (dict(neighbours=2.0), "neighbours got 2.0, wanted an int >= 1"),
        (dict(key_valid=np.ones((2, 12), bool)), r"key_valid got shape \(2, 12\)"),
        (dict(key_valid=np.ones((2, 13), np.int32)), "key_valid got dtype int32, wanted bool"),
    ],
    ids=["axes", "batch", "P", "no keys", "mixed", "zero", "float", "valid", "integers"],
)
def test_bad_input_is_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks would come first
    query, key = draw()
    with pytest.raises(ValueError, match=f"knn_indices: .*{message}"):
        knn_indices(**dict(query_positions=query, key_positions=key, neighbours=2) | change)


@pytest.mark.parametrize("name", ["block_q", "block_kv"])
def test_block_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} got 0, wanted at least 1"):
        KnnBlockSizes(**{name: 0})
