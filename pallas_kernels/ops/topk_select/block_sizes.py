"""Tile sizes of the `topk_select` kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKSelectBlockSizes:
    """Tile sizes; None leaves a size to the kernel's heuristic.

    block_rows: rows that one grid step holds.
    block_s: keys read at a time.
    num_splits: parts that a long row is divided into, run side by side (GPU).
    """

    block_rows: int | None = None
    block_s: int | None = None
    num_splits: int | None = None

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"TopKSelectBlockSizes: {name} got {value}, wanted at least 1")
