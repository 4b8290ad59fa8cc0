"""The Mosaic GPU kernels without a GPU: right in the interpreter, free of races, accepted by the compiler.

An interpreted kernel costs seconds to compile and milliseconds a row, so each test puts many rows into one call.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels.core import gpu_merge, interpret
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from pallas_kernels.ops.topk_select import mosaic_gpu as select_gpu
from pallas_kernels.ops.topk_select import reference as select_reference
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes
from tests.kernels import gpu_aot


def hard_rows(s: int, dtype) -> jax.Array:
    """Rows that break selectors: plateaus, zeros of both signs, NaN, infinities, subnormals, sorted and one-hot rows."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=s)
    place = np.arange(s)
    rows = [
        normal,
        np.round(2 * normal),  # duplicates across every rank
        np.full(s, 3.0),
        np.where(place % 97 == 5, 1.0, 0.0),  # a plateau of zeros after a ReLU
        np.where(place % 2 == 0, -0.0, 0.0),
        np.where(rng.random(s) < 0.5, np.nan, normal),
        np.full(s, np.nan),
        np.select([place % 5 == 0, place % 5 == 1], [np.inf, -np.inf], normal),
        np.where(place % 3 == 0, 1e-40, np.where(place % 3 == 1, -1e-40, 0.0)),  # subnormals
        np.where(
            place % 7 == 0, 1.1754944e-38, -1e-39
        ),  # the smallest normal number among subnormals
        place / s,
        -place / s,
        np.where(place == s - 1, 1.0, -1.0),
        np.where(place < s - 3, -np.inf, np.nan),
        np.sign(normal) * 10.0 ** rng.uniform(-38, 38, size=s),
    ]
    with np.errstate(over="ignore"):
        return jnp.asarray(np.stack(rows).astype(np.float32)).astype(dtype)


def assert_same_selection(got, wanted):
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        if b is None:
            assert a is None, name
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


# What makes a small row take the way of a long one.
SAMPLED = {"_SMALL_ROW": 0, "_DEFAULT_BUDGET": 64}
SPLIT = SAMPLED | {"_SPLIT_KEYS": 600}


@pytest.mark.parametrize(
    ("s", "dtype", "block_s", "sizes"),
    [
        pytest.param(1030, jnp.bfloat16, 512, {}, id="listed-whole"),
        pytest.param(2307, jnp.float32, None, SAMPLED, id="sampled"),
        pytest.param(2308, jnp.float32, 512, SPLIT, id="split"),
    ],
)
def test_select_equals_the_reference_bit_for_bit(s, dtype, block_s, sizes, monkeypatch):
    for name, value in sizes.items():
        monkeypatch.setattr(select_gpu, name, value)
    rows = hard_rows(s, dtype)
    count = rows.shape[0]
    # Every row at its own length, whole rows included, and with its own budget, one and more than all included.
    scores = jnp.concatenate([rows, rows])
    lengths = jnp.concatenate(
        [
            jnp.full((count,), s, jnp.int32),
            jnp.asarray(np.resize([s - 1, 0, 1, 65, s // 2], count), jnp.int32),
        ]
    )
    topk = jnp.asarray(np.resize([7, 1, s, 64, s + 9, 20, 3], 2 * count), jnp.int32)
    arguments = {
        "lengths": lengths,
        "with_indices": False,
        "block_sizes": TopKSelectBlockSizes(block_s=block_s),
    }
    with pallas_kernels.interpret_mode():
        got = pallas_kernels.topk_select(scores, topk, implementation="mosaic_gpu", **arguments)
        jax.block_until_ready(got)
    wanted = pallas_kernels.topk_select(scores, topk, implementation="reference", **arguments)
    assert_same_selection(got, wanted)


def test_select_lists_indices_of_sampled_rows_and_of_those_that_a_sample_misleads(monkeypatch):
    for name, value in SAMPLED.items():
        monkeypatch.setattr(select_gpu, name, value)
    scores = hard_rows(2307, jnp.float32)
    with pallas_kernels.interpret_mode():
        got = pallas_kernels.topk_select(scores, 130, implementation="mosaic_gpu")
        jax.block_until_ready(got)
    wanted = pallas_kernels.topk_select(scores, 130, implementation="reference")
    assert_same_selection(got, wanted)


@pytest.mark.parametrize(
    "sizes",
    # Of the splits, each list fits, and all of them together do not.
    [SAMPLED, SPLIT | {"_MAX_CAPACITY": 1024}],
    ids=["whole", "split"],
)
def test_a_plateau_at_the_threshold_needs_no_search_of_the_whole_row(sizes, monkeypatch):
    for name, value in sizes.items():
        monkeypatch.setattr(select_gpu, name, value)

    def finds_nothing(row, budget, hint, lanes_ref, finish, *_):
        finish(jnp.int32(0), jnp.int32(0), jnp.int32(0), lambda: None)

    monkeypatch.setattr(select_gpu, "search_in_place", finds_nothing)
    place, normal = np.arange(2308), np.random.default_rng(0).normal(size=2308)
    rows = [
        np.where(normal > 2.5, normal, np.where(place % 2 == 0, -0.0, 0.0)),  # after a ReLU
        np.full(2308, -2.5),
        np.where(place > 2270, 1 + normal**2, 0.0),  # the last of several lists holds the best
        np.where(place % 3 == 0, 1e-40, -1e-40),  # subnormals, which equal 0
    ]
    scores = jnp.asarray(np.stack(rows), jnp.float32)
    with pallas_kernels.interpret_mode():
        got = pallas_kernels.topk_select(
            scores,
            60,
            implementation="mosaic_gpu",
            block_sizes=TopKSelectBlockSizes(block_s=512),
        )
        jax.block_until_ready(got)
    wanted = pallas_kernels.topk_select(scores, 60, implementation="reference")
    assert_same_selection(got, wanted)


def test_the_plan_lists_what_it_can_and_splits_only_few_long_rows():
    plan = lambda rows, s, topk: select_gpu._plan(rows, s, s, topk, None, False)
    assert plan(8, 2000, 64).capacity >= 2000
    assert plan(1024, 131072, 2048).splits == 1
    assert plan(32, 131072, 2048).splits > 4
    for rows, s, topk in (
        (1024, 131072, 2048),
        (64, 1 << 20, 2048),
        (4096, 8192, 512),
        (1, 1 << 20, 4096),
    ):
        found = plan(rows, s, topk)
        assert topk * 1.1 < found.capacity < min(4 * topk + 8192, s)
    # Blocks that share a row read a smaller sample each, but not where it would let too much through.
    assert plan(32, 131072, 2048).sample < plan(1024, 131072, 2048).sample
    assert plan(4, 1 << 20, 2048).sample == plan(1024, 1 << 20, 2048).sample


def test_select_takes_one_range_for_several_rows_and_cuts_it_to_the_limit():
    rng = np.random.default_rng(2)
    scores = jnp.asarray(rng.integers(-3, 4, (6, 300)), jnp.float32)
    start, end = jnp.asarray([5, -7, 40], jnp.int32), jnp.asarray([90, 400, 12], jnp.int32)
    with pallas_kernels.interpret_mode():
        got = select_gpu.select(scores, start, end, topk=9, limit=250, listed=("indices",))
        whole = select_gpu.select(scores, topk=9, limit=250, listed=("indices",))
        jax.block_until_ready((got, whole))
    begins = np.repeat(np.clip(start, 0, 250), 2)[:, None]
    ends = np.repeat(np.clip(end, 0, 250), 2)[:, None]
    place = np.arange(300)
    for found, visible in ((got, (place >= begins) & (place < ends)), (whole, place < 250)):
        visible = jnp.broadcast_to(jnp.asarray(visible), scores.shape)
        wanted = select_reference.select(scores, visible, jnp.full((6,), 9))
        for mine, theirs in zip(found[:3], wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_select_lists_indices_of_short_rows_with_any_leading_axes():
    scores = hard_rows(97, jnp.float16).reshape(3, 5, 97)
    lengths = jnp.asarray([97, 0, 3, 96, 64], jnp.int32)
    with pallas_kernels.interpret_mode():
        got = pallas_kernels.topk_select(scores, 6, lengths=lengths, implementation="mosaic_gpu")
        jax.block_until_ready(got)
    wanted = pallas_kernels.topk_select(scores, 6, lengths=lengths, implementation="reference")
    assert_same_selection(got, wanted)


@pytest.mark.parametrize("splits", [1, 3, 37])
def test_parts_are_merged_as_one_softmax_whatever_an_empty_part_is(splits):
    rng = np.random.default_rng(splits)
    m = rng.normal(0, 30, (splits, 2, 3)).astype(np.float32)
    total = rng.uniform(0.5, 4, m.shape).astype(np.float32)
    acc = rng.normal(size=(*m.shape, 128)).astype(np.float32)
    empty = rng.random(m.shape) < 0.3
    empty[:, 1, 2] = True  # a row that sees nothing
    m[empty], total[empty], acc[empty] = -np.inf, 0, 0
    with pallas_kernels.interpret_mode():
        out, lse = gpu_merge.merge_splits(*map(jnp.asarray, (acc, m, total)), jnp.float32)
        jax.block_until_ready(out)
    weight = np.exp(m.astype(np.float64) - np.where(empty.all(0), 0, m.max(0)))
    whole = (weight * total).sum(0)
    with np.errstate(divide="ignore"):
        wanted_lse = np.log(whole) + m.max(0)
    wanted = (weight[..., None] * acc).sum(0) / np.where(whole == 0, 1, whole)[..., None]
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)
    assert np.array_equal(np.isneginf(lse), empty.all(0))


def whole_numbers(shape, seed: int, dtype) -> jax.Array:
    """Small integers: every score is exact and ties are everywhere, so sets can be compared index by index."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, size=shape), dtype)


def assert_close(got, wanted, dtype):
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    relative = 2e-5 if dtype == jnp.float32 else 1.01 * float(jnp.finfo(dtype).eps)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=relative * np.nanmax(np.abs(wanted)))


DECODE_CASES = {
    # batch, keys, query heads, key/value heads, head size, value size, dtype, arguments
    "group-of-three-ragged": (
        3,
        300,
        6,
        2,
        64,
        64,
        jnp.float32,
        {"lengths": [300, 0, 129], "topk": [[9], [4], [200]]},
    ),
    "group-of-eight-pooled": (1, 200, 8, 1, 64, 40, jnp.bfloat16, {"topk": 12, "scope": "group"}),
    "one-to-one-padded-window": (
        2,
        30,
        2,
        2,
        8,
        136,
        jnp.float16,
        {"topk": 4, "lengths": [30, 7], "window": 11},
    ),
}


@pytest.mark.parametrize("case", DECODE_CASES.values(), ids=DECODE_CASES.keys())
def test_decode_equals_the_reference(case):
    b, s, n, k, h, v_size, dtype, arguments = case
    query, key = whole_numbers((b, n, h), 1, dtype), whole_numbers((b, s, k, h), 2, dtype)
    value = jnp.asarray(np.random.default_rng(3).normal(size=(b, s, k, v_size)), dtype)
    arguments = {
        name: jnp.asarray(x, jnp.int32) if isinstance(x, list) else x
        for name, x in arguments.items()
    }
    lengths = arguments.get("lengths", jnp.full((b,), s, jnp.int32))
    decode = lambda key, value, implementation: pallas_kernels.topk_decode_attention(
        query,
        key,
        value,
        scale=0.125,
        return_residuals=True,
        implementation=implementation,
        block_sizes=TopKDecodeBlockSizes(num_splits=2),
        **arguments,
    )
    wanted, wanted_residuals = decode(key, value, "reference")

    # Memory past the lengths, and every value that no head selects, is NaN: none of it may show.
    alive = jnp.arange(s)[None, :] < lengths[:, None]
    kept = np.zeros((b, s, k), bool)
    if wanted_residuals.selection.indices is None:
        kept[:] = np.asarray(alive)[:, :, None]
    else:
        for i, head, _ in np.ndindex(wanted_residuals.selection.indices.shape):
            chosen = np.asarray(wanted_residuals.selection.indices[i, head])
            kept[i, chosen[chosen >= 0], head // (n // k)] = True
    with pallas_kernels.interpret_mode():
        got, residuals = decode(
            jnp.where(alive[:, :, None, None], key, jnp.nan),
            jnp.where(jnp.asarray(kept)[..., None], value, jnp.nan),
            "mosaic_gpu",
        )
        jax.block_until_ready((got, residuals))
    assert got.dtype == dtype
    assert_close(got, wanted, dtype)
    np.testing.assert_allclose(residuals.lse, wanted_residuals.lse, rtol=2e-5, atol=2e-5)
    if arguments.get("scope", "head") == "head":
        assert_same_selection(residuals.selection, wanted_residuals.selection)
    else:  # pooled scores are rounded by exp and log
        np.testing.assert_array_equal(residuals.selection.count, wanted_residuals.selection.count)


def test_a_value_reaches_only_the_heads_that_select_its_key():
    query = jnp.asarray([[[1.0] * 8, [-1.0] * 8]])
    key = jnp.zeros((1, 64, 1, 8)).at[0, 3].set(1.0).at[0, 5].set(-1.0)
    value = jnp.ones((1, 64, 1, 8)).at[0, 3].set(jnp.nan)
    with pallas_kernels.interpret_mode():
        out = pallas_kernels.topk_decode_attention(
            query, key, value, topk=1, implementation="mosaic_gpu"
        )
        out = np.asarray(out)
    assert np.isnan(out[0, 0]).all()
    np.testing.assert_array_equal(out[0, 1], np.ones(8))


def small_decode():
    """More key tiles in a split than buffers, and several tiles of values: every buffer is used again."""
    query, key, value = (
        whole_numbers(shape, 4, jnp.float32)
        for shape in ((1, 1, 8), (1, 384, 1, 8), (1, 384, 1, 8))
    )
    with pallas_kernels.interpret_mode(detect_races=True):
        jax.block_until_ready(
            pallas_kernels.topk_decode_attention(
                query,
                key,
                value,
                topk=100,
                implementation="mosaic_gpu",
                block_sizes=TopKDecodeBlockSizes(num_splits=1),
            )
        )


def small_gather():
    rng = np.random.default_rng(5)
    query, cache = (
        whole_numbers((1, 1, 2, 8), 1, jnp.float32),
        whole_numbers((1, 40, 1, 8), 2, jnp.float32),
    )
    indices = jnp.asarray(rng.integers(-1, 40, size=(1, 1, 1, 300)), jnp.int32)
    return pallas_kernels.gather_attention(
        query, cache, cache, indices, implementation="mosaic_gpu"
    )


def small_indexer():
    query, key = (whole_numbers(shape, 3, jnp.bfloat16) for shape in ((1, 2, 3, 8), (1, 600, 8)))
    weights = whole_numbers((1, 2, 3), 4, jnp.float32)
    return pallas_kernels.indexer_scores(query, key, weights, implementation="mosaic_gpu")


def test_kernels_have_no_race():
    with pallas_kernels.interpret_mode(detect_races=True):
        jax.block_until_ready((small_gather(), small_indexer()))
        jax.block_until_ready(
            pallas_kernels.topk_select(
                hard_rows(150, jnp.float32)[:2], 7, implementation="mosaic_gpu"
            )
        )
    small_decode()


def test_the_race_detector_sees_a_missing_fence(monkeypatch, capfd):
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with pytest.raises(interpret.RaceError, match="Mosaic GPU"):
        small_decode()


SPEC = jax.ShapeDtypeStruct


def select_at(rows, s, topk, dtype):
    fn = lambda scores, lengths: pallas_kernels.topk_select(
        scores, topk, lengths=lengths, with_indices=False, implementation="mosaic_gpu"
    )
    return fn, SPEC((rows, s), dtype), SPEC((rows,), jnp.int32)


def decode_at(b, s, n, k, h, topk, dtype):
    fn = lambda query, key, value, lengths: pallas_kernels.topk_decode_attention(
        query, key, value, topk=topk, lengths=lengths, implementation="mosaic_gpu"
    )
    cache = SPEC((b, s, k, h), dtype)
    return fn, SPEC((b, n, h), dtype), cache, cache, SPEC((b,), jnp.int32)


def gather_at(b, t, s, n, k, h, scopes, slots, dtype):
    fn = lambda query, key, value, indices: pallas_kernels.gather_attention(
        query, key, value, indices, implementation="mosaic_gpu"
    )
    cache = SPEC((b, s, k, h), dtype)
    return fn, SPEC((b, t, n, h), dtype), cache, cache, SPEC((b, t, scopes, slots), jnp.int32)


def indexer_at(b, t, s, i, d, topk, dtype):
    fn = lambda query, key, weights: pallas_kernels.indexer_select(
        query, key, weights, topk=topk, implementation="mosaic_gpu"
    )
    return (
        fn,
        SPEC((b, t, i, d), dtype),
        SPEC((b, s, d), dtype),
        SPEC((b, t, i), jnp.float32),
    )


# Each decode holds a selection of its own number of keys: one too long for shared memory, one that fits.
LOWERED = {
    "select-odd-f16": select_at(8, 1999, 64, jnp.float16),
    "decode-32-of-8x128-bf16": decode_at(8, 131072, 32, 8, 128, 2048, jnp.bfloat16),
    "decode-9-of-3x64-f32": decode_at(1, 8192, 9, 3, 64, 410, jnp.float32),
    "decode-1001-keys-bf16": decode_at(2, 1001, 8, 2, 128, 64, jnp.bfloat16),
    "gather-32-of-8x128-bf16": gather_at(8, 1, 131072, 32, 8, 128, 8, 2048, jnp.bfloat16),
    "indexer-decode-64x128": indexer_at(8, 1, 131072, 64, 128, 2048, jnp.bfloat16),
    "indexer-77-keys-5x32-f16": indexer_at(2, 9, 77, 5, 32, 20, jnp.float16),
}
COMPILED = LOWERED | {
    "select-32x131072": select_at(32, 131072, 2048, jnp.float32),
    "select-4096x8192": select_at(4096, 8192, 512, jnp.float32),
    "select-64x1048576": select_at(64, 1 << 20, 2048, jnp.float32),
    "decode-9-of-3x64-bf16": decode_at(1, 8192, 9, 3, 64, 410, jnp.bfloat16),
    "decode-16-of-1x256-f32": decode_at(2, 1000, 16, 1, 256, 100, jnp.float32),
    "gather-16-of-1x256-bf16": gather_at(1, 8, 1024, 16, 1, 256, 1, 100, jnp.bfloat16),
    "gather-9-of-3x64-f32": gather_at(1, 8, 1024, 9, 3, 64, 9, 100, jnp.float32),
    "indexer-prefill-64x128": indexer_at(1, 32768, 32768, 64, 128, 2048, jnp.bfloat16),
}


@pytest.mark.parametrize("case", LOWERED.values(), ids=LOWERED.keys())
def test_kernels_lower_for_a_hopper_gpu(case):
    fn, *specs = case
    assert "mosaic_gpu" in gpu_aot.lower_gpu(fn, *specs).as_text()


@gpu_aot.needs_compiler
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_kernels_compile_for_a_hopper_gpu_without_spills(case, monkeypatch, capfd):
    gpu_aot.compile_without_spills(*case, monkeypatch=monkeypatch, capfd=capfd)


@pytest.mark.parametrize(
    ("shape", "dtype", "block_kv", "message"),
    [
        pytest.param((1, 64, 1, 12), jnp.float32, None, "query of head size 12", id="odd-head"),
        pytest.param((1, 64, 1, 264), jnp.float32, None, "query of head size 264", id="large-head"),
        pytest.param((1, 0, 1, 8), jnp.float32, None, r"key of shape \(1, 0, 1, 8\)", id="no-key"),
        pytest.param((1, 64, 1, 8), jnp.float32, 32, "block_kv 32, wanted None", id="block"),
    ],
)
def test_decode_refuses_what_it_cannot_do(shape, dtype, block_kv, message):
    query, cache = jnp.zeros((shape[0], 2, shape[3]), dtype), jnp.zeros(shape, dtype)
    with pallas_kernels.interpret_mode(), pytest.raises(NotImplementedError, match=message):
        pallas_kernels.topk_decode_attention(
            query,
            cache,
            cache,
            topk=4,
            implementation="mosaic_gpu",
            block_sizes=TopKDecodeBlockSizes(block_kv=block_kv),
        )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param({"block_s": 384}, "block_s 384, wanted a power of two", id="block_s"),
        pytest.param({"block_rows": 2}, "block_rows 2, wanted 1", id="block_rows"),
    ],
)
def test_select_refuses_what_it_cannot_do(sizes, message):
    with pallas_kernels.interpret_mode(), pytest.raises(NotImplementedError, match=message):
        pallas_kernels.topk_select(
            jnp.zeros((1, 512)),
            4,
            implementation="mosaic_gpu",
            block_sizes=TopKSelectBlockSizes(**sizes),
        )
