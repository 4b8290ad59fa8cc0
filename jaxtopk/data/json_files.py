"""Reads the JSON files of a model folder, with errors that name the file."""

import json
import os
import pathlib
from typing import Any


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, or not an object.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: not found in {path.parent}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise ValueError(f"{path}: got invalid JSON ({error}), wanted a JSON object") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}, wanted a JSON object")
    return found
