"""Caches in pages: the bits of a contiguous cache, whatever lies in pages and table entries that no sequence uses.

Pools are drawn by cutting a contiguous cache into pages, shuffling them among spare ones, and writing NaN wherever no
sequence has a valid token; table entries past a length are no page at all. So one comparison asks all of it.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import testing
from pallas_kernels.core import paging
from pallas_kernels.ops.topk_decode_attention import mosaic_gpu as decode_gpu
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from tests.kernels import gpu_aot

HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests cost
PLAIN = ("reference", "xla")
NO_PAGE = (-7, 10**6)  # what stands in the table past a sequence's length
SPARE = 3  # pages of the pool that no sequence has


def draw(seed=0, *, b=3, s=64, n=4, k=2, h=8, v=8, rows=None, dtype=jnp.float32):
    """Returns query [B, N, H], or [B, rows, N, H], and key and value [B, S, K, ...]; scores are whole numbers, full of ties."""
    rng = np.random.default_rng(seed)
    leading = (b,) if rows is None else (b, rows)
    query, key = (rng.integers(-2, 3, shape) for shape in ((*leading, n, h), (b, s, k, h)))
    return tuple(jnp.asarray(x, dtype) for x in (query, key, rng.normal(size=(b, s, k, v))))


def valid_tokens(lengths, s: int) -> np.ndarray:
    return np.arange(s) < np.asarray(lengths)[:, None]


def in_pages(key, value, lengths, page: int, *, seed=0):
    """Returns the pools of a contiguous cache's pages, and the page table."""
    b, s = key.shape[:2]
    rng = np.random.default_rng(seed)
    pages = s // page
    table = rng.permutation(b * pages + SPARE)[: b * pages].reshape(b, pages).astype(np.int32)
    pools = []
    for cache in (key, value):
        valid = jnp.asarray(valid_tokens(lengths, s))[:, :, None, None]
        rows = jnp.where(valid, cache, jnp.nan).reshape(b * pages, page, *cache.shape[2:])
        pool = jnp.full((b * pages + SPARE, page, *cache.shape[2:]), jnp.nan, cache.dtype)
        pools.append(pool.at[table.ravel()].set(rows))
    used = np.arange(pages) * page < np.asarray(lengths)[:, None]
    strays = np.resize(NO_PAGE, (b, pages))
    return *pools, jnp.asarray(np.where(used, table, strays), jnp.int32)


@functools.partial(jax.jit, static_argnames=("options",), compiler_options=HURRY)
def _decode(arrays, traced, options):
    out, residuals = pallas_kernels.topk_decode_attention(
        *arrays, return_residuals=True, **traced, **dict(options)
    )
    return out, residuals.lse, residuals.selection


def decode(*arrays, **arguments):
    """Returns out, lse and the selection."""
    traced = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    static = tuple((name, x) for name, x in arguments.items() if name not in traced)
    return _decode(arrays, traced, static)


@functools.partial(jax.jit, static_argnames=("implementation",), compiler_options=HURRY)
def gather(query, key, value, indices, lengths=None, page_table=None, *, implementation):
    """Returns out and lse."""
    out, residuals = pallas_kernels.gather_attention(
        query,
        key,
        value,
        indices,
        lengths=lengths,
        page_table=page_table,
        implementation=implementation,
        return_residuals=True,
    )
    return out, residuals.lse


def assert_same_bits(got, wanted):
    for (path, x), (_, y) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (got, wanted)), strict=True
    ):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("page", paging.PAGES)
def test_decode_in_pages_is_that_of_the_contiguous_cache(page, implementation):
    s = 512  # for all pages, so that the contiguous form compiles once
    lengths = np.asarray([0, 1, page - 1, page, page + 1, s], np.int32)
    query, key, value = draw(b=6, s=s)
    key_pool, value_pool, table = in_pages(key, value, lengths, page)
    arguments = {"topk": 5, "lengths": jnp.asarray(lengths), "implementation": implementation}
    got = decode(query, key_pool, value_pool, page_table=table, **arguments)
    assert_same_bits(got, decode(query, key, value, **arguments))
    want = decode(query, key, value, **arguments | {"implementation": "reference"})
    testing.assert_accurate(got[0], want[0])
    testing.assert_accurate(got[1], want[1])
    testing.assert_same_selection(got[2], want[2])


@pytest.mark.parametrize(
    ("arguments", "dtype", "implementation"),
    [
        ({"topk": 4, "window": 17}, jnp.bfloat16, "reference"),
        ({"topk": 4, "window": 17}, jnp.float32, "xla"),
        ({"topk": 4, "scope": "group"}, jnp.bfloat16, "xla"),
        ({"topk": 4, "scope": "layer", "pooling": "score_max", "window": 30}, jnp.float32, "xla"),
        ({"topk": jnp.asarray([[1], [50], [999]], jnp.int32)}, jnp.float16, "xla"),
    ],
    ids=["window-bf16-reference", "window", "group-bf16", "layer-window", "budgets-f16"],
)
def test_every_form_of_decode_takes_pages(arguments, dtype, implementation):
    lengths = np.asarray([64, 33, 15], np.int32)
    query, key, value = draw(dtype=dtype)
    key_pool, value_pool, table = in_pages(key, value, lengths, 16)
    arguments = arguments | {"lengths": jnp.asarray(lengths), "implementation": implementation}
    got = decode(query, key_pool, value_pool, page_table=table, **arguments)
    assert_same_bits(got, decode(query, key, value, **arguments))


def test_listed_places_are_those_of_the_sequence_not_of_the_pool():
    query, key = jnp.ones((1, 1, 8)), jnp.zeros((1, 64, 1, 8))
    key = key.at[0, jnp.asarray([3, 20, 47])].set(1.0)
    key_pool, value_pool, table = in_pages(key, key, [64], 16, seed=4)
    assert (np.diff(table[0]) != 1).any()  # not in order in the pool
    _, _, found = decode(query, key_pool, value_pool, topk=3, page_table=table)
    np.testing.assert_array_equal(found.indices[0, 0], [3, 20, 47])


def test_without_lengths_every_page_is_full():
    query, key, value = draw()
    key_pool, value_pool, table = in_pages(key, value, [64, 64, 64], 32)
    got = decode(query, key_pool, value_pool, topk=5, page_table=table)
    assert_same_bits(got, decode(query, key, value, topk=5))


def test_sequences_may_share_pages():
    """The first two pages of all are one prefix; the pool holds it once."""
    query, key, value = draw(s=64)
    key, value = (x.at[1:, :32].set(x[0, :32]) for x in (key, value))
    lengths = jnp.asarray([64, 40, 32], jnp.int32)
    key_pool, value_pool, table = in_pages(key, value, lengths, 16)
    copies = table[1:, :2]
    table = table.at[1:, :2].set(table[0, :2])
    key_pool, value_pool = (x.at[copies.ravel()].set(jnp.nan) for x in (key_pool, value_pool))
    arguments = {"topk": 7, "lengths": lengths, "implementation": "xla"}
    got = decode(query, key_pool, value_pool, page_table=table, **arguments)
    assert_same_bits(got, decode(query, key, value, **arguments))


@hypothesis.given(
    seed=st.integers(0, 2**16),
    lengths=st.tuples(*[st.integers(0, 64)] * 3),
)
def test_where_pages_lie_changes_no_bit(seed, lengths):
    query, key, value = draw(seed)
    lengths = jnp.asarray(lengths, jnp.int32)
    arguments = {"topk": 6, "lengths": lengths, "implementation": "xla"}
    contiguous = decode(query, key, value, **arguments)
    key_pool, value_pool, table = in_pages(key, value, lengths, 16, seed=seed)
    assert_same_bits(decode(query, key_pool, value_pool, page_table=table, **arguments), contiguous)
    indices = contiguous[2].indices[:, None]
    rows = functools.partial(gather, implementation="xla")
    assert_same_bits(
        rows(query[:, None], key_pool, value_pool, indices, lengths, table),
        rows(query[:, None], key, value, indices, lengths),
    )


def listed(rng, shape, s: int):
    """Lists in any order, some slots masked, some past the end."""
    return jnp.asarray(rng.integers(-2, s + 2, shape), jnp.int32)


@pytest.mark.parametrize(
    ("page", "scopes", "dtype", "implementation"),
    [
        (16, 1, jnp.bfloat16, "reference"),
        (16, 1, jnp.float32, "xla"),
        (32, 2, jnp.bfloat16, "xla"),
        (64, 4, jnp.float32, "xla"),
        (128, 2, jnp.float32, "xla"),
        (256, 4, jnp.float32, "reference"),
    ],
    ids=[
        "16-layer-reference",
        "16-layer",
        "32-group",
        "64-head",
        "128-group",
        "256-head-reference",
    ],
)
def test_gather_from_pages_is_that_of_the_contiguous_cache(page, scopes, dtype, implementation):
    s = 2 * page
    lengths = jnp.asarray([s, page + 1, page, 0], jnp.int32)
    query, key, value = draw(b=4, s=s, rows=3, dtype=dtype)
    key_pool, value_pool, table = in_pages(key, value, lengths, page)
    indices = listed(np.random.default_rng(page), (4, 3, scopes, 9), s)
    run = functools.partial(gather, implementation=implementation)
    got = run(query, key_pool, value_pool, indices, lengths, table)
    assert_same_bits(got, run(query, key, value, indices, lengths))
    assert not np.isnan(np.asarray(got[0], np.float32)).any()
    assert np.isneginf(got[1][3]).all()


def sum_of_gather(indices, table, implementation):
    def total(query, key, value):
        out = pallas_kernels.gather_attention(
            query, key, value, indices, page_table=table, implementation=implementation
        )
        return jnp.sum(jnp.sin(out))

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)), compiler_options=HURRY)


@pytest.mark.parametrize(("implementation", "b"), [("reference", 2), ("xla", 1)])
def test_gradients_of_a_gather_from_pages_lie_in_its_pages(implementation, b):
    query, key, value = draw(b=b, s=32, rows=2)
    key_pool, value_pool, table = in_pages(key, value, [32] * b, 16)
    indices = listed(np.random.default_rng(0), (b, 2, 2, 5), 32)
    got = sum_of_gather(indices, table, implementation)(query, key_pool, value_pool)
    want = sum_of_gather(indices, None, implementation)(query, key, value)
    testing.assert_accurate(got[0], want[0])
    for of_pool, of_cache in zip(got[1:], want[1:], strict=True):
        testing.assert_accurate(of_pool[table].reshape(of_cache.shape), of_cache)
        unused = np.setdiff1d(np.arange(len(of_pool)), np.asarray(table))
        assert not np.any(of_pool[unused])


def test_gather_refuses_gradients_of_pages_where_it_has_none():
    query, key, value = draw(b=2, s=32, rows=2)
    key_pool, value_pool, table = in_pages(key, value, [32, 32], 16)
    indices = listed(np.random.default_rng(0), (2, 2, 2, 5), 32)
    with pytest.raises(NotImplementedError, match="got a page_table under differentiation"):
        sum_of_gather(indices, table, "xla")(query, key_pool, value_pool)


ZEROS = functools.partial(np.zeros, dtype=np.float32)
GOOD = {
    "key": ZEROS((7, 16, 2, 8)),
    "value": ZEROS((7, 16, 2, 8)),
    "page_table": np.zeros((3, 2), np.int32),
}
BAD = [
    (
        {"key": ZEROS((7, 8, 2, 8)), "value": ZEROS((7, 8, 2, 8))},
        r"key got shape \(7, 8, 2, 8\), wanted pages of one of 16, 32, 64, 128, 256 tokens",
    ),
    (
        {"key": ZEROS((7, 24, 2, 8)), "value": ZEROS((7, 24, 2, 8))},
        r"key got shape \(7, 24, 2, 8\), wanted pages of one of 16, 32, 64, 128, 256 tokens",
    ),
    ({"page_table": ZEROS((3, 2))}, "page_table got dtype float32, wanted int32"),
    (
        {"page_table": np.zeros((2, 2), np.int32)},
        r"page_table got shape \(2, 2\), wanted axis 0 \(B\) of size 3",
    ),
    (
        {"page_table": np.zeros(3, np.int32)},
        r"page_table got shape \(3,\), wanted 2 axes \[B, pages\]",
    ),
    (
        {"page_table": np.zeros((3, 0), np.int32)},
        r"page_table got shape \(3, 0\) over 7 pages, wanted at least one of each",
    ),
    ({"key": ZEROS((7, 16, 8))}, r"key got shape \(7, 16, 8\), wanted 4 axes"),
    (
        {"value": ZEROS((6, 16, 2, 8))},
        r"value got shape \(6, 16, 2, 8\), wanted axis 0 \(P\) of size 7",
    ),
    (
        {"value": ZEROS((7, 32, 2, 8))},
        r"value got shape \(7, 32, 2, 8\), wanted axis 1 \(page\) of size 16",
    ),
    ({"key": ZEROS((7, 16, 2, 4))}, r"key got shape .*, wanted axis 3 \(H\) of size 8"),
    ({"value": ZEROS((7, 16, 1, 8))}, r"value got shape .*, wanted axis 2 \(K\) of size 2"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:28] for _, message in BAD])
@pytest.mark.parametrize("op", ["topk_decode_attention", "gather_attention"])
def test_bad_input_is_named(op, change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks would come first
    arguments = GOOD | change
    if op == "gather_attention":
        arguments |= {"query": ZEROS((3, 1, 4, 8)), "indices": np.zeros((3, 1, 1, 2), np.int32)}
    else:
        arguments |= {"query": ZEROS((3, 4, 8)), "topk": 2}
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(pallas_kernels, op)(**arguments)


@pytest.mark.parametrize(
    ("pages_of_pool", "pages"), [(2**23, 4), (9, 2**23)], ids=["pool", "sequence"]
)
def test_a_row_number_has_to_fit_int32(pages_of_pool, pages):
    pool = jax.ShapeDtypeStruct((pages_of_pool, 256, 1, 8), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, pages), jnp.int32)
    query = jax.ShapeDtypeStruct((1, 1, 8), jnp.bfloat16)
    run = lambda query, pool, table: pallas_kernels.topk_decode_attention(
        query, pool, pool, topk=1, page_table=table
    )
    with pytest.raises(ValueError, match=r"page_table got .*, wanted fewer than 2\*\*31 of each"):
        jax.eval_shape(run, query, pool, table)


def test_rows_of_the_pool_follow_the_table():
    table = jnp.asarray([[5, 2], [0, 7]], jnp.int32)
    places = jnp.asarray([[[0, 15, 16]], [[-1, 31, 3]]], jnp.int32)
    rows = paging.pool_rows(places, table, 16)
    np.testing.assert_array_equal(rows, [[[80, 95, 32]], [[-1, 127, 3]]])


def test_a_safe_table_has_no_entry_outside_of_the_pool():
    table = jnp.asarray([[5, -7, 10**6], [3, 4, 99]], jnp.int32)
    lengths = jnp.asarray([16, 48], jnp.int32)
    safe = functools.partial(paging.safe_table, table, page=16, num_pages=8)
    np.testing.assert_array_equal(safe(lengths), [[5, 0, 0], [3, 4, 7]])
    np.testing.assert_array_equal(safe(None), [[5, 0, 7], [3, 4, 7]])


# From here on: Mosaic GPU. Interpreted kernels cost seconds to compile, so most tests are of the one that reads keys.

GPU_CASES = {
    # page, pages, lengths, window, query heads, key/value heads, head size, dtype
    "tensor-cores-16": (16, 17, [272, 129, 0], 150, 6, 2, 64, jnp.bfloat16),
    "rows-32": (32, 5, [160, 33, 1], None, 2, 1, 8, jnp.float32),
    "one-short-page": (64, 1, [64, 17], None, 2, 2, 64, jnp.float16),
    "tensor-cores-128": (128, 5, [640, 128], 300, 4, 1, 64, jnp.bfloat16),
    "tensor-cores-256": (256, 2, [257, 512], 90, 2, 2, 64, jnp.float16),
    "rows-256": (256, 2, [511, 193], None, 4, 2, 16, jnp.float32),
}


def by_default(*names):
    """The GPU cases; all but those named are slow."""
    return [
        pytest.param(case, id=name, marks=() if name in names else pytest.mark.slow)
        for name, case in GPU_CASES.items()
    ]


def draw_gpu_case(case):
    """Returns query, key, value, then the two pools and the table, and lengths and window."""
    page, pages, lengths, window, n, k, h, dtype = case
    arrays = draw(b=len(lengths), s=page * pages, n=n, k=k, h=h, dtype=dtype)
    return *arrays, *in_pages(*arrays[1:], lengths, page), jnp.asarray(lengths, jnp.int32), window


@pytest.mark.parametrize("case", by_default("tensor-cores-16", "rows-32", "tensor-cores-256"))
def test_gpu_scores_are_those_of_a_contiguous_cache_and_read_visible_pages_alone(case, monkeypatch):
    query, key, value, pool, _, table, lengths, window = draw_gpu_case(case)
    b, s = key.shape[:2]
    page = pool.shape[1]
    start = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    asked = []
    original = decode_gpu.CacheTiles.pages

    def pages(self, begin):
        found = original(self, begin)
        jax.debug.callback(lambda *numbers: asked.extend(map(int, numbers)), *found)
        return found

    monkeypatch.setattr(decode_gpu.CacheTiles, "pages", pages)
    # One split, so that buffers are used again.
    score = lambda key, table: decode_gpu._scores(query, key, start, lengths, 0.125, 1, table)
    score = jax.jit(score, compiler_options=HURRY)
    with pallas_kernels.interpret_mode():
        got, wanted = jax.block_until_ready((score(pool, table), score(key, None)))
    jax.effects_barrier()
    visible = valid_tokens(lengths, s) & ~valid_tokens(start, s)
    for i in range(b):
        row = got[i, :, :s][:, visible[i]]
        assert_same_bits(row, wanted[i, :, :s][:, visible[i]])
        assert np.isfinite(row).all()
    needed = {int(table[i, j // page]) for i, j in np.argwhere(visible)}
    # A sequence without a key has no tile.
    assert set(asked) == needed


@pytest.mark.parametrize("case", by_default())
def test_gpu_decode_has_the_bits_of_a_contiguous_cache(case):
    query, key, value, key_pool, value_pool, table, lengths, window = draw_gpu_case(case)
    run = functools.partial(
        decode,
        topk=9,
        lengths=lengths,
        window=window,
        implementation="mosaic_gpu",
        block_sizes=TopKDecodeBlockSizes(num_splits=1),
    )
    with pallas_kernels.interpret_mode():
        got = jax.block_until_ready(run(query, key_pool, value_pool, page_table=table))
        assert_same_bits(got, jax.block_until_ready(run(query, key, value)))


def test_gpu_decode_in_pages_equals_the_reference():
    case = GPU_CASES["rows-32"]
    query, key, value, key_pool, value_pool, table, lengths, _ = draw_gpu_case(case)
    run = functools.partial(
        decode, query, topk=9, lengths=lengths, scope="group", pooling="score_max"
    )
    with pallas_kernels.interpret_mode():
        got = run(key_pool, value_pool, page_table=table, implementation="mosaic_gpu")
        jax.block_until_ready(got)
    want = run(key, value, implementation="reference")
    testing.assert_accurate(got[0], want[0])
    testing.assert_accurate(got[1], want[1])
    testing.assert_same_selection(got[2], want[2])


def test_gpu_gather_from_pages_equals_the_reference():
    query, key, value = draw(b=2, s=48, rows=2, h=16)
    lengths = jnp.asarray([48, 17], jnp.int32)
    key_pool, value_pool, table = in_pages(key, value, lengths, 16)
    indices = listed(np.random.default_rng(3), (2, 2, 2, 20), 48)
    with pallas_kernels.interpret_mode():
        got = jax.block_until_ready(
            gather(
                query,
                key_pool,
                value_pool,
                indices,
                lengths,
                table,
                implementation="mosaic_gpu",
            )
        )
    want = gather(query, key, value, indices, lengths, implementation="reference")
    testing.assert_accurate(got[0], want[0])
    testing.assert_accurate(got[1], want[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["rows", "tensor-cores"])
def test_paged_gpu_kernels_have_no_race(dtype):
    query, key, value = draw(b=1, s=640, n=1, k=1, h=64, dtype=dtype)
    key_pool, value_pool, table = in_pages(key, value, [620], 16)
    with pallas_kernels.interpret_mode(detect_races=True):
        jax.block_until_ready(
            pallas_kernels.topk_decode_attention(
                query,
                key_pool,
                value_pool,
                topk=100,
                lengths=jnp.asarray([620], jnp.int32),
                page_table=table,
                implementation="mosaic_gpu",
                block_sizes=TopKDecodeBlockSizes(num_splits=1),
            )
        )


SPEC = jax.ShapeDtypeStruct


def decode_at(b, pages, page, n, k, h, dtype, pool=None):
    fn = lambda query, key, value, lengths, table: pallas_kernels.topk_decode_attention(
        query,
        key,
        value,
        topk=2048,
        lengths=lengths,
        page_table=table,
        implementation="mosaic_gpu",
    )
    pool = SPEC((pool or b * pages, page, k, h), dtype)
    lists = SPEC((b,), jnp.int32), SPEC((b, pages), jnp.int32)
    return fn, SPEC((b, n, h), dtype), pool, pool, *lists


def gather_at(b, pages, page, n, k, h, dtype, pool=None):
    fn = lambda query, key, value, indices, table: pallas_kernels.gather_attention(
        query, key, value, indices, page_table=table, implementation="mosaic_gpu"
    )
    pool = SPEC((pool or b * pages, page, k, h), dtype)
    lists = SPEC((b, 1, k, 2048), jnp.int32), SPEC((b, pages), jnp.int32)
    return fn, SPEC((b, 1, n, h), dtype), pool, pool, *lists


def scores_at(b, pages, page, n, k, h, dtype):
    fn = lambda query, key, lengths, table: decode_gpu._scores(
        query, key, jnp.zeros_like(lengths), lengths, 1.0, None, table
    )
    pool = SPEC((b * pages, page, k, h), dtype)
    return fn, SPEC((b, n, h), dtype), pool, SPEC((b,), jnp.int32), SPEC((b, pages), jnp.int32)


LOWERED = {
    "scores-page-16": scores_at(8, 8192, 16, 32, 8, 128, jnp.bfloat16),
    "scores-page-256-f32": scores_at(8, 512, 256, 32, 8, 128, jnp.float32),
    "gather-page-64": gather_at(8, 2048, 64, 32, 8, 128, jnp.bfloat16),
}
COMPILED = {
    "decode-page-16": decode_at(8, 8192, 16, 32, 8, 128, jnp.bfloat16),
    "decode-page-64": decode_at(8, 2048, 64, 32, 8, 128, jnp.bfloat16),
    "decode-page-256": decode_at(8, 512, 256, 32, 8, 128, jnp.bfloat16),
    "decode-page-16-f32": decode_at(8, 8192, 16, 32, 8, 128, jnp.float32),
    "decode-page-128-9-of-3x64": decode_at(1, 64, 128, 9, 3, 64, jnp.bfloat16),
    "gather-page-64": gather_at(8, 2048, 64, 32, 8, 128, jnp.bfloat16),
    # More elements than int32 counts.
    "decode-large-pool": decode_at(8, 2048, 64, 32, 8, 128, jnp.bfloat16, pool=2**16),
    "gather-large-pool": gather_at(8, 2048, 64, 32, 8, 128, jnp.bfloat16, pool=2**16),
}


@pytest.mark.parametrize("case", LOWERED.values(), ids=LOWERED.keys())
def test_paged_kernels_lower_for_a_hopper_gpu(case):
    fn, *specs = case
    assert "mosaic_gpu" in gpu_aot.lower_gpu(fn, *specs).as_text()


@gpu_aot.needs_compiler
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_paged_kernels_compile_without_spills_and_copy_no_cache(case, monkeypatch, capfd):
    compiled = gpu_aot.compile_without_spills(*case, monkeypatch=monkeypatch, capfd=capfd)
    # Rows of scores, and lists.
    _, _, pool, *_ = case
    allowed = pool.size * pool.dtype.itemsize / 4
    assert compiled.memory_analysis().temp_size_in_bytes < allowed
