"""Eight-bit keys: the copy and its bound, decoding ranked by it, and decoding that it only makes faster, bit for bit."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import QuantizedKeys, quantize_keys, testing
from pallas_kernels.core import quantization
from pallas_kernels.ops.topk_decode_attention import mosaic_gpu, quantized_gpu
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from tests.kernels import gpu_aot

HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests cost
FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]
FLOAT_IDS = ["f32", "bf16", "f16"]

_quantize = jax.jit(quantize_keys, static_argnames="dtype")


def in_64_bits(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def lost_by(key, copy: QuantizedKeys) -> np.ndarray:
    """Returns |key - scale * values|, each in float64."""
    made = in_64_bits(copy.scale)[..., None] * in_64_bits(copy.values)
    return np.sqrt(np.square(in_64_bits(key) - made).sum(-1))


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
def test_a_copy_is_what_a_loop_over_numbers_makes(dtype):
    key = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 3, 16)), dtype)
    copy = _quantize(key)
    assert copy.values.dtype == jnp.int8
    for place in np.ndindex(2, 9, 3):
        row = in_64_bits(key[place])
        scale = np.abs(row).max() / 127
        np.testing.assert_allclose(copy.scale[place], scale, rtol=1e-6)
        for number, x in zip(np.asarray(copy.values[place]), row, strict=True):
            # Either neighbour of a number half-way between them.
            assert abs(number - x / scale) <= 0.5 + 1e-4
        assert np.abs(np.asarray(copy.values[place])).max() == 127


@pytest.mark.parametrize("name", quantization.DTYPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@hypothesis.given(seed=st.integers(0, 2**16), exponent=st.integers(-150, 127))
def test_the_error_bounds_what_is_lost_and_by_little(dtype, name, seed, exponent):
    """Rows of one size and rows of sizes far apart; beyond a dtype's range, of infinities, zeros and subnormals."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(np.stack([np.full(16, 0.0), rng.uniform(-30, 0, 16), rng.uniform(-9, 9, 16)]))
    with np.errstate(over="ignore", under="ignore"):
        key = np.ldexp(rng.normal(size=(3, 16)) * sizes, exponent).astype(np.float32)
    key = jnp.asarray(key).astype(dtype)
    copy = _quantize(key, dtype=name)
    finite = np.isfinite(in_64_bits(key)).all(-1)
    error, lost = in_64_bits(copy.error), lost_by(key, copy)
    assert (error[finite] >= lost[finite]).all()
    length = np.sqrt(np.square(in_64_bits(key)).sum(-1))
    assert (error <= 1.001 * lost + 2e-6 * length + 2.0**-109)[finite].all()
    assert np.isnan(copy.scale[~finite]).all()
    assert np.isinf(error[~finite]).all()


def test_rows_without_a_finite_copy_are_marked_and_others_are_not_touched():
    largest = float(jnp.finfo(jnp.float32).max)
    rows = [
        [np.nan, 1],
        [1, np.inf],
        [-np.inf, np.nan],
        [0, -0.0],
        [1e-45, 0],
        [largest, -1],
        [3, 4],
    ]
    copy = _quantize(jnp.asarray(rows, jnp.float32))
    np.testing.assert_array_equal(np.isnan(copy.scale), [True] * 3 + [False] * 4)
    np.testing.assert_array_equal(np.isinf(copy.error), [True] * 3 + [False] * 4)
    np.testing.assert_array_equal(copy.values[3:], [[0, 0], [0, 0], [127, 0], [95, 127]])
    np.testing.assert_array_equal(copy.scale[3:5], [0, 0])


def test_a_row_that_a_step_appends_is_that_of_the_whole_cache():
    key = jax.random.normal(jax.random.key(0), (2, 5, 3, 16), jnp.bfloat16)
    whole = _quantize(key)
    for place in range(5):
        one = QuantizedKeys(*(x[:, place] for x in whole))
        assert_same_bits(_quantize(key[:, place]), one)


@functools.partial(jax.jit, static_argnames=("options",), compiler_options=HURRY)
def _decode(arrays, traced, options):
    out, residuals = pallas_kernels.topk_decode_attention(
        *arrays, return_residuals=True, **traced, **dict(options)
    )
    return out, residuals.lse, residuals.selection


def decode(*arrays, **arguments):
    """Returns out, lse and the selection."""
    traced = {name: x for name, x in arguments.items() if isinstance(x, (jax.Array, QuantizedKeys))}
    static = tuple((name, x) for name, x in arguments.items() if name not in traced)
    return _decode(arrays, traced, static)


def assert_same_bits(got, wanted):
    for (path, x), (_, y) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (got, wanted)), strict=True
    ):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def draw(seed=0, *, b=3, s=60, n=4, k=2, h=16, dtype=jnp.float32, most=20):
    """Returns query, key and value; queries and keys are whole numbers, so that sums of their products are exact."""
    rng = np.random.default_rng(seed)
    query = rng.integers(-most, most + 1, (b, n, h))
    key = rng.integers(-most, most + 1, (b, s, k, h))
    return tuple(jnp.asarray(x, dtype) for x in (query, key, rng.normal(size=(b, s, k, h))))


@pytest.mark.parametrize("name", quantization.DTYPES)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_copy_ranks_and_true_scores_weigh(implementation, name):
    """Against loops in float64."""
    query, key, value = draw(h=8)
    if (
        name == "int8"
    ):  # an element that no query asks for, so large that the copy says little of the others
        query, key = query.at[..., 0].set(0), key.at[..., 0].multiply(30)
    copy = _quantize(key, dtype=name)
    lengths, topk = [60, 33, 0], 7
    out, lse, found = decode(
        query,
        key,
        value,
        topk=topk,
        lengths=jnp.asarray(lengths, jnp.int32),
        quantized_key=copy,
        implementation=implementation,
        scale=0.02,
    )
    other_sets = 0
    for b, head in np.ndindex(3, 4):
        if lengths[b] == 0:
            assert found.count[b, head] == 0
            continue
        q, valid = in_64_bits(query[b, head]), slice(0, lengths[b])
        by_copy = in_64_bits(copy.scale[b, valid, head // 2]) * (
            in_64_bits(copy.values[b, valid, head // 2]) @ q
        )
        true = 0.02 * in_64_bits(key[b, valid, head // 2]) @ q
        kept = np.sort(np.argsort(-by_copy, kind="stable")[:topk])
        np.testing.assert_array_equal(found.indices[b, head], kept)
        other_sets += set(kept) != set(np.argsort(-true, kind="stable")[:topk])
        weights = np.exp(true[kept] - true[kept].max())
        wanted = weights / weights.sum() @ in_64_bits(value[b, kept, head // 2])
        np.testing.assert_allclose(out[b, head], wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(lse[b, head], np.log(np.exp(true[kept]).sum()), atol=1e-5)
    assert other_sets  # else nothing shows what ranks


FORMS = {
    "bf16-window": ({"topk": 5, "window": 17}, jnp.bfloat16),
    "group": ({"topk": 5, "scope": "group", "pooling": "score_max"}, jnp.float32),
    "layer-f16": ({"topk": 5, "scope": "layer"}, jnp.float16),
    "budgets": ({"topk": jnp.asarray([[1], [40], [999]], jnp.int32)}, jnp.float32),
}


@pytest.mark.parametrize(("arguments", "dtype"), FORMS.values(), ids=FORMS.keys())
def test_every_form_of_decode_takes_a_copy(arguments, dtype):
    query, key, value = draw(1, dtype=dtype)
    arguments = arguments | {
        "quantized_key": _quantize(key),
        "lengths": jnp.asarray([60, 33, 15], jnp.int32),
        "scale": 0.02,
    }
    got = decode(query, key, value, implementation="xla", **arguments)
    want = decode(query, key, value, implementation="reference", **arguments)
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    oracle = decode(*wide, implementation="reference", **arguments)
    for x, y, z in zip(got[:2], oracle[:2], want[:2], strict=True):
        testing.assert_accurate(x, y, naive=z)
    assert_same_sets(got[2], want[2])


def assert_same_sets(got, want):
    """Thresholds are rounded: a score by the copy is a product of three numbers."""
    testing.assert_same_selection(got, want._replace(threshold=got.threshold))
    np.testing.assert_allclose(got.threshold, want.threshold, rtol=1e-6)


@pytest.mark.parametrize("certified", [False, True], ids=["ranked", "certified"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_copy_in_pages_is_that_of_a_contiguous_cache(implementation, certified):
    query, key, value = draw(2, s=64)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.permutation(15)[:12].reshape(3, 4), jnp.int32)
    pools = [
        jnp.full((15, 16, 2, 16), jnp.nan).at[table.ravel()].set(x.reshape(12, 16, 2, 16))
        for x in (key, value)
    ]
    arguments = {
        "topk": 7,
        "lengths": jnp.asarray([64, 33, 16], jnp.int32),
        "certified": certified,
        "implementation": implementation,
    }
    pool_copy = _quantize(pools[0])
    got = decode(query, *pools, page_table=table, quantized_key=pool_copy, **arguments)
    assert_same_bits(got, decode(query, key, value, quantized_key=_quantize(key), **arguments))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_certified_is_the_call_without_a_copy_whatever_the_copy_holds(implementation):
    query, key, value = draw(3)
    arguments = {"topk": 7, "implementation": implementation}
    useless = jax.tree.map(jnp.zeros_like, _quantize(key))
    got = decode(query, key, value, quantized_key=useless, certified=True, **arguments)
    assert_same_bits(got, decode(query, key, value, **arguments))


def bad_copies(key):
    copy = quantize_keys(key)
    return {
        "dtype": (copy._replace(values=key), "quantized_key.values got dtype float32, wanted one"),
        "values": (
            copy._replace(values=copy.values[:, 1:]),
            "quantized_key.values got shape (3, 59, 2, 16), wanted (3, 60, 2, 16) as key has it",
        ),
        "scale": (
            copy._replace(scale=copy.scale[..., None]),
            "quantized_key.scale got shape (3, 60, 2, 1), wanted (3, 60, 2)",
        ),
        "error": (
            copy._replace(error=copy.error.astype(jnp.float16)),
            "quantized_key.error got dtype float16, wanted float32",
        ),
    }


@pytest.mark.parametrize("case", ["dtype", "values", "scale", "error"])
def test_a_copy_of_something_else_is_named(case):
    arrays = draw()
    copy, message = bad_copies(arrays[1])[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        pallas_kernels.topk_decode_attention(*arrays, topk=3, quantized_key=copy)


def test_other_bad_input_is_named():
    arrays = draw()
    with pytest.raises(ValueError, match="certified got True, wanted False where quantized_key"):
        pallas_kernels.topk_decode_attention(*arrays, topk=3, certified=True)
    with pytest.raises(ValueError, match="op: quantized_key got tuple, wanted QuantizedKeys"):
        quantization.check("op", tuple(quantize_keys(arrays[1])), arrays[1])
    with pytest.raises(ValueError, match="dtype got 'int4', wanted one of 'int8', 'float8"):
        quantize_keys(arrays[1], dtype="int4")


def refused(**changes):
    """Returns the shapes of a call, to be changed, and what is asked of it."""
    sizes = {"s": 256, "h": 64, "values": jnp.int8, "implementation": "mosaic_gpu"} | changes
    s, h = sizes["s"], sizes["h"]
    spec = jax.ShapeDtypeStruct
    cache = spec((2, s, 2, h), jnp.bfloat16)
    numbers = spec((2, s, 2), jnp.float32)
    copy = QuantizedKeys(spec(cache.shape, sizes["values"]), numbers, numbers)
    return spec((2, 4, h), jnp.bfloat16), cache, cache, copy, sizes["implementation"]


REFUSED = {
    "head-size": (refused(h=72), "head size 72, wanted a multiple of 16"),
    "keys": (refused(s=250), "250 keys, wanted a multiple of 8"),
}


@pytest.mark.parametrize(("case", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("certified", [False, True], ids=["ranked", "certified"])
def test_what_a_kernel_cannot_take_is_refused(case, message, certified):
    *specs, implementation = case
    call = lambda query, key, value, copy: pallas_kernels.topk_decode_attention(
        query,
        key,
        value,
        topk=3,
        quantized_key=copy,
        certified=certified,
        implementation=implementation,
    )
    with pallas_kernels.interpret_mode(), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call, *specs)


# From here on: Mosaic GPU. An interpreted call of all its kernels costs many seconds to compile, so those of one shape share it.

SHAPE = {"b": 3, "s": 208, "n": 4, "k": 2, "h": 64}
TOPK = 5
LENGTHS = (208, 150, 0)


def traps():
    """Keys whose copies rank last and are the best: all that counts of them is rounded away. Others are close together."""
    rng = np.random.default_rng(0)
    query, key, value = draw(**SHAPE, dtype=jnp.bfloat16)
    key = jnp.broadcast_to(jnp.asarray(rng.integers(40, 51, (3, 208, 2, 1)), key.dtype), key.shape)
    row = jnp.full((64,), 60, key.dtype).at[0].set(128 * 127)
    for place in range(7, 7 + TOPK):
        key = key.at[:, 20 * place % 150].set(row)
    return jnp.ones_like(query).at[..., 0].set(0), key, value


def poisoned(count: int):
    query, key, value = draw(5, **SHAPE, dtype=jnp.bfloat16)
    return query, key.at[0, :count, 0].set(jnp.nan).at[0, 3 : 3 + count, 1, 5].set(jnp.inf), value


def constant():
    query, key, value = draw(6, **SHAPE, dtype=jnp.bfloat16)
    return query, jnp.broadcast_to(key[:, :1], key.shape), value


CERTIFIED = {
    # inputs, and whether the copy settles them
    "spread": (lambda: draw(4, **SHAPE, dtype=jnp.bfloat16), True),
    "best-keys-lost-in-the-copy": (traps, True),
    "not-finite": (functools.partial(poisoned, 2), True),
    "more-not-finite-than-are-listed": (functools.partial(poisoned, 130), False),
    "one-key-everywhere": (constant, False),
}


@pytest.fixture(scope="module")
def interpreted():
    """Calls without a copy, ranked by it and certified, each compiled once; the last says whether it fell back."""
    fell_back = []
    original = mosaic_gpu.topk_decode_attention

    def watched(*arrays, **arguments):
        jax.debug.callback(lambda: fell_back.append(True))
        return original(*arrays, **arguments)

    def call(kind, query, key, value, **more):
        if kind != "plain":
            more.setdefault("quantized_key", _quantize(key))
        lengths = jnp.asarray(LENGTHS, jnp.int32)
        with pallas_kernels.interpret_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(mosaic_gpu, "topk_decode_attention", watched)
            fell_back.clear()
            found = decode(
                query,
                key,
                value,
                topk=TOPK,
                lengths=lengths,
                scale=0.125,
                certified=kind == "certified",
                implementation="mosaic_gpu",
                block_sizes=TopKDecodeBlockSizes(num_splits=1),
                **more,
            )
            jax.block_until_ready(found)
            jax.effects_barrier()
        return found, bool(fell_back)

    return call


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize(
    ("inputs", "settled"),
    [
        pytest.param(
            *case,
            id=name,
            marks=pytest.mark.slow if name in ("not-finite", "one-key-everywhere") else (),
        )
        for name, case in CERTIFIED.items()
    ],
)
def test_certified_has_the_bits_of_the_call_without_a_copy(inputs, settled, interpreted):
    arrays = inputs()
    got, fell_back = interpreted("certified", *arrays)
    wanted, _ = interpreted("plain", *arrays)
    assert_same_bits(got, wanted)
    assert fell_back is not settled


@pytest.mark.parametrize("inputs", ["spread", "best-keys-lost-in-the-copy"])
def test_ranking_by_the_copy_is_that_of_the_reference(inputs, interpreted):
    query, key, value = CERTIFIED[inputs][0]()
    got, _ = interpreted("ranked", query, key, value)
    arguments = {
        "topk": TOPK,
        "lengths": jnp.asarray(LENGTHS, jnp.int32),
        "scale": 0.125,
        "quantized_key": _quantize(key),
        "implementation": "reference",
    }
    want = decode(query, key, value, **arguments)
    oracle = decode(*(x.astype(jnp.float32) for x in (query, key, value)), **arguments)
    for x, y, z in zip(got[:2], oracle[:2], want[:2], strict=True):
        testing.assert_accurate(x, y, naive=z)
    assert_same_sets(got[2], want[2])


def in_pages(array, page: int):
    """Cuts [B, S, ...] into a shuffled pool with spare pages, NaN or the largest number; returns it and the table."""
    b, s, *rest = array.shape
    table = np.random.default_rng(page).permutation(b * s // page + 2)[: b * s // page]
    spare = jnp.nan if jnp.issubdtype(array.dtype, jnp.floating) else 127
    pool = jnp.full((b * s // page + 2, page, *rest), spare, array.dtype)
    pool = pool.at[table].set(array.reshape(-1, page, *rest))
    return pool, jnp.asarray(table.reshape(b, -1), jnp.int32)


SCORED = {
    # page, query heads, key/value heads, head size, dtype, the copy's
    "pages-of-16": (16, 6, 3, 64, jnp.bfloat16, "int8"),
    "pages-of-256": (256, 4, 2, 64, jnp.float32, "int8"),
    "e4m3": (None, 4, 4, 64, jnp.bfloat16, "float8_e4m3fn"),
    "e4m3-80-pages-of-64": (64, 4, 2, 80, jnp.float32, "float8_e4m3fn"),
    "48-f16": (None, 9, 1, 48, jnp.float16, "int8"),
    "40-heads-of-16": (None, 40, 1, 16, jnp.bfloat16, "int8"),
}


@pytest.mark.parametrize("case", SCORED.values(), ids=SCORED.keys())
def test_scores_by_a_copy_are_exact_where_numbers_are_whole(case):
    """Each number of the copy is whole, and so are sums; what follows are two products in float32."""
    page, n, k, h, dtype, name = case
    starts, ends = np.asarray([0, 37, 130, 0]), np.asarray([512, 300, 131, 0])
    query, key, _ = draw(10, b=4, s=512, n=n, k=k, h=h, dtype=dtype, most=14)
    copy = _quantize(key.at[..., 0].set(14), dtype=name)
    numbers = in_64_bits(copy.values)
    assert name == "int8" or (numbers == 32 * in_64_bits(key.at[..., 0].set(14))).all()
    table = None
    if page is not None:
        pools = [in_pages(x, page) for x in copy]
        copy, table = QuantizedKeys(*(pool for pool, _ in pools)), pools[0][1]
        beyond = np.arange(512 // page) * page >= ends[:, None]
        table = jnp.where(beyond, 10**6, table)  # no page at all
    run = jax.jit(
        functools.partial(quantized_gpu._score_copy, bounds=False, scale=0.125, wanted=2),
        compiler_options=HURRY,
    )
    with pallas_kernels.interpret_mode():
        first, last = (jnp.asarray(x, jnp.int32) for x in (starts, ends))
        got = np.asarray(jax.block_until_ready(run(query, copy, first, last, table=table)))
    scales = np.asarray(_quantize(key.at[..., 0].set(14), dtype=name).scale)
    for b, head in np.ndindex(4, n):
        seen = slice(starts[b], ends[b])
        sums = numbers[b, seen, head // (n // k)] @ in_64_bits(query[b, head])
        scale = scales[b, seen, head // (n // k)] * np.float32(0.125)
        np.testing.assert_array_equal(got[b, head, seen], sums.astype(np.float32) * scale)


@pytest.mark.parametrize(
    ("h", "dtype", "name"),
    [
        (64, jnp.bfloat16, "int8"),
        (64, jnp.bfloat16, "float8_e4m3fn"),
        (80, jnp.float16, "int8"),
    ],
    ids=["int8", "e4m3", "int8-80-f16"],
)
def test_bounds_hold_where_they_are_met_and_are_no_wider(h, dtype, name):
    """Each query points to where one key lost most: nothing smaller than the error bounds that score."""
    query, key, _ = draw(7, **SHAPE | {"b": 2, "h": h}, dtype=dtype)
    key = jax.random.normal(jax.random.key(1), key.shape, key.dtype)
    copy = _quantize(key, dtype=name)
    made = copy.scale[..., None] * copy.values.astype(jnp.float32)
    lost = (key.astype(jnp.float32) - made)[:, 11:15]  # of four keys [B, 4, K, H]
    query = jnp.stack([lost[:, head, head // 2] for head in range(4)], axis=1).astype(dtype)
    ends = jnp.asarray([208, 150], jnp.int32)
    bounds = jax.jit(
        functools.partial(quantized_gpu._score_copy, bounds=True, scale=0.5, wanted=1),
        compiler_options=HURRY,
    )
    with pallas_kernels.interpret_mode():
        got = jax.block_until_ready(bounds(query, copy, jnp.zeros_like(ends), ends))
    for b, head in np.ndindex(2, 4):
        true = 0.5 * in_64_bits(key[b, : ends[b], head // 2]) @ in_64_bits(query[b, head])
        slack = in_64_bits(got[b, head, : ends[b]]) - true
        assert (slack >= 0).all()
        size = 0.5 * np.linalg.norm(in_64_bits(query[b, head]))
        width = size * in_64_bits(copy.error[b, : ends[b], head // 2])
        assert slack[11 + head] <= 0.06 * width[11 + head]
        assert (slack <= 2.06 * width).all()


@pytest.mark.parametrize(("h", "page"), [(80, None), (64, 16)], ids=["80", "64-pages-of-16"])
def test_scoring_again_has_the_bits_of_the_call_without_a_copy(h, page):
    """Of whole numbers: the simulator does not sum in the order of tensor cores."""
    query, key, _ = draw(11, b=2, s=256, n=4, k=2, h=h, dtype=jnp.bfloat16)
    places = np.random.default_rng(0).permuted(np.tile(np.arange(256), (2, 4, 1)), axis=2)
    counts = np.asarray([[256, 200, 1, 0], [128, 129, 127, 256]])
    places, ends = jnp.asarray(places, jnp.int32), jnp.full((2,), 256, jnp.int32)
    rows, keys = places, key
    if page is not None:
        pool, table = in_pages(key, page)
        rows = quantized_gpu._rows_of(places, table, QuantizedKeys(pool, pool, pool))
        keys = pool.reshape(1, -1, 2, h)
    again = jax.jit(functools.partial(quantized_gpu._rescore, scale=0.125), compiler_options=HURRY)
    plain = jax.jit(
        functools.partial(mosaic_gpu._scores, scale=0.125, wanted=1), compiler_options=HURRY
    )
    with pallas_kernels.interpret_mode():
        got = jax.block_until_ready(again(query, keys, rows, jnp.asarray(counts, jnp.int32)))
        wanted = jax.block_until_ready(plain(query, key, jnp.zeros_like(ends), ends))
    for b, head in np.ndindex(2, 4):
        listed = places[b, head, : counts[b, head]]
        assert_same_bits(got[b, head, : counts[b, head]], wanted[b, head, listed])


FORMS_OF_A_COPY = {
    # page, head size, the copy's dtype
    "e4m3-in-pages-of-16": (16, 64, "float8_e4m3fn"),
    "e4m3": (None, 64, "float8_e4m3fn"),
    "int8-in-pages-of-16": (16, 64, "int8"),
    "int8-80": (None, 80, "int8"),
}


@pytest.mark.parametrize("certified", [False, True], ids=["ranked", "certified"])
@pytest.mark.parametrize(
    ("page", "h", "name"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if index else ())
        for index, (name, case) in enumerate(FORMS_OF_A_COPY.items())
    ],
)
def test_other_forms_of_a_copy_decode_like_the_usual_one(page, h, name, certified, interpreted):
    """Certified, the bits of the call without a copy and pages; else the sets of the reference."""
    query, key, value = draw(4, **SHAPE | {"h": h}, dtype=jnp.bfloat16, most=14)
    key = key.at[..., 0].set(14)
    arrays, more = (query, key, value), {"quantized_key": _quantize(key, dtype=name)}
    if page is not None:
        (key_pool, table), (value_pool, _) = in_pages(key, page), in_pages(value, page)
        arrays, more["page_table"] = (query, key_pool, value_pool), table
        more["quantized_key"] = _quantize(key_pool, dtype=name)
    got, fell_back = interpreted("certified" if certified else "ranked", *arrays, **more)
    if certified:
        wanted, _ = interpreted("plain", query, key, value)
        assert_same_bits(got, wanted)
        assert not fell_back
        return
    arguments = {
        "topk": TOPK,
        "lengths": jnp.asarray(LENGTHS, jnp.int32),
        "scale": 0.125,
        "quantized_key": _quantize(key, dtype=name),
        "implementation": "reference",
    }
    wanted = decode(query, key, value, **arguments)
    oracle = decode(*(x.astype(jnp.float32) for x in (query, key, value)), **arguments)
    for x, y, z in zip(got[:2], oracle[:2], wanted[:2], strict=True):
        testing.assert_accurate(x, y, naive=z)
    assert_same_sets(got[2], wanted[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "k", "h", "dtype"),
    [(9, 3, 64, jnp.float16), (16, 1, 128, jnp.bfloat16)],
    ids=["9-of-3x64-f16", "16-of-1x128-bf16"],
)
def test_certified_has_the_bits_of_the_call_without_a_copy_in_other_shapes(n, k, h, dtype):
    query, key, value = draw(8, b=2, s=1000, n=n, k=k, h=h, dtype=dtype)
    arguments = {
        "topk": 70,
        "lengths": jnp.asarray([1000, 301], jnp.int32),
        "window": 900,
        "scale": 0.125,
        "implementation": "mosaic_gpu",
    }
    with pallas_kernels.interpret_mode():
        wanted = jax.block_until_ready(decode(query, key, value, **arguments))
        arguments |= {"quantized_key": _quantize(key), "certified": True}
        got = jax.block_until_ready(decode(query, key, value, **arguments))
    assert_same_bits(got, wanted)


RACED = {
    # page, head size, the copy's dtype, certified
    "ranked": (None, 64, "int8", False),
    "certified": (None, 64, "int8", True),
    "certified-e4m3-80-in-pages-of-32": (32, 80, "float8_e4m3fn", True),
}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "h", "name", "certified"), RACED.values(), ids=RACED.keys())
def test_kernels_of_a_copy_have_no_race(page, h, name, certified):
    query, key, value = draw(9, b=1, s=640, n=1, k=1, h=h, dtype=jnp.bfloat16)
    table = None
    if page is not None:
        (key, table), (value, _) = in_pages(key, page), in_pages(value, page)
    with pallas_kernels.interpret_mode(detect_races=True):
        jax.block_until_ready(
            pallas_kernels.topk_decode_attention(
                query,
                key,
                value,
                topk=70,
                quantized_key=quantize_keys(key, dtype=name),
                certified=certified,
                implementation="mosaic_gpu",
                block_sizes=TopKDecodeBlockSizes(num_splits=1),
                page_table=table,
            )
        )


SPEC = jax.ShapeDtypeStruct


def decode_at(b, s, n, k, h, dtype, certified, topk=2048):
    fn = lambda query, key, value, lengths, *copy: pallas_kernels.topk_decode_attention(
        query,
        key,
        value,
        topk=topk,
        lengths=lengths,
        quantized_key=QuantizedKeys(*copy),
        certified=certified,
        implementation="mosaic_gpu",
    )
    cache, numbers = SPEC((b, s, k, h), dtype), SPEC((b, s, k), jnp.float32)
    copy = SPEC(cache.shape, jnp.int8), numbers, numbers
    return fn, SPEC((b, n, h), dtype), cache, cache, SPEC((b,), jnp.int32), *copy


COMPILED = {
    "ranked-8x131072-32-of-8x128": decode_at(8, 131072, 32, 8, 128, jnp.bfloat16, False),
    "certified-8x131072-32-of-8x128": decode_at(8, 131072, 32, 8, 128, jnp.bfloat16, True),
    "certified-2x8192-9-of-3x64-f16": decode_at(2, 8192, 9, 3, 64, jnp.float16, True, 500),
}


def pieces_at(page, b, s, n, k, h, dtype, name):
    """The kernels that read keys or their copy: scores and bounds by the copy, and the scores of listed keys."""

    def fn(query, key, lengths, table, rows, *copy):
        start, count = jnp.zeros_like(lengths), jnp.zeros(query.shape[:2], jnp.int32)
        if page is None:
            table = None
        else:
            key = key.reshape(1, -1, *key.shape[2:])
        by_copy = functools.partial(
            quantized_gpu._score_copy, query, QuantizedKeys(*copy), start, lengths, 1.0, None, table
        )
        found = by_copy(bounds=False)
        if dtype == jnp.float32:  # which is not certified
            return found
        return found, by_copy(bounds=True), quantized_gpu._rescore(query, key, rows, count, 1.0)

    tokens = (b, s) if page is None else (b * s // page, page)
    cache, numbers = SPEC((*tokens, k, h), dtype), SPEC((*tokens, k), jnp.float32)
    table, rows = SPEC((b, s // (page or s)), jnp.int32), SPEC((b, n, 640), jnp.int32)
    copy = SPEC(cache.shape, name), numbers, numbers
    return fn, SPEC((b, n, h), dtype), cache, SPEC((b,), jnp.int32), table, rows, *copy


BFLOAT16, FLOAT16, E4M3 = jnp.bfloat16, jnp.float16, "float8_e4m3fn"
PIECES = {
    "int8": pieces_at(None, 8, 131072, 32, 8, 128, BFLOAT16, "int8"),
    "e4m3": pieces_at(None, 8, 131072, 32, 8, 128, BFLOAT16, E4M3),
    "pages-of-16": pieces_at(16, 8, 131072, 32, 8, 128, BFLOAT16, "int8"),
    "80": pieces_at(None, 2, 8192, 8, 4, 80, BFLOAT16, "int8"),
    "e4m3-f32": pieces_at(None, 2, 8192, 32, 2, 128, jnp.float32, E4M3),
    "e4m3-96-pages-of-64-f16": pieces_at(64, 2, 8192, 12, 4, 96, FLOAT16, E4M3),
    "240-f16": pieces_at(None, 2, 8192, 16, 1, 240, FLOAT16, "int8"),
    "e4m3-256-64-heads-pages-of-256": pieces_at(256, 2, 8192, 64, 1, 256, BFLOAT16, E4M3),
    "16-f16": pieces_at(None, 2, 8192, 8, 8, 16, FLOAT16, "int8"),
}


@pytest.mark.parametrize("name", ["int8", "e4m3", "pages-of-16", "80"])
def test_kernels_of_a_copy_lower_for_a_hopper_gpu(name):
    fn, *specs = PIECES[name]
    assert "mosaic_gpu" in gpu_aot.lower_gpu(fn, *specs).as_text()


@gpu_aot.needs_compiler
@pytest.mark.parametrize("case", PIECES.values(), ids=PIECES.keys())
def test_kernels_of_every_form_of_a_copy_compile_without_spills(case, monkeypatch, capfd):
    gpu_aot.compile_without_spills(*case, monkeypatch=monkeypatch, capfd=capfd)


@gpu_aot.needs_compiler
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_kernels_of_a_copy_compile_without_spills_and_copy_no_cache(case, monkeypatch, capfd):
    compiled = gpu_aot.compile_without_spills(*case, monkeypatch=monkeypatch, capfd=capfd)
    # Rows of scores, and lists.
    key = case[2]
    cache = key.size * key.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 4
