"""The folder a run leaves behind: config.json, results.jsonl, report.html, each written whole or not at all."""

import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names and writes the files of one run; a second run into the same folder replaces them one by one.

    Args:
      path: made when the first file is written, with its parents.
    """

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """What was asked for."""
        return self.path / "config.json"

    @property
    def results(self) -> pathlib.Path:
        """One JSON object a line, one line a measurement."""
        return self.path / "results.jsonl"

    @property
    def report(self) -> pathlib.Path:
        """One self-contained page."""
        return self.path / "report.html"

    def check(self) -> None:
        """Fails early, before hours of work, where the results could not be written at the end.

        Raises:
          ValueError: the path is a file, or its nearest existing parent is not a writable folder.
        """
        nearest = self.path
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError(f"out: got {self.path}, wanted a folder that can be written")

    def write_config(self, config: Any) -> None:
        """Writes a dataclass, nested or not, as indented JSON."""
        text = json.dumps(jsonable(config), indent=2, allow_nan=False)
        write_text(self.config, text + "\n")

    def write_results(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes all rows at once: a run that is killed leaves the rows of the run before, or none."""
        write_text(self.results, jsonl(rows))

    def write_report(self, html: str) -> None:
        """Writes the page that `jaxtopk.analysis.report` rendered."""
        write_text(self.report, html)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a UTF-8 file by way of a temporary neighbour, so that `path` never holds half of it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file as `write_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = pathlib.Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Renders rows one a line, keys in the order given.

    Raises:
      ValueError: a number is not finite: a result that JSON cannot hold is a result that went wrong.
    """
    return "".join(json.dumps(jsonable(row), allow_nan=False) + "\n" for row in rows)


def jsonable(value: Any) -> Any:
    """Turns dataclasses, paths, tuples and numpy or JAX scalars into what JSON knows; floats keep 7 digits.

    A dataclass becomes its fields and, under "type", its name, since alternatives in a config are told apart by class.
    """
    if dataclasses.is_dataclass(type(value)):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **jsonable(fields)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(entry) for entry in value]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else value
    if isinstance(value, int):
        return value
    raise ValueError(f"results: got a {type(value).__name__}, wanted what JSON can hold")
