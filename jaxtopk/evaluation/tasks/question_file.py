"""Questions with their paragraphs, as local files in the form of SQuAD or of HotpotQA hold them."""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

_FEWEST = 2  # entries; from there on, each has paragraphs of others to hide among


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a file: a question, its answers, any of which is right, and its paragraphs."""

    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]


@functools.cache
def read_entries(path: str | os.PathLike[str]) -> tuple[Entry, ...]:
    """Reads questions in the form of SQuAD or of HotpotQA, one JSON object a line.

    A line has `question`; `answers`, a list or {"text": a list}, or `answer`, a string; and `context`: a string, a list of
    [title, sentences], or {"title": a list, "sentences": a list}.

    Raises:
      ValueError: the file cannot be read, has fewer than two entries, or a line is not of that form; names file and line.
    """
    entries = []
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"qa: got {os.fspath(path)!r} ({type(error).__name__}), wanted a file with a JSON object a line"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(_entry(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{os.fspath(path)} line {number}: got {reason}, wanted question, answers and context"
            ) from None
    if len(entries) < _FEWEST:
        raise ValueError(
            f"{os.fspath(path)}: got {len(entries)} questions, wanted at least {_FEWEST}"
        )
    return tuple(entries)


@functools.cache
def all_paragraphs(path: str) -> tuple[str, ...]:
    """Returns the distinct paragraphs of a file, in order."""
    return tuple(dict.fromkeys(text for entry in read_entries(path) for text in entry.paragraphs))


def _entry(row: dict[str, Any]) -> Entry:
    answers = row["answers"] if "answers" in row else [row["answer"]]
    answers = answers["text"] if isinstance(answers, dict) else answers
    context = row["context"]
    if isinstance(context, dict):
        context = list(zip(context["title"], context["sentences"], strict=True))
    if isinstance(context, str):
        paragraphs = [context]
    else:
        paragraphs = [f"{title}. {''.join(sentences).strip()}" for title, sentences in context]
    texts = [row["question"], *answers, *paragraphs]
    if not answers or not paragraphs or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError("an empty question, answer or context")
    return Entry(
        question=row["question"],
        answers=tuple(dict.fromkeys(answers)),
        paragraphs=tuple(paragraphs),
    )
