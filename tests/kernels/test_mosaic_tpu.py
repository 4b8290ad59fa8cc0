"""The Mosaic TPU kernels, interpreted on a CPU: values, ties, poisoned memory, races, and lowering for every generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels as pk
from pallas_kernels.core.interpret import RaceError
from pallas_kernels.ops.topk_decode_attention import mosaic_tpu as decode_kernel
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes
from tests.kernels import aot

NAN, INF = float("nan"), float("inf")
SMALL_SELECT = TopKSelectBlockSizes(block_rows=8, block_s=128)
SMALL_DECODE = TopKDecodeBlockSizes(block_kv=128)


def run(fn, *args):
    """Runs `fn` compiled as a whole and without optimisation: compiling is nearly all of a test's time."""
    fast = jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
    return jax.block_until_ready(fast(*args))


def interpreted(fn, *args, **options):
    """Runs `fn` as `run` does, under `interpret_mode(**options)`."""
    with pk.interpret_mode(**options):
        return run(fn, *args)


def assert_same_selection(got, wanted):
    for field, x, y in zip(wanted._fields, got, wanted, strict=True):
        if y is not None:
            np.testing.assert_array_equal(x, y, err_msg=field)


# ------------------------------------------------------------------------------------------------------- topk_select


def adversarial_rows(s: int = 300) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    plateau = np.zeros(s)
    plateau[[5, 140, 299]] = 1.0, 2.0, 1.0
    zeros = np.where(rng.random(s) < 0.5, 0.0, -0.0)
    tiny = rng.choice([1e-40, -1e-40, 0.0, -0.0, 2e-38, -2e-38], s)
    special = rng.choice([NAN, INF, -INF, 1.0, -1.0], s)
    across_blocks = np.full(s, -3.0)
    across_blocks[[120, 127, 128, 129, 255, 256, 257]] = 4.0
    one_hot = np.full(s, -INF)
    one_hot[200] = 7.0
    return {
        "constant": np.ones(s),
        "relu plateau": plateau,
        "signed zeros": zeros,
        "subnormals": tiny,
        "nan and infinities": special,
        "all nan": np.full(s, NAN),
        "ties across blocks": across_blocks,
        "ascending": np.arange(s),
        "descending": -np.arange(s),
        "one hot": one_hot,
        "integers": rng.integers(-4, 5, s),
        "normal": rng.normal(size=s),
        "wide range": rng.normal(size=s) * 10.0 ** rng.integers(-37, 38, s),
    }


@pytest.mark.parametrize("block_sizes", [SMALL_SELECT, None], ids=["many blocks", "one block"])
def test_select_agrees_on_adversarial_rows(block_sizes):
    rows = adversarial_rows()
    lengths = (0, 1, 127, 128, 129, 300)
    budgets = (1, 3, 4, 299, 1000)
    scores = jnp.asarray(np.stack([row for row in rows.values()]), jnp.float32)[:, None, None]
    shape = len(rows), len(lengths), len(budgets)
    scores = jnp.broadcast_to(scores, (*shape, scores.shape[-1]))
    valid = jnp.broadcast_to(jnp.array(lengths, jnp.int32)[None, :, None], shape)
    budget = jnp.broadcast_to(jnp.array(budgets, jnp.int32)[None, None, :], shape)

    def select(implementation):
        return lambda x, k, n: pk.topk_select(
            x,
            k,
            lengths=n,
            with_indices=False,
            implementation=implementation,
            block_sizes=block_sizes,
        )

    got = interpreted(select("mosaic_tpu"), scores, budget, valid)
    assert_same_selection(got, run(select("reference"), scores, budget, valid))
    assert int(got.count[list(rows).index("integers"), -1, 1]) == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "topk"),
    [
        ((5,), jnp.float32, 2),
        ((2, 3, 129), jnp.float32, 129),
        ((37, 257), jnp.bfloat16, 16),
        ((1, 1), jnp.bfloat16, 4),
    ],
    ids=str,
)
def test_select_agrees_at_awkward_shapes(shape, dtype, topk):
    scores = jax.random.randint(jax.random.key(0), shape, -9, 10).astype(dtype)
    select = lambda x, implementation: pk.topk_select(x, topk, implementation=implementation)
    got = interpreted(lambda x: select(x, "mosaic_tpu"), scores)
    assert_same_selection(got, run(lambda x: select(x, "reference"), scores))


def test_select_of_no_rows_is_empty():
    got = interpreted(
        lambda x: pk.topk_select(x, 2, implementation="mosaic_tpu"), jnp.zeros((0, 9))
    )
    assert got.indices.shape == (0, 2)
    assert got.threshold.shape == (0,)


# --------------------------------------------------------------------------------------------- topk_decode_attention


def decode_inputs(b, s, n, k, h, v, dtype=jnp.float32, integers=True):
    """Integer-valued queries and keys make scores exact, so that selections can be compared to the bit."""
    rng = np.random.default_rng(0)
    draw = (lambda shape: rng.integers(-2, 3, shape)) if integers else rng.standard_normal
    arrays = draw((b, n, h)), draw((b, s, k, h)), rng.standard_normal((b, s, k, v))
    return tuple(jnp.asarray(array.astype(dtype)) for array in arrays)


def poison(array, lengths, begins=0):
    """Fills keys or values outside of each sequence's range with NaN."""
    array, index = np.array(array), np.arange(array.shape[1])
    lengths, begins = np.asarray(lengths)[:, None], np.asarray(begins).reshape(-1, 1)
    array[(index >= lengths) | (index < begins)] = NAN
    return jnp.asarray(array)


def decode(implementation, *, block_sizes=SMALL_DECODE, **kwargs):
    return lambda q, k, v, n: pk.topk_decode_attention(
        q,
        k,
        v,
        lengths=n,
        implementation=implementation,
        block_sizes=block_sizes,
        return_residuals=True,
        **kwargs,
    )


def assert_decodes_alike(got, wanted, *, same_sets=True):
    (out, residuals), (wanted_out, wanted_residuals) = got, wanted
    if same_sets:
        assert_same_selection(residuals.selection, wanted_residuals.selection)
    atol = 2e-5 * float(jnp.max(jnp.abs(wanted_out)))
    np.testing.assert_allclose(out, wanted_out, rtol=0, atol=atol)
    np.testing.assert_allclose(residuals.lse, wanted_residuals.lse, rtol=2e-6, atol=2e-5)


CASES = {  # shape (B, S, N, K, H, V), lengths, where S stands in the keys' and values' layouts
    "tiny": ((2, 5, 2, 1, 4, 3), (5, 2), (0, 0)),
    "smollm2": ((3, 384, 9, 3, 64, 64), (384, 129, 0), (2, 2)),
    "head-major rows": ((2, 272, 6, 3, 128, 128), (272, 255), (1, 1)),
    "tiled rows": ((2, 300, 8, 8, 128, 128), (300, 128), (0, 0)),
    "mixed layouts": ((2, 256, 4, 2, 128, 64), (200, 1), (0, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_decode_agrees_in_every_layout(case):
    shape, lengths, axes = CASES[case]
    _, s, _, k, h, v = shape
    f32 = np.dtype("float32")
    assert (decode_kernel._key_axis(s, k, h, f32), decode_kernel._key_axis(s, k, v, f32)) == axes
    lengths = jnp.array(lengths, jnp.int32)
    query, key, value = decode_inputs(*shape)
    got = interpreted(
        decode("mosaic_tpu", topk=7, scale=0.25),
        query,
        poison(key, lengths),
        poison(value, lengths),
        lengths,
    )
    assert_decodes_alike(
        got, run(decode("reference", topk=7, scale=0.25), query, key, value, lengths)
    )
    dead = np.asarray(lengths) == 0
    assert np.all(np.asarray(got[0])[dead] == 0)
    assert np.all(np.asarray(got[1].lse)[dead] == -INF)


def test_decode_agrees_on_random_scores_with_a_budget_a_row():
    query, key, value = decode_inputs(3, 257, 4, 2, 32, 32, integers=False)
    lengths = jnp.array([257, 250, 3], jnp.int32)
    topk = jnp.array([[1], [40], [300]], jnp.int32)
    got = interpreted(decode("mosaic_tpu", topk=topk), query, key, value, lengths)
    out, residuals = run(decode("reference", topk=topk), query, key, value, lengths)
    np.testing.assert_array_equal(got[1].selection.count, residuals.selection.count)
    assert_decodes_alike(got, (out, residuals), same_sets=False)


def test_decode_window_hides_what_lies_before_it():
    lengths = jnp.array([384, 300, 20], jnp.int32)
    query, key, value = decode_inputs(3, 384, 9, 3, 64, 64)
    dark = lambda x: poison(x, lengths, lengths - 40)
    got = interpreted(
        decode("mosaic_tpu", topk=7, window=40), query, dark(key), dark(value), lengths
    )
    assert_decodes_alike(
        got, run(decode("reference", topk=7, window=40), query, key, value, lengths)
    )


@pytest.mark.parametrize(
    ("scope", "pooling"),
    [("group", "prob_sum"), ("group", "score_mean"), ("layer", "prob_max")],
)
def test_decode_shares_a_selection_among_heads(scope, pooling):
    query, key, value = decode_inputs(2, 200, 6, 3, 16, 16, integers=False)
    # What one head cannot rank, its pool cannot either; the other heads' scores of it are good.
    key = key.at[0, 7, 0].set(NAN)
    lengths = jnp.array([200, 133], jnp.int32)
    kwargs = dict(topk=9, scope=scope, pooling=pooling)
    out, residuals = interpreted(
        decode("mosaic_tpu", **kwargs), query, key, poison(value, lengths), lengths
    )
    wanted_out, wanted = run(decode("reference", **kwargs), query, key, value, lengths)
    # Pooled thresholds are sums of logarithms, equal to rounding; on these scores that moves no key.
    np.testing.assert_array_equal(residuals.selection.indices, wanted.selection.indices)
    np.testing.assert_allclose(residuals.selection.threshold, wanted.selection.threshold, atol=1e-4)
    assert_decodes_alike((out, residuals), (wanted_out, wanted), same_sets=False)


def test_decode_in_bfloat16_is_as_good_as_rounding_allows():
    query, key, value = decode_inputs(4, 256, 8, 2, 64, 64, jnp.bfloat16)
    lengths = jnp.array([256, 200, 129, 64], jnp.int32)
    kwargs = dict(topk=24, scale=0.05)
    out, residuals = interpreted(decode("mosaic_tpu", **kwargs), query, key, value, lengths)
    exact, wanted = run(
        decode("reference", **kwargs),
        *(x.astype(jnp.float32) for x in (query, key, value)),
        lengths,
    )
    assert_same_selection(residuals.selection, wanted.selection)
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32) - exact))))
    assert out.dtype == jnp.bfloat16
    assert rms(out) <= 1.5 * rms(exact.astype(jnp.bfloat16))


def test_decode_reads_no_unselected_value_and_owns_up_to_a_selected_one():
    query, key, value = decode_inputs(1, 256, 4, 2, 64, 64)
    lengths = jnp.array([256], jnp.int32)
    kwargs = dict(topk=3)
    clean, residuals = run(decode("reference", **kwargs), query, key, value, lengths)
    of_head = residuals.selection.indices[0]
    chosen = jnp.zeros((256, 2), bool)
    for head in range(4):
        chosen = chosen.at[of_head[head], head // 2].set(True)
    dark = jnp.where(chosen[None, :, :, None], value, jnp.inf)
    # Head 2 alone keeps this key, if the heads of its group do not agree on it.
    lone = next(int(j) for j in of_head[2] if int(j) not in of_head[3])
    planted = dark.at[0, lone, 1, 5].set(NAN)
    kernel = decode("mosaic_tpu", **kwargs)
    got, got_planted = interpreted(
        lambda q, k, v, w, n: (kernel(q, k, v, n)[0], kernel(q, k, w, n)[0]),
        query,
        key,
        dark,
        planted,
        lengths,
    )
    np.testing.assert_allclose(got, clean, atol=2e-5)
    assert np.argwhere(np.isnan(np.asarray(got_planted))).tolist() == [[0, 2, 5]]


def test_decode_gives_the_same_bits_again_and_in_any_order():
    query, key, value = decode_inputs(3, 200, 4, 2, 64, 64, integers=False)
    lengths = jnp.array([200, 150, 31], jnp.int32)
    order = jnp.array([2, 0, 1])
    kernel = decode("mosaic_tpu", topk=9)
    fn = lambda *args: (kernel(*args), kernel(*args), kernel(*(x[order] for x in args)))
    first, again, permuted = interpreted(fn, query, key, value, lengths)
    leaves = zip(*map(jax.tree.leaves, (first, again, permuted)), strict=True)
    for x, y, z in leaves:
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x[order], z)


def test_decode_copies_only_the_blocks_it_needs(monkeypatch):
    copied = []

    class Watched:
        def __init__(self, source, target, semaphore):
            self.copy = original(source, target, semaphore)
            self.wait = self.copy.wait
            # Values have another head size than keys, which tells their copies apart.
            self.name = "value" if 96 in source.shape else "key"

        def start(self):
            jax.debug.callback(lambda: copied.append(self.name))
            self.copy.start()

    original = pltpu.make_async_copy
    monkeypatch.setattr(decode_kernel.pltpu, "make_async_copy", Watched)
    query, key, value = decode_inputs(1, 640, 2, 1, 32, 96)
    query = query.at[:, 1].set(query[:, 0])
    # Keys 256 to 599 are visible, in blocks 2, 3 and 4; the best scores lie in block 3.
    key = key.at[:, 400:404].set(4 * query[:, :1])
    fn = lambda q, k, v: pk.topk_decode_attention(
        q,
        k,
        v,
        topk=4,
        window=344,
        lengths=jnp.array([600], jnp.int32),
        implementation="mosaic_tpu",
        block_sizes=SMALL_DECODE,
    )
    out = interpreted(fn, query, key, value)
    jax.effects_barrier()
    np.testing.assert_allclose(out[0, 0], value[0, 400:404, 0].mean(0), atol=2e-6)
    assert sorted(copied) == ["key", "key", "key", "value"]


# --------------------------------------------------------------------------------------------------------------- races


def race_inputs():
    lengths = jnp.array([300, 140, 0], jnp.int32)
    query, key, value = decode_inputs(3, 300, 2, 1, 8, 8)
    return query, poison(key, lengths), poison(value, lengths), lengths


def test_select_runs_without_races_on_uninitialised_memory():
    scores = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (9, 300)), jnp.float32)
    lengths = jnp.array([300, 0, 1, 128, 129, 200, 127, 300, 256], jnp.int32)
    select = lambda implementation, **kwargs: (
        lambda x, n: pk.topk_select(x, 5, lengths=n, implementation=implementation, **kwargs)
    )
    got = interpreted(
        select("mosaic_tpu", block_sizes=SMALL_SELECT), scores, lengths, detect_races=True
    )
    assert_same_selection(got, run(select("reference"), scores, lengths))


def test_decode_runs_without_races_on_uninitialised_memory():
    args = race_inputs()
    kwargs = dict(topk=4, scope="group", pooling="score_max")
    got = interpreted(decode("mosaic_tpu", **kwargs), *args, detect_races=True)
    clean = map(jnp.nan_to_num, args)
    assert_decodes_alike(got, run(decode("reference", **kwargs), *clean))


def test_the_detector_finds_a_copy_that_nobody_waits_for(monkeypatch):
    class Unattended:
        def __init__(self, *copy):
            self.copy = copy

        def start(self):
            original(*self.copy).start()

        def wait(self):
            waits.append(self)

    original, waits = pltpu.make_async_copy, []
    monkeypatch.setattr(decode_kernel.pltpu, "make_async_copy", Unattended)
    with pytest.raises(RaceError, match="Mosaic TPU"):
        interpreted(decode("mosaic_tpu", topk=4), *race_inputs(), detect_races=True)
    assert waits


# ------------------------------------------------------------------------------------------------- lowering, refusals


@pytest.mark.parametrize("chip", aot.DEVICE_KINDS)
def test_kernels_lower_for_every_generation(chip):
    spec = jax.ShapeDtypeStruct
    select = aot.lower_tpu(
        lambda x: pk.topk_select(x, 5, implementation="mosaic_tpu"),
        spec((3, 300), jnp.float32),
        chip=chip,
    )
    assert "topk_select_float32_r8_s512" in select.as_text()
    shapes = (2, 3, 64), (2, 384, 1, 64), (2, 384, 1, 64)
    decoding = aot.lower_tpu(
        decode("mosaic_tpu", topk=5),
        *(spec(shape, jnp.bfloat16) for shape in shapes),
        spec((2,), jnp.int32),
        chip=chip,
    )
    assert "topk_decode_bfloat16_g3_kv128_22" in decoding.as_text()


def test_what_cannot_run_is_refused_by_name():
    with pk.interpret_mode():
        half = jnp.zeros((2, 9), jnp.float16)
        with pytest.raises(
            NotImplementedError, match="scores of dtype float16, wanted float32 or bfloat16"
        ):
            pk.topk_select(half, 2, implementation="mosaic_tpu")
        with pytest.raises(
            NotImplementedError, match="S=4000000, which needs .* MiB of VMEM, wanted at most 64"
        ):
            jax.eval_shape(
                lambda x: pk.topk_select(x, 2, implementation="mosaic_tpu"),
                jax.ShapeDtypeStruct((1, 4_000_000), jnp.float32),
            )
        half = jnp.zeros((1, 9, 1, 4), jnp.float16)
        with pytest.raises(
            NotImplementedError, match="query of dtype float16, wanted float32 or bfloat16"
        ):
            pk.topk_decode_attention(half[:, 0], half, half, topk=2, implementation="mosaic_tpu")
        whole = jnp.zeros((1, 9, 1, 4))
        with pytest.raises(NotImplementedError, match="num_splits=2, wanted 1"):
            pk.topk_decode_attention(
                whole[:, 0],
                whole,
                whole,
                topk=2,
                implementation="mosaic_tpu",
                block_sizes=TopKDecodeBlockSizes(num_splits=2),
            )


def test_refusals_fall_back_to_what_the_caller_allows():
    half = jnp.zeros((2, 9), jnp.float16)
    with pk.interpret_mode():
        got = pk.topk_select(half, 2, implementation=("mosaic_tpu", "reference"))
    np.testing.assert_array_equal(got.indices, [[0, 1], [0, 1]])
