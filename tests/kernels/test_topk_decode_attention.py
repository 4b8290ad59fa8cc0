"""`topk_decode_attention`: rows against loops, shared sets, what is never read, equality with the training op, bad input."""

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

from pallas_kernels import merge_attention, testing, topk_attention, topk_decode_attention
from pallas_kernels.core import selection
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes

HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests cost
IMPLEMENTATIONS = ("reference", "xla")


def draw(seed=0, *, b=3, s=29, n=4, k=2, h=8, v=3, dtype=np.float32, whole=False):
    """Returns query, key, value; whole numbers where scores are to be exact and full of ties."""
    rng = np.random.default_rng(seed)
    shapes = (b, n, h), (b, s, k, h), (b, s, k, v)
    draws = [rng.normal(size=shape) for shape in shapes]
    if whole:
        draws[:2] = (rng.integers(-2, 3, shape) for shape in shapes[:2])
    return tuple(jnp.asarray(x, dtype) for x in draws)


def attend(query, key, value, **options):
    """Returns out, lse and the selection."""
    options = {"implementation": "xla"} | options
    out, residuals = topk_decode_attention(query, key, value, return_residuals=True, **options)
    return out, residuals.lse, residuals.selection


def jitted(**options):
    return jax.jit(functools.partial(attend, **options), compiler_options=HURRY)


def loop(query, key, value, topk, lengths, window):
    """Returns out, lse and the lists of kept keys, a head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, n, h = query.shape
    k = key.shape[2]
    out, lse, lists = np.zeros((b, n, value.shape[3])), np.full((b, n), -np.inf), {}
    for i, head in np.ndindex(b, n):
        kv = head // (n // k)
        scores = key[i, :, kv] @ query[i, head] * h**-0.5
        seen = range(max(lengths[i] - window, 0), lengths[i])
        kept = sorted(sorted(seen, key=lambda j: (-np.float32(scores[j]), j))[: topk[i, head]])
        lists[i, head] = kept
        if kept:
            weights = np.exp(scores[kept])
            out[i, head] = weights @ value[i, kept, kv] / weights.sum()
            lse[i, head] = np.log(weights.sum())
    return out, lse, lists


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("group", [1, 3])
def test_each_head_keeps_its_best_visible_keys(implementation, window, group):
    args = draw(n=6, k=6 // group, whole=True)
    lengths = np.asarray([29, 0, 10], np.int32)
    run = jitted(topk=4, lengths=jnp.asarray(lengths), window=window, implementation=implementation)
    out, lse, found = run(*args)
    want = loop(*args, np.full((3, 6), 4), lengths, window or 29)
    testing.assert_accurate(out, want[0])
    testing.assert_accurate(lse, want[1])
    for (i, head), kept in want[2].items():
        assert [j for j in np.asarray(found.indices[i, head]) if j >= 0] == kept
        assert found.count[i, head] == len(kept)
    testing.assert_well_formed(found)
    assert not np.any(out[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_budgets_may_differ_by_head_and_by_sequence(implementation):
    args = draw(whole=True)
    lengths = np.asarray([29, 5, 17], np.int32)
    topk = np.random.default_rng(1).integers(1, 9, (3, 4)).astype(np.int32)
    run = jax.jit(functools.partial(attend, implementation=implementation), compiler_options=HURRY)
    for budgets in (topk, np.broadcast_to(topk[:, :1], (3, 4))):
        given = {"topk": jnp.asarray(budgets), "lengths": jnp.asarray(lengths)}
        out, lse, found = run(*args, **given)
        want = loop(*args, budgets, lengths, 29)
        testing.assert_accurate(out, want[0])
        testing.assert_accurate(lse, want[1])
        assert found.indices is None
    one_a_sequence = run(*args, topk=jnp.asarray(topk[:, :1]), lengths=jnp.asarray(lengths))
    testing.assert_accurate(one_a_sequence[0], want[0])


@pytest.mark.parametrize("scope", ["group", "layer"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_shared_scope_has_the_set_of_the_best_summed_probability(implementation, scope):
    with jax.enable_x64(True):
        query, key, value = draw(dtype=np.float64)
        lengths = np.asarray([29, 7, 2], np.int32)
        run = jitted(
            topk=5, scope=scope, lengths=jnp.asarray(lengths), implementation=implementation
        )
        out, lse, found = run(query, key, value)
        spread = lambda x: np.repeat(np.asarray(x), 2, axis=2)
        scores = np.einsum("bnh,bsnh->bns", np.asarray(query), spread(key)) * 8**-0.5
        seen = np.arange(29) < lengths[:, None, None]
        weights = np.where(seen, np.exp(scores), 0)
        sets = 2 if scope == "group" else 1
        full = weights / weights.sum(-1, keepdims=True)
        pooled = np.repeat(full.reshape(3, sets, -1, 29).sum(2), 4 // sets, axis=1)
        order = np.argsort(-pooled, axis=-1, kind="stable")[..., :5]
        mask = np.zeros(weights.shape, bool)
        np.put_along_axis(mask, order, True, axis=-1)
        mask &= seen
        weights = np.where(mask, weights, 0)
        want = np.einsum("bns,bsnv->bnv", weights, spread(value)) / weights.sum(-1)[..., None]
        testing.assert_accurate(out, want)
        testing.assert_accurate(lse, np.log(weights.sum(-1)))
        np.testing.assert_array_equal(
            selection.compact(jnp.asarray(mask), 5), np.asarray(found.indices)
        )


@pytest.mark.parametrize("pooling", ["prob_max", "score_mean", "score_max"])
def test_other_poolings_agree_with_the_training_op(pooling):
    """There they are checked against numpy."""
    query, key, value = draw()
    options = dict(topk=5, scope="group", pooling=pooling)
    out, lse, found = jitted(**options)(query, key, value)
    train = jax.jit(
        lambda *args: topk_attention(*args, return_residuals=True, implementation="xla", **options),
        compiler_options=HURRY,
    )
    want, residuals = train(query[:, None], key, value)
    testing.assert_accurate(out, want[:, 0])
    testing.assert_accurate(lse, residuals.lse[..., 0])
    np.testing.assert_array_equal(found.tie_cut, residuals.tie_cut[..., 0])


def test_a_step_is_the_row_of_the_training_op_that_sees_the_same_keys():
    query, key, value = draw(b=1, n=4)
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(1, 29, 4, 8)), jnp.float32)
    train = jax.jit(
        lambda *args: topk_attention(*args, topk_ratio=0.2, min_topk=2, implementation="xla"),
        compiler_options=HURRY,
    )
    want = train(rows, key, value)
    step = jax.jit(attend, compiler_options=HURRY)
    for length in (1, 2, 13, 29):
        budget = max(2, -(-length // 5)) if length > 1 else 1
        given = {"topk": jnp.full((1, 1), budget), "lengths": jnp.asarray([length], jnp.int32)}
        out, _, _ = step(rows[:, length - 1], key, value, **given)
        testing.assert_accurate(out, want[:, length - 1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scope", ["head", "group"])
def test_what_is_not_selected_may_hold_anything(implementation, scope):
    query, key, value = draw()
    lengths = jnp.asarray([29, 0, 11], jnp.int32)
    run = jitted(topk=4, lengths=lengths, scope=scope, implementation=implementation)
    hidden = (jnp.arange(29)[None] >= lengths[:, None]).at[0, 3].set(True)[..., None, None]
    poisoned = run(query, *(jnp.where(hidden, jnp.nan, x) for x in (key, value)))
    # Key 3 of the first sequence now has a score of NaN, which is never selected.
    for x in jax.tree.leaves(poisoned[:2]):
        assert not np.isnan(x).any()
    assert (np.asarray(poisoned[2].indices[0]) != 3).all()
    idle = np.ones(29, bool)
    idle[np.asarray(poisoned[2].indices[0]).ravel()] = False
    assert idle.sum() > 5
    seen_only = jnp.where(jnp.asarray(idle)[None, :, None, None], jnp.nan, value)
    again = run(query, jnp.where(hidden, jnp.nan, key), seen_only)
    np.testing.assert_array_equal(again[0][0], poisoned[0][0])


def test_a_value_that_is_selected_and_nan_shows_in_its_heads_alone():
    query, key, value = draw(b=1, whole=True)
    clean = jitted(topk=4)(query, key, value)
    lists = np.asarray(clean[2].indices[0])
    only_first = next(j for j in lists[:2].ravel())  # heads 0 and 1 read key/value head 0
    out, _, _ = jitted(topk=4)(query, key, value.at[0, only_first, 0].set(jnp.nan))
    hit = np.asarray([only_first in lists[head] and head < 2 for head in range(4)])
    assert np.isnan(np.asarray(out[0])[hit]).all()
    np.testing.assert_array_equal(np.asarray(out[0])[~hit], np.asarray(clean[0][0])[~hit])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sequence_without_keys_is_zero(implementation):
    lengths = jnp.asarray([0, 5, 0], jnp.int32)
    out, lse, found = jitted(topk=3, lengths=lengths, implementation=implementation)(*draw())
    for i in (0, 2):
        assert not np.any(out[i])
        assert (np.asarray(lse[i]) == -np.inf).all()
        assert (np.asarray(found.count[i]) == 0).all()
        assert (np.asarray(found.indices[i]) == -1).all()
    testing.assert_well_formed(found)


def test_a_budget_of_all_keys_is_dense_attention():
    query, key, value = draw()
    want = jax.nn.dot_product_attention(
        query[:, None], key, jnp.pad(value, ((0, 0),) * 3 + ((0, 5),))
    )
    for topk in (29, 99):
        testing.assert_accurate(jitted(topk=topk)(query, key, value)[0], want[:, 0, :, :3])


def test_a_longer_cache_changes_no_set_and_the_order_of_the_batch_no_bit():
    args = draw(whole=True)
    lengths = jnp.asarray([29, 4, 17], jnp.int32)
    run = jax.jit(lambda *args, lengths: attend(*args, topk=5, lengths=lengths))
    plain = run(*args, lengths=lengths)
    order = jnp.asarray([2, 0, 1])
    moved = run(*(x[order] for x in args), lengths=lengths[order])
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(x, y[order])
    longer = (args[0], *(jnp.pad(x, ((0, 0), (0, 35), (0, 0), (0, 0))) for x in args[1:]))
    padded = run(*longer, lengths=lengths)
    testing.assert_same_selection(padded[2], plain[2])
    testing.assert_accurate(padded[0], plain[0])


@functools.partial(jax.jit, compiler_options=HURRY)
def _parts_and_whole(query, key, value, cuts):
    run = lambda lengths, topk: attend(query, key, value, lengths=lengths, topk=topk)
    everything = jnp.full((1, 1), 29)
    parts = []
    for first, last in zip((jnp.int32(0), *cuts), (*cuts, jnp.int32(29)), strict=True):
        # The keys first .. last - 1, moved to the front.
        moved = (jnp.roll(x, -first, axis=1) for x in (key, value))
        lengths = jnp.full((3,), last - first)
        parts.append(attend(query, *moved, lengths=lengths, topk=everything)[:2])
    out, lse, _ = run(jnp.full((3,), 29), everything)
    return parts, (out, lse)


@hypothesis.given(
    seed=st.integers(0, 2**16), cuts=st.tuples(st.integers(0, 29), st.integers(0, 29))
)
def test_parts_merge_into_the_whole_in_any_grouping(seed, cuts):
    cuts = tuple(map(jnp.int32, sorted(cuts)))
    (a, b, c), whole = _parts_and_whole(*draw(seed), cuts)
    merge = lambda *parts: merge_attention(*zip(*parts, strict=True))
    for merged in (merge(a, b, c), merge(merge(a, b), c), merge(a, merge(c, b))):
        for x, y in zip(merged, whole, strict=True):
            testing.assert_accurate(x, y)


def test_memory_is_a_few_score_rows_and_nothing_is_sorted():
    b, s, n, k, h = 2, 4096, 8, 2, 64
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    run = lambda *args: topk_decode_attention(*args, topk=64, implementation="xla")
    program = jax.jit(run).lower(shape(b, n, h), shape(b, s, k, h), shape(b, s, k, h)).compile()
    assert " sort(" not in program.as_text()
    cache = 4 * b * s * k * h
    # CPU products transpose an operand; no more than both caches and a few rows of scores.
    assert program.memory_analysis().temp_size_in_bytes < 2.5 * cache + 16 * 4 * b * n * s


@pytest.mark.multidevice
def test_it_stays_local_inside_shard_map():
    args = draw(b=4)
    lengths = jnp.asarray([29, 0, 3, 20], jnp.int32)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, cache = P("data", "tensor"), P("data", None, "tensor")
    run = lambda *args: attend(*args[:3], topk=4, lengths=args[3])
    local = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(heads, cache, cache, P("data")), out_specs=heads),
        compiler_options=HURRY,
    )
    got, want = local(*args, lengths), jax.jit(run, compiler_options=HURRY)(*args, lengths)
    testing.assert_accurate(got[0], want[0])
    testing.assert_same_selection(got[2], want[2])
    jaxpr = str(local.trace(*args, lengths).jaxpr)
    assert "shard_map" in jaxpr
    for collective in ("psum", "all_gather", "all_to_all", "ppermute", "reduce_scatter"):
        assert collective not in jaxpr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(topk=0), "topk got 0, wanted at least 1"),
        (dict(topk=np.ones((3, 3), np.int32)), r"topk got shape \(3, 3\), wanted one that broad"),
        (dict(query=np.zeros((3, 1, 4, 8), np.float32)), r"query got shape .*, wanted 3 axes"),
        (
            dict(query=np.zeros((3, 3, 8), np.float32)),
            "query got 3 heads, wanted a multiple of the 2",
        ),
        (
            dict(key=np.zeros((3, 29, 2, 9), np.float32)),
            r"key got shape .*, wanted axis 3 \(H\) of",
        ),
        (
            dict(value=np.zeros((3, 28, 2, 3), np.float32)),
            r"value got shape .*, wanted axis 1 \(S\)",
        ),
        (
            dict(value=np.zeros((3, 29, 2, 3), np.float16)),
            "value float16, wanted one dtype for all",
        ),
        (dict(query=np.zeros((3, 4, 8), np.int32)), "query got dtype int32, wanted one of float16"),
        (dict(scope="row"), "scope got 'row', wanted one of 'head', 'group', 'layer'"),
        (dict(window=0), "window got 0, wanted at least 1"),
        (dict(lengths=np.zeros(3, np.float32)), "lengths got dtype float32, wanted int32"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x),
)
def test_bad_input_is_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks would come first
    arguments = dict(zip(("query", "key", "value"), draw(), strict=True)) | dict(topk=3) | change
    with pytest.raises(ValueError, match=f"topk_decode_attention: .*{message}"):
        topk_decode_attention(**arguments)


@pytest.mark.parametrize("name", ["block_kv", "num_splits"])
def test_block_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} got 0, wanted at least 1"):
        TopKDecodeBlockSizes(**{name: 0})
