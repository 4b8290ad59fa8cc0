"""How many rows the `gather_attention` paths hold at a time, and by which form they differentiate."""

import dataclasses

from pallas_kernels.core import platform

BACKWARDS = ("lists", "counts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatherAttentionBlockSizes:
    """Sizes; None leaves a choice to the heuristic.

    block_q: query rows whose listed keys and values "xla" holds at a time; a block of the GPU kernel holds one.
    block_q_backward: the same in the backward; with "counts", rows whose weights over all keys are held at a time.
    block_slots: slots of a list that the TPU kernel takes at a time.
    num_splits: parts that a list is divided into by the GPU kernel, run side by side.
    backward: "lists" (time T x k, a scatter-add) or "counts" (time T x S, matrix products), see `xla_vjp`.
    """

    block_q: int | None = None
    block_q_backward: int | None = None
    block_slots: int | None = None
    num_splits: int | None = None
    backward: str | None = None

    def __post_init__(self):
        for name in ("block_q", "block_q_backward", "block_slots", "num_splits"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"GatherAttentionBlockSizes: {name} got {value}, wanted at least 1"
                )
        if self.backward is not None and self.backward not in BACKWARDS:
            wanted = ", ".join(map(repr, BACKWARDS))
            raise ValueError(
                f"GatherAttentionBlockSizes: backward got {self.backward!r}, wanted one of {wanted}"
            )


# Measured: a CPU is fastest while a chunk stays in its caches, and a GPU when launches are few and large.
CHUNK_BYTES = {"cpu": 2**22, "gpu": 2**28, "tpu": 2**28}

SLOT_COST = 8  # keys that a CPU passes in matrix products in the time of one slot of a list


def chunk_rows(rows: int, row_bytes: int, *, least: int = 1) -> int:
    """Returns how many rows fit the device's `CHUNK_BYTES`, spread evenly over as few chunks as that allows."""
    fits = max(CHUNK_BYTES[platform.target_platform()] // max(row_bytes, 1), least)
    chunks = -(-rows // fits)
    return -(-rows // chunks)


def cheaper_backward(slots: int, keys: int) -> str:
    """Returns the form of the backward for rows that fetch `slots` rows and, if they took all, would meet `keys`.

    GPUs have no scatter-add of fixed order: theirs is made of atomics, and one made of a sort and sums of runs took an H100
    as long as "counts" over 600 keys a slot. TPUs take "counts" as well, for their matrix units; that is not measured.
    """
    cpu = platform.target_platform() == "cpu"
    return "lists" if cpu and SLOT_COST * slots < keys else "counts"
