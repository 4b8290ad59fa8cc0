"""Records of local files, one JSON object a line or one JSON list, checked once and read again when asked for."""

import dataclasses
import difflib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """The objects of one file; those of a file with an object a line stay on disk, since such files are large.

    Args:
      path: the file.
      notes: what was noted of each object when the file was checked.
      places: where each line begins, bytes; None where the file is one list.
      rows: the objects of a list.
    """

    path: pathlib.Path
    notes: tuple[Any, ...]
    places: tuple[int, ...] | None
    rows: tuple[Row, ...] = ()

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, index: int) -> Row:
        if self.places is None:
            return self.rows[index]
        with self.path.open("rb") as file:
            file.seek(self.places[index])
            return json.loads(file.readline())


def read_records(path: pathlib.Path, note: Callable[[Row], Any]) -> Records:
    """Reads a file once, from start to end, and checks each of its objects.

    Args:
      note: checks one object and returns what is worth keeping of it in memory; raises ValueError.

    Raises:
      ValueError: a line is no JSON object, or `note` refuses it; names the file and the line (the entry, in a list).
    """
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    return _read_list(path, note) if start.startswith(b"[") else _read_lines(path, note)


def _read_lines(path: pathlib.Path, note: Callable[[Row], Any]) -> Records:
    notes, places, place = [], [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                notes.append(_checked(_parsed(line, where), note, where))
                places.append(place)
            place += len(line)
    if not notes:
        raise ValueError(f"{path}: got an empty file, wanted a JSON object a line")
    return Records(path=path, notes=tuple(notes), places=tuple(places))


def _read_list(path: pathlib.Path, note: Callable[[Row], Any]) -> Records:
    rows = _parsed(path.read_bytes(), str(path))
    if not rows:
        raise ValueError(f"{path}: got an empty list, wanted a list of JSON objects")
    notes = tuple(
        _checked(row, note, f"{path}, entry {number}") for number, row in enumerate(rows, 1)
    )
    return Records(path=path, notes=notes, places=None, rows=tuple(rows))


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"{where}: got invalid JSON ({error}), wanted a JSON object") from None


def _checked(row: Any, note: Callable[[Row], Any], where: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {type(row).__name__}, wanted a JSON object")
    try:
        return note(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------------------------------------ fields
def text(row: Row, field: str) -> str:
    """Returns a field that is text, and not empty.

    Raises:
      ValueError: it is missing, empty or something else.
    """
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field}: got {_shown(value)}, wanted text")
    return value


def answers(row: Row, *fields: str) -> tuple[str, ...]:
    """Returns the right answers, from the first of `fields` that is there: one or a list, texts or numbers.

    Raises:
      ValueError: there is none, or one is empty.
    """
    field = next((field for field in fields if field in row), fields[0])
    value = row.get(field)
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ValueError(f"{field}: got an empty list, wanted at least one answer")
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, str | int | float):
            raise ValueError(f"{field}: got {_shown(entry)}, wanted texts or numbers")
        if not str(entry).strip():
            raise ValueError(f"{field}: got an empty answer, wanted text or a number")
    return tuple(map(str, entries))


def objects(row: Row, field: str, *wanted: str) -> list[Row]:
    """Returns a field that is a list of objects, each with the fields `wanted`.

    Raises:
      ValueError: it is missing, empty or something else, or a field is.
    """
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field}: got {_shown(value)}, wanted a list of objects")
    for entry in value:
        for name in wanted:
            if not isinstance(entry, dict) or name not in entry:
                raise ValueError(f"{field}: got {_shown(entry)}, wanted objects with {name!r}")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


# ------------------------------------------------------------------------------------------------------------- paths
def first_file(folder: pathlib.Path, names: Iterable[str]) -> pathlib.Path | None:
    """Returns the first of these files that the folder has, None where it has none."""
    return next((path for name in names if (path := folder / name).is_file()), None)


def existing(folder: str | os.PathLike[str], *, suite: str, remedy: str) -> pathlib.Path:
    """Returns the folder as a path.

    Raises:
      ValueError: it is not there; says what to get and where to put it.
    """
    path = pathlib.Path(folder).expanduser()
    if not path.exists():
        raise ValueError(f"{suite}: got no folder {path}, wanted one: {remedy}")
    return path


def known(name: str, names: Iterable[str], *, what: str) -> str:
    """Returns `name`, one of `names`.

    Raises:
      ValueError: it is none of them; gives the nearest.
    """
    names = tuple(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ValueError(f"{what}: got {name!r}, wanted one of {', '.join(near)}")
    return name
