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
SMALL = 1 << 20  # bytes: what the compiler keeps for itself; any copy of a cache is larger
spec = jax.ShapeDtypeStruct
every_chip = pytest.mark.parametrize("chip", aot.TOPOLOGIES)


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
