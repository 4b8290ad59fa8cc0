"""The exact relations between entropy, mass, distance and output error, on measured rows; and what breaks where they fail.

Write p for the full softmax of a row, U for a set of its keys, a for the mass of U, H for the entropy of p.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pallas_kernels
from jaxtopk.analysis.entropy import RowEntropy, attention_entropy
from jaxtopk.attention import FullAttention

HURRY = {"xla_backend_optimization_level": 0}
ROWS, KEYS, VALUES = 3, 97, 4
TOPKS = (1, 2, 7, 40, 97)
TOLERANCE = 1e-6  # float64, but sets are ranked by float32


@functools.partial(jax.jit, compiler_options=HURRY)
def measured(scores, value):
    """Rows [R, S] of any scores: heads of size 1 whose queries are 1. Returns entropies, and full and sparse outputs."""
    query = jnp.ones((len(scores), 1, 1, 1), scores.dtype)
    key = scores[:, :, None, None]
    value = value[:, :, None]
    rows = attention_entropy(query, key, topks=TOPKS, causal=False, scale=1.0)
    full = FullAttention().attend(query, key, value, scale=1.0)
    sparse = [
        pallas_kernels.topk_attention(
            query, key, value, topk=topk, scale=1.0, causal=False, implementation="reference"
        )
        for topk in TOPKS
    ]
    return rows, full, sparse


def draw(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = {
        "flat": np.zeros((ROWS, KEYS)),
        "normal": rng.normal(size=(ROWS, KEYS)),
        "peaked": 6 * rng.normal(size=(ROWS, KEYS)),
        "ties": rng.integers(0, 3, size=(ROWS, KEYS)).astype(float),
        "one heavy": np.where(np.arange(KEYS) == 5, 9.0, rng.normal(size=(ROWS, KEYS))),
    }[kind]
    return scores, rng.normal(size=(ROWS, KEYS, VALUES))


def softmax(scores):
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def entropy_of(p):
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


def best(p, topk):
    """The best keys of each row, lowest index first among equals, bool [R, S]."""
    order = np.argsort(-p, axis=-1, kind="stable")[:, :topk]
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return kept


def check_bounds(rows: RowEntropy) -> None:
    """Relations 4 and 5 as a reader of measurements can check them; raises where one of them fails."""
    entropy = np.asarray(rows.entropy)
    assert (entropy >= -TOLERANCE).all()
    assert (entropy <= np.log(KEYS) + TOLERANCE).all(), "more entropy than the keys allow"
    previous = np.zeros_like(entropy)
    for topk, part in zip(TOPKS, rows.topk, strict=True):
        mass, inside = np.asarray(part.mass), np.asarray(part.entropy)
        assert (mass <= 1).all()
        assert (mass >= previous - TOLERANCE).all(), "a larger set holds less"
        assert (inside <= np.log(topk) + TOLERANCE).all(), "more entropy than the set allows"
        assert (inside <= entropy + TOLERANCE).all(), "more entropy inside the best than in all"
        if topk > 1:
            assert (mass >= 1 - entropy / np.log(topk) - TOLERANCE).all(), "less mass than proven"
        if topk == KEYS:
            np.testing.assert_allclose(mass, 1, atol=TOLERANCE)
            np.testing.assert_allclose(inside, entropy, atol=TOLERANCE)
        previous = mass


KINDS = ("flat", "normal", "peaked", "ties", "one heavy")


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
def test_relations_hold_on_measured_rows(kind, seed):
    scores, value = draw(kind, seed)
    with jax.enable_x64(True):
        rows, full, sparse = jax.tree.map(np.asarray, measured(scores, value))
    p = softmax(scores)
    np.testing.assert_allclose(rows.entropy[:, 0, 0], entropy_of(p), atol=1e-9)
    check_bounds(rows)
    full = full[:, 0, 0]
    farthest = np.linalg.norm(value, axis=-1).max(axis=-1)
    for topk, part, out in zip(TOPKS, rows.topk, sparse, strict=True):
        kept = best(p, topk)
        out, a = out[:, 0, 0], part.mass[:, 0, 0]
        inside = np.where(kept, p, 0) / a[:, None]
        # 1: the output error, exactly, and its bound
        rest = np.where(kept, 0, p)
        left = rest.sum(axis=-1, keepdims=True)
        of_rest = np.einsum("rs,rsv->rv", rest / np.where(left > 0, left, 1), value)
        error = full - out
        np.testing.assert_allclose(error, (1 - a)[:, None] * (of_rest - out), atol=TOLERANCE)
        assert (np.linalg.norm(error, axis=-1) <= 2 * (1 - a) * farthest + TOLERANCE).all()
        # 2: total variation; 3: divergence
        np.testing.assert_allclose(np.abs(p - inside).sum(axis=-1) / 2, 1 - a, atol=TOLERANCE)
        ratio = np.where(kept, np.log(np.where(kept, inside / p, 1)), 0)
        np.testing.assert_allclose((inside * ratio).sum(axis=-1), -np.log(a), atol=TOLERANCE)
        np.testing.assert_allclose(part.entropy[:, 0, 0], entropy_of(inside), atol=TOLERANCE)


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), topk=st.sampled_from([1, 2, 7, 40]))
def test_no_other_set_of_that_size_has_more_mass(kind, seed, topk):
    """Relation 6; and 1 to 4 for sets in general, as far as they hold for them."""
    scores, value = draw(kind, seed)
    p = softmax(scores)
    rng = np.random.default_rng(seed + 1)
    order = np.argsort(rng.random((ROWS, KEYS)), axis=-1)[:, :topk]
    other = np.zeros(p.shape, bool)
    np.put_along_axis(other, order, True, axis=-1)
    with jax.enable_x64(True):
        rows = jax.tree.map(np.asarray, measured(scores, value)[0])
    a = np.where(other, p, 0).sum(axis=-1)
    most = rows.topk[TOPKS.index(topk)].mass[:, 0, 0]
    assert (a <= most + TOLERANCE).all()
    inside = np.where(other, p, 0) / a[:, None]
    np.testing.assert_allclose(np.abs(p - inside).sum(axis=-1) / 2, 1 - a, atol=1e-9)
    assert (entropy_of(inside) <= np.log(topk) + 1e-9).all()
    full, out = (np.einsum("rs,rsv->rv", weights, value) for weights in (p, inside))
    farthest = np.linalg.norm(value, axis=-1).max(axis=-1)
    assert (np.linalg.norm(full - out, axis=-1) <= 2 * (1 - a) * farthest + 1e-9).all()


def test_a_set_that_is_not_the_best_may_have_more_entropy_than_the_whole():
    p = np.asarray([0.9, 0.05, 0.05])
    assert entropy_of(p[1:] / p[1:].sum()) == pytest.approx(np.log(2))
    assert entropy_of(p) < np.log(2) - 0.2


def test_the_best_set_may_have_the_larger_output_error():
    p, value = np.asarray([0.4, 0.35, 0.25]), np.asarray([1.0, 0.0, 0.4])
    error_of_one = np.abs(p @ value - value)
    assert error_of_one[2] < error_of_one[0]  # the lightest key stands in best for all


def in_bits(rows: RowEntropy) -> RowEntropy:
    return rows._replace(entropy=rows.entropy / np.log(2))


def not_renormalised(rows: RowEntropy) -> RowEntropy:
    parts = [
        part._replace(entropy=part.mass * part.entropy - part.mass * np.log(part.mass))
        for part in rows.topk
    ]
    return rows._replace(topk=tuple(parts))


def other_than_the_best(rows: RowEntropy) -> RowEntropy:
    """As the worst two keys would: next to no mass."""
    parts = [
        part._replace(mass=part.mass * (topk != 2))
        for topk, part in zip(TOPKS, rows.topk, strict=True)
    ]
    return rows._replace(topk=(parts[0]._replace(mass=0 * parts[0].mass), *parts[1:]))


def masses_in_another_order(rows: RowEntropy) -> RowEntropy:
    pairs = zip(rows.topk, rows.topk[::-1], strict=True)
    return rows._replace(topk=tuple(part._replace(mass=other.mass) for part, other in pairs))


def sum_that_did_not_move_with_the_maximum(rows: RowEntropy) -> RowEntropy:
    return rows._replace(entropy=np.maximum(rows.entropy - 1.0, 0))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (in_bits, "more entropy than the keys allow"),
        (not_renormalised, "more entropy than the set allows"),
        (other_than_the_best, "less mass than proven"),
        (masses_in_another_order, "a larger set holds less"),
        (sum_that_did_not_move_with_the_maximum, "more entropy inside the best than in all"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_check_notices_a_planted_mistake(mistake, message):
    found = set()
    for kind in KINDS:
        scores, value = draw(kind, 0)
        with jax.enable_x64(True):
            rows = jax.tree.map(np.asarray, measured(scores, value)[0])
        check_bounds(rows)
        try:
            check_bounds(mistake(rows))
        except AssertionError as error:
            found.add(str(error).partition("\n")[0])
    assert message in found
