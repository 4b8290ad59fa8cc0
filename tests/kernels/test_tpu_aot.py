"""The Mosaic TPU kernels compile for v5e, v5p, v6e and tpu7x, fit, and make no copy of the cache; nothing is executed."""

import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from tests.kernels import aot

pytestmark = pytest.mark.tpu_aot

F32, BF16 = jnp.float32, jnp.bfloat16
INT8, FP8 = jnp.int8, jnp.float8_e4m3fn
SMALL = 1 << 20  # bytes: what the compiler keeps for itself; any copy of a cache is larger
spec = jax.ShapeDtypeStruct
every_chip = pytest.mark.parametrize("chip", aot.TOPOLOGIES)


def on_every_chip(cases, *, by_default: int):
    """Runs the first cases on every chip, and by default the others on the smallest one alone."""
    runs = [
        pytest.param(
            case,
            chip,
            id=f"{case}-{chip}",
            marks=() if index < by_default or chip == "v5e" else pytest.mark.slow,
        )
        for index, case in enumerate(cases)
        for chip in aot.TOPOLOGIES
    ]
    return pytest.mark.parametrize(("case", "chip"), runs)


def compile_select(shape, dtype, *, chip, **kwargs):
    select = lambda x, n: pk.topk_select(x, 2048, lengths=n, implementation="mosaic_tpu", **kwargs)
    return aot.compile_tpu(select, spec(shape, dtype), spec(shape[:-1], jnp.int32), chip=chip)


def compile_decode(b, s, n, k, h, v, dtype, *, chip, topk=64, **kwargs):
    decode = lambda q, key, value, lengths: pk.topk_decode_attention(
        q, key, value, topk=topk, lengths=lengths, implementation="mosaic_tpu", **kwargs
    )
    shapes = (b, n, h), (b, s, k, h), (b, s, k, v)
    arrays = [spec(shape, dtype) for shape in shapes]
    return aot.compile_tpu(decode, *arrays, spec((b,), jnp.int32), chip=chip)


def compile_paged_decode(b, pages, page, n, k, h, v, dtype, *, chip, **kwargs):
    decode = lambda q, key, value, lengths, table: pk.topk_decode_attention(
        q,
        key,
        value,
        topk=64,
        lengths=lengths,
        page_table=table,
        implementation="mosaic_tpu",
        **kwargs,
    )
    shapes = (b, n, h), (b * pages, page, k, h), (b * pages, page, k, v)
    arrays = [spec(shape, dtype) for shape in shapes]
    integers = spec((b,), jnp.int32), spec((b, pages), jnp.int32)
    return aot.compile_tpu(decode, *arrays, *integers, chip=chip)


def compile_quantized_decode(b, s, n, k, h, v, dtype, copy, *, chip, page=None, topk=64, **kwargs):
    decode = lambda q, key, value, lengths, values, scale, error, *table: pk.topk_decode_attention(
        q,
        key,
        value,
        topk=topk,
        lengths=lengths,
        quantized_key=pk.QuantizedKeys(values, scale, error),
        page_table=table[0] if table else None,
        implementation="mosaic_tpu",
        **kwargs,
    )
    tokens = (b, s, k) if page is None else (b * s // page, page, k)
    arrays = spec((b, n, h), dtype), spec((*tokens, h), dtype), spec((*tokens, v), dtype)
    copy = spec((*tokens, h), copy), spec(tokens, F32), spec(tokens, F32)
    table = () if page is None else (spec((b, s // page), jnp.int32),)
    return aot.compile_tpu(decode, *arrays, spec((b,), jnp.int32), *copy, *table, chip=chip)


def compile_gather(b, t, s, n, k, scopes, slots, dtype, *, chip, page=None, head=128):
    gather = lambda q, key, value, indices, *table: pk.gather_attention(
        q, key, value, indices, page_table=table[0] if table else None, implementation="mosaic_tpu"
    )
    cache = spec((b, s, k, head) if page is None else (b * s // page, page, k, head), dtype)
    arrays = spec((b, t, n, head), dtype), cache, cache, spec((b, t, scopes, slots), jnp.int32)
    table = () if page is None else (spec((b, s // page), jnp.int32),)
    return aot.compile_tpu(gather, *arrays, *table, chip=chip)


def assert_nothing_long_is_made(compiled):
    text = compiled.as_text()
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", text)) == 1
    assert " sort(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < SMALL


@every_chip
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((32, 131072), F32), ((37, 1001), BF16), ((3, 5), F32), ((1, 1 << 20), F32)],
    ids=["131072", "uneven bf16", "tiny", "a million"],
)
def test_select_compiles(shape, dtype, chip):
    assert_nothing_long_is_made(compile_select(shape, dtype, with_indices=False, chip=chip))


# B, S, N, K, H, V, dtype, options. S 131072 at 32 heads is a third of what v5p and tpu7x can hold.
DECODES = {
    "llama 128k": ((8, 131072, 32, 8, 128, 128, BF16), {"topk": 2048}),
    "smollm2 bf16": ((8, 8192, 9, 3, 64, 64, BF16), {}),
    "smollm2 f32": ((8, 8192, 9, 3, 64, 64, F32), {}),
    "uneven capacity": ((2, 8200, 8, 8, 128, 128, F32), {}),
    "head-major, uneven": ((2, 8208, 10, 5, 128, 128, BF16), {}),
    "one kv head": ((2, 8192, 8, 1, 128, 64, BF16), {"window": 500}),
    "group scope": ((2, 8192, 32, 8, 128, 128, BF16), {"scope": "group"}),
    "layer scope": ((2, 8192, 9, 3, 64, 64, BF16), {"scope": "layer", "pooling": "score_mean"}),
}


@every_chip
@pytest.mark.parametrize("case", DECODES)
def test_decode_compiles_without_a_copy_of_the_cache(case, chip):
    shape, kwargs = DECODES[case]
    assert_nothing_long_is_made(compile_decode(*shape, chip=chip, **kwargs))


# B, pages, page, N, K, H, V, dtype, options.
PAGED = {
    "llama 128k": ((8, 8192, 16, 32, 8, 128, 128, BF16), {}),
    "head-major": ((2, 512, 16, 10, 5, 128, 128, F32), {"window": 500}),
    "narrow heads": ((2, 64, 128, 9, 3, 64, 64, BF16), {"scope": "layer"}),
    "a block of half a page": (
        (2, 32, 256, 8, 2, 128, 128, F32),
        {"block_sizes": TopKDecodeBlockSizes(block_kv=128)},
    ),
}


@on_every_chip(PAGED, by_default=1)
def test_decode_of_pages_compiles_without_a_copy_of_the_pool(case, chip):
    shape, kwargs = PAGED[case]
    assert_nothing_long_is_made(compile_paged_decode(*shape, chip=chip, **kwargs))


# B, S, N, K, H, V, dtype, dtype of the copy, options; the large copy holds 1 GiB.
QUANTIZED = {
    "llama 128k": ((8, 131072, 32, 8, 128, 128, BF16, INT8), {"topk": 2048}),
    "llama 128k, float8": ((8, 131072, 32, 8, 128, 128, BF16, FP8), {"topk": 2048}),
    "llama 128k, paged": ((8, 131072, 32, 8, 128, 128, BF16, INT8), {"topk": 2048, "page": 128}),
    "layer scope": ((8, 131072, 32, 8, 128, 128, BF16, INT8), {"topk": 2048, "scope": "layer"}),
    "group scope": ((2, 8192, 32, 8, 128, 128, BF16, FP8), {"scope": "group"}),
    "one word a token, window": ((2, 8192, 8, 4, 128, 256, BF16, INT8), {"window": 500}),
    "many heads, uneven": ((2, 8201, 32, 32, 128, 128, BF16, INT8), {}),
    "wide heads, f32": ((2, 8192, 16, 8, 256, 128, F32, INT8), {}),
    "two heads, uneven": ((2, 8200, 6, 2, 128, 128, BF16, FP8), {}),
    "two heads, paged": ((2, 8192, 6, 2, 128, 128, BF16, INT8), {"page": 256}),
    "one kv head, f32": ((2, 8192, 8, 1, 128, 128, F32, INT8), {}),
}


@on_every_chip(QUANTIZED, by_default=2)
def test_decode_by_eight_bit_keys_compiles_without_a_copy_of_a_cache(case, chip):
    shape, kwargs = QUANTIZED[case]
    compiled = compile_quantized_decode(*shape, chip=chip, **kwargs)
    text = compiled.as_text()
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", text)) == 2
    assert " sort(" not in text
    # The lists, which are turned to rows of a pool, and laid out part by part; the scales of an uneven capacity.
    b, s, n, k, *_ = shape
    lists = 4 * b * n * kwargs.get("topk", 64)
    scales = 4 * b * k * (s + 128) if s % 128 else 0
    assert compiled.memory_analysis().temp_size_in_bytes < SMALL + 4 * lists + scales


# B, T, S, N, K, G, slots, dtype, page; the caches hold 2 GiB or more where S is 131072.
GATHERS = {
    "layer": (8, 1, 131072, 32, 8, 1, 2048, BF16, None),
    "group": (8, 1, 131072, 32, 8, 8, 2048, BF16, None),
    "head": (8, 1, 131072, 32, 8, 32, 2048, BF16, None),
    "layer, paged": (8, 1, 131072, 32, 8, 1, 2048, BF16, 16),
    "group, paged": (8, 1, 131072, 32, 8, 8, 2048, BF16, 16),
    "head, paged, f32": (4, 1, 131072, 32, 8, 32, 2048, F32, 256),
    "layer, f32": (4, 1, 131072, 32, 8, 1, 2048, F32, None),
    "group, f32, eight rows": (4, 8, 131072, 32, 8, 8, 2048, F32, None),
    "two heads, uneven": (2, 3, 32768, 6, 2, 2, 77, BF16, None),
    "one head": (2, 3, 32768, 5, 1, 1, 77, F32, None),
}


@on_every_chip(GATHERS, by_default=3)
def test_gather_compiles_without_a_copy_of_the_cache(case, chip):
    *shape, page = GATHERS[case]
    compiled = compile_gather(*shape, chip=chip, page=page)
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", compiled.as_text())) == 1
    # The lists are laid out part by part, and turned to rows of the pool before that.
    b, t, *_, scopes, slots, _ = shape
    lists = 4 * b * t * scopes * slots
    assert compiled.memory_analysis().temp_size_in_bytes < SMALL + 4 * lists


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("scopes", [1, 8], ids=["layer", "group"])
def test_gather_compiles_where_heads_are_wider_than_a_register(scopes, dtype):
    compile_gather(2, 1, 8192, 32, 8, scopes, 256, dtype, chip="v5e", head=256)


@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_decode_compiles_where_the_cache_must_be_copied(chip):
    """Heads of 64 lanes at a capacity that is no multiple of 128: right, at the price of a copy."""
    shape = 2, 20, 9, 3, 64, 64, F32
    assert compile_decode(*shape, chip=chip, return_residuals=True) is not None


@pytest.mark.parametrize(
    ("chip", "num_keys"), [("v5p", 393216), ("tpu7x", 393216), ("v5e", 786432)]
)
def test_decode_compiles_near_the_largest_size_that_it_accepts(chip, num_keys):
    shape = 32, 8, 128, 128, BF16
    assert_nothing_long_is_made(compile_decode(1, num_keys, *shape, chip=chip))
    with pytest.raises(NotImplementedError, match=f"32 rows of S={2 * num_keys}"):
        compile_decode(1, 2 * num_keys, *shape, chip=chip)


@pytest.mark.parametrize("block_kv", [128, 1024])
def test_decode_compiles_at_other_block_sizes(block_kv):
    sizes = TopKDecodeBlockSizes(block_kv=block_kv)
    compiled = compile_decode(2, 8192, 32, 8, 128, 128, BF16, chip="tpu7x", block_sizes=sizes)
    assert_nothing_long_is_made(compiled)
    assert f"kv{block_kv}_" in compiled.as_text()


def test_the_estimated_cost_reaches_the_compiler():
    compiled = compile_select((8, 8192), F32, with_indices=False, chip="v6e")
    cost = compiled.cost_analysis()
    assert cost["flops"] >= 8 * 8192 * 64
    assert cost["bytes accessed"] >= 8 * 8192 * 4


# B, T, S, I, D, dtype, topk.
INDEXERS = {
    "decode 128k": (8, 1, 131072, 64, 128, BF16, 2048),
    "decode 128k, narrow heads": (8, 1, 131072, 8, 64, BF16, 2048),
    "prefill 32k": (1, 32768, 32768, 64, 128, BF16, 2048),
    "128k keys": (1, 1024, 131072, 64, 128, BF16, 2048),
    "uneven f32": (5, 3, 1001, 9, 64, F32, 64),
    "uneven bf16": (2, 37, 1001, 2, 32, BF16, 2000),
}


def compile_indexer(op, b, t, s, i, d, dtype, *, chip, **kwargs):
    run = lambda query, key, weights, lengths: op(
        query, key, weights, lengths=lengths, implementation="mosaic_tpu", **kwargs
    )
    shapes = ((b, t, i, d), dtype), ((b, s, d), dtype), ((b, t, i), F32), ((b,), jnp.int32)
    return aot.compile_tpu(run, *(spec(*shape) for shape in shapes), chip=chip)


@every_chip
@pytest.mark.parametrize("case", INDEXERS)
def test_indexer_select_compiles_and_makes_no_scores(case, chip):
    *shape, topk = INDEXERS[case]
    compiled = compile_indexer(pk.indexer_select, *shape, chip=chip, topk=topk)
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", compiled.as_text())) == 1
    rows = shape[0] * shape[1]
    # Two or three numbers a row, filled up to whole lanes; the largest case's scores would be 4 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < SMALL + 64 * rows


@every_chip
@pytest.mark.parametrize("rows", [1, 512], ids=["decode", "prefill"])
def test_indexer_scores_compiles(rows, chip):
    shape = 2, rows, 32768, 64, 128, BF16
    compiled = compile_indexer(pk.indexer_scores, *shape, chip=chip)
    assert compiled.memory_analysis().temp_size_in_bytes < SMALL


@every_chip
@pytest.mark.parametrize(
    ("b", "t", "s"),
    [(4, 1165, 1165), (4, 1, 1165), (1, 1024, 131072)],
    ids=["scene", "one", "128k"],
)
def test_knn_indices_compiles(b, t, s, chip):
    find = lambda query, key, valid: pk.knn_indices(
        query, key, neighbours=16, key_valid=valid, implementation="mosaic_tpu"
    )
    arrays = spec((b, t, 3), F32), spec((b, s, 3), F32), spec((b, s), jnp.bool_)
    compiled = aot.compile_tpu(find, *arrays, chip=chip)
    # Positions are turned to [P, S]; distances of the scene would be 22 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * SMALL


@pytest.mark.parametrize("chip", ["v5p", "tpu7x"])
def test_indexer_select_compiles_near_the_largest_size_that_it_accepts(chip):
    shape = 64, 128, BF16
    assert compile_indexer(pk.indexer_select, 1, 8, 1 << 20, *shape, chip=chip, topk=2048)
    with pytest.raises(NotImplementedError, match=f"8 rows of S={1 << 21}, which needs"):
        compile_indexer(pk.indexer_select, 1, 8, 1 << 21, *shape, chip=chip, topk=2048)
