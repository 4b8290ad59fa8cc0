"""`merge_attention` and the pieces of a softmax: any split, any grouping, empty parts, gradients, bad input."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels import merge_attention, testing
from pallas_kernels.core import online_softmax


def parts_of(seed=0, *, splits=(0, 3, 3, 10), dtype=np.float64, four=False):
    """Returns ([(out, lse)], (out, lse) of the whole): numpy softmax over runs of keys, one of them empty."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(2, 4, 5, splits[-1])) * 3  # [B, N, T, S]
    value = rng.normal(size=(2, 4, splits[-1], 6))

    def attend(first, last):
        weights = np.exp(scores[..., first:last])
        total = weights.sum(-1)
        out = weights @ value[:, :, first:last] / np.where(total == 0, 1, total)[..., None]
        with np.errstate(divide="ignore"):
            lse = np.log(total)
        if not four:
            return out[:, :, 0].astype(dtype), lse[:, :, 0].astype(dtype)
        return np.swapaxes(out, 1, 2).astype(dtype), lse.astype(dtype)

    runs = [attend(a, b) for a, b in zip(splits[:-1], splits[1:], strict=True)]
    return [tuple(map(jnp.asarray, run)) for run in runs], attend(0, splits[-1])


def merge(*parts):
    return merge_attention(*zip(*parts, strict=True))


@pytest.mark.parametrize("four", [False, True], ids=["rows", "sequences"])
def test_parts_merge_into_the_whole_however_they_are_grouped(four):
    with jax.enable_x64(True):
        (a, b, c), whole = parts_of(four=four)
        for merged in (
            merge(a, b, c),
            merge(merge(a, b), c),
            merge(c, merge(b, a)),
            merge(tuple(map(jnp.asarray, whole))),
        ):
            for x, y in zip(merged, whole, strict=True):
                testing.assert_accurate(x, y)
        stacked = merge_attention(*(jnp.stack(x) for x in zip(a, b, c, strict=True)))
        testing.assert_accurate(stacked[0], whole[0])


def test_a_part_without_keys_adds_nothing_even_if_it_holds_nan():
    (a, _, c), whole = parts_of(dtype=np.float32)
    empty = (jnp.full_like(a[0], jnp.nan), jnp.full_like(a[1], -jnp.inf))
    for x, y in zip(merge(empty, a, empty, c), whole, strict=True):
        testing.assert_accurate(x, y)
    out, lse = merge(empty, empty)
    assert not np.any(out)
    assert (np.asarray(lse) == -np.inf).all()


def test_shares_survive_log_sum_exps_far_from_zero():
    (a, b, c), whole = parts_of(dtype=np.float32)
    for shift in (-1e4, 1e4):
        moved = [(out, lse + shift) for out, lse in (a, b, c)]
        np.testing.assert_allclose(
            merge(*moved)[0], whole[0], rtol=0, atol=5e-3
        )  # lse has 2^-10 left


def test_gradients_flow_into_outs_and_log_sum_exps():
    with jax.enable_x64(True):
        (a, empty, c), _ = parts_of()
        spell = lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

        def loss(parts):
            out, lse = merge(*parts)
            return jnp.sum(out * spell(out)) + jnp.sum(jnp.sin(lse))

        grads = jax.jit(jax.grad(loss))([a, empty, c])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
        assert not any(np.any(x) for x in grads[1])
        rng = np.random.default_rng(1)
        step = jax.tree.map(lambda x: 1e-6 * jnp.asarray(rng.normal(size=x.shape)), [a, empty, c])
        moved = lambda sign: loss(jax.tree.map(lambda x, d: x + sign * d, [a, empty, c], step))
        slope = sum(
            jnp.sum(g * d)
            for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True)
        )
        np.testing.assert_allclose((moved(1) - moved(-1)) / 2, slope, rtol=1e-6)


def test_narrow_parts_merge_in_float32_and_stay_narrow():
    (a, _, c), whole = parts_of(dtype=np.float32)
    narrow = [(out.astype(jnp.bfloat16), lse) for out, lse in (a, c)]
    out, lse = merge(*narrow)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    wide = merge(*((out.astype(jnp.float32), lse) for out, lse in narrow))[0]
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
    testing.assert_accurate(lse, whole[1])


def test_values_enter_only_the_rows_that_keep_them():
    p = jnp.asarray([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    value = jnp.asarray([[1.0], [3.0], [jnp.nan]])
    for weigh in (online_softmax.weigh_values, online_softmax.weigh_finite_values):
        out = weigh("ts,sv->tv", p, p > 0, value)
        np.testing.assert_array_equal(out[:, 0], [2, np.nan, 0])
        np.testing.assert_array_equal(
            weigh("ts,sv->tv", p, p > 0, value.at[2].set(7))[:, 0], [2, 7, 0]
        )


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "got 0 outs and 0 lses, wanted as many of both, at least 1"),
        ([(2, 4, 6)], [(2, 4), (2, 4)], "got 1 outs and 2 lses"),
        ([(2, 5, 4, 6)], [(2, 5, 4)], r"shape \(2, 5, 4\), wanted \(2, 5, 4, 6\) with \(2, 4, 5\)"),
        (
            [(2, 4, 6), (2, 4, 7)],
            [(2, 4), (2, 4)],
            r"out of shape \(2, 4, 7\).* wanted \(2, 4, 6\)",
        ),
    ],
    ids=["none", "numbers", "axes", "shapes"],
)
def test_bad_input_is_named(outs, lses, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks would come first
    with pytest.raises(ValueError, match=f"merge_attention: .*{message}"):
        merge_attention([jnp.zeros(x) for x in outs], [jnp.zeros(x) for x in lses])
