"""HELMET (arXiv:2410.02694): which sub-tasks there are, and where their files lie."""

import pathlib

from jaxtopk.evaluation.suites import (
    helmet_books,
    helmet_cited,
    helmet_icl,
    helmet_questions,
    helmet_ranking,
    helmet_recall,
)
from jaxtopk.evaluation.suites.helmet_base import HelmetTask

REMEDY = (
    "get its data as the README of github.com/princeton-nlp/HELMET says, so that there is FOLDER/data/json_kv; "
    "sets it loads from elsewhere go to FOLDER/data/icl/trec_fine/train.jsonl and test.jsonl ({text, label} a line) "
    "and FOLDER/data/infbench/longbook_qa_eng.jsonl"
)
_JUDGE = "its score needs a judge model"
NOT_RUN = {
    "narrativeqa": _JUDGE,
    "infbench_sum": _JUDGE,
    "multi_lexsum": _JUDGE,
    "alce_asqa_citations": "whether citations hold needs an NLI model; alce_asqa scores the answers",
    "alce_qampari_citations": "whether citations hold needs an NLI model; alce_qampari scores the answers",
}
_PARTS = (helmet_recall, helmet_questions, helmet_ranking, helmet_cited, helmet_icl, helmet_books)
SUBTASKS = {name: part for part in _PARTS for name in part.NAMES}


def open_subtask(name: str, folder: pathlib.Path, *, chat: bool) -> HelmetTask | None:
    """Returns a sub-task, None where none of its files is there.

    Args:
      folder: a copy of the suite, or its folder `data`.
    """
    data = folder / "data" if (folder / "data").is_dir() else folder
    return SUBTASKS[name].open_subtask(name, data, chat=chat)
