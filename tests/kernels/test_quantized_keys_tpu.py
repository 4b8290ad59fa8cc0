"""Decoding ranked by eight-bit keys on TPUs, interpreted on a CPU: sets and values, what is read, races, refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels as pk
from pallas_kernels import QuantizedKeys, quantize_keys, testing
from pallas_kernels.core import quantization
from pallas_kernels.ops.gather_attention import xla
from pallas_kernels.ops.topk_decode_attention import quantized_tpu
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from tests.kernels import aot

HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests cost
SMALL = TopKDecodeBlockSizes(block_kv=128)


def run(fn, *args):
    """Runs `fn` compiled as a whole."""
    return jax.block_until_ready(jax.jit(fn, compiler_options=HURRY)(*args))


def interpreted(fn, *args, **options):
    """Runs `fn` as `run` does, under `interpret_mode(**options)`."""
    with pk.interpret_mode(**options):
        return run(fn, *args)


def decode(implementation, **options):
    options = {"scale": 0.02, "block_sizes": SMALL, "return_residuals": True} | options
    return lambda query, key, value, copy, lengths: pk.topk_decode_attention(
        query,
        key,
        value,
        lengths=lengths,
        quantized_key=copy,
        implementation=implementation,
        **options,
    )


def draw(b, s, n, k, h, v, *, dtype=jnp.float32, copy="int8", most=9):
    """Whole numbers, so that products with the copy's are exact; most of a key's elements are lost in its copy."""
    rng = np.random.default_rng(0)
    query = rng.integers(-3, 4, (b, n, h))
    key = rng.integers(-most, most + 1, (b, s, k, h))
    # An element that no query asks for, of few sizes, so that scales differ and scores are tied all the same.
    query[..., 0], key[..., 0] = 0, 2 ** rng.integers(9, 12, (b, s, k))
    key = jnp.asarray(key, dtype)
    value = jnp.asarray(rng.normal(size=(b, s, k, v)), dtype)
    return jnp.asarray(query, dtype), key, value, quantize_keys(key, copy)


def hide(arrays, lengths, window=None):
    """Fills what no row may see: keys, values, scales with NaN, the copy with its largest number."""
    query, key, value, copy = arrays
    index, lengths = np.arange(key.shape[1]), np.asarray(lengths)[:, None]
    hidden = (index >= lengths) | (index < lengths - (window or key.shape[1]))
    fill = lambda x, with_: jnp.where(hidden.reshape(hidden.shape + (1,) * (x.ndim - 2)), with_, x)
    values = fill(copy.values, jnp.asarray(127, copy.values.dtype))
    copy = QuantizedKeys(values, fill(copy.scale, jnp.nan), fill(copy.error, jnp.nan))
    return query, fill(key, jnp.nan), fill(value, jnp.nan), copy


def assert_alike(got, wanted):
    (out, residuals), (wanted_out, wanted_residuals) = got, wanted
    testing.assert_same_selection(residuals.selection, wanted_residuals.selection)
    testing.assert_accurate(out, wanted_out, name="out")
    testing.assert_accurate(residuals.lse, wanted_residuals.lse, name="lse")


@pytest.mark.parametrize("name", quantization.DTYPES)
def test_every_number_is_taken_out_of_its_word(name):
    numbers = jnp.arange(256, dtype=jnp.uint8)
    wanted = jax.lax.bitcast_convert_type(numbers, jnp.dtype(name)).astype(jnp.float32)
    others = np.random.default_rng(0).integers(0, 256, (256, 4))
    for byte in range(4):
        parts = jnp.asarray(others, jnp.uint8).at[:, byte].set(numbers)
        got = quantized_tpu._number(
            jax.lax.bitcast_convert_type(parts, jnp.int32), byte, jnp.dtype(name)
        )
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(jnp.float32), wanted)


CASES = {  # shape (B, S, N, K, H, V), lengths, options
    "words of two lines": ((2, 300, 16, 8, 128, 128), (300, 129), {}),
    "words of one line, float8": ((2, 257, 12, 4, 32, 16), (257, 0), {"copy": "float8_e4m3fn"}),
    "wide heads": ((1, 140, 8, 8, 256, 128), (139,), {}),
    "heads apart": ((3, 384, 9, 3, 64, 64), (384, 129, 0), {}),
    "heads apart, float8": ((1, 200, 6, 1, 16, 8), (200,), {"copy": "float8_e4m3fn"}),
    "window": ((3, 640, 4, 4, 16, 16), (640, 300, 20), {"window": 140}),
    "more than there are": ((2, 200, 2, 2, 16, 16), (200, 5), {"topk": 201}),
    "a budget a row": (
        (3, 200, 2, 1, 16, 16),
        (200, 150, 3),
        {"topk": jnp.asarray([[1], [40], [300]], jnp.int32)},
    ),
}


@pytest.fixture
def gathered_by_xla(monkeypatch):
    """Attends to the lists by `xla`, whose result is the same and which compiles in a tenth of the time."""
    gather = quantized_tpu.gather_attention
    monkeypatch.setattr(gather, "gather_attention", xla.gather_attention)


SLOW = "wide heads", "heads apart, float8"


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CASES]
)
def test_the_set_is_that_of_the_reference(case, gathered_by_xla):
    shape, lengths, options = CASES[case]
    options = {"topk": 7} | options
    arrays = draw(*shape, copy=options.pop("copy", "int8"))
    hidden = hide(arrays, lengths, options.get("window"))
    lengths = jnp.asarray(lengths, jnp.int32)
    got = interpreted(decode("mosaic_tpu", **options), *hidden, lengths)
    by_copy, by_keys = run(
        lambda *x: [decode("reference", certified=c, **options)(*x) for c in (False, True)],
        *arrays,
        lengths,
    )
    assert_alike(got, by_copy)
    # Else nothing shows what ranks; where all keys are kept, nothing can.
    lists = [x[1].selection.tie_cut for x in (by_copy, by_keys)]
    assert case == "more than there are" or np.any(lists[0] != lists[1])


@pytest.mark.parametrize(
    ("scope", "pooling"),
    [
        ("group", "prob_sum"),
        pytest.param("group", "score_mean", marks=pytest.mark.slow),
        ("layer", "prob_max"),
    ],
)
def test_heads_share_a_selection(scope, pooling, gathered_by_xla):
    query, key, value, _ = draw(2, 300, 12, 4, 16, 16)
    key = jnp.asarray(np.random.default_rng(1).normal(size=key.shape), jnp.float32)
    # What one head cannot rank, its pool cannot either.
    arrays = query, key, value, quantize_keys(key.at[0, 7, 0].set(jnp.nan))
    lengths = jnp.asarray([300, 133], jnp.int32)
    options = dict(topk=9, scope=scope, pooling=pooling, scale=0.1)
    got = interpreted(decode("mosaic_tpu", **options), *arrays, lengths)
    wanted = run(decode("reference", **options), *arrays, lengths)
    # Pooled thresholds are sums of logarithms, equal to rounding; on these scores that moves no key.
    threshold = got[1].selection.threshold
    np.testing.assert_allclose(threshold, wanted[1].selection.threshold, atol=1e-4)
    selected = wanted[1].selection._replace(threshold=threshold)
    assert_alike(got, (wanted[0], wanted[1]._replace(selection=selected)))


def test_in_bfloat16_it_is_as_good_as_rounding_allows():
    """Attends to the lists by its own kernel."""
    arrays = draw(2, 200, 8, 4, 128, 128, dtype=jnp.bfloat16)
    lengths = jnp.asarray([200, 130], jnp.int32)
    got = interpreted(decode("mosaic_tpu", topk=20), *arrays, lengths)
    naive = run(decode("reference", topk=20), *arrays, lengths)
    exact = [x.astype(jnp.float32) for x in arrays[:3]]
    oracle = run(decode("reference", topk=20), *exact, arrays[3], lengths)
    testing.assert_same_selection(got[1].selection, naive[1].selection)
    testing.assert_accurate(got[0], oracle[0], naive=naive[0])
    testing.assert_accurate(got[1].lse, oracle[1].lse, naive=naive[1].lse)


PAGED = {  # pages, page, K, lengths, options
    "128, words": (3, 128, 4, (384, 100), {"window": 140}),
    "256, heads apart": (2, 256, 2, (512, 257), {"scope": "group", "pooling": "score_max"}),
}


@pytest.mark.parametrize("case", PAGED)
def test_pages_give_the_bits_of_the_contiguous_cache(case, gathered_by_xla):
    pages, page, k, lengths, options = PAGED[case]
    arrays = draw(2, pages * page, 4, k, 16, 16)
    query, *caches = hide(arrays, lengths, options.get("window"))
    places = np.random.default_rng(1).permutation(2 * pages + 3)[: 2 * pages].reshape(2, pages)

    def pool(x):
        whole = np.full((2 * pages + 3, page, *x.shape[2:]), 77, x.dtype)
        whole[places] = np.asarray(x).reshape(2, pages, page, *x.shape[2:])
        return jnp.asarray(whole)

    # Entries of pages past a length lead nowhere.
    seen = np.arange(pages) * page < np.asarray(lengths)[:, None]
    table = jnp.asarray(np.where(seen, places, 10**6), jnp.int32)
    lengths = jnp.asarray(lengths, jnp.int32)
    fn = lambda table, query, *x: decode("mosaic_tpu", topk=7, page_table=table, **options)(
        query, *x, lengths
    )
    paged = interpreted(fn, table, query, *jax.tree.map(pool, caches))
    contiguous = interpreted(lambda *x: fn(None, *x), query, *caches)
    for x, y in zip(*map(jax.tree.leaves, (paged, contiguous)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(np.asarray(paged[0])).all()


@pytest.mark.parametrize("k", [4, 2], ids=["words", "heads apart"])
def test_it_runs_without_races_on_uninitialised_memory(k):
    arrays = draw(2, 300, 4, k, 8, 8)
    lengths = [300, 140]
    hidden = hide(arrays, lengths)
    lengths = jnp.asarray(lengths, jnp.int32)
    options = dict(topk=4, scope="group", pooling="score_max")
    got = interpreted(decode("mosaic_tpu", **options), *hidden, lengths, detect_races=True)
    assert_alike(got, run(decode("reference", **options), *arrays, lengths))


def test_it_gives_the_same_bits_again_and_in_any_order(gathered_by_xla):
    arrays = draw(3, 200, 4, 2, 16, 16)
    lengths, order = jnp.asarray([200, 150, 31], jnp.int32), jnp.asarray([2, 0, 1])
    kernel = jax.jit(decode("mosaic_tpu", topk=9), compiler_options=HURRY)
    moved = jax.tree.map(lambda x: x[order], (*arrays, lengths))
    with pk.interpret_mode():
        runs = [kernel(*x) for x in ((*arrays, lengths), (*arrays, lengths), moved)]
    for x, y, z in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x[order], z)


def test_it_copies_only_the_blocks_that_are_visible(monkeypatch, gathered_by_xla):
    copied = []

    class Watched:
        def __init__(self, source, target, semaphore):
            self.copy = original(source, target, semaphore)
            self.wait = self.copy.wait
            self.dtype = jnp.dtype(source.dtype).name

        def start(self):
            jax.debug.callback(lambda: copied.append(self.dtype))
            self.copy.start()

    original = pltpu.make_async_copy
    monkeypatch.setattr(quantized_tpu.pltpu, "make_async_copy", Watched)
    arrays = draw(2, 640, 2, 1, 16, 16)
    # Keys 256 to 599 are visible in blocks 2, 3 and 4; none of the other sequence.
    lengths = jnp.asarray([600, 0], jnp.int32)
    interpreted(decode("mosaic_tpu", topk=4, window=344), *arrays, lengths)
    jax.effects_barrier()
    assert sorted(copied) == ["float32"] * 3 + ["int8"] * 3


def test_certified_makes_the_call_without_a_copy():
    *arrays, copy = draw(2, 140, 4, 2, 16, 16)
    program = lambda copy, **options: jax.make_jaxpr(decode("mosaic_tpu", topk=5, **options))(
        *arrays, copy, jnp.asarray([140, 60], jnp.int32)
    )
    with pk.interpret_mode():
        certified, plain, by_copy = program(copy, certified=True), program(None), program(copy)
    equations = lambda jaxpr: re.sub(" at 0x[0-9a-f]+", "", str(jaxpr.eqns))
    assert equations(certified) == equations(plain) != equations(by_copy)


# ------------------------------------------------------------------------------------------------- lowering, refusals

SPEC = jax.ShapeDtypeStruct


def specs(s, n, k, h, *, v=None, dtype=jnp.bfloat16, copy=jnp.int8):
    cache, numbers = SPEC((2, s, k, h), dtype), SPEC((2, s, k), jnp.float32)
    copy = QuantizedKeys(SPEC(cache.shape, copy), numbers, numbers)
    value = SPEC((2, s, k, v or h), dtype)
    return SPEC((2, n, h), dtype), cache, value, copy, SPEC((2,), jnp.int32)


@pytest.mark.parametrize("copy", [jnp.int8, jnp.float8_e4m3fn], ids=quantization.DTYPES)
@pytest.mark.parametrize("k", [8, 2])
@pytest.mark.parametrize("chip", aot.DEVICE_KINDS)
def test_it_lowers_for_every_generation(chip, k, copy):
    fn = decode("mosaic_tpu", topk=70)
    text = aot.lower_tpu(fn, *specs(1024, 8, k, 128, copy=copy), chip=chip).as_text()
    words = "_words" if k == 8 else ""
    assert f"topk_decode_copy_{jnp.dtype(copy).name}_g8_kv128{words}" in text


REFUSED = {
    "float16": (dict(dtype=jnp.float16), {}, "query of dtype float16, wanted float32 or bfloat16"),
    "head-size": (dict(h=64), {}, "key of head size 64, wanted a multiple of 128"),
    "heads": (dict(n=6, k=3), {}, "key of 3 heads in bfloat16, wanted 2, 4 or a multiple of 8"),
    "keys": (
        dict(k=2, s=1001),
        {},
        "a quantized_key of 1001 keys of 2 heads, wanted a multiple of 8",
    ),
    "splits": (
        {},
        dict(block_sizes=TopKDecodeBlockSizes(num_splits=2)),
        "num_splits=2, wanted 1 ",
    ),
    "memory": (dict(s=1 << 21), {"topk": 9}, "8 rows of S=2097152 and 8 lists of 9, which needs"),
}


@pytest.mark.parametrize(("shape", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_run_is_refused_by_name(shape, options, message):
    arrays = specs(**(dict(s=1024, n=8, k=8, h=128) | shape))
    fn = decode("mosaic_tpu", **{"topk": 3} | options)
    with pytest.raises(NotImplementedError, match=f"topk_decode_attention: .*{re.escape(message)}"):
        aot.lower_tpu(fn, *arrays, chip="v5p")


def test_small_pages_are_refused():
    query, key, value, copy, lengths = specs(64, 8, 8, 128)
    fn = lambda table, *arrays: decode("mosaic_tpu", topk=3, page_table=table)(*arrays)
    table = SPEC((2, 1), jnp.int32)
    message = (
        "a page_table of pages of 64 tokens beside a quantized_key, wanted pages of at least 128"
    )
    with pytest.raises(NotImplementedError, match=message):
        aot.lower_tpu(fn, table, query, key, value, copy, lengths, chip="v5e")
