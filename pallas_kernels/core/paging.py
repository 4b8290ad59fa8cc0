"""Caches in pages: a pool that sequences share, and a table that says which pages are whose.

A paged cache is a pool [P, page, K, H] and a page table int32 [B, pages]: token s of sequence b lies in pool page
`page_table[b, s // page]` at row `s % page`, so that a sequence has room for S = pages * page tokens. Table entries of
pages past a sequence's length are never followed, whatever they hold.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from pallas_kernels.core import checks

PAGES = (16, 32, 64, 128, 256)  # tokens


def check(op: str, key, value, page_table, batch: int):
    """Checks a pool of keys, one of values, and their page table; returns the table and S."""
    checks.shape(op, "key", key, "P page K H")
    checks.shape(op, "value", value, "P page K V", P=key.shape[0], page=key.shape[1])
    if key.shape[1] not in PAGES:
        wanted = ", ".join(map(str, PAGES))
        raise ValueError(
            f"{op}: key got shape {tuple(key.shape)}, wanted pages of one of {wanted} tokens on axis 1 beside a page_table"
        )
    page_table = jnp.asarray(page_table)
    checks.integer(op, "page_table", page_table)
    checks.shape(op, "page_table", page_table, "B pages", B=batch)
    if 0 in page_table.shape or 0 in key.shape[:1]:
        raise ValueError(
            f"{op}: page_table got shape {tuple(page_table.shape)} over {key.shape[0]} pages, wanted at least one of each"
        )
    rows, s = key.shape[0] * key.shape[1], page_table.shape[1] * key.shape[1]
    if max(rows, s) >= 2**31:
        raise ValueError(
            f"{op}: page_table got {s} tokens a sequence over a pool of {rows}, wanted fewer than 2**31 of each"
        )
    return page_table, s


def safe_table(
    page_table: Int32[Array, "B pages"],
    lengths: Int32[Array, "B"] | None,
    *,
    page: int,
    num_pages: int,
) -> Int32[Array, "B pages"]:
    """Returns the table with page 0 in the place of entries past a sequence's length, the others kept inside the pool."""
    if lengths is not None:
        first_row = jnp.arange(page_table.shape[1], dtype=jnp.int32)[None] * page
        page_table = jnp.where(first_row < lengths[:, None], page_table, 0)
    return jnp.clip(page_table, 0, num_pages - 1)


def contiguous(
    pool: Shaped[Array, "P page *rest"], page_table: Int32[Array, "B pages"]
) -> Shaped[Array, "B S *rest"]:
    """Copies each sequence's pages into one array, page after page; the table is a safe one."""
    b, pages = page_table.shape
    return pool[page_table].reshape(b, pages * pool.shape[1], *pool.shape[2:])


def pool_rows(
    indices: Int32[Array, "B *rest"], page_table: Int32[Array, "B pages"], page: int
) -> Int32[Array, "B *rest"]:
    """Returns where listed tokens lie in the pool seen as rows [P * page, ...]; -1 stays -1; the table is a safe one."""
    b = indices.shape[0]
    flat = jnp.maximum(indices.reshape(b, -1), 0)
    pages = jnp.take_along_axis(page_table, flat // page, axis=1, mode="clip")
    return jnp.where(indices < 0, -1, (pages * page + flat % page).reshape(indices.shape))


def contiguous_cache(key, value, quantized_key, page_table, lengths):
    """Returns keys, values and the eight-bit copy of keys (or None) as [B, S, ...] each, copied out of their pages if in any."""
    if page_table is None:
        return key, value, quantized_key
    table = safe_table(page_table, lengths, page=key.shape[1], num_pages=key.shape[0])
    copy = lambda pool: contiguous(pool, table)
    return copy(key), copy(value), jax.tree.map(copy, quantized_key)
