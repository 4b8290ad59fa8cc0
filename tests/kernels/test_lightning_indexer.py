"""The lightning indexer: loops, plateaus, scores that break selectors, poisoned tails, equal bits, memory, races, bad input."""

import contextlib
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import indexer_scores, indexer_select, testing
from pallas_kernels.ops.lightning_indexer import block_sizes
from pallas_kernels.ops.lightning_indexer.block_sizes import LightningIndexerBlockSizes
from tests.kernels import aot

HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests cost
SMALL = LightningIndexerBlockSizes(block_q=8, block_kv=128)
IMPLEMENTATIONS = ("reference", "xla")
EVERY = (*IMPLEMENTATIONS, "mosaic_tpu")


def draw(seed=0, *, b=2, t=5, s=11, i=3, d=4, dtype=np.float32, whole=False):
    """Returns index_query, index_key, head_weights; whole numbers where scores are to be exact and full of ties."""
    rng = np.random.default_rng(seed)
    shapes = (b, t, i, d), (b, s, d), (b, t, i)
    if whole:
        return tuple(jnp.asarray(rng.integers(-2, 3, shape), dtype) for shape in shapes)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def run(op, *args, implementation, **options):
    """Runs an op compiled as a whole, the Mosaic kernels interpreted."""
    mosaic = implementation.startswith("mosaic")
    call = functools.partial(op, implementation=implementation, **options)
    with pk.interpret_mode() if mosaic else contextlib.nullcontext():
        return jax.block_until_ready(jax.jit(call, compiler_options=HURRY)(*args))


def loop(query, key, weights, *, causal, lengths):
    """Returns the scores of float64 arrays, one head, row and key at a time."""
    b, t, heads, _ = query.shape
    s = key.shape[1]
    scores = np.full((b, t, s), -np.inf)
    for n, row, j in np.ndindex(b, t, s):
        if j < lengths[n] and (not causal or j <= row + s - t):
            scores[n, row, j] = sum(
                weights[n, row, h] * max(query[n, row, h] @ key[n, j], 0) for h in range(heads)
            )
    return scores


def best(scores, topk, lengths):
    """Returns what the specification of `topk_select` selects of given scores."""
    lengths = jnp.broadcast_to(lengths, scores.shape[:-1])
    select = lambda scores, *, implementation: pk.topk_select(
        scores, topk, lengths=lengths, implementation=implementation
    )
    return run(select, scores, implementation="reference")


def as_scores(rows):
    """Returns one-row queries, keys of size 1 and weights whose scores are `rows` [B, S]: relu(x) - relu(-x)."""
    sign = jnp.asarray([1.0, -1.0])
    query = jnp.broadcast_to(sign[:, None], (len(rows), 1, 2, 1))
    return query, jnp.asarray(rows)[..., None], jnp.broadcast_to(sign, (len(rows), 1, 2))


# ---------------------------------------------------------------------------------------------------------------- meaning


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("s", "causal"), [(11, True), (3, True), (11, False)])
def test_scores_and_selections_are_what_loops_give(implementation, s, causal):
    with jax.enable_x64(True):
        args = draw(s=s, dtype=np.float64)
        lengths = np.asarray([s, s // 2], np.int32)
        options = dict(causal=causal, implementation=implementation)
        scores = run(indexer_scores, *args, lengths=jnp.asarray(lengths), **options)
        want = loop(*map(np.asarray, args), causal=causal, lengths=lengths)
        assert scores.dtype == jnp.float32
        testing.assert_accurate(scores, want)
        got = run(indexer_select, *args, topk=4, lengths=jnp.asarray(lengths), **options)
        for n, row in np.ndindex(want.shape[:2]):
            visible = np.flatnonzero(want[n, row] > -np.inf)
            best = sorted(sorted(visible, key=lambda j: -want[n, row, j])[:4])
            assert [j for j in np.asarray(got.indices[n, row]) if j >= 0] == best
        testing.assert_well_formed(got)


def test_scores_of_a_case_by_hand():
    query = jnp.asarray([[[[1.0, 0.0], [0.0, 1.0]]]])  # head 0 reads channel 0, head 1 channel 1
    key = jnp.asarray([[[2.0, 3.0], [-2.0, 3.0], [2.0, -3.0], [-2.0, -3.0]]])
    weights = jnp.asarray([[[10.0, -1.0]]])
    # 10 * 2 - 3, -3 alone, 20 alone, nothing fires.
    for implementation in IMPLEMENTATIONS:
        scores = run(indexer_scores, query, key, weights, implementation=implementation)
        np.testing.assert_array_equal(scores, [[[17.0, -3.0, 20.0, 0.0]]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_plateau_of_zeros_keeps_its_lowest_indices(implementation):
    key = np.full((1, 300, 1), -1.0, np.float32)
    key[0, [150, 299], 0] = 1.0, 2.0
    ones = jnp.ones((1, 1, 1))
    got = run(
        indexer_select,
        ones[..., None],
        jnp.asarray(key),
        ones,
        topk=5,
        implementation=implementation,
    )
    np.testing.assert_array_equal(got.indices[0, 0], [0, 1, 2, 150, 299])
    assert got.threshold[0, 0] == 0
    assert got.tie_cut[0, 0] == 2


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("topk", [1, 140])
def test_scores_that_break_selectors_are_selected_exactly(implementation, topk):
    """Sequences are the adversarial rows, at lengths on and beside a block's edge; one decoded row each."""
    rows = np.stack(list(testing.adversarial_scores(300, topk).values()))
    lengths = jnp.asarray(np.resize([300, 129, 128, 127, 1, 0], len(rows)), jnp.int32)
    lengths = lengths[np.random.default_rng(0).permutation(len(rows))]
    got = run(
        indexer_select,
        *as_scores(rows),
        topk=topk,
        lengths=lengths,
        implementation=implementation,
        block_sizes=SMALL,
    )
    want = best(jnp.asarray(rows), topk, lengths)
    testing.assert_same_selection(jax.tree.map(lambda x: x[:, 0], got), want)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("t", [1, 9])
def test_what_a_row_may_not_see_may_hold_anything(implementation, t):
    query, key, weights = draw(b=3, t=t, s=200, whole=True)
    lengths = jnp.asarray([200, 130, 0], jnp.int32)
    tail = jnp.arange(200)[None, :, None] >= lengths[:, None, None]
    poisoned = jnp.where(tail, jnp.nan, key)
    # A visible key that is not a number is no candidate either.
    key, poisoned = key.at[0, 7].set(-9), poisoned.at[0, 7].set(jnp.nan)
    options = dict(lengths=lengths, causal=False)
    both = lambda *args, implementation: (
        indexer_scores(*args, **options, implementation=implementation),
        indexer_select(*args, topk=9, **options, implementation=implementation),
    )
    got_scores, got = run(both, query, poisoned, weights, implementation=implementation)
    want_scores = np.array(
        run(indexer_scores, query, key, weights, implementation="reference", **options)
    )
    want_scores[0, :, 7] = np.nan
    np.testing.assert_array_equal(got_scores, want_scores)
    testing.assert_same_selection(got, best(jnp.asarray(want_scores), 9, lengths[:, None]))


@pytest.mark.parametrize(
    ("implementation", "t", "d"),
    [("xla", 16, 16), ("mosaic_tpu", 2, 128), ("mosaic_tpu", 16, 16)],
    ids=["xla", "mosaic_tpu decode", "mosaic_tpu prefill"],
)
def test_selections_are_made_on_the_bits_of_the_scores(implementation, t, d):
    args = draw(t=t, s=260, i=10, d=d, dtype=jnp.bfloat16)
    lengths = jnp.asarray([260, 131], jnp.int32)
    options = dict(lengths=lengths, causal=False, block_sizes=SMALL, implementation=implementation)
    both = lambda *args, implementation: (
        indexer_scores(*args, **options),
        indexer_select(*args, topk=40, **options),
    )
    scores, got = run(both, *args, implementation=implementation)
    testing.assert_same_selection(got, best(scores, 40, lengths[:, None]))
    # bfloat16 products are exact in float32, so the scores are as good as those of the rounded inputs in float32.
    exact = run(
        indexer_scores,
        *(x.astype(jnp.float32) for x in args),
        lengths=lengths,
        causal=False,
        implementation="reference",
    )
    testing.assert_accurate(scores, exact, dtype="float32")


@pytest.mark.parametrize("block_q", [1, 3, None])
def test_chunks_of_any_size_give_the_same(block_q):
    args = draw(t=7, s=20, whole=True)
    sizes = LightningIndexerBlockSizes(block_q=block_q)
    both = lambda *args, implementation: (
        indexer_scores(*args, implementation=implementation, block_sizes=sizes),
        indexer_select(*args, topk=4, implementation=implementation, block_sizes=sizes),
    )
    scores, got = run(both, *args, implementation="xla")
    want_scores, want = run(both, *args, implementation="reference")
    np.testing.assert_array_equal(scores, want_scores)
    testing.assert_same_selection(got, want)


@functools.partial(jax.jit, compiler_options=HURRY)
def _select_in_both_orders(query, key, weights, order):
    select = functools.partial(indexer_select, topk=5, causal=False, implementation="xla")
    return select(query, key, weights).indices, select(query, key[:, order], weights).indices


@hypothesis.given(seed=st.integers(0, 2**16))
def test_the_order_of_the_keys_does_not_matter(seed):
    order = np.random.default_rng(seed).permutation(13)
    plain, moved = _select_in_both_orders(*draw(seed, t=3, s=13, i=8), jnp.asarray(order))
    # Ties are zeros, where no head fires; eight heads of four channels leave none here.
    np.testing.assert_array_equal(np.sort(order[np.asarray(moved)], axis=-1), plain)


# ------------------------------------------------------------------------------------------------------ what holds around


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_have_the_gradients_of_their_formula(implementation):
    query, key, weights = args = draw(s=7)
    visible = np.tri(5, 7, 2, dtype=bool)
    mix = np.cos(np.arange(2 * 5 * 7)).reshape(2, 5, 7).astype(np.float32)
    sizes = LightningIndexerBlockSizes(block_q=2)

    def mixed(*args):
        scores = indexer_scores(*args, implementation=implementation, block_sizes=sizes)
        return jnp.sum(jnp.where(visible, scores, 0) * mix)

    got = jax.jit(jax.grad(mixed, (0, 1, 2)), compiler_options=HURRY)(*args)
    query, key, weights = (np.asarray(x, np.float64) for x in args)
    product = np.einsum("btid,bsd->btis", query, key)
    fires = (product > 0) * (mix * visible)[:, :, None]
    sent = fires * weights[..., None]
    want = (
        np.einsum("btis,bsd->btid", sent, key),
        np.einsum("btis,btid->bsd", sent, query),
        np.einsum("btis,btis->bti", fires, product),
    )
    for name, x, y in zip(("index_query", "index_key", "head_weights"), got, want, strict=True):
        testing.assert_accurate(x, y, name=name)


def test_a_selection_is_a_constant_under_differentiation():
    query, key, weights = draw()
    total = lambda q, k, w: jnp.sum(indexer_select(q, k, w, topk=3, implementation="xla").threshold)
    gradients = jax.jit(jax.grad(total, (0, 1, 2)), compiler_options=HURRY)
    for gradient in gradients(query, key, weights):
        assert not np.any(gradient)


def test_memory_grows_with_rows_plus_keys():
    def temporaries(size):
        args = ((1, size, 4, 8), (1, size, 8), (1, size, 4))
        args = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in args)
        select = functools.partial(indexer_select, topk=16, implementation="xla")
        return jax.jit(select).lower(*args).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(2048), temporaries(4096)
    assert large < 2.1 * small
    assert large < 4096 * 4096 * 4 / 4  # a quarter of the scores


def test_a_chunk_keeps_to_its_budget():
    budget = block_sizes.CHUNK_BYTES["cpu"]
    row = 4 * 2 * 3 * 512
    chunk = block_sizes.chunk_rows(2, 10_000, 3, 512)
    assert chunk * row <= budget < (chunk + 10) * row
    assert block_sizes.chunk_rows(2, 10_000, 3, budget) == 1
    assert block_sizes.chunk_rows(2, 5, 3, 512) == 5


@pytest.mark.multidevice
def test_sequences_on_several_devices_need_nothing_of_each_other():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    args = draw(t=4, s=9, whole=True)
    select = functools.partial(indexer_select, topk=3, implementation="xla")
    sharded = jax.shard_map(select, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    sharded = jax.jit(sharded, compiler_options=HURRY).lower(*args).compile()
    text = sharded.as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "permute"))
    spread = jax.device_put(args, jax.NamedSharding(mesh, P("data")))
    want = run(indexer_select, *args, topk=3, implementation="reference")
    testing.assert_same_selection(sharded(*spread), want)


# ------------------------------------------------------------------------------------------------------ the Mosaic kernels


@pytest.mark.parametrize("t", [1, 9], ids=["decode", "prefill"])
def test_kernels_run_without_races_on_uninitialised_memory(t):
    args = draw(b=3, t=t, s=200, i=2, whole=True)
    lengths = jnp.asarray([0, 200, 100], jnp.int32)
    options = dict(topk=5, lengths=lengths)
    select = functools.partial(
        indexer_select, implementation="mosaic_tpu", block_sizes=SMALL, **options
    )
    with pk.interpret_mode(detect_races=True):
        got = jax.block_until_ready(jax.jit(select, compiler_options=HURRY)(*args))
    testing.assert_same_selection(
        got, run(indexer_select, *args, implementation="reference", **options)
    )


@pytest.mark.parametrize("chip", aot.DEVICE_KINDS)
def test_kernels_lower_for_every_generation(chip):
    spec = jax.ShapeDtypeStruct
    for t, name in ((1, "r1x2_kv384"), (20, "r32x1_kv384")):
        shapes = (2, t, 3, 64), (2, 300, 64), (2, t, 3)
        args = [spec(shape, jnp.bfloat16) for shape in shapes]
        select = functools.partial(indexer_select, topk=5, implementation="mosaic_tpu")
        lowered = aot.lower_tpu(select, *args, chip=chip)
        assert f"indexer_select_bfloat16_h3_{name}" in lowered.as_text()


def test_what_the_kernels_cannot_take_is_refused_by_name():
    spec = jax.ShapeDtypeStruct
    select = functools.partial(indexer_select, topk=5, implementation="mosaic_tpu")
    shapes = lambda t, s: ((1, t, 2, 8), (1, s, 8), (1, t, 2))
    with pk.interpret_mode():
        with pytest.raises(NotImplementedError, match="index_query of dtype float16, wanted float"):
            jax.eval_shape(select, *(spec(shape, jnp.float16) for shape in shapes(1, 9)))
        with pytest.raises(
            NotImplementedError, match="8 rows of S=4000000, which needs .* MiB of VMEM, wanted"
        ):
            jax.eval_shape(select, *(spec(shape, jnp.float32) for shape in shapes(1, 4_000_000)))
        with pytest.raises(NotImplementedError, match=r"in 65537 blocks, wanted at most 65536"):
            jax.eval_shape(
                select, *(spec(shape, jnp.float32) for shape in shapes(64 * 65536 + 1, 9))
            )


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(index_query=np.zeros((2, 5, 4), np.float32)),
            "index_query got shape .*wanted 4 axes",
        ),
        (dict(index_key=np.zeros((2, 11, 3), np.float32)), r"index_key .*axis 2 \(D\) of size 4"),
        (dict(index_key=np.zeros((2, 0, 4), np.float32)), "index_key .*every axis of at least 1"),
        (dict(index_key=np.zeros((2, 11, 4), jnp.bfloat16)), "wanted one dtype for all of them"),
        (
            dict(head_weights=np.zeros((2, 5, 2), np.float32)),
            r"head_weights .*axis 2 \(I\) of size",
        ),
        (dict(head_weights=np.zeros((2, 5, 3), np.int32)), "head_weights got dtype int32"),
        (dict(lengths=np.zeros(3, np.int32)), r"lengths got shape \(3,\), wanted axis 0"),
        (dict(lengths=np.zeros(2, np.float32)), "lengths got dtype float32, wanted int32"),
        (dict(implementation="triton"), "implementation got 'triton', wanted one of"),
    ],
    ids=["axes", "depth", "no keys", "mixed", "heads", "weights", "lengths", "float", "backend"],
)
def test_bad_input_is_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks would come first
    arguments = (
        dict(zip(("index_query", "index_key", "head_weights"), draw(), strict=True)) | change
    )
    with pytest.raises(ValueError, match=f"indexer_scores: .*{message}"):
        indexer_scores(**arguments)
    with pytest.raises(ValueError, match=f"indexer_select: .*{message}"):
        indexer_select(**arguments, topk=2)


def test_bad_budgets_are_named(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for topk, message in (
        (0, "topk got 0, wanted at least 1"),
        (jnp.ones((2, 5), jnp.int32), "with_indices=True got an array for topk"),
        (jnp.ones((3,), jnp.int32), r"topk got shape \(3,\), wanted one that broadcasts"),
    ):
        with pytest.raises(ValueError, match=f"indexer_select: {message}"):
            indexer_select(*draw(), topk=topk)


@pytest.mark.parametrize("name", ["block_q", "block_kv"])
def test_block_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} got 0, wanted at least 1"):
        LightningIndexerBlockSizes(**{name: 0})
