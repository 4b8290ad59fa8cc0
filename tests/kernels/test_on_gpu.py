"""The Mosaic GPU kernels on a real GPU, at real sizes: conformance, determinism, and the error of half precision.

JAXTOPK_TEST_PLATFORM=gpu python -m pytest -m gpu tests/kernels/test_on_gpu.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import QuantizedKeys
from pallas_kernels.core import selection
from pallas_kernels.ops.topk_decode_attention import mosaic_gpu, quantized_gpu

pytestmark = pytest.mark.gpu


def assert_same_bits(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@functools.cache
def compiled(op, names: tuple[str, ...], static: tuple[tuple[str, object], ...]):
    """One jitted function for one set of static arguments, so that tests of one shape compile once."""
    return jax.jit(
        lambda *arrays: op(
            *arrays[: len(arrays) - len(names)],
            **dict(zip(names, arrays[len(arrays) - len(names) :], strict=True)),
            **dict(static),
        )
    )


def call(op, *arrays, **arguments):
    """Calls `op` under jit, arrays among the keyword arguments as traced ones."""
    traced = {name: x for name, x in arguments.items() if isinstance(x, (jax.Array, QuantizedKeys))}
    static = tuple((name, x) for name, x in arguments.items() if name not in traced)
    return compiled(op, tuple(traced), static)(*arrays, *traced.values())


def select(scores, topk, implementation, **arguments):
    return call(
        pallas_kernels.topk_select, scores, topk=topk, implementation=implementation, **arguments
    )


def score_rows(rows: int, s: int, kind: str, dtype) -> jax.Array:
    normal = jax.random.normal(jax.random.key(rows + s), (rows, s), jnp.float32)
    place = jnp.arange(s)[None, :]
    scores = {
        "normal": lambda: normal,
        "rounded": lambda: jnp.round(4 * normal),
        "plateau": lambda: jnp.where(normal > 3, normal, jnp.where(place % 2 == 0, -0.0, 0.0)),
        "constant": lambda: jnp.full((rows, s), 2.5, jnp.float32),
        "ascending": lambda: jnp.broadcast_to(place / s, (rows, s)).astype(jnp.float32),
        "mixed": lambda: jnp.where(
            place % 11 == 0,
            jnp.nan,
            jnp.where(
                place % 13 == 0, jnp.inf, jnp.where(place % 17 == 0, -jnp.inf, normal * 1e-38)
            ),
        ),
    }[kind]()
    return scores.astype(dtype)


@pytest.mark.parametrize("kind", ["normal", "rounded", "plateau", "constant", "ascending", "mixed"])
@pytest.mark.parametrize(
    ("rows", "s", "topk", "dtype"),
    [
        pytest.param(32, 131072, 2048, jnp.float32, id="32x131072"),
        pytest.param(4096, 8192, 512, jnp.float32, id="4096x8192"),
        pytest.param(64, 8192, 512, jnp.bfloat16, id="64x8192-bf16"),
        pytest.param(16, 49152, 1000, jnp.float32, id="16x49152"),
        pytest.param(16, 49153, 1000, jnp.float32, id="16x49153"),
        pytest.param(7, 1999, 64, jnp.float16, id="7x1999-f16"),
        pytest.param(5, 97, 200, jnp.float32, id="5x97"),
    ],
)
def test_select_equals_the_reference_bit_for_bit(rows, s, topk, dtype, kind):
    scores = score_rows(rows, s, kind, dtype)
    assert_same_bits(select(scores, topk, "mosaic_gpu"), select(scores, topk, "reference"))


def test_select_at_a_million_keys():
    scores = score_rows(64, 1 << 20, "normal", jnp.float32)
    lengths = jnp.asarray(np.resize([1 << 20, 0, 1, 777_777, 131072], 64), jnp.int32)
    topk = jnp.asarray(np.resize([2048, 1, 3, 1 << 20], 64), jnp.int32)
    arguments = {"lengths": lengths, "with_indices": False}
    got = select(scores, topk, "mosaic_gpu", **arguments)
    assert_same_bits(got, select(scores, topk, "reference", **arguments))


def test_select_gives_the_same_bits_again_and_in_another_order():
    scores = score_rows(64, 20000, "rounded", jnp.float32)
    first = select(scores, 300, "mosaic_gpu")
    assert_same_bits(select(scores, 300, "mosaic_gpu"), first)
    assert_same_bits(
        select(scores[::-1], 300, "mosaic_gpu"), jax.tree.map(lambda x: x[::-1], first)
    )


def decode_inputs(b, s, n, k, h, dtype, *, whole=False):
    keys = jax.random.split(jax.random.key(b * s + n), 3)
    shapes = (b, n, h), (b, s, k, h), (b, s, k, h)
    if whole:  # scores without rounding and full of ties
        query, key = (
            jax.random.randint(r, x, -2, 3).astype(dtype)
            for r, x in zip(keys[:2], shapes[:2], strict=True)
        )
    else:
        query, key = (
            jax.random.normal(r, x, dtype) for r, x in zip(keys[:2], shapes[:2], strict=True)
        )
    return query, key, jax.random.normal(keys[2], shapes[2], dtype)


def decode(query, key, value, implementation, **arguments):
    return call(
        pallas_kernels.topk_decode_attention,
        query,
        key,
        value,
        implementation=implementation,
        return_residuals=True,
        **arguments,
    )


DECODE_SHAPES = {
    "8x4096-32-of-8x128": (8, 4096, 32, 8, 128),
    "2x8192-9-of-3x64": (2, 8192, 9, 3, 64),
    "3x1001-16-of-1x256": (3, 1001, 16, 1, 256),
    "4x50-4-of-4x80": (4, 50, 4, 4, 80),
}


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"]
)
@pytest.mark.parametrize("shape", DECODE_SHAPES.values(), ids=DECODE_SHAPES.keys())
def test_decode_selects_the_same_keys(shape, dtype):
    b, s, *_ = shape
    query, key, value = decode_inputs(*shape, dtype, whole=True)
    lengths = jnp.asarray(np.resize([s, s // 2 + 1, 0, 1], b), jnp.int32)
    arguments = {"topk": max(1, s // 20), "lengths": lengths, "scale": 0.125}
    out, residuals = decode(query, key, value, "mosaic_gpu", **arguments)
    wanted, wanted_residuals = decode(query, key, value, "reference", **arguments)
    assert_same_bits(residuals.selection, wanted_residuals.selection)
    np.testing.assert_allclose(residuals.lse, wanted_residuals.lse, rtol=2e-5, atol=2e-5)
    tolerance = 2e-5 if dtype == jnp.float32 else 1.01 * float(jnp.finfo(dtype).eps)
    out, wanted = np.asarray(out, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("window", [None, 700], ids=["all", "window"])
def test_decode_in_float32_is_as_good_as_the_reference(window):
    query, key, value = decode_inputs(2, 8192, 9, 3, 64, jnp.float32)
    arguments = {"topk": 8192, "window": window}  # every visible key: no member can flip
    out, residuals = decode(query, key, value, "mosaic_gpu", **arguments)
    wanted, wanted_residuals = decode(query, key, value, "reference", **arguments)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(residuals.lse, wanted_residuals.lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scope", ["group", "layer"])
@pytest.mark.parametrize("pooling", ["prob_sum", "score_max"])
def test_decode_shares_one_set_in_a_scope(scope, pooling):
    query, key, value = decode_inputs(2, 4096, 32, 8, 128, jnp.float32)
    arguments = {"topk": 256, "scope": scope, "pooling": pooling}
    out, residuals = decode(query, key, value, "mosaic_gpu", **arguments)
    wanted, wanted_residuals = decode(query, key, value, "reference", **arguments)
    indices = np.asarray(residuals.selection.indices)
    per_set = 4 if scope == "group" else 32
    shared = indices.reshape(2, 32 // per_set, per_set, 256)
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:, :, :1], shared.shape))
    # Pooled scores are rounded by exp and log, so a member at the edge may differ; few do.
    same = [
        len(np.intersect1d(a, b))
        for a, b in zip(
            indices.reshape(-1, 256),
            np.asarray(wanted_residuals.selection.indices).reshape(-1, 256),
            strict=True,
        )
    ]
    assert min(same) >= 255
    np.testing.assert_allclose(out, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


def test_decode_in_bfloat16_adds_no_error_of_its_own():
    """RMS against the float32 reference on the rounded inputs, at most 1.5 times that of the bfloat16 reference."""
    query, key, value = decode_inputs(8, 8192, 32, 8, 128, jnp.bfloat16)
    out, _ = decode(query, key, value, "mosaic_gpu", topk=512)
    plain, _ = decode(query, key, value, "reference", topk=512)
    oracle, _ = decode(*(x.astype(jnp.float32) for x in (query, key, value)), "reference", topk=512)
    error = lambda x: np.asarray(x, np.float32) - np.asarray(oracle)
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    ulp = float(jnp.finfo(jnp.bfloat16).eps) * float(np.abs(oracle).max())
    assert rms(error(out)) <= 1.5 * rms(error(plain))
    assert np.abs(error(out)).max() <= max(2 * np.abs(error(plain)).max(), ulp)


def test_decode_at_131072_keys_ignores_what_it_does_not_select():
    """The cache of eight sequences at full size; the tails past their lengths are NaN."""
    b, s, topk = 8, 131072, 2048
    query, key, value = decode_inputs(b, s, 32, 8, 128, jnp.bfloat16)
    lengths = jnp.asarray([131072, 131071, 70000, 4097, 64, 1, 0, 100_000], jnp.int32)
    clean, _ = decode(query, key, value, "mosaic_gpu", topk=topk, lengths=lengths)
    dead = (jnp.arange(s)[None, :] >= lengths[:, None])[:, :, None, None]
    key, value = (jnp.where(dead, jnp.nan, x) for x in (key, value))
    out, residuals = decode(query, key, value, "mosaic_gpu", topk=topk, lengths=lengths)
    assert_same_bits(out, clean)
    selected = residuals.selection
    np.testing.assert_array_equal(
        selected.count, np.minimum(topk, np.asarray(lengths))[:, None].repeat(32, 1)
    )
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert (np.asarray(out[6], np.float32) == 0).all()
    assert np.isneginf(residuals.lse[6]).all()
    # The attention over the listed keys, gathered and computed plainly, for one head of each sequence.
    indices = selected.indices[:, 0]
    rows = jnp.arange(b)[:, None]
    keys, values = (x[rows, indices, 0].astype(jnp.float32) for x in (key, value))
    scores = 128**-0.5 * jnp.einsum(
        "bh,bsh->bs", query[:, 0].astype(jnp.float32), keys, precision="highest"
    )
    listed = indices >= 0
    weights = jax.nn.softmax(jnp.where(listed, scores, -1e30), axis=-1)
    wanted = jnp.einsum(
        "bs,bsv->bv",
        jnp.where(listed, weights, 0.0),
        jnp.where(listed[..., None], values, 0.0),
        precision="highest",
    )
    full = np.asarray(lengths) > 0
    np.testing.assert_allclose(
        np.asarray(out[:, 0], np.float32)[full], np.asarray(wanted)[full], rtol=0.01, atol=2e-3
    )


def test_decode_gives_the_same_bits_again_and_in_another_order():
    query, key, value = decode_inputs(4, 20000, 9, 3, 64, jnp.float32)
    first = decode(query, key, value, "mosaic_gpu", topk=1000)
    assert_same_bits(decode(query, key, value, "mosaic_gpu", topk=1000), first)
    backwards = decode(query[::-1], key[::-1], value[::-1], "mosaic_gpu", topk=1000)
    assert_same_bits(backwards, jax.tree.map(lambda x: x[::-1], first))


def test_decode_takes_a_budget_a_sequence():
    query, key, value = decode_inputs(4, 3000, 8, 2, 64, jnp.float32, whole=True)
    topk = jnp.asarray([[1], [30], [299], [5000]], jnp.int32)
    _, residuals = decode(query, key, value, "mosaic_gpu", topk=topk)
    _, wanted = decode(query, key, value, "reference", topk=topk)
    assert_same_bits(residuals.selection, wanted.selection)
    scores = 64**-0.5 * jnp.einsum(
        "bkgh,bskh->bkgs", query.reshape(4, 2, 4, 64), key, precision="highest"
    )
    kept = selection.selected(
        scores.reshape(4, 8, 3000),
        jnp.ones((4, 8, 3000), bool),
        residuals.selection.threshold,
        residuals.selection.tie_cut,
    )
    np.testing.assert_array_equal(kept.sum(-1), np.minimum(np.asarray(topk), 3000).repeat(8, 1))


GATHER_SHAPES = {
    # batch, rows, keys, query heads, key/value heads, head size, value size, scopes, slots
    "8x1x131072-32-of-8x128": (8, 1, 131072, 32, 8, 128, 128, 8, 2048),
    "2x8x4096-32-of-8x128-one-list": (2, 8, 4096, 32, 8, 128, 128, 1, 512),
    "1x3x1000-9-of-3x64-a-list-a-head": (1, 3, 1000, 9, 3, 64, 64, 9, 300),
    "2x2x777-16-of-1x80": (2, 2, 777, 16, 1, 80, 48, 1, 100),
}


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"]
)
@pytest.mark.parametrize("shape", GATHER_SHAPES.values(), ids=GATHER_SHAPES.keys())
def test_gather_adds_no_error_of_its_own(shape, dtype):
    b, t, s, n, k, h, v_size, scopes, slots = shape
    rngs = jax.random.split(jax.random.key(s + slots), 4)
    query, key, value = (
        jax.random.normal(r, x, dtype)
        for r, x in zip(rngs[:3], ((b, t, n, h), (b, s, k, h), (b, s, k, v_size)), strict=True)
    )
    indices = jax.random.randint(rngs[3], (b, t, scopes, slots), -s // 8, s)
    indices = indices.at[0, 0, 0].set(-1)
    # Key 0 is listed by nobody, and masked slots must not read it.
    indices = jnp.where(indices == 0, 1, jnp.maximum(indices, -1))
    gather = lambda *arrays, implementation: call(
        pallas_kernels.gather_attention,
        *arrays,
        indices,
        implementation=implementation,
        return_residuals=True,
    )
    poisoned = [query, key.at[:, 0].set(jnp.nan), value.at[:, 0].set(jnp.nan)]
    out, residuals = gather(*poisoned, implementation="mosaic_gpu")
    assert_same_bits(gather(*poisoned, implementation="mosaic_gpu"), (out, residuals))
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    oracle, wanted = gather(*wide, implementation="xla")
    np.testing.assert_allclose(residuals.lse, wanted.lse, rtol=2e-5, atol=2e-5)
    error = lambda x: np.asarray(x, np.float32) - np.asarray(oracle)
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    if dtype == jnp.float32:
        assert np.abs(error(out)).max() <= 2e-5 * np.abs(oracle).max()
        return
    plain, _ = gather(query, key, value, implementation="xla")
    ulp = float(jnp.finfo(dtype).eps) * float(np.abs(oracle).max())
    assert rms(error(out)) <= 1.5 * max(rms(error(plain)), ulp / 4)
    assert np.abs(error(out)).max() <= max(2 * np.abs(error(plain)).max(), ulp)


def in_pages(key, value, lengths, page: int, *, spare: int = 5):
    """Cuts caches into pools of shuffled pages, NaN where no token is valid; the table has no page there."""
    b, s, *sizes = key.shape
    rng = np.random.default_rng(page)
    pages = s // page
    table = rng.permutation(b * pages + spare)[: b * pages].reshape(b, pages)
    valid = jnp.arange(s)[None, :, None, None] < lengths[:, None, None, None]
    pools = []
    for cache in (key, value):
        pool = jnp.full((b * pages + spare, page, *sizes), jnp.nan, cache.dtype)
        rows = jnp.where(valid, cache, jnp.nan).reshape(b * pages, page, *sizes)
        pools.append(pool.at[table.ravel()].set(rows))
    used = np.arange(pages) * page < np.asarray(lengths)[:, None]
    strays = np.resize([-7, 10**6], table.shape)
    return *pools, jnp.asarray(np.where(used, table, strays), jnp.int32)


PAGED_SHAPES = {
    # page, then as above; a cache shorter than a tile, and tiles that begin early, are among them
    "16-of-8x4096-32-of-8x128": (16, 8, 4096, 32, 8, 128),
    "16-of-3x1008-16-of-1x256": (16, 3, 1008, 16, 1, 256),
    "32-of-2x8160-9-of-3x64": (32, 2, 8160, 9, 3, 64),
    "64-of-4x64-4-of-4x80": (64, 4, 64, 4, 4, 80),
    "128-of-2x4096-8-of-2x128": (128, 2, 4096, 8, 2, 128),
    "256-of-4x1536-32-of-8x64": (256, 4, 1536, 32, 8, 64),
}


@pytest.mark.parametrize(
    ("dtype", "window"),
    [(jnp.float32, None), (jnp.bfloat16, None), (jnp.float16, 500)],
    ids=["f32", "bf16", "f16-window"],
)
@pytest.mark.parametrize("shape", PAGED_SHAPES.values(), ids=PAGED_SHAPES.keys())
def test_pages_change_no_bit(shape, dtype, window):
    page, b, s, n, k, h = shape
    query, key, value = decode_inputs(b, s, n, k, h, dtype)
    lengths = jnp.asarray(np.resize([s, s // 2 + 1, 0, page], b), jnp.int32)
    key_pool, value_pool, table = in_pages(key, value, lengths, page)
    arguments = {"topk": max(1, s // 20), "lengths": lengths, "window": window}
    contiguous = decode(query, key, value, "mosaic_gpu", **arguments)
    paged = decode(query, key_pool, value_pool, "mosaic_gpu", page_table=table, **arguments)
    assert_same_bits(paged, contiguous)
    assert np.isfinite(np.asarray(paged[0], np.float32)).all()
    if h * jnp.dtype(dtype).itemsize > 512:  # a row that the gather kernel does not take
        return
    gather = functools.partial(
        call,
        pallas_kernels.gather_attention,
        query[:, None],
        indices=contiguous[1].selection.indices[:, None],
        lengths=lengths,
        implementation="mosaic_gpu",
        return_residuals=True,
    )
    assert_same_bits(gather(key_pool, value_pool, page_table=table), gather(key, value))


@pytest.mark.parametrize("page", [16, 64])
def test_pages_change_no_bit_at_131072_keys(page):
    b, s = 8, 131072
    query, key, value = decode_inputs(b, s, 32, 8, 128, jnp.bfloat16)
    lengths = jnp.asarray([131072, 131071, 70000, 4097, 64, 1, 0, 100_000], jnp.int32)
    arguments = {"topk": 2048, "lengths": lengths}
    contiguous = decode(query, key, value, "mosaic_gpu", **arguments)
    pools = in_pages(key, value, lengths, page)
    del key, value
    paged = decode(query, *pools[:2], "mosaic_gpu", page_table=pools[2], **arguments)
    assert_same_bits(paged, contiguous)


def test_a_pool_may_hold_more_elements_than_int32_counts():
    """All pages in use lie past element 2^31 of a pool of 4.4 GB."""
    b, s, page, k, h = 2, 4096, 64, 8, 128
    query, cache, _ = decode_inputs(b, s, 32, k, h, jnp.bfloat16)
    lengths = jnp.asarray([s, 1000], jnp.int32)
    pages, first = b * s // page, 2**31 // (page * k * h)
    fill = jax.jit(
        lambda cache: (
            jnp.zeros((first + pages, page, k, h), cache.dtype)
            .at[first:]
            .set(cache.reshape(pages, page, k, h))
        )
    )
    pool = fill(cache)
    table = first + jnp.arange(pages, dtype=jnp.int32).reshape(b, -1)
    arguments = {"topk": 256, "lengths": lengths}
    contiguous = decode(query, cache, cache, "mosaic_gpu", **arguments)
    paged = decode(query, pool, pool, "mosaic_gpu", page_table=table, **arguments)
    assert_same_bits(paged, contiguous)
    gather = functools.partial(
        call,
        pallas_kernels.gather_attention,
        query[:, None],
        indices=contiguous[1].selection.indices[:, None],
        implementation="mosaic_gpu",
    )
    assert_same_bits(gather(pool, pool, page_table=table), gather(cache, cache))


INDEXER_SHAPES = {
    # batch, rows, keys, heads, head size, causal
    "decode-8x131072-64x128": (8, 1, 131072, 64, 128, False),
    "prefill-2x700-64x128": (2, 700, 700, 64, 128, True),
    "rows-before-the-keys-5x32": (3, 130, 77, 5, 32, True),
    "four-rows-3000-16x64": (2, 4, 3000, 16, 64, True),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", INDEXER_SHAPES.values(), ids=INDEXER_SHAPES.keys())
def test_the_indexer_equals_the_reference_on_whole_numbers(shape, dtype):
    b, t, s, i, d, causal = shape
    rngs = jax.random.split(jax.random.key(s + i), 3)
    query, key, weights = (
        jax.random.randint(r, x, -2, 3)
        for r, x in zip(rngs, ((b, t, i, d), (b, s, d), (b, t, i)), strict=True)
    )
    arrays = query.astype(dtype), key.astype(dtype), weights.astype(jnp.float32)
    lengths = jnp.asarray(np.resize([s, s // 2 + 1, 0], b), jnp.int32)
    arguments = {"causal": causal, "lengths": lengths}
    for op, more in (
        (pallas_kernels.indexer_scores, {}),
        (pallas_kernels.indexer_select, {"topk": max(1, s // 20)}),
    ):
        got = call(op, *arrays, implementation="mosaic_gpu", **arguments, **more)
        assert_same_bits(got, call(op, *arrays, implementation="xla", **arguments, **more))


def test_nearest_neighbours_equal_the_reference():
    rngs = jax.random.split(jax.random.key(3), 3)
    query = jax.random.randint(rngs[0], (4, 300, 2), -40, 41).astype(jnp.float32)
    key = jax.random.randint(rngs[1], (4, 1700, 2), -40, 41).astype(jnp.float32)
    valid = jax.random.bernoulli(rngs[2], 0.7, (4, 1700)).at[3].set(False)
    for neighbours in (1, 16, 2000):
        nearest = lambda implementation, neighbours=neighbours: call(
            pallas_kernels.knn_indices,
            query,
            key,
            neighbours=neighbours,
            key_valid=valid,
            implementation=implementation,
        )
        assert_same_bits(nearest("mosaic_gpu"), nearest("reference"))


# Eight-bit copies of the keys. All calls of one kind share a shape, so that each compiles once.

COPIED = 8, 8192, 32, 8, 128


def crowded(key):
    """Every other key close to one: their bounds overlap."""
    place = jnp.arange(key.shape[1])[None, :, None, None]
    return jnp.where(place % 2 == 0, key[:, :1] + key * jnp.asarray(2e-3, key.dtype), key)


def planted(key):
    """The best keys of some heads lie where only the tail of a row is."""
    query = decode_inputs(*COPIED, jnp.bfloat16)[0].reshape(8, 8, 4, 128)[:, None, :, 0]
    place = jnp.arange(key.shape[1])[None, :, None, None]
    return jnp.where(place > key.shape[1] - 700, key + query, key)


def stretched(key):
    """Sizes of keys from 2^-12 to 2^5, and an element that dwarfs the others."""
    exponent = jax.random.randint(jax.random.key(9), (*key.shape[:3], 1), -12, 6)
    return key.at[..., 3].multiply(10) * jnp.exp2(exponent.astype(jnp.float32)).astype(key.dtype)


def poisoned(key):
    key = key.at[0, 5, 0].set(jnp.nan).at[0, 77, 0, 3].set(jnp.inf).at[1, 9, 1, 0].set(-jnp.inf)
    return key.at[2, :1000].set(jnp.nan)  # more than are listed


KEYS = {
    "random": lambda key: key,
    "stretched": stretched,
    "planted": planted,
    "crowded": crowded,
    "not-finite": poisoned,
    "whole-numbers": lambda key: jnp.round(2 * key).clip(-2, 2),
    "one-key-everywhere": lambda key: jnp.broadcast_to(key[:, :1], key.shape),
}


RAGGED = (8192, 8191, 5000, 2700, 700, 512, 64, 0)


def copied_inputs(kind: str, dtype: str = "int8"):
    """Returns query, key, value, and the keyword arguments of a call."""
    query, key, value = decode_inputs(*COPIED, jnp.bfloat16)
    key = KEYS[kind](key)
    lengths = jnp.asarray(RAGGED, jnp.int32)
    copy = call(pallas_kernels.quantize_keys, key, dtype=dtype)
    return query, key, value, {"topk": 512, "lengths": lengths, "quantized_key": copy}


@pytest.mark.parametrize("kind", KEYS)
def test_certified_has_the_bits_of_the_call_without_a_copy(kind):
    *arrays, arguments = copied_inputs(kind)
    copy = arguments.pop("quantized_key")
    certified = functools.partial(decode, *arrays, "mosaic_gpu", quantized_key=copy, certified=True)
    for lengths in (arguments["lengths"], jnp.full((8,), 8192, jnp.int32)):
        arguments["lengths"] = lengths
        wanted = decode(*arrays, "mosaic_gpu", **arguments)
        assert_same_bits(certified(**arguments), wanted)
        assert_same_bits(certified(**arguments), wanted)


def test_the_copy_settles_random_keys_and_not_those_that_are_equal(monkeypatch):
    """Else `certified` would only cost time, or could not be right."""
    fell_back = []
    original = mosaic_gpu.topk_decode_attention

    def watched(*arrays, **arguments):
        jax.debug.callback(lambda: fell_back.append(True))
        return original(*arrays, **arguments)

    monkeypatch.setattr(mosaic_gpu, "topk_decode_attention", watched)
    run = jax.jit(
        lambda *arrays, **traced: pallas_kernels.topk_decode_attention(
            *arrays, topk=512, certified=True, implementation="mosaic_gpu", **traced
        )
    )
    for kind, dtype, falls_back in (
        ("random", "int8", False),
        ("random", "float8_e4m3fn", False),
        ("one-key-everywhere", "int8", True),
    ):
        fell_back.clear()
        *arrays, arguments = copied_inputs(kind, dtype)
        del arguments["topk"]
        jax.block_until_ready(run(*arrays, **arguments))
        jax.effects_barrier()
        assert bool(fell_back) is falls_back, (kind, dtype)


def test_ranking_by_the_copy_adds_no_error_of_its_own():
    """Sets against those of float32; outputs by RMS, as without a copy."""
    *arrays, arguments = copied_inputs("random")
    got = decode(*arrays, "mosaic_gpu", **arguments)
    assert_same_bits(decode(*arrays, "mosaic_gpu", **arguments), got)
    plain, _ = decode(*arrays, "xla", **arguments)
    oracle, wanted = decode(*(x.astype(jnp.float32) for x in arrays), "xla", **arguments)
    selected, wanted = got[1].selection, wanted.selection
    assert_same_bits(selected.count, wanted.count)
    lists = (np.asarray(x.indices).reshape(-1, 512) for x in (selected, wanted))
    same = [len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(*lists, strict=True)]
    # Sums by the kernel are exact and those of float32 are not, so a member at the edge may differ.
    assert (np.asarray(same) >= np.asarray(wanted.count).ravel() - 1).all()
    error = lambda x: np.asarray(x, np.float32) - np.asarray(oracle)
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    ulp = float(jnp.finfo(jnp.bfloat16).eps) * float(np.abs(oracle).max())
    assert rms(error(got[0])) <= 1.5 * rms(error(plain))
    assert np.abs(error(got[0])).max() <= max(2 * np.abs(error(plain)).max(), ulp)


COPY_FORMS = {
    # page, then as above, dtype, the copy's
    "e4m3": (None, *COPIED, jnp.bfloat16, "float8_e4m3fn"),
    "pages-of-16": (16, *COPIED, jnp.bfloat16, "int8"),
    "pages-of-256-9-of-3x64-f16": (256, 2, 8192, 9, 3, 64, jnp.float16, "int8"),
    "e4m3-pages-of-128-16-of-2x256": (128, 2, 4096, 16, 2, 256, jnp.bfloat16, "float8_e4m3fn"),
    "e4m3-pages-of-64-12-of-4x96-f16": (64, 2, 8192, 12, 4, 96, jnp.float16, "float8_e4m3fn"),
    "8-of-4x80": (None, 4, 8192, 8, 4, 80, jnp.bfloat16, "int8"),
    "16-of-1x240-f16": (None, 3, 4096, 16, 1, 240, jnp.float16, "int8"),
    "40-of-1x128": (None, 3, 4096, 40, 1, 128, jnp.bfloat16, "int8"),
    "e4m3-4x48": (None, 3, 4096, 4, 4, 48, jnp.bfloat16, "float8_e4m3fn"),
}


def formed(case, kind: str):
    """Returns contiguous arrays, those in pages if any, and the arguments of calls with them."""
    page, b, s, n, k, h, dtype, name = case
    query, key, value = decode_inputs(b, s, n, k, h, dtype)
    key = KEYS[kind](key)
    lengths = jnp.asarray(np.resize([s, s // 2 + 1, 0, 5], b), jnp.int32)
    arguments = {"topk": s // 20, "lengths": lengths}
    arrays, more = (key, value), {}
    if page is not None:
        *arrays, more["page_table"] = in_pages(key, value, lengths, page)
    more["quantized_key"] = call(pallas_kernels.quantize_keys, arrays[0], dtype=name)
    return (query, key, value), (query, *arrays), arguments, more


@pytest.mark.parametrize("kind", ["random", "stretched", "not-finite", "whole-numbers"])
@pytest.mark.parametrize("case", COPY_FORMS.values(), ids=COPY_FORMS.keys())
def test_other_forms_of_a_copy_certify_the_same_bits(case, kind):
    arrays, copied, arguments, more = formed(case, kind)
    wanted = decode(*arrays, "mosaic_gpu", **arguments)
    certified = functools.partial(decode, *copied, "mosaic_gpu", certified=True, **more)
    assert_same_bits(certified(**arguments), wanted)
    assert_same_bits(certified(**arguments), wanted)


@pytest.mark.parametrize("window", [None, 700], ids=["all", "window"])
@pytest.mark.parametrize("case", COPY_FORMS.values(), ids=COPY_FORMS.keys())
def test_other_forms_of_a_copy_rank_as_its_numbers_do(case, window):
    """As float64 does; in pages, by the bits of the contiguous call."""
    page, *_, name = case
    arrays, copied, arguments, more = formed(case, "random")
    arguments["window"] = window
    out, residuals = decode(*copied, "mosaic_gpu", **arguments, **more)
    copy = call(pallas_kernels.quantize_keys, arrays[1], dtype=name)
    contiguous = arguments | {"quantized_key": copy}
    if page is not None:
        assert_same_bits((out, residuals), decode(*arrays, "mosaic_gpu", **contiguous))
    visible = positions_visible(arguments["lengths"], window, arrays[1].shape[1])
    ranked_as_the_copy_does(residuals.selection, arrays[0], copy, visible)
    attends_to_its_list(out, residuals.selection, *arrays)


def in_float64(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def positions_visible(lengths, window, size: int) -> np.ndarray:
    """Returns [B, S]."""
    place, end = np.arange(size), np.asarray(lengths)[:, None]
    return (place < end) & (place >= end - (size if window is None else window))


def ranked_as_the_copy_does(selection, query, copy, visible) -> None:
    """Checks that no key left out is above one kept, by scores of the copy in float64, but for what float16 rounds."""
    made = in_float64(copy.scale)[..., None] * in_float64(copy.values)
    heads = query.shape[1] // made.shape[2]
    scores = np.einsum("bnh,bsnh->bns", in_float64(query), made.repeat(heads, axis=2))
    longest = np.linalg.norm(made, axis=-1).max(axis=(1, 2))[:, None]
    slack = 2.0**-11 * np.linalg.norm(in_float64(query), axis=-1) * longest
    for b, n in np.ndindex(query.shape[:2]):
        kept = np.zeros(visible.shape[1], bool)
        indices = np.asarray(selection.indices)[b, n]
        kept[indices[indices >= 0]] = True
        assert kept.sum() == np.asarray(selection.count)[b, n]
        assert not (kept & ~visible[b]).any()
        assert kept.sum() == min(len(indices), visible[b].sum())
        left_out = scores[b, n][visible[b] & ~kept]
        if left_out.size:
            assert scores[b, n][kept].min() >= left_out.max() - slack[b, n]


def attends_to_its_list(out, selection, query, key, value) -> None:
    """Compares with a softmax in float64 over the true scores of the listed keys."""
    heads = query.shape[1] // key.shape[2]
    keys, values = (in_float64(x) for x in (key, value))
    wanted = np.zeros(out.shape)
    for b, n in np.ndindex(query.shape[:2]):
        listed = np.asarray(selection.indices)[b, n]
        listed = listed[listed >= 0]
        if listed.size:
            scores = keys[b, listed, n // heads] @ in_float64(query)[b, n] * query.shape[2] ** -0.5
            weights = np.exp(scores - scores.max())
            wanted[b, n] = weights @ values[b, listed, n // heads] / weights.sum()
    error = np.abs(in_float64(out) - wanted).max()
    assert error <= float(jnp.finfo(out.dtype).eps) * np.abs(wanted).max()


BOUNDED = {
    "e4m3-128": (128, jnp.bfloat16, "float8_e4m3fn"),
    "e4m3-256-f16": (256, jnp.float16, "float8_e4m3fn"),
    "int8-80-f16": (80, jnp.float16, "int8"),
    "int8-240": (240, jnp.bfloat16, "int8"),
}


@pytest.mark.parametrize("exact", [False, True], ids=["lossy", "exact"])
@pytest.mark.parametrize(("h", "dtype", "name"), BOUNDED.values(), ids=BOUNDED.keys())
def test_bounds_of_products_in_half_precision_hold(h, dtype, name, exact):
    """Queries point to where keys lost most; or nothing is lost, so that only rounding needs a bound."""
    query, key, _ = decode_inputs(2, 4096, 8, 2, h, dtype)
    if exact:
        whole = {"int8": 127, "float8_e4m3fn": 14}[name]
        key = jnp.round(4 * key).clip(-whole, whole).at[..., 0].set(whole)
    copy = call(pallas_kernels.quantize_keys, key, dtype=name)
    if not exact:
        made = copy.scale[..., None] * copy.values.astype(jnp.float32)
        lost = (key.astype(jnp.float32) - made)[:, 5:9]  # of four keys [B, 4, K, H]
        query = jnp.swapaxes(lost, 1, 2).reshape(2, 8, h).astype(dtype)
    bounds = jax.jit(
        functools.partial(quantized_gpu._score_copy, bounds=True, scale=0.5, wanted=None)
    )
    ends = jnp.full((2,), 4096, jnp.int32)
    got = np.asarray(bounds(query, copy, jnp.zeros_like(ends), ends), np.float64)
    keys = in_float64(key).repeat(4, axis=2)
    true = 0.5 * np.einsum("bnh,bsnh->bns", in_float64(query), keys)
    size = 0.5 * np.linalg.norm(in_float64(query), axis=-1)[..., None]
    width = size * np.swapaxes(in_float64(copy.error).repeat(4, axis=2), 1, 2)
    lengths = np.swapaxes(np.linalg.norm(keys, axis=-1), 1, 2)
    assert (got >= true).all()
    assert (got - true <= 2.06 * width + 4e-3 * size * lengths).all()
