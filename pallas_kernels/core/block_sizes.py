"""Where a kernel's tile sizes come from: the caller, else this device's tuned table, else a heuristic.

Tables are JSON, `tuned/<device>/<op>.json`: {"entries": [{"implementation", "dtype", "bucket": {...}, "block_sizes": {...},
...}]}. A bucket holds powers of two; a call falls into the bucket that is equal after rounding its sizes up. Nothing is
ever searched at call time.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels.core import platform

logger = logging.getLogger("pallas_kernels")

_TUNED = pathlib.Path(__file__).parent.parent / "tuned"


def round_up_to_power_of_two(value: int) -> int:
    """Returns the smallest power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


@functools.cache
def _table(device: str, op: str) -> Mapping[tuple, Mapping[str, Any]]:
    path = _TUNED / device / f"{op}.json"
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())["entries"]
    return {
        (entry["implementation"], entry["dtype"], tuple(sorted(entry["bucket"].items()))): entry[
            "block_sizes"
        ]
        for entry in entries
    }


@functools.cache
def _report_miss(device: str, op: str, key: tuple) -> None:
    logger.info("%s: no tuned block sizes for %s on %s, using the heuristic", op, key, device)


def resolve[Sizes](
    op: str,
    implementation: str,
    explicit: Sizes | None,
    *,
    cls: Callable[..., Sizes],
    dtype: str,
    bucket: Mapping[str, int],
    heuristic: Callable[[], Sizes],
) -> Sizes:
    """Returns the block sizes of one call.

    Args:
      explicit: what the caller gave; wins.
      cls: the op's block-size dataclass, built from a table entry's fields.
      bucket: the sizes that matter for this op, as they are; rounded up to powers of two here.
      heuristic: called when no entry fits.
    """
    if explicit is not None:
        return explicit
    rounded = {name: round_up_to_power_of_two(value) for name, value in bucket.items()}
    key = (implementation, dtype, tuple(sorted(rounded.items())))
    device = platform.device_slug()
    entry = _table(device, op).get(key)
    if entry is not None:
        return cls(**entry)
    _report_miss(device, op, key)
    return heuristic()


def even_splits(tiles: int, wanted: int) -> int:
    """Returns in how many parts `tiles` are divided, about as many as wanted and none of them empty."""
    share = -(-tiles // max(1, min(wanted, tiles)))
    return -(-tiles // share)
