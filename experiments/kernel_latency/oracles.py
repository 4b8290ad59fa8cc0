"""Whether a timed result is right: certificates and slow plain oracles, at full size, on the device.

A selection from given scores is checked exactly: a set {score > threshold, or equal with a place up to the tie cut} that has
as many keys as wanted is the one right answer. Where scores are computed inside the op, they may differ in their last bits:
keys clearly above the k-th score must be in, keys clearly below must be out. Attention outputs are compared row by row, since
one wrong key among 2,048 moves a row by 3 %, and rounding to bfloat16 by 0.2 %.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.core.selection import TopKSelection

_ROUNDING = 0.01  # of a row, relative RMS: rounding to bfloat16 stays well below
_ROUNDED_ROWS = 0.75  # share of rows that must stay within it; in the others a near-tie at the last place may fall either way


def assert_selected(scores, lengths, topk: int, got: TopKSelection) -> None:
    """Checks a selection from scores [R, S], every field of it.

    Raises:
      AssertionError: says how many rows break which rule.
    """
    _assert_none(_selection_faults(scores, lengths, *got, topk=topk))


def assert_largest(scores, indices) -> None:
    """Checks lists [R, k] of positions, in any order: distinct, and no key left out is larger than one kept.

    Raises:
      AssertionError: says how many rows break which rule.
    """
    _assert_none(_largest_faults(scores, jnp.asarray(indices, jnp.int32)))


def assert_nearly_selected(scores, visible, topk: int, count, indices, *, slack: float) -> None:
    """Checks lists [R, k] against scores [R, S] that another routine computed.

    Args:
      scores: the oracle's.
      visible: [R, S].
      count: keys kept by each row; None for a list without one.
      indices: positions, -1 at the tail.
      slack: how far scores may differ, in standard deviations of a row's visible scores.

    Raises:
      AssertionError: says how many rows break which rule.
    """
    indices = jnp.asarray(indices, jnp.int32)
    count = jnp.sum(indices >= 0, axis=-1, dtype=jnp.int32) if count is None else count
    _assert_none(_nearly_selected_faults(scores, visible, count, indices, slack, topk=topk))


def assert_rows_close(got, want, topk: int, *, rounding: float = _ROUNDING) -> None:
    """Checks attention outputs [..., V]: most rows differ by rounding, none by more than two keys of `topk`.

    Args:
      rounding: relative RMS that a row may differ by.

    Raises:
      AssertionError: says how many rows are off, and by how much.
    """
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    if got.shape != want.shape:
        raise AssertionError(f"out: got shape {got.shape}, wanted {want.shape}")
    rms = lambda x: np.sqrt(np.mean(np.square(x), axis=-1))
    off = rms(got - want) / np.maximum(rms(want), np.finfo(np.float32).tiny)
    most = rounding + 2 * (2 / topk) ** 0.5
    share = float(np.mean(off <= rounding))
    if not (share >= _ROUNDED_ROWS and off.max() <= most):
        raise AssertionError(
            f"out: got {share:.0%} of rows within {rounding:g} and the worst off by {off.max():.3g}, wanted "
            f"{_ROUNDED_ROWS:.0%} and {most:.3g} (relative RMS)"
        )


def assert_same_bits(got, want) -> None:
    """Checks that two results are one, bit for bit.

    Raises:
      AssertionError: says how many elements are not.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.tobytes() != want.tobytes():
        other = int(np.sum(got != want))
        raise AssertionError(f"out: got {other} of {got.size} elements other, wanted the same bits")


@functools.partial(jax.jit, static_argnames="topk")
def attention(query, key, value, lengths, *, topk: int | None, ranked_by=None):
    """Returns float32 [B, N, V]: softmax over the `topk` best keys of each head, or over all, a sequence at a time.

    Args:
      query, key, value: [B, N, H], [B, S, K, H], [B, S, K, V].
      lengths: valid keys, int32 [B].
      ranked_by: eight-bit [B, S, K, H] and scale [B, S, K] of a copy that says which keys are best; None ranks by their scores.
    """
    num_kv = key.shape[2]

    def sequence(arguments):
        q, k, v, length, copy = arguments
        n, h = q.shape
        heads = q.reshape(num_kv, n // num_kv, h)
        scores = _products("kgh,skh->kgs", heads, k) * h**-0.5
        visible = jnp.arange(k.shape[0], dtype=jnp.int32) < length
        scores = jnp.where(visible[None, None, :], scores, -jnp.inf)
        if topk is not None:
            ranking = scores
            if copy is not None:
                # Numbers of eight bits are exact in the query's dtype.
                products = _products("kgh,skh->kgs", heads, copy[0].astype(q.dtype))
                ranking = jnp.where(visible[None, None, :], products * copy[1].T[:, None], -jnp.inf)
            last = lax.top_k(ranking, min(topk, k.shape[0]))[0][..., -1:]
            scores = jnp.where(ranking >= last, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        return _products("kgs,skv->kgv", weights, v.astype(jnp.float32)).reshape(n, -1)

    return lax.map(sequence, (query, key, value, lengths, ranked_by))


@jax.jit
def listed_attention(query, key, value, indices):
    """Returns float32 [B, N, V]: softmax over listed keys, all valid.

    Args:
      query, key, value: [B, N, H], [B, S, K, H], [B, S, K, V].
      indices: [B, G, k], one list for all heads (G = 1) or one for each key/value head.
    """
    num_kv = key.shape[2]

    def sequence(arguments):
        q, k, v, listed = arguments
        n, h = q.shape
        place = jnp.broadcast_to(listed, (num_kv, listed.shape[1])).T[:, :, None]
        k, v = (jnp.take_along_axis(x, place, axis=0, mode="clip") for x in (k, v))
        scores = _products("kgh,skh->kgs", q.reshape(num_kv, n // num_kv, h), k) * h**-0.5
        weights = jax.nn.softmax(scores, axis=-1)
        return _products("kgs,skv->kgv", weights, v.astype(jnp.float32)).reshape(n, -1)

    return lax.map(sequence, (query, key, value, indices))


@jax.jit
def indexer_scores(index_query, index_key, head_weights):
    """Returns float32 [R, S], sum_i w_i relu(<q_i, k_s>), a row at a time.

    Args:
      index_query, head_weights: [R, I, D], [R, I].
      index_key: [S, D] for all rows.
    """

    def row(arguments):
        q, w = arguments
        products = jnp.maximum(_products("id,sd->is", q, index_key), 0)
        return _products("i,is->s", w.astype(jnp.float32), products)

    return lax.map(row, (index_query, head_weights))


def _products(subscripts: str, left, right):
    return jnp.einsum(
        subscripts,
        left,
        right,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _assert_none(faults) -> None:
    found = {name: int(rows) for name, rows in jax.device_get(faults).items() if rows}
    if found:
        rules = ", ".join(f"{name} in {rows} rows" for name, rows in found.items())
        raise AssertionError(f"selection: got it wrong ({rules}), wanted no row to break a rule")


def _rows(broken) -> jax.Array:
    return jnp.sum(broken, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames="topk")
def _selection_faults(scores, lengths, indices, count, threshold, tie_cut, *, topk: int):
    place = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    bound, cut = threshold[:, None], tie_cut[:, None]
    valid = (place < lengths[:, None]) & ~jnp.isnan(scores)
    kept = valid & ((scores > bound) | ((scores == bound) & (place <= cut)))
    total = lambda mask: jnp.sum(mask, axis=-1, dtype=jnp.int32)
    listed = lax.broadcasted_iota(jnp.int32, indices.shape, 1) < count[:, None]
    values = jnp.take_along_axis(scores, jnp.maximum(indices, 0), axis=1, mode="clip")
    member = (indices < lengths[:, None]) & (
        (values > bound) | ((values == bound) & (indices <= cut))
    )
    smallest = jnp.min(jnp.where(listed, values, jnp.inf), axis=-1)
    last_equal = jnp.max(jnp.where(listed & (values == bound), indices, -1), axis=-1)
    rises = (indices[:, 1:] > indices[:, :-1]) | ~listed[:, 1:]
    return {
        "count": _rows(count != jnp.minimum(topk, total(valid))),
        "size of the set": _rows(total(kept) != count),
        "list outside the set": _rows(jnp.any(listed & ~member, axis=-1)),
        "order of the list": _rows(~jnp.all(rises, axis=-1)),
        "tail of the list": _rows(jnp.any((indices >= 0) != listed, axis=-1)),
        "threshold": _rows(smallest != threshold),
        "tie cut": _rows(last_equal != tie_cut),
    }


@jax.jit
def _largest_faults(scores, indices):
    places = jnp.sort(indices, axis=-1)
    smallest = jnp.min(
        jnp.take_along_axis(scores, indices, axis=1, mode="clip"), axis=-1, keepdims=True
    )
    above = jnp.sum(scores > smallest, axis=-1, dtype=jnp.int32)
    reach = jnp.sum(scores >= smallest, axis=-1, dtype=jnp.int32)
    inside = (places[:, 0] >= 0) & (places[:, -1] < scores.shape[1])
    k = indices.shape[1]
    return {
        "places outside the row": _rows(~inside),
        "a place twice": _rows(jnp.any(places[:, 1:] == places[:, :-1], axis=-1)),
        "a larger key left out": _rows((above > k) | (reach < k)),
    }


@functools.partial(jax.jit, static_argnames="topk")
def _nearly_selected_faults(scores, visible, count, indices, slack, *, topk: int):
    hidden = jnp.where(visible, scores, -jnp.inf)
    number = jnp.sum(visible, axis=-1, dtype=jnp.int32)
    mean = jnp.sum(jnp.where(visible, scores, 0), axis=-1, keepdims=True)
    mean = mean / number[:, None].astype(jnp.float32)
    squares = jnp.sum(jnp.where(visible, jnp.square(scores - mean), 0), axis=-1, keepdims=True)
    deviation = jnp.sqrt(squares / number[:, None].astype(jnp.float32))
    last = lax.top_k(hidden, min(topk, scores.shape[1]))[0][:, -1:]
    high, low = last + slack * deviation, last - slack * deviation
    listed = indices >= 0
    values = jnp.take_along_axis(hidden, jnp.maximum(indices, 0), axis=1, mode="clip")
    places = jnp.sort(indices, axis=-1)
    twice = (places[:, 1:] == places[:, :-1]) & (places[:, 1:] >= 0)
    total = lambda mask: jnp.sum(mask, axis=-1, dtype=jnp.int32)
    return {
        "count": _rows(count != jnp.minimum(topk, number)),
        "length of the list": _rows(total(listed) != count),
        "a place twice": _rows(jnp.any(twice, axis=-1)),
        "a hidden key listed": _rows(jnp.any(listed & (values == -jnp.inf), axis=-1)),
        "a larger key left out": _rows(total(hidden > high) != total(listed & (values > high))),
        "a smaller key listed": _rows(jnp.any(listed & (values < low), axis=-1)),
    }
