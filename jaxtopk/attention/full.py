"""Dense attention: the control of every study, and what exempt layers and prompt rows run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxtopk.attention.base import AttentionStrategy
from pallas_kernels.core.platform import target_platform

_CHUNK_BYTES = 2**28  # float32 scores that the chunked path holds at a time
_PIECE_ROWS = 64  # rows that share a slice of the keys; more where there would be too many pieces
_MAX_PIECES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullAttention(AttentionStrategy):
    """Softmax over every visible key.

    On GPUs in half precision this is cuDNN's fused attention, else plain products over chunks of rows, so that the score
    matrix never stands whole.
    """

    def attend(
        self,
        query,
        key,
        value,
        *,
        scale=None,
        window=None,
        lengths=None,
        segment_ids=None,
        sparse_rows=None,
        index=None,
    ):
        """See `AttentionStrategy.attend`; `sparse_rows` changes nothing here."""
        del sparse_rows, index
        b, t, n, h = query.shape
        s = key.shape[1]
        if segment_ids is None and t == s and _has_cudnn(query, value):
            local = None if window is None else (window - 1, 0)
            # `lengths` is not passed on: below it, causality hides the padding already, and rows past it then stay finite,
            # where the kernel may leave memory as it was. They end up in caches, where a NaN times a weight of 0 is NaN.
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                scale=scale,
                is_causal=True,
                local_window_size=local,
                implementation="cudnn",
            )
        # Pieces of rows, each against the keys its rows can see: causal attention at about half the dense cost, and
        # scores that stay in a CPU's caches.
        piece = max(_PIECE_ROWS, -(-t // _MAX_PIECES))
        # Backward, all pieces would keep their scores; recompute them where together they are too large.
        remat = jax.checkpoint if 4 * b * n * t * s > _CHUNK_BYTES else lambda f: f
        outs = []
        for start in range(0, t, piece):
            stop = min(start + piece, t)
            first = 0 if window is None else max(0, start + (s - t) - window + 1)
            last = max(stop + (s - t), first + 1)
            attend = functools.partial(
                _attend_rows, offset=start + (s - t) - first, window=window, scale=scale
            )
            outs.append(
                remat(attend)(
                    query[:, start:stop],
                    key[:, first:last],
                    value[:, first:last],
                    None if lengths is None else lengths - first,
                    None if segment_ids is None else segment_ids[:, start:stop],
                    None if segment_ids is None else segment_ids[:, first:last],
                )
            )
        return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)

    def decode(self, query, key, value, *, lengths, scale=None, window=None, index=None):
        """See `AttentionStrategy.decode`. Values past `lengths` get weight 0, so they have to be finite, as a cache's are."""
        del index
        index = jnp.arange(key.shape[1], dtype=jnp.int32)[None, :]
        mask = index < lengths[:, None]
        if window is not None:
            mask &= index >= lengths[:, None] - window
        return _masked_attention(query[:, None], key, value, mask[:, None, :], scale)[:, 0]


def _attend_rows(
    query, key, value, lengths, query_segments, key_segments, *, offset, window, scale
):
    """Attends rows whose first one is aligned with key `offset`, a chunk of them at a time so that scores stay small."""
    b, t, n, _ = query.shape
    s = key.shape[1]
    position = jnp.arange(t, dtype=jnp.int32) + offset
    index = jnp.arange(s, dtype=jnp.int32)

    def rows(query, position, segments):
        mask = index[None, None, :] <= position[None, :, None]
        if window is not None:
            mask &= index[None, None, :] > position[None, :, None] - window
        if lengths is not None:
            mask = mask & (index[None, None, :] < lengths[:, None, None])
        if segments is not None:
            mask = mask & (segments[:, :, None] == key_segments[:, None, :])
        return _masked_attention(query, key, value, mask, scale)

    chunk = max(8, _CHUNK_BYTES // (4 * b * n * s) // 8 * 8)
    if chunk >= t:
        return rows(query, position, query_segments)
    # Whole chunks under a scan, the remainder on its own: no padded rows.
    whole = t // chunk * chunk
    split = lambda x: jnp.moveaxis(
        x[:, :whole].reshape(b, whole // chunk, chunk, *x.shape[2:]), 1, 0
    )
    xs = (
        split(query),
        position[:whole].reshape(-1, chunk),
        None if query_segments is None else split(query_segments),
    )
    out = lax.map(jax.checkpoint(lambda x: rows(*x)), xs)
    out = jnp.moveaxis(out, 0, 1).reshape(b, whole, n, -1)
    if whole == t:
        return out
    tail = rows(
        query[:, whole:],
        position[whole:],
        None if query_segments is None else query_segments[:, whole:],
    )
    return jnp.concatenate([out, tail], axis=1)


def _masked_attention(query, key, value, mask, scale):
    """Attends [B, T, N, H] rows under a [B, T, S] mask, softmax in float32; rows that see nothing give 0."""
    b, t, n, h = query.shape
    heads = key.shape[2]
    scale = h**-0.5 if scale is None else scale
    query = query.reshape(b, t, heads, n // heads, h)
    if t == 1 and target_platform() == "cpu":
        scores, mix = _row_products(query[:, 0], key, value)
    else:
        scores = _einsum("btkgh,bskh->btkgs", query, key)
        mix = lambda weights: _einsum("btkgs,bskh->btkgh", weights, value)
    visible = mask[:, :, None, None, :]
    scores = jnp.where(visible, scores * scale, -jnp.inf)
    m = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(m == -jnp.inf, 0.0, m))
    l = jnp.sum(weights, axis=-1, keepdims=True)
    out = mix(weights.astype(value.dtype)) / jnp.where(l == 0.0, 1.0, l)
    return out.reshape(b, t, n, -1).astype(query.dtype)


def _row_products(query, key, value):
    """The two products of one row a sequence, read from the cache as it lies: [B, K, G, H] -> [B, 1, K, G, S], and back.

    On a CPU, batching over a middle axis would transpose the whole cache at each token. So all heads share one product, with
    zeros where a query head meets another's keys: K times the arithmetic, but bound by reading the cache once.
    """
    b, heads, g, h = query.shape
    s = key.shape[1]
    own = jnp.eye(heads, dtype=query.dtype)
    spread = jnp.einsum("bkgh,kc->bkgch", query, own).reshape(b, heads * g, heads * h)
    scores = _einsum("bnc,bsc->bns", spread, key.reshape(b, s, heads * h)).reshape(
        b, 1, heads, g, s
    )

    def mix(weights):
        mixed = _einsum("bns,bsc->bnc", weights.reshape(b, heads * g, s), value.reshape(b, s, -1))
        mixed = mixed.reshape(b, heads, g, heads, -1)
        return jnp.stack([mixed[:, head, :, head] for head in range(heads)], axis=1)[:, None]

    return scores, mix


def _einsum(formula, x, y):
    """Contracts into float32; float32 operands are not rounded to a shorter type on accelerators."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(formula, x, y, precision=precision, preferred_element_type=jnp.float32)


def _has_cudnn(query, value) -> bool:
    """Whether cuDNN's fused kernel takes these arrays: a GPU, half precision, equal head sizes up to 128."""
    return (
        target_platform() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[-1] == value.shape[-1] <= 128
        and query.shape[-1] % 8 == 0
    )
