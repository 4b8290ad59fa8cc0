"""Tile sizes of the `topk_decode_attention` kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKDecodeBlockSizes:
    """Tile sizes; None leaves a size to the kernel's heuristic.

    block_kv: keys read at a time.
    num_splits: parts that a row's keys are divided into, run side by side.
    list_splits: parts that a head's list of selected keys is divided into; as `num_splits` if only that is given.
    """

    block_kv: int | None = None
    num_splits: int | None = None
    list_splits: int | None = None

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"TopKDecodeBlockSizes: {name} got {value}, wanted at least 1")
