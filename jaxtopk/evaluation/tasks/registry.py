"""Tasks by name, and the suites that the names belong to."""

import difflib
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from jaxtopk.evaluation.tasks.associative_recall import AssociativeRecall
from jaxtopk.evaluation.tasks.base import Task, TokenTask
from jaxtopk.evaluation.tasks.code_run import CodeRun
from jaxtopk.evaluation.tasks.common_words import CommonWords
from jaxtopk.evaluation.tasks.frequent_words import FrequentWords
from jaxtopk.evaluation.tasks.haystack import Haystack
from jaxtopk.evaluation.tasks.json_kv import JsonKeyValue, KeyValueRetrieval
from jaxtopk.evaluation.tasks.math_calc import MathCalc
from jaxtopk.evaluation.tasks.math_find import MathFind
from jaxtopk.evaluation.tasks.niah import NeedleInHaystack
from jaxtopk.evaluation.tasks.passkey import PassKey
from jaxtopk.evaluation.tasks.question_answering import QuestionAnswering
from jaxtopk.evaluation.tasks.variable_tracking import VariableTracking


class Sources(NamedTuple):
    """What tasks are made of: the text that needles hide in, and where questions are read."""

    haystack: Haystack
    qa: pathlib.Path | None


def _niah(label: str | None, **settings) -> Callable[[Sources], Task]:
    return lambda given: NeedleInHaystack(label=label, haystack=given.haystack, **settings)


def _needles(label: str, **settings) -> Callable[[Sources], Task]:
    return lambda given: NeedleInHaystack(label=label, haystack="needles", **settings)


def _questions(label: str, file: str) -> Callable[[Sources], Task]:
    def make(given: Sources) -> Task:
        if given.qa is None:
            raise ValueError(
                f"qa: got None, wanted a file of questions for {label}, or a folder with {file}"
            )
        path = given.qa / file if given.qa.is_dir() else given.qa
        return QuestionAnswering(label=label, path=os.fspath(path))

    return make


_RULER: dict[str, Callable[[Sources], Task | TokenTask]] = {
    "niah_single_1": lambda given: NeedleInHaystack(label="niah_single_1"),
    "niah_single_2": _niah("niah_single_2"),
    "niah_single_3": _niah("niah_single_3", values="uuids"),
    "niah_multikey_1": _niah("niah_multikey_1", distractors=3),
    "niah_multikey_2": _needles("niah_multikey_2"),
    "niah_multikey_3": _needles("niah_multikey_3", keys="uuids", values="uuids"),
    "niah_multivalue": _niah("niah_multivalue", values_per_key=4),
    "niah_multiquery": _niah("niah_multiquery", queries=4),
    "vt": lambda given: VariableTracking(haystack=given.haystack),
    "cwe": lambda given: CommonWords(),
    "fwe": lambda given: FrequentWords(),
    "qa_1": _questions("qa_1", "squad.jsonl"),
    "qa_2": _questions("qa_2", "hotpotqa.jsonl"),
}
_INFINITEBENCH: dict[str, Callable[[Sources], Task | TokenTask]] = {
    "passkey": lambda given: PassKey(haystack=given.haystack),
    "number_string": lambda given: PassKey(digits="number_string", haystack=given.haystack),
    "kv_retrieval": lambda given: KeyValueRetrieval(),
    "math_find": lambda given: MathFind(),
    "math_calc": lambda given: MathCalc(),
    "code_run": lambda given: CodeRun(),
}
_OTHERS: dict[str, Callable[[Sources], Task | TokenTask]] = {
    "niah": _niah(None),
    "niah_multikey": _needles("niah_multikey"),
    "json_kv": lambda given: JsonKeyValue(),
    "json_kv_words": lambda given: JsonKeyValue(entries="words"),
    "mqar": lambda given: AssociativeRecall(),
}
TASKS: Mapping[str, Callable[[Sources], Task | TokenTask]] = types.MappingProxyType(
    _RULER | _INFINITEBENCH | _OTHERS
)
SUITES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {"ruler": tuple(_RULER), "infinitebench": tuple(_INFINITEBENCH), "all": tuple(TASKS)}
)


def task_names(suite: str = "all") -> tuple[str, ...]:
    """Returns the names of a suite: "ruler" (thirteen), "infinitebench" (those that need no data), or "all"."""
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, wanted one of {', '.join(SUITES)}")
    return SUITES[suite]


def expand_names(names: Iterable[str]) -> tuple[str, ...]:
    """Replaces suites among the names by their tasks; each task once, in order.

    Raises:
      ValueError: there is no such task or suite; names the nearest ones.
    """
    expanded: dict[str, None] = {}
    for name in names:
        if name not in SUITES:
            _check(name)
        expanded |= dict.fromkeys(SUITES.get(name, (name,)))
    return tuple(expanded)


def make_task(
    name: str, *, haystack: Haystack | None = None, qa: str | os.PathLike[str] | None = None
) -> Task | TokenTask:
    """Makes a task.

    Args:
      name: one of `task_names()`.
      haystack: of every task that hides something in a text, but niah_single_1, which is noise by definition; None: noise.
      qa: for qa_1 and qa_2: a file as `read_entries` takes it, or a folder with squad.jsonl and hotpotqa.jsonl.

    Raises:
      ValueError: there is no such task (names the nearest ones), or its file is missing or malformed.
    """
    _check(name)
    source = Haystack.noise() if haystack is None else haystack
    return TASKS[name](Sources(source, None if qa is None else pathlib.Path(qa)))


def _check(name: str) -> None:
    if name not in TASKS:
        names = (*TASKS, *SUITES)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ValueError(f"task: got {name!r}, wanted one of {', '.join(near)}")
