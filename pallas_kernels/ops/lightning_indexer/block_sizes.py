"""How many rows and keys the `lightning_indexer` paths hold at a time."""

import dataclasses

from pallas_kernels.core import platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningIndexerBlockSizes:
    """Sizes; None leaves a size to the heuristic.

    block_q: query rows that are scored together.
    block_kv: keys read at a time by the kernels; "xla" reads all of them.
    num_splits: parts that the keys are divided into by the GPU kernel, run side by side.
    """

    block_q: int | None = None
    block_kv: int | None = None
    num_splits: int | None = None

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(
                    f"LightningIndexerBlockSizes: {name} got {value}, wanted at least 1"
                )


# float32 products of one chunk, all indexer heads: a CPU is to keep them in its caches, others want large launches.
CHUNK_BYTES = {"cpu": 2**22, "gpu": 2**28, "tpu": 2**28}


def chunk_rows(batch: int, rows: int, heads: int, keys: int) -> int:
    """Returns how many rows' products fit the device's `CHUNK_BYTES`, at least one, spread evenly over the chunks."""
    budget = CHUNK_BYTES[platform.target_platform()]
    fits = max(budget // max(4 * batch * heads * keys, 1), 1)
    chunks = -(-rows // fits)
    return -(-rows // chunks)
