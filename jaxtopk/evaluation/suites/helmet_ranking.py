"""HELMET's re-ranking of documents (MS MARCO)."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

from jaxtopk.evaluation.answers import ndcg, ranking
from jaxtopk.evaluation.suites.base import Draft
from jaxtopk.evaluation.suites.files import Records, Row, objects, read_records, text
from jaxtopk.evaluation.suites.helmet_base import (
    Drawn,
    FilesTask,
    draw_keys,
    examples_file,
    pick_examples,
    present_files,
    seed_of,
    shuffled,
)
from jaxtopk.evaluation.tasks.base import Sample

_DOCUMENTS = (14, 50, 130, 285, 600, 1000)  # at each length
NAMES = ("msmarco_rerank_psg",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingTask(FilesTask):
    """Documents ordered by how well they answer a query, after two worked examples.

    Args:
      examples: the file that examples come from; its notes are ids of queries.
    """

    examples: Records

    @property
    def metric(self) -> str:
        """See `AnyTask.metric`."""
        return "ndcg@10"

    def draft(self, index: int, target_tokens: int) -> Draft:
        """See `SuiteTask.draft`."""
        row = self.row(index, target_tokens)
        own, keys = str(row["qid"]), self.examples.notes
        asked = self.file(target_tokens).keys
        # With enough examples none is a query that is asked; else, as the suite does, only this one is left out.
        avoid = set(asked) if len(keys) > 2 * len(asked) else {own}
        kept = [place for place, key in enumerate(keys) if key not in avoid]
        order = [kept[place] for place in shuffled(len(kept), seed_of(own))]
        shown = [self.examples[place] for place in pick_examples(keys, order)]
        blocks = [
            f"{_listed(demo)}\n\nQuery: {demo['query']}\nRanking: {_best(demo)}" for demo in shown
        ]
        relevant = {
            str(page["id"]): int(page["label"]) for page in row["ctxs"] if page["label"] > 0
        }
        return Draft(
            before="Documents with IDs, and a query. Order all IDs from the document that answers the query "
            "best to the one that answers it least, in this form: ID7 > ID2 > ID4\n\n"
            + "".join(f"{block}\n\n" for block in blocks),
            context=_listed(row),
            after=f"\n\nQuery: {row['query']}",
            reply_start=self.opening("Ranking:"),
            joint=self.joint,
            answers=(_best(row, relevant),),
            meta=(*self.meta, ("relevance", json.dumps(relevant))),
        )

    def score(self, sample: Sample, reply: str) -> float:
        """See `Task.score`."""
        relevant = json.loads(dict(sample.meta)["relevance"])
        return ndcg(relevant, ranking(reply), at=10)


def open_subtask(name: str, data: pathlib.Path, *, chat: bool) -> RankingTask | None:
    """Returns a sub-task, None where none of its files is there."""
    file = lambda k: data / f"msmarco/test_reranking_data_k{k}_dep3.jsonl"
    paths = present_files(file, _DOCUMENTS)
    if not paths:
        return None

    @functools.cache
    def drawn(path: pathlib.Path) -> Drawn:
        return draw_keys(read_records(path, _note_query))

    return RankingTask(
        subtask=name,
        chat=chat,
        category="Re-rank",
        longest_reply=200,
        one_line=True,
        paths=paths,
        drawn=drawn,
        examples=read_records(examples_file(file(10)), _note_query),
    )


def _note_query(row: Row) -> str:
    text(row, "query")
    pages = objects(row, "ctxs", "id", "text", "label")
    if not all(type(page["label"]) is int for page in pages):
        raise ValueError("ctxs: got a label that is no integer, wanted integers")
    if not any(page["label"] > 0 for page in pages):
        raise ValueError("ctxs: got no label above 0, wanted at least one relevant document")
    if "qid" not in row:
        raise ValueError("qid: got nothing, wanted the id of the query")
    return str(row["qid"])


def _listed(row: Row) -> str:
    title = lambda page: f" ({page['title']})" if page.get("title") else ""
    return "\n\n".join(f"[ID: {page['id']}]{title(page)} {page['text']}" for page in row["ctxs"])


def _best(row: Row, only: Mapping[str, int] | None = None) -> str:
    pages = sorted(row["ctxs"], key=lambda page: page["label"], reverse=True)
    return " > ".join(str(page["id"]) for page in pages if only is None or str(page["id"]) in only)
