"""The Mosaic TPU kernels, interpreted on a CPU: values, ties, poisoned memory, races, and lowering for every generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels as pk
from pallas_kernels import testing
from pallas_kernels.core import tpu_tiles
from pallas_kernels.core.interpret import RaceError
from pallas_kernels.ops.gather_attention import mosaic_tpu as gather_kernel
from pallas_kernels.ops.gather_attention.block_sizes import GatherAttentionBlockSizes
from pallas_kernels.ops.topk_decode_attention import mosaic_tpu as decode_kernel
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes
from tests.kernels import aot

NAN, INF = float("nan"), float("inf")
SMALL_SELECT = TopKSelectBlockSizes(block_rows=8, block_s=128)
SMALL_DECODE = TopKDecodeBlockSizes(block_kv=128)
SMALL_GATHER = GatherAttentionBlockSizes(block_slots=16)


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


@pytest.mark.parametrize(
    ("num_heads", "dtype"),
    [(1, "float32"), (4, "float32"), (24, "float32")]
    + [(k, "bfloat16") for k in (2, 4, 8, 16, 24)],
    ids=str,
)
def test_a_head_is_loaded_by_strides(num_heads, dtype):
    shape, (slot, offset, size) = (2, 96, num_heads, 128), (1, 32, 48)
    assert tpu_tiles.is_strided(num_heads, 128, jnp.dtype(dtype))
    blocks = jax.random.normal(jax.random.key(0), shape, dtype)

    def kernel(blocks_ref, at_ref, heads_ref):
        for head in range(num_heads):
            heads_ref[head] = tpu_tiles.load_head(blocks_ref, at_ref[0], at_ref[1], size, head)

    got = run(
        pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((num_heads, size, 128), dtype),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pl.BlockSpec(memory_space=pltpu.SMEM),
            ],
            interpret=True,
        ),
        blocks,
        jnp.array([slot, offset], jnp.int32),
    )
    np.testing.assert_array_equal(got, blocks[slot, offset : offset + size].swapaxes(0, 1))


@pytest.mark.parametrize(
    ("num_heads", "head_size", "dtype"),
    [(3, 128, "bfloat16"), (8, 64, "bfloat16"), (8, 256, "float32"), (1, 128, "bfloat16")],
    ids=str,
)
def test_heads_whose_tiles_have_gaps_are_not_loaded_by_strides(num_heads, head_size, dtype):
    assert not tpu_tiles.is_strided(num_heads, head_size, jnp.dtype(dtype))


def test_decode_gives_the_bits_of_strided_heads_where_heads_are_swapped():
    # The plain interpreter loads heads by strides, as devices do; the simulator knows no such view, and swaps them.
    query, key, value = decode_inputs(2, 256, 4, 2, 128, 128, jnp.bfloat16, integers=False)
    lengths = jnp.array([256, 140], jnp.int32)
    kernel = decode("mosaic_tpu", topk=5)
    # Values that no row keeps hold what 0 does not cancel, so that the sums are taken again.
    kept = np.asarray(interpreted(kernel, query, key, value, lengths)[1].selection.indices)
    dark = np.ones((2, 256), bool)
    for sequence in range(2):
        dark[sequence, kept[sequence]] = False
    value = jnp.where(dark[..., None, None], INF, value)
    strided = interpreted(kernel, query, key, value, lengths)
    swapped = interpreted(kernel, query, key, value, lengths, simulate=True)
    for x, y in zip(jax.tree.leaves(strided), jax.tree.leaves(swapped), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(np.asarray(strided[0], np.float32)).all()


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


# B, pages, page, N, K, H, V, lengths, options. All that a page can be to a block of 128: part of it, the whole, more than it.
PAGED = {
    "16, window": ((2, 17, 16, 8, 8, 128, 128), (272, 100), {"window": 60}),
    "32, group": (
        (2, 10, 32, 4, 2, 128, 64),
        (320, 77),
        {"scope": "group", "pooling": "score_max"},
    ),
    "128, heads across": ((2, 3, 128, 6, 3, 64, 64), (384, 300), {}),
    "256": ((2, 2, 256, 4, 1, 128, 128), (512, 257), {}),
}


def paged_inputs(b, pages, page, n, k, h, v, lengths):
    """Returns (query, pools of keys and values, table, the same keys and values as contiguous caches).

    Whatever no sequence may see is NaN, and table entries past a sequence's length lead nowhere.
    """
    query, key, value = decode_inputs(b, pages * page, n, k, h, v)
    key, value = poison(key, lengths), poison(value, lengths)
    places = np.random.default_rng(1).permutation(b * pages + 3)[: b * pages].reshape(b, pages)

    def pool(x):
        whole = np.full((b * pages + 3, page, *x.shape[2:]), NAN, np.float32)
        whole[places] = np.asarray(x).reshape(b, pages, page, *x.shape[2:])
        return jnp.asarray(whole)

    table = np.where(np.arange(pages) * page < np.asarray(lengths)[:, None], places, 10**6)
    table[0] = np.where(table[0] == 10**6, -7, table[0])
    return query, pool(key), pool(value), jnp.asarray(table, jnp.int32), key, value


@pytest.mark.parametrize("case", PAGED)
def test_decode_of_pages_gives_the_bits_of_the_contiguous_cache(case):
    shape, lengths, options = PAGED[case]
    query, keys, values, table, key, value = paged_inputs(*shape, lengths)
    lengths = jnp.array(lengths, jnp.int32)
    plain = decode("mosaic_tpu", topk=7, **options)
    paged = lambda q, k, v, n, t: decode("mosaic_tpu", topk=7, page_table=t, **options)(q, k, v, n)
    both = lambda k, v, t, q, *cache: (paged(q, k, v, cache[2], t), plain(q, *cache))
    got, wanted = interpreted(both, keys, values, table, query, key, value, lengths)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(np.asarray(got[0])).all()


# -------------------------------------------------------------------------------------------------- gather_attention


def gather_inputs(b, t, s, n, k, h, v, scopes, size, dtype=jnp.float32):
    """Masked slots anywhere, keys listed twice, one list that is empty and one whose tail is; what no row lists is NaN."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    arrays = [draw(b, t, n, h), draw(b, s, k, h), draw(b, s, k, v)]
    indices = rng.integers(-1, s, (b, t, scopes, size))
    indices[rng.random(indices.shape) < 0.2] = -1
    indices[..., 1] = indices[..., 0]
    indices[0, 0, 0] = -1
    indices[-1, -1, -1, size // 2 :] = -1
    for sequence in range(b):
        unlisted = np.setdiff1d(np.arange(s), indices[sequence])
        for cache in arrays[1:]:
            cache[sequence, unlisted] = NAN
    return *(jnp.asarray(x.astype(dtype)) for x in arrays), jnp.asarray(indices, jnp.int32)


def gather(implementation, **kwargs):
    return lambda q, k, v, i: pk.gather_attention(
        q, k, v, i, implementation=implementation, return_residuals=True, **kwargs
    )


def assert_gathers_alike(got, wanted):
    testing.assert_accurate(got[0], wanted[0], name="out")
    testing.assert_accurate(got[1].lse, wanted[1].lse, name="lse")


GATHERS = {  # B, T, S, N, K, H, V, scopes, slots; what a slot fetches is in the name
    "tokens": (2, 2, 50, 8, 2, 128, 128, 1, 40),
    "tokens of narrow heads": (1, 3, 37, 9, 3, 64, 8, 1, 33),
    "tokens of wide heads": (1, 2, 40, 4, 2, 256, 384, 1, 20),
    "rows of groups": (2, 1, 50, 8, 4, 128, 256, 4, 40),
    "rows of heads": (1, 8, 20, 6, 3, 16, 16, 6, 9),
    "rows of one key/value head": (1, 2, 50, 5, 1, 128, 128, 1, 17),
}


@pytest.mark.parametrize("case", GATHERS)
def test_gather_agrees_in_every_form(case):
    arguments = gather_inputs(*GATHERS[case])
    assert gather_kernel._form(*GATHERS[case][4:8:3], jnp.dtype("float32")) == case.split()[0]
    got = interpreted(gather("mosaic_tpu", block_sizes=SMALL_GATHER), *arguments)
    assert_gathers_alike(got, run(gather("reference"), *arguments))
    assert np.all(np.asarray(got[0])[0, 0, 0] == 0)
    assert got[1].lse[0, 0, 0] == -INF


@pytest.mark.parametrize("scopes", [1, 3, 6])
def test_gather_in_bfloat16_is_as_good_as_rounding_allows(scopes):
    """Lists of heads fetch words that hold two heads, an odd last one with nothing beside it."""
    shape = 1, 2, 50, 6, 3, 128, 128, scopes, 20
    arguments = gather_inputs(*shape, jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in arguments[:3]], arguments[3]
    got = interpreted(gather("mosaic_tpu", block_sizes=SMALL_GATHER), *arguments)
    oracle = run(gather("reference"), *exact[0], exact[1])
    naive = run(gather("reference"), *arguments)
    assert got[0].dtype == jnp.bfloat16
    testing.assert_accurate(got[0], oracle[0], naive=naive[0], name="out")
    testing.assert_accurate(got[1].lse, oracle[1].lse, name="lse")


def test_words_made_for_an_interpreter_are_the_ones_a_device_sees():
    """Interpreted, the kernel is given words; on a device it views the cache as such, which no simulator can."""
    heads = jnp.asarray(np.random.default_rng(0).normal(size=(16, 128)), jnp.bfloat16)

    def view(ref, out_ref):
        out_ref[...] = pltpu.bitcast(ref[...], jnp.int32)

    shape = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    seen = pl.pallas_call(view, out_shape=shape, interpret=True)(heads)
    np.testing.assert_array_equal(gather_kernel._as_words(heads), seen)


def test_gather_owns_up_to_a_listed_nan_in_its_row_alone():
    query, key, value, indices = gather_inputs(1, 2, 30, 4, 2, 128, 128, 2, 9)
    indices = indices.at[0, 1, 1, 3].set(29).at[0, 0].set(jnp.minimum(indices[0, 0], 28))
    indices = indices.at[0, 1, 0].set(jnp.minimum(indices[0, 1, 0], 28))
    for dark in ((key.at[0, 29].set(NAN), value), (key, value.at[0, 29].set(NAN))):
        out, residuals = interpreted(
            gather("mosaic_tpu", block_sizes=SMALL_GATHER), query, *dark, indices
        )
        assert np.argwhere(np.isnan(np.asarray(out)).all(-1)).tolist() == [[0, 1, 2], [0, 1, 3]]
        assert np.isnan(np.asarray(out)).sum() == 2 * 128


def test_gather_of_pages_gives_the_bits_of_the_contiguous_cache():
    query, keys, values, table, key, value = paged_inputs(2, 3, 16, 4, 2, 128, 128, (48, 20))
    lengths = jnp.array([48, 20], jnp.int32)
    indices = jnp.asarray(np.random.default_rng(3).integers(-1, 50, (2, 1, 2, 20)), jnp.int32)

    def both(q, k, v, t, *cache):
        run = lambda k, v, t: gather(
            "mosaic_tpu", block_sizes=SMALL_GATHER, page_table=t, lengths=lengths
        )(q[:, None], k, v, indices)
        return run(k, v, t), run(*cache, None)

    got, wanted = interpreted(both, query, keys, values, table, key, value)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(np.asarray(got[0])).all()


def test_gather_gives_the_same_bits_in_any_order():
    query, key, value, indices = gather_inputs(3, 1, 40, 4, 2, 128, 128, 2, 20)
    order = jnp.array([2, 0, 1])
    kernel = gather("mosaic_tpu", block_sizes=SMALL_GATHER)
    fn = lambda *args: (kernel(*args), kernel(*(x[order] for x in args)))
    first, permuted = interpreted(fn, query, key, value, indices)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(permuted), strict=True):
        np.testing.assert_array_equal(x[order], y)


def test_gather_copies_no_part_past_the_last_valid_slot(monkeypatch):
    copied = []

    class Watched:
        def __init__(self, source, target, semaphore):
            self.copy = original(source, target, semaphore)
            self.wait = self.copy.wait
            self.is_value = source.shape[-1] == 128  # as keys are not

        def start(self):
            if self.is_value:
                jax.debug.callback(lambda: copied.append(1))
            self.copy.start()

    original = pltpu.make_async_copy
    monkeypatch.setattr(gather_kernel.pltpu, "make_async_copy", Watched)
    query, key, value, indices = gather_inputs(1, 1, 40, 2, 2, 64, 128, 2, 64)
    indices = indices.at[:, :, :, 17:].set(-1).at[:, :, 0].set(-1).at[:, :, 1, 16].set(7)
    key, value = jnp.nan_to_num(key), jnp.nan_to_num(value)
    interpreted(gather("mosaic_tpu", block_sizes=SMALL_GATHER), query, key, value, indices)
    jax.effects_barrier()
    assert len(copied) == 16 + 32  # an empty list has one part, and the other list two of its four


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


def test_decode_of_pages_runs_without_races_on_uninitialised_memory():
    lengths = 288, 140, 0
    query, keys, values, table, key, value = paged_inputs(3, 18, 16, 2, 1, 8, 8, lengths)
    lengths = jnp.array(lengths, jnp.int32)
    fn = lambda q, k, v, n, t: decode("mosaic_tpu", topk=4, page_table=t)(q, k, v, n)
    got = interpreted(fn, query, keys, values, lengths, table, detect_races=True)
    clean = map(jnp.nan_to_num, (query, key, value))
    assert_decodes_alike(got, run(decode("reference", topk=4), *clean, lengths))


@pytest.mark.parametrize(("scopes", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_gather_runs_without_races_on_uninitialised_memory(scopes, dtype):
    arguments = gather_inputs(2, 1, 30, 4, 2, 8, 8, scopes, 20, dtype)
    sizes = GatherAttentionBlockSizes(block_slots=8)
    got = interpreted(gather("mosaic_tpu", block_sizes=sizes), *arguments, detect_races=True)
    exact = [x.astype(jnp.float32) for x in arguments[:3]]
    wanted = run(gather("reference"), *exact, arguments[3])
    naive = run(gather("reference"), *arguments)
    testing.assert_accurate(got[0], wanted[0], naive=naive[0], name="out")
    testing.assert_accurate(got[1].lse, wanted[1].lse, name="lse")


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
    cache = spec((2, 384, 4, 128), jnp.bfloat16)
    gathering = aot.lower_tpu(
        gather("mosaic_tpu"),
        spec((2, 1, 8, 128), jnp.bfloat16),
        cache,
        cache,
        spec((2, 1, 4, 50), jnp.int32),
        chip=chip,
    )
    assert "gather_attention_bfloat16_words_g4_r56" in gathering.as_text()


def test_caches_that_would_be_copied_are_refused_for_a_device():
    spec = jax.ShapeDtypeStruct

    def lower(dtype, k, h, v):
        cache = [spec((1, 64, k, size), dtype) for size in (h, v)]
        indices = spec((1, 1, 1, 9), jnp.int32)
        query = spec((1, 1, k, h), dtype)
        return aot.lower_tpu(gather("mosaic_tpu"), query, *cache, indices, chip="v6e")

    for dtype, shape, message in (
        (jnp.float32, (2, 64, 128), "key of head size 64, wanted a multiple of 128 .'xla' takes"),
        (jnp.float32, (2, 128, 64), "value of head size 64, wanted a multiple of 128"),
        (jnp.float32, (3, 128, 128), "key of 3 heads in float32, wanted 2, 4 .* or 1"),
        (jnp.bfloat16, (1, 128, 128), r"key of 1 heads in bfloat16, wanted 2, 4 .* 8 \("),
    ):
        with pytest.raises(NotImplementedError, match=message):
            lower(dtype, *shape)
    pool = spec((8, 16, 2, 64), jnp.float32)
    paged = lambda q, k, v, n, t: decode("mosaic_tpu", topk=4, page_table=t)(q, k, v, n)
    arrays = spec((1, 2, 64), jnp.float32), pool, pool, spec((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="pages of 16 tokens with key of head size 64"):
        aot.lower_tpu(paged, *arrays, spec((1, 4), jnp.int32), chip="v6e")


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
        with pytest.raises(
            NotImplementedError, match="query of dtype float16, wanted float32 or bfloat16"
        ):
            pk.gather_attention(
                half, half, half, jnp.zeros((1, 9, 1, 2), jnp.int32), implementation="mosaic_tpu"
            )
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
