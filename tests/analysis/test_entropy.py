"""Entropy and mass of attention rows: against rows written out one by one, and against the attention ops themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from jaxtopk.analysis import entropy
from jaxtopk.analysis.entropy import attention_entropy
from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.attention.base import AttentionStrategy
from pallas_kernels.core.selection import budget_from_ratio

B, N, K, H = 2, 4, 2, 8
TOPKS = (5, 1, 500)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draw(t, s=None, *, seed=0, dtype=np.float64, n=N, k=K):
    rng = np.random.default_rng(seed)
    s = t if s is None else s
    return 2 * rng.normal(size=(B, t, n, H)).astype(dtype), rng.normal(size=(B, s, k, H)).astype(
        dtype
    )


@functools.cache
def program(names, pieces, **options):
    del pieces  # another number of them is another program
    return jax.jit(
        lambda query, key, *arrays: attention_entropy(
            query, key, **dict(zip(names, arrays, strict=True)), **options
        ),
    )


def measure(query, key, **options):
    """Runs the function compiled; arrays among the options are arguments."""
    arrays = {name: jnp.asarray(x) for name, x in options.items() if isinstance(x, np.ndarray)}
    rest = {name: x for name, x in options.items() if name not in arrays}
    run = program(tuple(arrays), entropy._PIECE_ROWS, **rest)
    return jax.tree.map(np.asarray, run(jnp.asarray(query), jnp.asarray(key), *arrays.values()))


def rows(query, key, *, causal=True, window=None, lengths=None, segments=None):
    """Yields ((sequence, head, row), the row's visible positions, their full softmax), from the definition."""
    (b, t, n, h), s = query.shape, key.shape[1]
    for i, head, row in np.ndindex(b, n, t):
        last = row + s - t
        visible = np.asarray(
            [
                j
                for j in range(s)
                if (not causal or j <= last)
                and (window is None or j > last - window)
                and (lengths is None or j < lengths[i])
                and (segments is None or segments[0][i, row] == segments[1][i, j])
            ],
            int,
        )
        scores = key[i, visible, head * key.shape[2] // n] @ query[i, row, head] * h**-0.5
        p = np.exp(scores - scores.max()) if len(visible) else scores
        yield (i, head, row), visible, p / p.sum()


def entropy_of(p):
    p = p / p.sum()
    return -(p[p > 0] * np.log(p[p > 0])).sum()


SEGMENTS = np.repeat([[0] * 5 + [1] * 8 + [2], [3] * 1 + [1] * 12 + [1]], 1, axis=0).astype(
    np.int32
)
CASES = {
    "not causal": dict(t=6, s=14, causal=False),
    "aligned at the end, one key head": dict(t=9, s=14, k=1, lengths=np.asarray([14, 3], np.int32)),
    "more rows than keys": dict(t=14, s=9, pieces=2),
    "window": dict(t=14, window=4, pieces=2),
    "segments": dict(t=14, segments=(SEGMENTS, SEGMENTS), pieces=2),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_definition(case, monkeypatch):
    options = dict(CASES[case])
    if "pieces" in options:
        monkeypatch.setattr(entropy, "_PIECE_ROWS", options["t"] // options.pop("pieces"))
    query, key = draw(options.pop("t"), options.pop("s", None), k=options.pop("k", K))
    segments = options.get("segments")
    asked = {name: value for name, value in options.items() if name != "segments"}
    if segments is not None:
        asked |= {"query_segment_ids": segments[0], "key_segment_ids": segments[1]}
    found = measure(query, key, topks=TOPKS, block_q=4, strategy=FullAttention(), **asked)
    tiled = found
    if case in ("not causal", "window", "segments"):
        tiled = measure(query, key, block_q=3, block_kv=4, strategy=FullAttention(), **asked)
    normalised, support = np.asarray(found.normalised), np.asarray(found.support)
    assert found.entropy.dtype == np.float64
    for name in ("visible", "entropy", "lse", "attended_count"):
        np.testing.assert_allclose(getattr(found, name), getattr(tiled, name), atol=1e-9)
    np.testing.assert_array_equal(found.attended.entropy, found.entropy)
    for (i, head, row), visible, p in rows(query, key, **options):
        at = i, head, row
        n = len(visible)
        assert found.visible[i, row] == found.attended_count[at] == n
        assert found.attended.mass[at] == (n > 0)
        if n == 0:
            assert found.entropy[at] == normalised[at] == 0
            assert found.lse[at] == -np.inf
            assert all(part.mass[at] == part.entropy[at] == 0 for part in found.topk)
            continue
        full = entropy_of(p)
        assert found.entropy[at] == pytest.approx(full, abs=1e-9)
        assert normalised[at] == pytest.approx(full / np.log(n) if n > 1 else 0, abs=1e-9)
        assert support[at] == pytest.approx(np.exp(full), rel=1e-9)
        for topk, part in zip(TOPKS, found.topk, strict=True):
            best = np.sort(p)[-topk:]
            assert part.mass[at] == pytest.approx(best.sum(), abs=1e-9)
            assert part.entropy[at] == pytest.approx(entropy_of(best), abs=1e-9)
            assert part.mass[at] <= 1


STRATEGIES = {
    "a budget a sequence, some rows": TopKAttention(topk=(2, 4)),
    "group": TopKAttention(topk=3, scope="group", pooling="score_max"),
    "layer, some rows": TopKAttention(topk_ratio=0.4, min_topk=2, scope="layer"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_attended_set_is_the_one_that_the_strategy_attends_to(name):
    """With one-hot values a row's output is its weights: the set is read off the op that attends."""
    # The specification of the op: it compiles least.
    strategy = STRATEGIES[name].replace(implementation="reference")
    query, key = draw(11, seed=3)
    lengths = np.asarray([11, 6], np.int32)
    some = {"sparse_rows": np.arange(22).reshape(2, 11) % 3 > 0} if "some" in name else {}
    options = {"lengths": jnp.asarray(lengths), "window": 8}
    options |= jax.tree.map(jnp.asarray, some)
    attend = jax.jit(functools.partial(strategy.attend, **options))
    one_hot = np.broadcast_to(np.eye(11)[None, :, None], (B, 11, K, 11))
    weights = np.asarray(attend(jnp.asarray(query), jnp.asarray(key), jnp.asarray(one_hot)))
    found = measure(query, key, strategy=strategy, lengths=lengths, window=8, block_q=4, **some)
    kept_something_less = False
    for (i, head, row), visible, p in rows(query, key, lengths=lengths, window=8):
        at = i, head, row
        kept = weights[i, row, head, visible]
        assert found.attended_count[at] == (kept > 0).sum()
        assert found.attended.mass[at] == pytest.approx(p[kept > 0].sum(), abs=1e-9)
        wanted = entropy_of(kept) if len(visible) else 0
        assert found.attended.entropy[at] == pytest.approx(wanted, abs=1e-9)
        kept_something_less |= (kept > 0).sum() < len(visible)
    assert kept_something_less


def test_mass_is_that_of_the_residuals_of_the_attention_op():
    query, key = draw(12, dtype=np.float32, seed=5)

    @jax.jit
    def residuals(query, key):
        attend = functools.partial(
            pallas_kernels.topk_attention, implementation="reference", return_residuals=True
        )
        return [attend(query, key, key, topk=topk)[1].lse for topk in (5, 12)]

    some, everything = residuals(query, key)
    found = measure(query, key, topks=(5,))
    np.testing.assert_allclose(found.topk[0].mass, np.exp(some - everything), atol=2e-6)
    np.testing.assert_allclose(found.lse, everything, atol=2e-6)


def test_a_strategy_of_another_kind_gives_the_full_rows_and_says_that_its_set_is_not_known():
    class Other(AttentionStrategy):
        attend = decode = None

    query, key = draw(8, dtype=np.float32)
    found = measure(query, key, strategy=Other(), topks=(2,))
    np.testing.assert_allclose(found.entropy, measure(query, key, topks=(2,)).entropy, atol=1e-6)
    assert np.isnan(found.attended.mass).all()
    assert (found.attended_count == -1).all()


def test_keys_that_no_row_sees_may_hold_anything_and_a_nan_score_has_no_weight():
    query, key = draw(8, dtype=np.float32)
    lengths = np.asarray([8, 5], np.int32)
    dirty = key.copy()
    dirty[1, 5:] = np.nan
    options = {"topks": (2,), "lengths": lengths, "strategy": TopKAttention(topk=3)}
    clean, found = (measure(query, x, **options) for x in (key, dirty))
    jax.tree.map(np.testing.assert_array_equal, clean, found)
    broken = key.copy()
    broken[0, 2] = np.nan
    row = measure(query, broken, topks=(2,))
    without = np.delete(np.arange(8), 2)
    p = np.exp(query[0, 7, 0] @ key[0, without, 0].T * H**-0.5)
    assert row.entropy[0, 0, 7] == pytest.approx(entropy_of(p), abs=1e-5)
    assert row.topk[0].mass[0, 0, 7] == pytest.approx(np.sort(p)[-2:].sum() / p.sum(), abs=1e-5)


def test_a_row_that_keeps_everything_has_exactly_its_own_entropy_and_mass_one():
    query, key = draw(60, dtype=np.float32, seed=2)
    found = measure(query, key, topks=(59, 60), strategy=TopKAttention(topk=1000))
    for part in (*found.topk, found.attended):
        np.testing.assert_array_equal(part.mass[:, :, :59], 1)
        np.testing.assert_allclose(part.entropy[:, :, :59], found.entropy[:, :, :59], atol=1e-6)


@pytest.mark.parametrize("topks", [(16,), ()], ids=["with sets", "entropy alone"])
def test_memory_grows_with_the_length_and_not_with_its_square(topks, monkeypatch):
    monkeypatch.setattr(entropy, "_MAX_PIECES", 1)  # fewer to compile
    heads = 3

    def temporary(length: int) -> int:
        shapes = (1, length, heads, H), (1, length, 1, H)
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        run = functools.partial(attention_entropy, topks=topks, block_q=32, block_kv=128)
        compiled = jax.jit(run).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(8192)
    assert large < 4.2 * small
    assert large < heads * 8192 * 8192 * 4 / 16


def test_budgets_are_those_of_the_strategy():
    visible = jnp.asarray([[1, 2, 50, 0], [9, 10, 11, 12]], jnp.int32)
    ratio = TopKAttention(topk_ratio=0.1, min_topk=2)
    np.testing.assert_array_equal(ratio.budget(visible), budget_from_ratio(visible, 0.1, 2))
    fixed = TopKAttention(topk=(3, 10))
    np.testing.assert_array_equal(fixed.budget(visible), [[1, 2, 3, 0], [9, 10, 10, 10]])
    sparse = jnp.asarray([[True] * 4, [False] * 4])
    np.testing.assert_array_equal(
        fixed.budget(visible, sparse_rows=sparse), [[1, 2, 3, 0], [9, 10, 11, 12]]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(topks=(4, 0)), "topks: got 0, wanted ints of at least 1"),
        (dict(topks=(True,)), "topks: got True, wanted"),
        (dict(window=0), "window got 0, wanted at least 1"),
        (dict(block_q=0), "block_q got 0, wanted at least 1"),
        (dict(window=3, causal=False), "window got 3 with causal=False"),
        (dict(query_segment_ids=jnp.zeros((2, 6), jnp.int32)), "key_segment_ids got None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused(options, message):
    query, key = map(jnp.asarray, draw(6, dtype=np.float32))
    with pytest.raises((ValueError, TypeError), match=message):
        attention_entropy(query, key, **options)


def test_heads_that_do_not_divide_are_refused():
    query, key = map(jnp.asarray, draw(6, dtype=np.float32, n=3))
    with pytest.raises(ValueError, match="query got 3 heads, wanted a multiple of the 2"):
        attention_entropy(query, key)
