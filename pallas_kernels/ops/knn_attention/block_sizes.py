"""How many rows and keys the nearest-neighbour paths hold at a time."""

import dataclasses

from pallas_kernels.core import platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnBlockSizes:
    """Sizes; None leaves a size to the heuristic.

    block_q: query rows whose distances are held at a time.
    block_kv: keys read at a time by the kernels; "xla" reads all of them.
    """

    block_q: int | None = None
    block_kv: int | None = None

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"KnnBlockSizes: {name} got {value}, wanted at least 1")


# float32 distances of one chunk, which are searched some twenty times over: a CPU is to keep them in its caches.
CHUNK_BYTES = {"cpu": 2**20, "gpu": 2**28, "tpu": 2**28}


def chunk_rows(batch: int, rows: int, keys: int) -> int:
    """Returns how many rows' distances fit the device's `CHUNK_BYTES`, at least one, spread evenly over the chunks."""
    fits = max(CHUNK_BYTES[platform.target_platform()] // max(4 * batch * keys, 1), 1)
    chunks = -(-rows // fits)
    return -(-rows // chunks)
