"""Which keys a block sees, and copies of a cache's tiles into shared memory, its rows together or in pages (Mosaic GPU)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def visible_of(row, start_ref, end_ref, num_rows: int, limit: int):
    """Returns the first visible key of a row and one past the last, cut to [0, limit].

    Args:
      row: int32 scalar, below `num_rows`.
      start_ref, end_ref: None for 0 and `limit`, or int32 vectors, each entry for as many rows in turn as make `num_rows`.
    """

    def entry(ref):
        rows = num_rows // ref.shape[0]
        return jnp.clip(ref[row if rows == 1 else lax.div(row, rows)], 0, limit)

    start = jnp.int32(0) if start_ref is None else entry(start_ref)
    return start, jnp.int32(limit) if end_ref is None else entry(end_ref)


def copies_of(rows: int, page: int | None) -> int:
    """Returns how many copies, and so how many arrivals at a barrier, a tile of `rows` takes; page is None without pages."""
    return 1 if page is None else max(rows // page, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheTiles:
    """Tiles of one sequence and head of a cache, inside a kernel.

    Without pages a tile is one copy. In pages it is a copy of each page in it, or of a part of a larger page; tiles then begin
    at multiples of the page or, where that is larger, of `rows`. Only pages that hold a visible row are read: in the place of
    another, the nearest of those is copied, so that every tile has as many copies, and no memory is read that is not needed.

    Args:
      cache_ref: [B, S, K, H], or a pool of pages [P, page, K, H]; in global memory.
      table_ref: None, or the pages of each sequence, int32 [B, pages], in global memory.
      sequence, head: int32 scalars.
      start, end: int32 scalars, the first visible row and one past the last; at least one is visible where a tile is fetched.
      rows: of a tile; with pages, one is a multiple of the other.
    """

    cache_ref: Any
    table_ref: Any
    sequence: Any
    head: Any
    start: Any
    end: Any
    rows: int

    def pages(self, begin) -> list:
        """Reads from the table which pages the tile at row `begin` lies in; empty without pages. To be done ahead of `fetch`."""
        if self.table_ref is None:
            return []
        page = self.cache_ref.shape[1]
        first, last = lax.div(self.start, page), lax.div(self.end - 1, page)
        wanted = (lax.div(begin, page) + i for i in range(copies_of(self.rows, page)))
        return [self.table_ref[self.sequence, jnp.clip(i, first, last)] for i in wanted]

    def fetch(self, begin, pages: list, tile_ref, barrier) -> None:
        """Starts the copies of the tile at row `begin`, whose pages are given, to shared memory [rows, H]."""
        if self.table_ref is None:
            source = self.cache_ref.at[self.sequence, pl.ds(begin, self.rows), self.head]
            plgpu.copy_gmem_to_smem(source, tile_ref, barrier)
            return
        page = self.cache_ref.shape[1]
        if page >= self.rows:
            inside = pl.ds(lax.rem(begin, page), self.rows)
            source = self.cache_ref.at[pages[0], inside, self.head]
            plgpu.copy_gmem_to_smem(source, tile_ref, barrier)
            return
        for i, number in enumerate(pages):
            source = self.cache_ref.at[number, :, self.head]
            plgpu.copy_gmem_to_smem(source, tile_ref.at[pl.ds(i * page, page)], barrier)
