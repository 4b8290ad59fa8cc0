"""Tuned tables on disk: entries are added to what is there, and a file is replaced whole, so a killed run leaves no half of one."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from pallas_kernels.core import block_sizes
from pallas_kernels.core.block_sizes import Key

type Entry = dict[str, Any]


def versions() -> dict[str, str]:
    """Returns what a measurement depends on beside the device."""
    return {"jax": jax.__version__, "backend": jax.devices()[0].client.platform_version.strip()}


class Table:
    """The entries of one op on one device.

    Args:
      folder: of the device; made when the first entry is put in.
      op: whose table it is.

    Raises:
      ValueError: the file there is not a table.
    """

    def __init__(self, folder: pathlib.Path, op: str):
        self.path = folder / f"{op}.json"
        self._entries: dict[Key, Entry] = block_sizes.read_table(self.path)

    def measured(self, key: Key, workload: str) -> bool:
        """Whether the entry of `key` was measured to the end, on this workload, with the versions of now."""
        entry = self._entries.get(key, {})
        known = entry.get("workload"), entry.get("versions"), entry.get("complete")
        return known == (workload, versions(), True)

    def put(self, key: Key, found: Mapping[str, Any]) -> None:
        """Sets an entry and writes the file."""
        implementation, dtype, bucket = key
        self._entries[key] = {
            "implementation": implementation,
            "dtype": dtype,
            "bucket": dict(bucket),
            **found,
            "versions": versions(),
        }
        entries = ",\n".join(
            "  " + json.dumps(self._entries[known]) for known in sorted(self._entries)
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            begun.write_text('{"entries": [\n' + entries + "\n]}\n")
            begun.replace(self.path)
        finally:
            begun.unlink(missing_ok=True)
