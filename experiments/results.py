"""Rows of results: what every row must say, how a run adds them to its file, and how committed ones are read back."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtopk.analysis.run_folder import jsonl

# What makes a number traceable; the rest of a row belongs to its study.
REQUIRED = ("study", "device", "platform", "versions", "commit", "command", "date", "seed", "n")

type Row = dict[str, Any]


def read(folder: pathlib.Path) -> list[Row]:
    """Reads every `*.jsonl` of a folder, in the order of their names; an absent or empty folder has no rows.

    Raises:
      ValueError: a line is not a JSON object, or lacks a field of `REQUIRED`; names the file and the line.
    """
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path.name} line {number}: got {error}, wanted a JSON object"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path.name} line {number}: got {type(row).__name__}, wanted a JSON object"
                )
            check(row, f"{path.name} line {number}")
            rows.append(row)
    return rows


def append(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Adds rows to a file at once, so that a run that ends early leaves what it has measured; returns them as read back."""
    lines = jsonl(rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
    return list(map(json.loads, lines.splitlines()))


def check(row: Mapping[str, Any], where: str) -> None:
    """Refuses a row that does not say how it was made.

    Raises:
      ValueError: names the missing fields.
    """
    missing = [name for name in REQUIRED if row.get(name) in (None, "")]
    if missing:
        raise ValueError(
            f"{where}: got no {', '.join(missing)}, wanted all of {', '.join(REQUIRED)}"
        )


def groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Gathers rows that agree in the named fields, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def digest(rows: Sequence[Row]) -> str:
    """Returns a short fingerprint of rows, which a figure carries to say what it was drawn from."""
    text = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
