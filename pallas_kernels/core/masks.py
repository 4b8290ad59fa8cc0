"""Which keys a row may see: causal edge, sliding window, valid lengths and packed segments, in one rule.

Causal rows are aligned at the end: query t of T sees keys j <= t + S - T, so the last query sees the last key.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


def visible_keys(
    query_index: Int32[Array, "T"],
    key_index: Int32[Array, "S"],
    *,
    offset: int,
    causal: bool,
    window: int | None = None,
    lengths: Int32[Array, "B"] | None = None,
    query_segment_ids: Int32[Array, "B T"] | None = None,
    key_segment_ids: Int32[Array, "B S"] | None = None,
) -> Bool[Array, "#B T S"]:
    """Returns the mask of a tile of rows and keys.

    Args:
      query_index, key_index: positions of the tile's rows and keys in the whole arrays.
      offset: S - T of the whole arrays.
      causal: hide keys after the row's own position, `query_index + offset`.
      window: rows see only the last `window` keys up to their own position; needs `causal`.
      lengths: keys at or past this index are padding.
      query_segment_ids, key_segment_ids: the tile's document numbers; rows see their own document only.
    """
    position = (query_index + offset)[:, None]
    key = key_index[None, :]
    mask = jnp.broadcast_to(jnp.bool_(True), (query_index.shape[0], key_index.shape[0]))
    if causal:
        mask = key <= position
        if window is not None:
            mask &= key > position - window
    mask = mask[None]
    if lengths is not None:
        mask = mask & (key_index[None, None, :] < lengths[:, None, None])
    if query_segment_ids is not None and key_segment_ids is not None:
        mask = mask & (query_segment_ids[:, :, None] == key_segment_ids[:, None, :])
    return mask


def visible_to_decode(
    num_keys: int, lengths: Int32[Array, "B"] | None, window: int | None, batch: int
) -> Bool[Array, "B S"]:
    """Returns the keys that one decoded row a sequence may see: the last `window` of its first `lengths`."""
    lengths = jnp.full((batch,), num_keys, jnp.int32) if lengths is None else lengths
    key, end = jnp.arange(num_keys, dtype=jnp.int32)[None, :], lengths[:, None]
    mask = key < end
    return mask if window is None else mask & (key >= end - window)
