"""How many rows the `topk_attention` paths hold at a time."""

import dataclasses

from pallas_kernels.core import platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKAttentionBlockSizes:
    """Sizes; None leaves a size to the heuristic.

    block_q: query rows whose scores against all keys are held at a time; `chunk_rows` when None.
    """

    block_q: int | None = None

    def __post_init__(self):
        if self.block_q is not None and self.block_q < 1:
            raise ValueError(
                f"TopKAttentionBlockSizes: block_q got {self.block_q}, wanted at least 1"
            )


# float32 scores of one chunk. A CPU searches them some twenty times over, so they are to stay in its caches: chunks of 0.6 to
# 4.5 MiB took two fifths of the time of one of 36 MiB (two cores, T = S = 1024, 9 heads, measured). Others want large launches.
CHUNK_BYTES = {"cpu": 2**20, "gpu": 2**28, "tpu": 2**28}


def chunk_rows(batch: int, rows: int, heads: int, keys: int) -> int:
    """Returns the largest multiple of 8 rows whose scores fit the device's `CHUNK_BYTES`, at least 8, at most all rows."""
    budget = CHUNK_BYTES[platform.target_platform()]
    fits = budget // max(4 * batch * heads * keys, 1) // 8 * 8
    return min(max(fits, 8), rows)
