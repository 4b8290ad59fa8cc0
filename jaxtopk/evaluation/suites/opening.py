"""Opens a suite by name: its sub-tasks whose files are there, or the ones asked for."""

import logging
import os
import types
from collections.abc import Mapping, Sequence

from jaxtopk.evaluation.suites import helmet, infinitebench, longbench_v2, ruler
from jaxtopk.evaluation.suites.base import SuiteTask
from jaxtopk.evaluation.suites.files import existing, known

_log = logging.getLogger(__name__)

SUITES: Mapping[str, types.ModuleType] = types.MappingProxyType(
    {
        "ruler": ruler,
        "helmet": helmet,
        "longbench_v2": longbench_v2,
        "infinitebench": infinitebench,
    }
)


def open_suite(
    name: str,
    folder: str | os.PathLike[str],
    *,
    subtasks: Sequence[str] | None = None,
    model_chat: bool = False,
) -> list[SuiteTask]:
    """Returns the sub-tasks of a suite, in the suite's order; nothing is ever downloaded.

    Args:
      name: ruler, helmet, longbench_v2 or infinitebench.
      folder: the user's copy of it.
      subtasks: names; None for all those whose files are there (what is missing is logged).
      model_chat: prompts go through a chat template. Replies are then not begun for the model.

    Raises:
      ValueError: the suite or a sub-task is unknown (gives the nearest names) or not run (says why), a folder or file is
        missing (says what to get and where it goes), or a line is broken or has no answer (names file and line).
    """
    suite = SUITES[known(name, SUITES, what="suite")]
    wanted = tuple(suite.SUBTASKS) if subtasks is None else tuple(dict.fromkeys(subtasks))
    if not wanted:
        raise ValueError("subtasks: got none, wanted at least one")
    for subtask in wanted:
        if subtask in suite.NOT_RUN:
            raise ValueError(f"{name}: got {subtask}, which is not run: {suite.NOT_RUN[subtask]}")
        known(subtask, suite.SUBTASKS, what=f"{name}: sub-task")
    path = existing(folder, suite=name, remedy=suite.REMEDY)
    opened = {
        subtask: suite.open_subtask(subtask, path, chat=model_chat)
        for subtask in suite.SUBTASKS
        if subtask in wanted
    }
    missing = [subtask for subtask, task in opened.items() if task is None]
    if missing and (subtasks is not None or len(missing) == len(opened)):
        raise ValueError(
            f"{name}: got no files of {', '.join(missing)} in {path}, wanted them: {suite.REMEDY}"
        )
    if missing:
        _log.warning("%s: no files of %s in %s", name, ", ".join(missing), path)
    return [task for task in opened.values() if task is not None]


def not_run(name: str) -> Mapping[str, str]:
    """Returns the parts of a suite that are never run here, each with the reason, for reports.

    Raises:
      ValueError: the suite is unknown.
    """
    return types.MappingProxyType(SUITES[known(name, SUITES, what="suite")].NOT_RUN)
