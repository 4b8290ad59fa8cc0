"""How many rows the `topk_attention` paths hold at a time."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKAttentionBlockSizes:
    """Sizes; None leaves a size to the heuristic.

    block_q: query rows whose scores against all keys are held at a time; `chunk_rows` when None.
    """

    block_q: int | None = None

    def __post_init__(self):
        if self.block_q is not None and self.block_q < 1:
            raise ValueError(f"TopKAttentionBlockSizes: block_q got {self.block_q}, wanted at least 1")


CHUNK_BYTES = 2**28  # float32 scores of one chunk of rows


def chunk_rows(batch: int, rows: int, heads: int, keys: int) -> int:
    """Returns the largest multiple of 8 rows whose float32 scores fit `CHUNK_BYTES`, at least 8, at most all rows."""
    fits = CHUNK_BYTES // max(4 * batch * heads * keys, 1) // 8 * 8
    return min(max(fits, 8), rows)
