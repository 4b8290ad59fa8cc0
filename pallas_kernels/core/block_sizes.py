"""Where a kernel's tile sizes come from: the caller, else this device's tuned table, else a heuristic.

Tables are JSON, `tuned/<device>/<op>.json`: {"entries": [{"implementation", "dtype", "bucket": {...}, "block_sizes": {...},
...}]}. A bucket holds powers of two; a call falls into the bucket that is equal after rounding its sizes up. Nothing is
ever searched at call time. `python -m pallas_kernels.tuning` makes the tables.
"""

import contextlib
import contextvars
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pallas_kernels.core import platform

logger = logging.getLogger("pallas_kernels")

_TUNED = pathlib.Path(__file__).parent.parent / "tuned"


def round_up_to_power_of_two(value: int) -> int:
    """Returns the smallest power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


class Key(NamedTuple):
    """What an entry is found by; `bucket` are sorted pairs of a size's name and its value, a power of two."""

    implementation: str
    dtype: str
    bucket: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, implementation: str, dtype: str, bucket: Mapping[str, int]) -> "Key":
        """Returns the key of a call of these sizes."""
        rounded = {name: round_up_to_power_of_two(value) for name, value in bucket.items()}
        return cls(implementation, dtype, tuple(sorted(rounded.items())))


_asked: contextvars.ContextVar[list[tuple[str, Key]] | None] = contextvars.ContextVar(
    "asked", default=None
)


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[str, Key]]]:
    """Yields a list that receives the op and the key of each call traced in the context, explicit sizes or not."""
    asked: list[tuple[str, Key]] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def table_path(device: str, op: str) -> pathlib.Path:
    """Returns the file of a device's table, which need not exist."""
    return _TUNED / device / f"{op}.json"


def read_table(path: pathlib.Path) -> dict[Key, dict[str, Any]]:
    """Reads a table's entries, by their keys; a file that does not exist has none.

    Raises:
      ValueError: the file is not a table; names the file, the entry, the got and the wanted.
    """
    try:
        entries = json.loads(path.read_text())["entries"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: got {type(error).__name__} ({error}), wanted JSON {{"entries": [...]}}'
        ) from error
    found: dict[Key, dict[str, Any]] = {}
    for place, entry in enumerate(entries):
        try:
            key = Key(
                entry["implementation"], entry["dtype"], tuple(sorted(entry["bucket"].items()))
            )
            whole = isinstance(entry["block_sizes"], dict) and all(
                round_up_to_power_of_two(size) == size for _, size in key.bucket
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: entry {place} got {entry!r}, wanted implementation, dtype, bucket and block_sizes"
            ) from error
        if not whole:
            raise ValueError(
                f"{path}: entry {place} got {entry!r}, wanted a bucket of powers of two and block sizes by name"
            )
        if key in found:
            raise ValueError(
                f"{path}: entry {place} got {key} a second time, wanted one entry for it"
            )
        found[key] = entry
    return found


@functools.cache
def _table(device: str, op: str) -> Mapping[Key, Mapping[str, Any]]:
    return read_table(table_path(device, op))


def forget_tables() -> None:
    """Makes the next calls read the tables again; functions that are compiled keep what they were traced with."""
    _table.cache_clear()
    _report_miss.cache_clear()


@functools.cache
def _report_miss(device: str, op: str, key: Key) -> None:
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

    Raises:
      ValueError: the device's table is broken, or its entry is not of `cls`; names the file and the entry.
    """
    key = Key.of(implementation, dtype, bucket)
    if (asked := _asked.get()) is not None:
        asked.append((op, key))
    if explicit is not None:
        return explicit
    device = platform.device_slug()
    entry = _table(device, op).get(key)
    if entry is None:
        _report_miss(device, op, key)
        return heuristic()
    try:
        return cls(**entry["block_sizes"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{table_path(device, op)}: entry of {key} got block_sizes {entry['block_sizes']}, wanted those of this op ({error})"
        ) from error


def even_splits(tiles: int, wanted: int) -> int:
    """Returns in how many parts `tiles` are divided, about as many as wanted and none of them empty."""
    share = -(-tiles // max(1, min(wanted, tiles)))
    return -(-tiles // share)
