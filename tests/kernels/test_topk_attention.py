"""`topk_attention`: rows against loops, gradients against the dense mask, packing, budgets, memory, sharding, bad input."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import merge_attention, testing, topk_attention
from pallas_kernels.ops.topk_attention import block_sizes
from pallas_kernels.ops.topk_attention.block_sizes import TopKAttentionBlockSizes

HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests cost
CHUNKS = TopKAttentionBlockSizes(block_q=8)
IMPLEMENTATIONS = ("reference", "xla")


def draw(seed=0, *, b=2, t=11, s=11, n=4, k=2, h=8, v=3, dtype=np.float32, whole=False):
    """Returns query, key, value; whole numbers where scores are to be exact and full of ties."""
    rng = np.random.default_rng(seed)
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, v)
    draws = [rng.normal(size=shape) for shape in shapes]
    if whole:
        draws[:2] = (rng.integers(-2, 3, shape) for shape in shapes[:2])
    return tuple(jnp.asarray(x, dtype) for x in draws)


def attend(query, key, value, **options):
    """Returns out, lse and the rest of the residuals."""
    options = {"implementation": "xla", "block_sizes": CHUNKS} | options
    out, residuals = topk_attention(query, key, value, return_residuals=True, **options)
    return out, residuals.lse, residuals.threshold, residuals.tie_cut


def mixed(run, *args):
    """Returns (a scalar in which every element of out and every finite one of lse has its own weight, run(*args))."""
    out, lse, *rest = run(*args)
    spell = lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    total = jnp.sum(out * spell(out)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) * spell(lse))
    return total, (out, lse, *rest)


def with_gradients(run):
    """Returns a jitted function to (what `run` returns, gradients of `mixed` in query, key and value)."""
    both = jax.value_and_grad(functools.partial(mixed, run), (0, 1, 2), has_aux=True)

    def reorder(*args):
        (_, found), grads = both(*args)
        return found, grads

    return jax.jit(reorder, compiler_options=HURRY)


def jitted(**options):
    """Returns `attend` with fixed options, compiled as a whole."""
    return jax.jit(functools.partial(attend, **options), compiler_options=HURRY)


def loop(query, key, value, topk, visible):
    """Returns out, lse, threshold and tie cut, a row at a time, of a budget int [B, T] and a mask [B, T, S]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, n, h = query.shape
    k = key.shape[2]
    out, lse = np.zeros((b, t, n, value.shape[3])), np.full((b, n, t), -np.inf)
    threshold, cut = np.full((b, n, t), np.inf), np.full((b, n, t), -1)
    for i, row, head in np.ndindex(b, t, n):
        kv = head // (n // k)
        scores = key[i, :, kv] @ query[i, row, head] * h**-0.5
        seen = np.flatnonzero(visible[i, row])
        kept = sorted(seen, key=lambda j: (-np.float32(scores[j]), j))[: topk[i, row]]
        if kept:
            weights = np.exp(scores[kept])
            out[i, row, head] = weights @ value[i, kept, kv] / weights.sum()
            lse[i, head, row] = np.log(weights.sum())
            threshold[i, head, row] = scores[kept[-1]]
            cut[i, head, row] = kept[-1]
    return out, lse, threshold, cut


def dense(query, key, value, mask):
    """Returns out and lse of a plain masked softmax, differentiable; mask [B, N, T, S]."""
    group = query.shape[2] // key.shape[2]
    spread = lambda x: jnp.repeat(x, group, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", query, spread(key)) * query.shape[3] ** -0.5
    weights = jnp.where(mask, jnp.exp(scores), 0)
    total = jnp.sum(weights, axis=-1)
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)))
    weights = weights / jnp.where(total == 0, 1, total)[..., None]
    return jnp.einsum("bnts,bsnv->btnv", weights, spread(value)), lse


def causal(t, s):
    return np.arange(s) <= np.arange(t)[:, None] + s - t


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_keep_their_budget_of_visible_keys(implementation):
    rng = np.random.default_rng(3)
    args = draw(whole=True)
    topk = rng.integers(1, 6, (2, 11)).astype(np.int32)
    lengths = np.asarray([11, 6], np.int32)
    ids = np.sort(rng.integers(0, 3, (2, 11)), axis=-1).astype(np.int32)
    visible = causal(11, 11) & (ids[:, :, None] == ids[:, None, :])
    visible = visible & (np.arange(11) < lengths[:, None])[:, None, :]
    visible &= np.arange(11) > np.arange(11)[:, None] - 4
    run = jitted(
        topk=jnp.asarray(topk),
        lengths=jnp.asarray(lengths),
        query_segment_ids=jnp.asarray(ids),
        key_segment_ids=jnp.asarray(ids),
        window=4,
        implementation=implementation,
    )
    got, want = run(*args), loop(*args, topk, visible)
    assert (~visible.any(-1)).any()
    for name, x, y in zip(("out", "lse", "threshold"), got, want, strict=False):
        testing.assert_accurate(x, y, name=name)
    np.testing.assert_array_equal(got[3], want[3])


def test_a_case_computed_by_hand():
    # Scores of row t are keys x query: 1 0 2 1, rows causal, 2 keys a row, ties to the lower index.
    query, key = jnp.ones((1, 4, 1, 1)), jnp.asarray([1.0, 0, 2, 1]).reshape(1, 4, 1, 1)
    value = jnp.asarray([10.0, 20, 30, 40]).reshape(1, 4, 1, 1)
    out, lse, threshold, cut = jitted(topk=2)(query, key, value)
    e = math.e
    want = [10, (10 * e + 20) / (e + 1), (10 * e + 30 * e**2) / (e + e**2), (10 + 30 * e) / (1 + e)]
    np.testing.assert_allclose(out[0, :, 0, 0], want, rtol=1e-6)
    wanted_lse = [1, np.log(e + 1), np.log(e + e**2), np.log(e + e**2)]
    np.testing.assert_allclose(lse[0, 0], wanted_lse, rtol=1e-6)
    np.testing.assert_array_equal(threshold[0, 0], [1, 0, 1, 1])
    np.testing.assert_array_equal(cut[0, 0], [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("implementation", "n", "k"),
    [("reference", 4, 2), *(("xla", n, k) for n, k in ((2, 2), (4, 2), (4, 1), (8, 1), (6, 2)))],
    ids=["reference-2", "xla-1", "xla-2", "xla-4", "xla-8", "xla-3"],
)
def test_gradients_are_those_of_the_dense_mask(implementation, n, k):
    """Both outputs have cotangents; the mask is the one that the thresholds describe."""
    with jax.enable_x64(True):
        args = draw(n=n, k=k, dtype=np.float64)
        run = lambda *args: attend(*args, topk=3, implementation=implementation)
        (out, lse, threshold, cut), got = with_gradients(run)(*args)
        query, key, _ = map(np.asarray, args)
        scores = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, n // k, 2)) * 8**-0.5
        scores, bound = scores.astype(np.float32), np.asarray(threshold)[..., None]
        tied = (scores == bound) & (np.arange(11) <= np.asarray(cut)[..., None])
        mask = causal(11, 11) & ((scores > bound) | tied)
        assert (mask.sum(-1) == np.minimum(3, np.arange(11) + 1)).all()
        want = with_gradients(functools.partial(dense, mask=jnp.asarray(mask)))(*args)
        for name, x, y in zip(("out", "lse"), (out, lse), want[0], strict=True):
            testing.assert_accurate(x, y, name=name)
        for name, x, y in zip("qkv", got, want[1], strict=True):
            testing.assert_accurate(x, y, name=f"d{name}")


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        args = draw(5, t=7, s=7, n=2, k=1, dtype=np.float64)
        run = lambda *args: mixed(functools.partial(attend, topk=3), *args)[0]
        loss, gradient = (
            jax.jit(f, compiler_options=HURRY) for f in (run, jax.grad(run, (0, 1, 2)))
        )
        direction = draw(6, t=7, s=7, n=2, k=1, dtype=np.float64)
        slope = sum(jnp.sum(g * d) for g, d in zip(gradient(*args), direction, strict=True))
        step = 1e-6  # no row of this draw has its third and fourth score so near
        moved = lambda sign: loss(
            *(x + sign * step * d for x, d in zip(args, direction, strict=True))
        )
        np.testing.assert_allclose((moved(1) - moved(-1)) / (2 * step), slope, rtol=1e-7)


@pytest.mark.parametrize(
    ("scope", "pooling"),
    [
        ("group", "prob_sum"),
        ("layer", "prob_sum"),
        ("group", "prob_max"),
        ("layer", "score_mean"),
        ("group", "score_max"),
    ],
)
def test_a_shared_scope_has_one_set_of_its_heads_with_the_best_pooled_score(scope, pooling):
    with jax.enable_x64(True):
        args = draw(dtype=np.float64)
        run = functools.partial(attend, topk=3, scope=scope, pooling=pooling)
        (out, lse, _, _), got = with_gradients(run)(*args)
        query, key, value = map(np.asarray, args)
        scores = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, 2, 2)) * 8**-0.5
        scores = np.where(causal(11, 11), scores, -np.inf)
        ranked = scores
        if pooling.startswith("prob"):
            ranked = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        sets = 2 if scope == "group" else 1
        parts = ranked.reshape(2, sets, -1, 11, 11)
        combine = dict(prob_sum=np.sum, prob_max=np.max, score_mean=np.mean, score_max=np.max)
        pooled = combine[pooling](parts, axis=2)
        order = np.argsort(-pooled, axis=-1, kind="stable")[..., :3]
        mask = np.zeros(pooled.shape, bool)
        np.put_along_axis(mask, order, True, axis=-1)
        mask = np.repeat(mask, 4 // sets, axis=1) & causal(11, 11)
        want = with_gradients(functools.partial(dense, mask=jnp.asarray(mask)))(*args)
        for x, y in zip(jax.tree.leaves(((out, lse), got)), jax.tree.leaves(want), strict=True):
            testing.assert_accurate(x, y)


def test_a_group_of_one_head_is_the_scope_head():
    args = draw(k=4)
    got, want = (
        with_gradients(lambda *args, scope=scope: attend(*args, topk=3, scope=scope))(*args)
        for scope in ("group", "head")
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "budget",
    [dict(topk=11), dict(topk=10**12), dict(topk_ratio=1.0), dict(topk_ratio=0.01, min_topk=99)],
    ids=["all", "more", "ratio 1", "floor"],
)
def test_a_budget_of_all_keys_is_dense_attention(budget):
    args = draw()
    got = with_gradients(lambda *args: attend(*args, **budget)[:2])(*args)
    want = with_gradients(functools.partial(dense, mask=jnp.asarray(causal(11, 11))))(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        testing.assert_accurate(x, y)


def test_dense_rows_keep_all_their_keys_and_the_others_their_budget():
    args = draw()
    rows = jnp.asarray(np.random.default_rng(0).random((2, 11)) < 0.5)
    mixed_rows = jitted(topk=2, dense_rows=rows)(*args)
    sparse, full = (jitted()(*args, topk=jnp.full((2, 1), topk)) for topk in (2, 11))
    here = np.asarray(rows)[:, :, None, None]
    np.testing.assert_array_equal(mixed_rows[0], np.where(here, full[0], sparse[0]))


def test_a_budget_of_one_key_teaches_values_only():
    args = draw()
    gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(attend(*args, topk=1)[0])), (0, 1, 2))
    d_query, d_key, d_value = jax.jit(gradient, compiler_options=HURRY)(*args)
    assert not np.any(d_query)
    assert not np.any(d_key)
    assert np.any(d_value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scope", ["head", "group"])
def test_what_no_row_selects_gets_no_gradient_and_its_nan_never_shows(implementation, scope):
    query, key, value = draw()
    hidden = jnp.zeros((2, 11), bool).at[:, 4].set(True).at[1, 8:].set(True)[..., None, None]
    lengths = jnp.asarray([11, 8], jnp.int32)
    run = with_gradients(
        lambda *args: attend(
            *args, topk=3, lengths=lengths, implementation=implementation, scope=scope
        )
    )
    # A key of NaN has a score of NaN, which is never selected; what stands behind `lengths` is never seen.
    poisoned = run(query, jnp.where(hidden, jnp.nan, key), jnp.where(hidden, jnp.nan, value))
    for x in jax.tree.leaves(poisoned):
        assert not np.isnan(x).any()
    for grad in poisoned[1][1:]:
        assert not np.any(np.where(hidden, grad, 0))
        assert np.any(grad)
    for x in jax.tree.leaves((poisoned[0][:2], poisoned[1])):
        assert np.isfinite(x).all()


def test_a_value_that_is_seen_but_not_selected_may_be_nan():
    query, key, value = draw(whole=True)
    run = with_gradients(functools.partial(attend, topk=1, scope="layer"))
    (out, _, _, cut), _ = run(query, key, value)
    chosen = {(i, int(j)) for i in range(2) for j in np.asarray(cut[i]).ravel()}
    idle = [(i, j) for i in range(2) for j in range(11) if (i, j) not in chosen]
    assert idle
    for i, j in idle:
        value = value.at[i, j].set(jnp.nan)
    got = run(query, key, value)
    np.testing.assert_array_equal(got[0][0], out)
    assert all(np.isfinite(grad).all() for grad in got[1])


def test_rows_that_see_nothing_are_zero_and_learn_nothing():
    args = draw(t=11, s=7)  # the first four rows stand before the first key
    got, grads = with_gradients(lambda *args: attend(*args, topk=3))(*args)
    out, lse, threshold, cut = got
    assert not np.any(out[:, :4])
    assert (np.asarray(lse)[..., :4] == -np.inf).all()
    assert (np.asarray(threshold)[..., :4] == np.inf).all()
    assert (np.asarray(cut)[..., :4] == -1).all()
    assert not np.any(grads[0][:, :4])
    assert all(np.isfinite(grad).all() for grad in grads)


def test_a_packed_batch_equals_its_documents_run_alone():
    query, key, value = draw(b=1, t=21, s=21)
    ids = np.repeat([5, 2, 9], [3, 9, 9]).astype(np.int32)[None]
    options = dict(topk_ratio=0.3, min_topk=2)
    packed = lambda *args: attend(
        *args, query_segment_ids=jnp.asarray(ids), key_segment_ids=jnp.asarray(ids), **options
    )
    (out, lse, threshold, cut), grads = with_gradients(packed)(query, key, value)
    # The loss of `mixed` depends on places, so the packed weights are handed to the documents.
    weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    weight_lse = jnp.cos(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)

    def loss(query, key, value, weight, weight_lse):
        out, lse, *_ = found = attend(query, key, value, **options)
        return jnp.sum(out * weight) + jnp.sum(lse * weight_lse), found

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=HURRY)
    for first, last in ((0, 3), (3, 12), (12, 21)):
        part = slice(first, last)
        alone = (x[:, part] for x in (query, key, value, weight))
        (_, found), want = both(*alone, weight_lse[..., part])
        testing.assert_accurate(out[:, part], found[0])
        testing.assert_accurate(lse[..., part], found[1])
        testing.assert_accurate(threshold[..., part], found[2])
        np.testing.assert_array_equal(cut[..., part] - first, found[3])
        for x, y in zip(grads, want, strict=True):
            testing.assert_accurate(x[:, part], y)


def test_neither_chunks_nor_padding_nor_the_order_of_the_batch_change_a_set():
    args = draw(b=3, t=19, s=19, whole=True)
    blocks = lambda rows: TopKAttentionBlockSizes(block_q=rows)
    at_once = jitted(topk=4, block_sizes=blocks(19))
    whole = at_once(*args)
    for rows in (1, 5):
        got = jitted(topk=4, block_sizes=blocks(rows))(*args)
        for x, y in zip(got[2:], whole[2:], strict=True):
            np.testing.assert_array_equal(x, y)
        testing.assert_accurate(got[0], whole[0])
    order = jnp.asarray([2, 0, 1])
    moved = at_once(*(x[order] for x in args))
    for x, y in zip(moved, whole, strict=True):
        np.testing.assert_array_equal(x, y[order])
    longer = (args[0], *(jnp.pad(x, ((0, 0), (0, 6), (0, 0), (0, 0))) for x in args[1:]))
    run = jax.jit(
        lambda *args, lengths: attend(*args, topk=4, causal=False, lengths=lengths),
        compiler_options=HURRY,
    )
    lengths = jnp.full((3,), 19, jnp.int32)
    padded, plain = run(*longer, lengths=lengths), run(*args, lengths=lengths)
    for x, y in zip(padded[2:], plain[2:], strict=True):
        np.testing.assert_array_equal(x, y)


def test_two_halves_of_the_keys_merge_into_the_whole():
    """With nothing left out, the parts' lse carry the gradient too."""
    args = draw(t=6, s=12)
    half = lambda query, key, value: attend(query, key, value, topk=99, causal=False)[:2]

    def merged(query, key, value):
        parts = [half(query, key[:, part], value[:, part]) for part in (slice(5), slice(5, 12))]
        return merge_attention(*zip(*parts, strict=True))

    got, want = (with_gradients(run)(*args) for run in (merged, half))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        testing.assert_accurate(x, y)


@pytest.mark.parametrize("scope", ["head", "group"])
def test_the_backward_under_remat_selects_nothing_again(scope):
    """With the named numbers saved, the recomputation has no search left in it."""
    args = draw()
    names = ("topk_threshold", "topk_tie_cut", "topk_pool_lse")
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def searches(policy):
        run = jax.checkpoint(lambda *args: attend(*args, topk=3, scope=scope)[0], policy=policy)

        def both(*args):
            out, pull = jax.vjp(run, *args)
            return out, pull(out)

        return jax.jit(both).lower(*args).as_text().count("stablehlo.while")

    # Forward: the scan over chunks, and two searches inside it. Backward: a scan.
    assert searches(policy) == 3 + 1
    assert searches(jax.checkpoint_policies.nothing_saveable) == 3 + 3 + 1


def test_memory_grows_with_rows_plus_keys():
    def temporaries(size):
        x = jax.ShapeDtypeStruct((1, size, 2, 16), jnp.float32)
        run = functools.partial(attend, topk_ratio=0.05)
        programs = jitted(topk_ratio=0.05), with_gradients(run)
        stats = [program.lower(x, x, x).compile().memory_analysis() for program in programs]
        return np.asarray([stat.temp_size_in_bytes for stat in stats])

    small, large = temporaries(2048), temporaries(4096)
    assert (large < 2.1 * small).all()
    assert (large < 4096 * 4096 * 4 / 4).all()  # a quarter of one head's scores


def test_a_chunk_keeps_to_its_budget():
    budget = block_sizes.CHUNK_BYTES["cpu"]
    row = 4 * 2 * 3 * 512
    assert block_sizes.chunk_rows(2, 10_000, 3, 512) == budget // row // 8 * 8
    assert block_sizes.chunk_rows(2, 10_000, 3, budget) == 8
    assert block_sizes.chunk_rows(2, 5, 3, budget) == 5


@functools.partial(jax.jit, compiler_options=HURRY)
def _both_orders(query, key, value, order):
    run = lambda key, value: attend(query, key, value, topk=5, causal=False)
    return run(key, value), run(key[:, order], value[:, order])


@hypothesis.given(seed=st.integers(0, 2**16))
def test_the_order_of_the_keys_does_not_matter(seed):
    order = np.random.default_rng(seed).permutation(13)
    args = draw(seed, t=9, s=13)
    plain, moved = _both_orders(*args, jnp.asarray(order))
    for x, y in zip(plain[:3], moved[:3], strict=True):
        testing.assert_accurate(x, y)
    np.testing.assert_array_equal(order[np.asarray(moved[3])], plain[3])


@functools.partial(jax.jit, compiler_options=HURRY)
def _shifted(query, key, value, shift):
    lift = lambda x, by: jnp.concatenate([x, jnp.broadcast_to(by, (*x.shape[:3], 1))], axis=3)
    run = lambda by: attend(lift(query, jnp.float32(1)), lift(key, by), value, topk=3, scale=1.0)
    return run(jnp.float32(0)), run(shift)


@hypothesis.given(seed=st.integers(0, 2**16), shift=st.integers(-1000, 1000))
def test_a_constant_added_to_whole_number_scores_changes_nothing_but_lse(seed, shift):
    plain, moved = _shifted(*draw(seed, whole=True), jnp.float32(shift))
    testing.assert_accurate(moved[0], plain[0])
    np.testing.assert_array_equal(moved[3], plain[3])
    np.testing.assert_allclose(moved[1], plain[1] + shift, rtol=1e-5, atol=1e-4)


@pytest.mark.multidevice
def test_it_stays_local_inside_shard_map():
    args = draw(b=4, n=4, k=2)
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (4, 11)), -1), jnp.int32)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, rest = P("data", None, "tensor"), P("data")
    packed = lambda query, key, value, ids: attend(
        query, key, value, topk=3, query_segment_ids=ids, key_segment_ids=ids
    )
    local = jax.shard_map(
        packed,
        mesh=mesh,
        in_specs=(rows, rows, rows, rest),
        out_specs=(rows, *(P("data", "tensor"),) * 3),
    )
    both, want = (with_gradients(run)(*args, ids) for run in (local, packed))
    for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(want), strict=True):
        testing.assert_accurate(x.astype(jnp.float32), y.astype(jnp.float32))
    jaxpr = str(with_gradients(local).trace(*args, ids).jaxpr)
    assert "shard_map" in jaxpr
    for collective in ("psum", "all_gather", "all_to_all", "ppermute", "reduce_scatter"):
        assert collective not in jaxpr


@pytest.mark.multidevice
def test_keys_that_all_devices_share_get_the_sum_of_their_gradients():
    args = draw(b=1, t=8, s=11)
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    rows = P(None, "context")
    run = lambda *args: attend(*args, topk=3, causal=False)
    local = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(rows, P(), P()),
        out_specs=(rows, *(P(None, None, "context"),) * 3),
    )
    got, want = with_gradients(local)(*args), with_gradients(run)(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        testing.assert_accurate(x.astype(jnp.float32), y.astype(jnp.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(), "got topk None and topk_ratio None, wanted exactly one"),
        (dict(topk=3, topk_ratio=0.5), "got topk 3 and topk_ratio 0.5, wanted exactly one"),
        (dict(topk=0), "topk got 0, wanted at least 1"),
        (dict(topk=True), "topk got True, wanted an int"),
        (dict(topk=2.0), "topk got 2.0, wanted an int"),
        (dict(topk=np.ones((2, 3), np.int32)), r"topk got shape \(2, 3\), wanted one that broad"),
        (dict(topk=np.zeros((2, 1), np.int32)), "topk got a row of 0, wanted at least 1"),
        (dict(topk=np.ones((2, 1), np.float32)), "topk got dtype float32, wanted int32"),
        (dict(topk_ratio=1.5), r"topk_ratio got 1.5, wanted a number in \(0, 1\]"),
        (dict(topk_ratio=0.0), "topk_ratio got 0.0, wanted"),
        (dict(topk_ratio=0.1, min_topk=0), "min_topk got 0, wanted at least 1"),
        (dict(topk=3, scope="heads"), "scope got 'heads', wanted one of 'head', 'group', 'layer'"),
        (dict(topk=3, pooling="sum"), "pooling got 'sum', wanted one of 'prob_sum'"),
        (dict(topk=3, window=0), "window got 0, wanted at least 1"),
        (dict(topk=3, window=2, causal=False), "window got 2 with causal=False, wanted None"),
        (dict(topk=3, query_segment_ids=np.zeros((2, 11), np.int32)), "key_segment_ids got None"),
        (dict(topk=3, lengths=np.zeros(3, np.int32)), "lengths got shape .*, wanted axis 0"),
        (dict(topk=3, dense_rows=np.zeros((2, 11), np.int32)), "dense_rows got dtype int32"),
        (
            dict(topk=3, key=np.zeros((2, 11, 3, 8), np.float32)),
            "value got shape .*, wanted axis 2",
        ),
        (
            dict(topk=3, query=np.zeros((2, 11, 3, 8), np.float32)),
            "query got 3 heads, wanted a mult",
        ),
        (
            dict(topk=3, value=np.zeros((2, 11, 2, 3), np.float16)),
            "value float16, wanted one dtype",
        ),
        (dict(topk=3, implementation=()), "implementation got an empty sequence"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x) or "nothing",
)
def test_bad_input_is_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks would come first
    arguments = dict(zip(("query", "key", "value"), draw(), strict=True)) | change
    with pytest.raises(ValueError, match=f"topk_attention: .*{message}"):
        topk_attention(**arguments)


def test_block_sizes_are_checked():
    with pytest.raises(ValueError, match="block_q got 0, wanted at least 1"):
        TopKAttentionBlockSizes(block_q=0)
