"""`gather_attention`: lists of every scope against loops and dense softmax, what masked slots may touch, and fixed order."""

import dataclasses
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

from pallas_kernels import gather_attention, testing, topk_attention, topk_decode_attention
from pallas_kernels.core import platform
from pallas_kernels.ops.gather_attention import block_sizes
from pallas_kernels.ops.gather_attention.block_sizes import GatherAttentionBlockSizes

IMPLEMENTATIONS = ("reference", "xla")
ROWS_OF_TWO = GatherAttentionBlockSizes(block_q=2, block_q_backward=2)
FORMS = {
    "reference": dict(implementation="reference"),
    "lists": dict(
        implementation="xla", block_sizes=dataclasses.replace(ROWS_OF_TWO, backward="lists")
    ),
    "counts": dict(
        implementation="xla", block_sizes=dataclasses.replace(ROWS_OF_TWO, backward="counts")
    ),
}

jitted_attention = jax.jit(
    functools.partial(gather_attention, implementation="xla", block_sizes=ROWS_OF_TWO)
)


def draw(seed=0, *, b=2, t=5, s=11, n=4, k=2, g=2, listed=7, h=4, v=3, dtype=np.float32):
    """Returns query, key, value, and lists with repeats, -1 and out-of-range slots; row (0, 1) lists nothing."""
    rng = np.random.default_rng(seed)
    arrays = (rng.normal(size=shape) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, v)))
    indices = rng.integers(-1, s + 1, (b, t, g, listed)).astype(np.int32)
    indices[0, 1 % t] = -1
    return (*(jnp.asarray(x, dtype) for x in arrays), jnp.asarray(indices))


def loop(query, key, value, indices, lengths, scale):
    """Returns out and lse of float64 arrays, one slot at a time."""
    b, t, n, _ = query.shape
    s, k = key.shape[1:3]
    out, lse = np.zeros((b, t, n, value.shape[3])), np.full((b, n, t), -np.inf)
    for i, row, head in np.ndindex(b, t, n):
        kv = head // (n // k)
        listed = [
            j
            for j in indices[i, row, head // (n // indices.shape[2])]
            if 0 <= j < min(s, lengths[i])
        ]
        if listed:
            weights = np.exp([scale * query[i, row, head] @ key[i, j, kv] for j in listed])
            out[i, row, head] = (
                sum(w * value[i, j, kv] for w, j in zip(weights, listed, strict=True))
                / weights.sum()
            )
            lse[i, head, row] = np.log(weights.sum())
    return out, lse


def dense(query, key, value, indices):
    """Returns out and lse by a softmax over all keys, each weighted by how often the row lists it; differentiable."""
    n, s, k = query.shape[2], key.shape[1], key.shape[2]
    times = jax.nn.one_hot(jnp.swapaxes(indices, 1, 2), s, dtype=query.dtype).sum(axis=3)
    times = jnp.repeat(times, n // times.shape[1], axis=1)  # [B, N, T, S]
    spread = lambda x: jnp.repeat(x, n // k, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", query, spread(key)) * query.shape[3] ** -0.5
    weights = times * jnp.exp(scores)
    total = jnp.sum(weights, axis=-1)
    empty = total == 0
    weights = weights / jnp.where(empty, 1, total)[..., None]
    lse = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)))
    return jnp.einsum("bnts,bsnv->btnv", weights, spread(value)), lse


def mixed(attend, query, key, value, *rest):
    """A scalar that uses every element of out and every finite one of lse, each with a weight of its own."""
    out, lse = attend(query, key, value, *rest)
    spell = lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return jnp.sum(out * spell(out)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) * spell(lse))


def attend(query, key, value, indices, **options):
    out, residuals = gather_attention(query, key, value, indices, return_residuals=True, **options)
    return out, residuals.lse


def with_gradients(attend):
    """Returns a jitted function to ((out, lse), gradients of `mixed` in query, key and value)."""
    return jax.jit(
        lambda *args: (attend(*args), jax.grad(functools.partial(mixed, attend), (0, 1, 2))(*args))
    )


def gradients(attend, *args):
    return jax.jit(jax.grad(functools.partial(mixed, attend), (0, 1, 2)))(*args)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("g", [1, 2, 4], ids=["layer", "group", "head"])
def test_it_is_a_softmax_over_the_listed_keys_alone(implementation, g):
    with jax.enable_x64(True):
        args = draw(g=g, dtype=np.float64)
        lengths, scale = np.asarray([7, 99], np.int32), 0.3
        got = attend(
            *args,
            lengths=jnp.asarray(lengths),
            scale=scale,
            implementation=implementation,
            block_sizes=ROWS_OF_TWO,
        )
        for value, want in zip(got, loop(*map(np.asarray, args), lengths, scale), strict=True):
            testing.assert_accurate(value, want)


@pytest.mark.parametrize(
    ("n", "k", "g"),
    [(2, 2, 2), (4, 2, 1), (4, 2, 4), (6, 2, 2), (4, 1, 1), (8, 1, 8)],
    ids=lambda x: str(x),
)
def test_gradients_are_those_of_the_dense_softmax(n, k, g):
    with jax.enable_x64(True):
        args = draw(n=n, k=k, g=g, dtype=np.float64)
        want = gradients(dense, *args)
        for form, options in FORMS.items():
            for name, x, y in zip(
                "qkv", gradients(functools.partial(attend, **options), *args), want, strict=True
            ):
                testing.assert_accurate(x, y, name=f"{form} d{name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_key_listed_twice_weighs_twice(implementation):
    query, key = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 2, 1, 2))
    value = jnp.asarray([3.0, 9.0]).reshape(1, 2, 1, 1)
    out, lse = attend(
        query, key, value, jnp.asarray([[[[0, 1, -1, 0]]]]), implementation=implementation
    )
    np.testing.assert_allclose(out, 5.0, rtol=1e-6)  # (3 + 9 + 3) / 3
    np.testing.assert_allclose(lse, np.log(3), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_listed_never_shows(form):
    query, key, value, indices = draw()
    indices = jnp.where(indices == 3, 4, indices)  # nobody lists key 3
    lengths = jnp.asarray([11, 6], jnp.int32)  # nor 6 and on in sequence 1
    unlisted = (jnp.arange(11) == 3)[None] | (jnp.arange(11)[None] >= lengths[:, None])
    unlisted = unlisted.at[0, 0].set(True)[:, :, None, None]  # nor 0, which masked slots might read
    indices = indices.at[0].set(jnp.where(indices[0] == 0, -1, indices[0]))
    run = functools.partial(attend, lengths=lengths, **FORMS[form])
    both = with_gradients(run)
    clean, poisoned = (
        both(query, *(jnp.where(unlisted, fill, x) for x in (key, value)), indices)
        for fill in (0.0, jnp.nan)
    )
    for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(poisoned), strict=True):
        np.testing.assert_array_equal(x, y)
    for grad in clean[1][1:]:
        assert not np.any(np.where(unlisted, grad, 0))
        assert np.any(grad)


@pytest.mark.parametrize("form", ["lists", "counts"])
def test_a_listed_nan_stays_with_the_rows_that_list_it(form):
    query, key, value, indices = draw(g=1, k=1)
    indices = jnp.where(indices == 3, 4, indices).at[1, 2, 0, 5].set(3)  # row (1, 2) alone
    d_out = jnp.ones((2, 5, 4, 3)).at[1, 2].set(0)

    @jax.jit
    def run(value):
        attend = lambda *args: gather_attention(*args, indices, **FORMS[form])
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(d_out)

    out, d_query, d_key, _ = run(value.at[1, 3].set(jnp.nan))
    other, d_query_other, d_key_other, _ = run(value)
    hit = np.zeros((2, 5), bool)
    hit[1, 2] = True
    assert np.isnan(out[hit]).all()
    np.testing.assert_array_equal(out[~hit], other[~hit])
    np.testing.assert_array_equal(d_query[~hit], d_query_other[~hit])
    elsewhere = np.ones((2, 11), bool)
    elsewhere[1, np.asarray(indices[1, 2, 0])[np.asarray(indices[1, 2, 0]) < 11]] = False
    np.testing.assert_array_equal(d_key[elsewhere], d_key_other[elsewhere])


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_lists_nothing_is_zero_and_learns_nothing(form):
    query, key, value, _ = draw(t=3)
    indices = jnp.full((2, 3, 2, 2), -1, jnp.int32).at[1].set(11)  # S itself is out of range

    @jax.jit
    def run(*args):
        (out, lse), pull = jax.vjp(lambda *args: attend(*args, indices, **FORMS[form]), *args)
        return out, lse, pull((jnp.ones_like(out), jnp.ones_like(lse)))

    out, lse, grads = run(query, key, value)
    assert not np.any(out)
    assert (np.asarray(lse) == -np.inf).all()
    for grad in grads:
        assert not np.any(grad)


@pytest.mark.parametrize("backward", ["lists", "counts"])
def test_sizes_of_chunks_and_one_row_do_not_matter(backward):
    args = draw(t=7, g=4)

    def run(rows):
        chunks = GatherAttentionBlockSizes(block_q=rows, block_q_backward=rows, backward=backward)
        return with_gradients(functools.partial(attend, implementation="xla", block_sizes=chunks))(
            *args
        )

    whole = run(99)
    for x, y in zip(jax.tree.leaves(run(3)), jax.tree.leaves(whole), strict=True):
        testing.assert_accurate(x, y)
    last = jitted_attention(args[0][:, -1:], *args[1:3], args[3][:, -1:])
    testing.assert_accurate(last, whole[0][0][:, -1:])


def test_chunks_cover_the_rows_and_keep_to_the_budget():
    budget = block_sizes.CHUNK_BYTES["cpu"]
    cases = {  # rows, bytes a row, least -> chunk
        (1, 10**12, 1): 1,
        (9, 10**12, 8): 5,  # two chunks of at most 8
        (7, 1, 1): 7,
        (1000, budget // 3, 1): 3,
        (7, budget // 5, 1): 4,  # 4 + 3 rather than 5 + 2
    }
    for (rows, row_bytes, least), chunk in cases.items():
        assert block_sizes.chunk_rows(rows, row_bytes, least=least) == chunk


def test_the_backward_follows_the_lists_where_they_are_short_and_a_scatter_has_an_order(
    monkeypatch,
):
    assert block_sizes.cheaper_backward(slots=64, keys=4096) == "lists"
    assert block_sizes.cheaper_backward(slots=64, keys=128) == "counts"
    monkeypatch.setattr(platform, "target_platform", lambda: "gpu")
    assert block_sizes.cheaper_backward(slots=64, keys=4096) == "counts"
    with pytest.raises(NotImplementedError, match="backward got 'lists' on a GPU, wanted 'counts'"):
        gather_attention(*draw(), **FORMS["lists"])


def lists_of_best(scores, topk):
    """Returns the positions of each row's best scores in float64 [..., S], lowest index first on ties, -1 where -inf."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :topk]
    return np.where(np.take_along_axis(scores, order, -1) == -np.inf, -1, order).astype(np.int32)


def test_it_equals_topk_attention_on_the_keys_that_are_selected():
    """Whole-number scores: the sets agree exactly, ties included."""
    rng = np.random.default_rng(1)
    whole = lambda *shape: rng.integers(-2, 3, shape).astype(np.float32)
    query, key, value = (
        whole(2, 9, 4, 8),
        whole(2, 9, 2, 8),
        rng.normal(size=(2, 9, 2, 3)).astype(np.float32),
    )
    scores = np.einsum("btnh,bsnh->btns", query, np.repeat(key, 2, axis=2)).astype(np.float64)
    scores = np.where(np.tri(9, dtype=bool)[None, :, None, :], scores, -np.inf)
    args = tuple(map(jnp.asarray, (query, key, value)))
    listed = functools.partial(
        attend, indices=jnp.asarray(lists_of_best(scores, 3)), implementation="xla"
    )

    def selected(*args):
        out, residuals = topk_attention(*args, topk=3, implementation="xla", return_residuals=True)
        return out, residuals.lse

    got, want = (with_gradients(run)(*args) for run in (listed, selected))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        testing.assert_accurate(x, y)


def test_it_equals_topk_decode_attention_on_the_keys_that_are_selected():
    query, key, value, _ = draw(t=1, s=37)

    @jax.jit
    def both(query, key, value):
        out, residuals = topk_decode_attention(
            query[:, 0], key, value, topk=5, implementation="xla", return_residuals=True
        )
        indices = residuals.selection.indices[:, None]
        got, lse = attend(query, key, value, indices, implementation="xla")
        return (got[:, 0], lse[..., 0]), (out, residuals.lse)

    for x, y in zip(*both(query, key, value), strict=True):
        testing.assert_accurate(x, y)


@pytest.mark.parametrize("form", ["lists", "counts"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_as_good_as_the_reference_in_that_type(form, dtype):
    arrays = [jnp.asarray(x, dtype) for x in draw(t=13, s=29, h=16, v=16)[:3]]
    indices = draw(t=13, s=29)[3]
    cotangent = jnp.asarray(np.random.default_rng(3).normal(size=(2, 13, 4, 16)), dtype)

    def run(arrays, dtype, **options):
        attend = lambda *args: gather_attention(*args, indices, **options)
        both = lambda arrays, d_out: (lambda out, pull: (out, *pull(d_out)))(
            *jax.vjp(attend, *arrays)
        )
        return jax.jit(both)([x.astype(dtype) for x in arrays], cotangent.astype(dtype))

    oracle = run(arrays, "float32", implementation="reference")
    naive = run(arrays, dtype, implementation="reference")
    for name, x, y, z in zip("oqkv", run(arrays, dtype, **FORMS[form]), oracle, naive, strict=True):
        testing.assert_accurate(x, y, naive=z, name=name)


@hypothesis.given(seed=st.integers(0, 2**16))
def test_neither_the_order_of_keys_nor_that_of_slots_matters(seed):
    query, key, value, indices = draw(seed)
    rng = np.random.default_rng(seed)
    keys = rng.permutation(11).astype(np.int32)  # new place -> old place
    new_place = np.concatenate([np.argsort(keys), [-1, -1]]).astype(
        np.int32
    )  # of 0..10, of 11, of -1
    moved = jnp.asarray(new_place[np.asarray(rng.permuted(indices, axis=-1))])
    run = jitted_attention
    testing.assert_accurate(
        run(query, key[:, keys], value[:, keys], moved), run(query, key, value, indices)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(indices=np.zeros((2, 5, 3, 7), np.int32)),
            "indices got 3 scopes on axis 2, wanted one of 1, 2, 4",
        ),
        (
            dict(indices=np.zeros((2, 4, 2, 7), np.int32)),
            r"indices got shape \(2, 4, 2, 7\), wanted axis 1 \(T\) of size 5",
        ),
        (dict(indices=np.zeros((2, 5, 7), np.int32)), "indices got shape .*, wanted 4 axes"),
        (
            dict(indices=np.zeros((2, 5, 2, 0), np.int32)),
            "indices got shape .*, wanted at least one entry",
        ),
        (
            dict(indices=np.zeros((2, 5, 2, 7), np.float32)),
            "indices got dtype float32, wanted int32",
        ),
        (
            dict(key=np.zeros((2, 11, 3, 4), np.float32)),
            r"value got shape .*, wanted axis 2 \(K\) of size 3",
        ),
        (dict(value=np.zeros((2, 11, 2, 3), np.float16)), "value float16, wanted one dtype"),
        (dict(lengths=np.zeros(3, np.int32)), "lengths got shape .*, wanted axis 0"),
        (dict(implementation="cuda"), "implementation got 'cuda', wanted one of"),
    ],
    ids=[
        "scopes",
        "rows",
        "axes",
        "no slot",
        "index type",
        "key heads",
        "dtypes",
        "lengths",
        "implementation",
    ],
)
def test_bad_input_is_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks would come first
    arguments = dict(zip(("query", "key", "value", "indices"), draw(), strict=True)) | change
    with pytest.raises(ValueError, match=f"gather_attention: .*{message}"):
        gather_attention(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("block_q", 0, "at least 1"),
        ("block_q_backward", -1, "at least 1"),
        ("block_slots", 0, "at least 1"),
        ("backward", "atomics", "one of 'lists', 'counts'"),
    ],
)
def test_block_sizes_are_checked(name, value, wanted):
    with pytest.raises(ValueError, match=f"{name} got {value!r}, wanted {wanted}"):
        GatherAttentionBlockSizes(**{name: value})


@pytest.mark.parametrize("backward", ["lists", "counts"])
def test_memory_grows_with_rows_plus_keys(backward):
    def temporaries(size):
        shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
        x = shape(1, size, 2, 16)
        chunks = GatherAttentionBlockSizes(block_q=8, block_q_backward=8, backward=backward)
        run = functools.partial(attend, implementation="xla", block_sizes=chunks)
        lowered = with_gradients(run).lower(x, x, x, shape(1, size, 2, 8, dtype=jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(2048), temporaries(4096)
    assert large < 2.1 * small
    assert large < 4096 * 4096 * 4 / 4  # a quarter of one head's scores


@pytest.mark.multidevice
@pytest.mark.parametrize("form", ["lists", "counts"])
def test_it_stays_local_inside_shard_map(form):
    args = draw(b=4, n=4, k=2, g=2)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = P("data", None, "tensor")
    run = functools.partial(attend, **FORMS[form])
    local = jax.shard_map(
        run, mesh=mesh, in_specs=(rows,) * 4, out_specs=(rows, P("data", "tensor"))
    )
    both = with_gradients(local)
    want = with_gradients(run)(*args)
    for x, y in zip(jax.tree.leaves(both(*args)), jax.tree.leaves(want), strict=True):
        testing.assert_accurate(x, y)
    jaxpr = str(jax.make_jaxpr(both)(*args))
    assert "shard_map" in jaxpr
    for collective in ("psum", "all_gather", "all_to_all", "ppermute", "reduce_scatter"):
        assert collective not in jaxpr


@pytest.mark.multidevice
def test_keys_that_all_devices_share_get_the_sum_of_their_gradients():
    args = draw(b=1, t=8)
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    rows = P(None, "context")
    run = functools.partial(attend, implementation="xla")
    local = jax.shard_map(
        run, mesh=mesh, in_specs=(rows, P(), P(), rows), out_specs=(rows, P(None, None, "context"))
    )
    got, want = with_gradients(local)(*args), with_gradients(run)(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        testing.assert_accurate(x, y)
