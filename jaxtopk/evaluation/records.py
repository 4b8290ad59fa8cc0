"""results.jsonl of an evaluation: one row a sample and setting, appended sample by sample, resumed after any end of a run.

A sample's rows go to the file in one write that is flushed to the disk, so what a killed run leaves is whole samples and at
most one torn one, which is cut off when the folder is opened again. Several processes share a folder by each appending to a
file of its own, results.1.jsonl beside results.jsonl; all of them are read.
"""

import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtopk.analysis.run_folder import RunFolder, jsonable, jsonl, write_text

type Row = dict[str, Any]
type Key = tuple[str, int, int]  # task, length, index

logger = logging.getLogger("jaxtopk")

# A run may go on in a folder with more of these; everything else has to be what it was.
GROWING = ("tasks", "lengths", "samples")


class Records:
    """The rows of a folder, open for appending; a context manager.

    Attributes:
      done: samples that are in some file of the folder.
    """

    def __init__(self, folder: RunFolder, config: Any, *, settings: Sequence[str], part: int = 0):
        """Checks the folder, and cuts a torn sample off the file of this part.

        Args:
          config: a dataclass that says what the rows are; see `GROWING`.
          settings: names of the settings that every sample has a row for.
          part: which process this is, of those that share the folder.

        Raises:
          ValueError: the folder cannot be written, holds the results of another configuration, or a broken file; or another
            process appends to the same file.
        """
        folder.check()
        self._path = results_path(folder, part)
        written = _agreed(folder, jsonable(config))
        folder.path.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")
        try:
            _lock(self._file, self._path)
            _cut_torn(self._path, len(settings))
            self.done = {key_of(row) for row in read_rows(folder, len(settings))}
            if written is not None:
                write_text(folder.config, json.dumps(written, indent=2, allow_nan=False) + "\n")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *unused) -> None:
        self._file.close()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends all rows of one sample, and returns once they are on the disk.

        Raises:
          ValueError: the sample is there already.
        """
        keys = {key_of(row) for row in rows}
        if len(keys) != 1 or keys & self.done:
            raise ValueError(f"rows: got samples {sorted(keys)}, wanted one that is not there yet")
        self._file.write(jsonl(rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done |= keys


def results_path(folder: RunFolder, part: int = 0) -> pathlib.Path:
    """Returns the file that a process appends to."""
    return folder.results if part == 0 else folder.path / f"results.{part}.jsonl"


def key_of(row: Mapping[str, Any]) -> Key:
    """Returns which sample a row is of."""
    return row["task"], row["length"], row["index"]


def read_rows(folder: RunFolder, settings: int) -> list[Row]:
    """Reads the rows of all parts; a sample that is being written at the end of a file is left out.

    Args:
      settings: rows of a sample.

    Raises:
      ValueError: a line is no JSON object, a sample has other than `settings` rows, or is there twice; names the file.
    """
    rows: list[Row] = []
    seen: dict[Key, str] = {}
    for path in sorted(folder.path.glob("results*.jsonl")):
        found, _ = _whole_samples(path, settings)
        for sample in found:
            key = key_of(sample[0])
            if key in seen:
                raise ValueError(
                    f"{path.name}: got {key} again, wanted each sample once ({seen[key]})"
                )
            seen[key] = path.name
            rows += sample
    return rows


def _whole_samples(path: pathlib.Path, settings: int) -> tuple[list[list[Row]], int]:
    """Returns the samples of a file, and how many of its bytes they take."""
    samples: list[list[Row]] = []
    end = 0
    lines = list(_whole_lines(path))
    for start in range(0, len(lines), settings):
        part = lines[start : start + settings]
        keys = {key_of(row) for row, _ in part}
        if len(keys) > 1:
            raise ValueError(
                f"{path.name} line {start + 1}: got rows of {len(keys)} samples, wanted {settings} of one"
            )
        if len(part) == settings:
            samples.append([row for row, _ in part])
            end = part[-1][1]
    return samples, end


def _whole_lines(path: pathlib.Path) -> Iterator[tuple[Row, int]]:
    """Yields each row and the byte it ends at; a last line without an end is left out."""
    position = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        position += len(line)
        if not line.endswith(b"\n"):
            return
        try:
            row = json.loads(line)
            key_of(row)
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path.name} line {number}: got {line[:40]!r}, wanted a row with task, length and index"
            ) from None
        yield row, position


def _cut_torn(path: pathlib.Path, settings: int) -> None:
    _, end = _whole_samples(path, settings)
    size = path.stat().st_size
    if size > end:
        logger.warning("%s: cut off %d bytes of a sample that was torn", path.name, size - end)
        os.truncate(path, end)


def _lock(file, path: pathlib.Path) -> None:
    """Refuses a second process; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"out: got {path.name} that another run appends to, wanted a folder of its own, or another part"
        ) from None
    except OSError:
        logger.debug("%s: this file system has no locks", path)


def _agreed(folder: RunFolder, config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the config to write: the given one, grown by what the folder has; None where the folder's says it all."""
    if not folder.config.exists():
        if any(folder.path.glob("results*.jsonl")):
            raise ValueError(
                f"out: got results without a config.json in {folder.path}, wanted both or none"
            )
        return config
    try:
        before = json.loads(folder.config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder.config.name}: got {error}, wanted a JSON object") from None
    if not isinstance(before, dict):
        raise ValueError(f"{folder.config.name}: got {type(before).__name__}, wanted an object")
    fixed = lambda entries: {name: x for name, x in entries.items() if name not in GROWING}
    difference = _first_difference(fixed(config), fixed(before))
    if difference is not None:
        name, got, wanted = difference
        raise ValueError(
            f"out: got results of another configuration in {folder.path}: {name} is {_short(got)} now, "
            f"wanted {_short(wanted)} as there (or another folder)"
        )
    grown = dict(config)
    for name in GROWING:
        old, new = before.get(name), config.get(name)
        if isinstance(old, list) and isinstance(new, list):
            grown[name] = old + [entry for entry in new if entry not in old]
        elif isinstance(old, int) and isinstance(new, int):
            grown[name] = max(old, new)
    return None if grown == before else grown


def _first_difference(got: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Returns the name of the first entry that differs, such as settings[1].strategy.topk, and the two values."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        for key in [*got, *(key for key in wanted if key not in got)]:
            inner = f"{name}.{key}" if name else key
            found = _first_difference(got.get(key), wanted.get(key), inner)
            if found is not None:
                return found
        return None
    if isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        for index, pair in enumerate(zip(got, wanted, strict=True)):
            found = _first_difference(*pair, f"{name}[{index}]")
            if found is not None:
                return found
        return None
    return None if got == wanted else (name, got, wanted)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["GROWING", "Key", "Records", "Row", "key_of", "read_rows", "results_path"]
