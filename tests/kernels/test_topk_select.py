"""`topk_select`: every row against a stable sort, the scores that break selectors, what never changes a set, bad input."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels import testing, topk_select
from pallas_kernels.core import selection
from pallas_kernels.ops.topk_select import xla
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes

HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests cost
IMPLEMENTATIONS = ("reference", "xla")
SIZES = (1, 7, 97, 257)


@functools.cache
def compiled(implementation, topk=None):
    """Returns the op over (scores, lengths) with an int budget and a list, or (scores, lengths, budgets) without."""
    if topk is None:
        run = lambda scores, lengths, budgets: topk_select(
            scores, budgets, lengths=lengths, with_indices=False, implementation=implementation
        )
    else:
        run = lambda scores, lengths: topk_select(
            scores, topk, lengths=lengths, implementation=implementation
        )
    return jax.jit(run, compiler_options=HURRY)


def best(row, topk, length):
    """Returns the chosen positions of one row, ascending: a stable sort of what may be chosen."""
    row = np.where(np.abs(row) < 2.0**-126, 0.0, row)
    alive = [j for j in range(length) if not np.isnan(row[j])]
    return sorted(sorted(alive, key=lambda j: (-row[j], j))[:topk])


def check_rows(got, rows, budgets, lengths):
    for i, (row, budget, length) in enumerate(zip(rows, budgets, lengths, strict=True)):
        row = np.where(np.abs(row) < 2.0**-126, np.float32(0), row)
        want = best(row, budget, length)
        assert got.count[i] == len(want), i
        if want:
            worst = min(row[want])
            assert got.threshold[i] == worst, i
            assert got.tie_cut[i] == max(j for j in want if row[j] == worst), i
        if got.indices is not None:
            assert [j for j in np.asarray(got.indices[i]) if j >= 0] == want, i
    testing.assert_well_formed(got)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_that_break_selectors_are_selected_exactly(implementation, size):
    """All adversarial rows, each with budgets of 1, a third, all and more, whole and cut short: one compilation."""
    rows, budgets, lengths = [], [], []
    for topk in (1, max(size // 3, 1), size, size + 5):
        for row in testing.adversarial_scores(size, topk).values():
            for length in (size, size // 2):
                rows.append(row), budgets.append(topk), lengths.append(length)
    as_int = lambda x: jnp.asarray(x, jnp.int32)
    got = compiled(implementation)(jnp.asarray(np.stack(rows)), as_int(lengths), as_int(budgets))
    check_rows(got, rows, budgets, lengths)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lists_hold_the_set_that_the_two_numbers_describe(implementation):
    rows = np.stack(list(testing.adversarial_scores(97, 9).values()))
    lengths = np.random.default_rng(0).integers(0, 98, len(rows)).astype(np.int32)
    got = compiled(implementation, topk=9)(jnp.asarray(rows), jnp.asarray(lengths))
    check_rows(got, rows, [9] * len(rows), lengths)
    visible = np.arange(97) < lengths[:, None]
    kept = selection.selected(jnp.asarray(rows), jnp.asarray(visible), got.threshold, got.tie_cut)
    np.testing.assert_array_equal(selection.compact(kept, 9), got.indices)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_are_ranked_as_float32(implementation, dtype):
    with jax.enable_x64(True):
        scores = np.random.default_rng(0).normal(size=(4, 97))
        scores[:, ::7] = scores[:, 1::7]  # ties, in every type
        scores[0, :50] = 1 + 1e-12 * np.arange(50)  # distinct in float64 alone
        lengths = jnp.full((4,), 97, jnp.int32)
        run = compiled(implementation, topk=9)
        narrow = jnp.asarray(scores, dtype)
        testing.assert_same_selection(
            run(narrow, lengths), run(narrow.astype(jnp.float32), lengths)
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_may_have_any_axes_and_budgets_broadcast_to_them(implementation):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 20)), jnp.float32)
    topk = jnp.asarray([[1], [4]], jnp.int32)
    lengths = jnp.asarray([5, 20, 0], jnp.int32)
    run = functools.partial(topk_select, implementation=implementation)
    several = jax.jit(functools.partial(run, with_indices=False), compiler_options=HURRY)
    got = several(scores, topk, lengths=lengths)
    assert got.indices is None
    np.testing.assert_array_equal(got.count, [[1, 1, 0], [4, 4, 0]])
    single = jax.jit(lambda row: run(row, 4), compiler_options=HURRY)(scores[0, 1])
    assert single.count.shape == ()
    assert single.indices.shape == (4,)
    np.testing.assert_array_equal(single.indices, best(np.asarray(scores[0, 1]), 4, 20))


def test_rows_that_are_searched_in_turns_give_the_same(monkeypatch):
    rows = jnp.asarray(np.stack(list(testing.adversarial_scores(33, 5).values())))
    lengths = jnp.asarray(np.arange(len(rows)) + 10, jnp.int32)
    want = compiled("reference", topk=5)(rows, lengths)
    monkeypatch.setattr(xla, "_CHUNK_BYTES", 4 * 33 * 4)  # four rows, and a remainder
    testing.assert_same_selection(compiled.__wrapped__("xla", topk=5)(rows, lengths), want)


def test_rows_too_long_to_count_in_float32_are_counted_in_int32(monkeypatch):
    rows = jnp.asarray(np.stack(list(testing.adversarial_scores(33, 5).values())))
    lengths = jnp.full((len(rows),), 33, jnp.int32)
    want = compiled("reference", topk=5)(rows, lengths)
    monkeypatch.setattr(xla, "_MAX_EXACT_COUNT", 33)
    testing.assert_same_selection(compiled.__wrapped__("xla", topk=5)(rows, lengths), want)


@hypothesis.given(seed=st.integers(0, 2**16), size=st.sampled_from((7, 97)))
def test_the_order_of_rows_changes_nothing_and_that_of_distinct_keys_only_the_positions(seed, size):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(size), (4, 1)), axis=1).astype(np.float32)
    run, lengths = compiled("xla", topk=5), jnp.full((4,), size, jnp.int32)
    plain = run(jnp.asarray(scores), lengths)
    keys, rows = rng.permutation(size), rng.permutation(4)
    moved = run(jnp.asarray(scores[rows][:, keys]), lengths)
    np.testing.assert_array_equal(
        np.sort(keys[np.asarray(moved.indices)], axis=1), np.asarray(plain.indices)[rows]
    )
    np.testing.assert_array_equal(moved.threshold, np.asarray(plain.threshold)[rows])


@hypothesis.given(seed=st.integers(0, 2**16), shift=st.integers(-1000, 1000))
def test_a_constant_added_to_whole_numbers_changes_no_set(seed, shift):
    scores = np.random.default_rng(seed).integers(-3, 4, (4, 97)).astype(np.float32)
    run, lengths = compiled("xla", topk=9), jnp.full((4,), 97, jnp.int32)
    plain, moved = (run(jnp.asarray(x), lengths) for x in (scores, scores + shift))
    np.testing.assert_array_equal(plain.indices, moved.indices)
    np.testing.assert_array_equal(plain.tie_cut, moved.tie_cut)
    np.testing.assert_array_equal(plain.threshold + shift, moved.threshold)


@hypothesis.given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=97, max_size=97))
def test_any_float_at_all_is_ranked_exactly(bits):
    scores = np.asarray([bits], np.int32).view(np.float32)
    got = compiled("xla", topk=9)(jnp.asarray(scores), jnp.asarray([97], jnp.int32))
    check_rows(got, scores, [9], [97])


def test_nothing_is_sorted_and_memory_stays_a_few_times_the_scores():
    scores = jax.ShapeDtypeStruct((8, 4096), jnp.float32)
    run = jax.jit(lambda x: topk_select(x, 64, implementation="xla"))
    program = run.lower(scores).compile()
    text = program.as_text()
    assert " sort(" not in text
    assert "topk" not in text.lower().replace("topk_select", "")
    assert program.memory_analysis().temp_size_in_bytes < 6 * 8 * 4096 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 0), np.float32), 1), r"scores got shape \(2, 0\), wanted \[..., S\] with S"),
        ((np.float32(1), 1), r"scores got shape \(\), wanted \[..., S\]"),
        ((np.zeros((2, 5), np.int32), 1), "scores got dtype int32, wanted one of float16"),
        ((np.zeros((2, 5), np.float32), 0), "topk got 0, wanted at least 1"),
        ((np.zeros((2, 5), np.float32), "3"), "topk got '3', wanted an int"),
        ((np.zeros((2, 5), np.float32), np.ones(2, np.int32)), "with_indices=True got an array"),
        (
            (np.zeros((2, 5), np.float32), 1, dict(lengths=np.ones(3, np.int32))),
            r"lengths got shape \(3,\), wanted one that broadcasts to \(2,\)",
        ),
        (
            (np.zeros((2, 5), np.float32), 1, dict(lengths=np.ones(2, np.int64))),
            "lengths got dtype int64, wanted int32",
        ),
        (
            (np.zeros((2, 5), np.float32), 1, dict(implementation="triton")),
            "implementation got 'triton', wanted one of reference, xla, mosaic_tpu, mosaic_gpu",
        ),
    ],
    ids=["no keys", "no axes", "type", "zero", "word", "list", "lengths", "wide", "backend"],
)
def test_bad_input_is_named(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks would come first
    *arguments, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with jax.enable_x64(True), pytest.raises(ValueError, match=f"topk_select: .*{message}"):
        topk_select(*arguments, **options)


@pytest.mark.parametrize("name", ["block_rows", "block_s"])
def test_block_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} got 0, wanted at least 1"):
        TopKSelectBlockSizes(**{name: 0})
