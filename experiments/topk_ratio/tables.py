"""What the page shows of the committed summaries: a table a device and length, and the figure, as Markdown and SVG."""

import dataclasses
import functools
import pathlib
from typing import Any

from experiments import results
from experiments.quickstart.tables import markdown
from jaxtopk.evaluation import report
from jaxtopk.evaluation.summary import Average, Cell

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
FIGURE = RESULTS / "ratio.svg"
_NONE_YET = "*No results are committed yet.*"


@functools.cache
def committed() -> tuple[results.Row, ...]:
    """Returns the scores of all committed runs; the entropy rows beside them are another module's."""
    return tuple(row for row in results.read(RESULTS) if row["study"] == "topk_ratio")


def tables() -> str:
    """Every committed run, one table a device and length."""
    parts = []
    for (device, commit), rows in results.groups(committed(), "device", "commit").items():
        for (length,), of_length in results.groups(rows, "length").items():
            cells, averages = _cells(of_length), _averages(of_length)
            parts.append(f"### {device}, {length} tokens\n")
            parts.append(markdown(*report.score_table(cells, averages)) + "\n")
        row = rows[0]
        parts.append(
            f"{row['model']} in {row['dtype']}, {device}, jax {row['versions']['jax']}, commit {commit}, {row['date']}, seed "
            f"{row['seed']}. Percent, with 95% bootstrap intervals over samples. * differs from full attention on the same "
            f"samples (paired sign-flip test, p < 0.05 after Holm's correction over the settings of a task and length). "
            f"Prompts are prefilled with full attention but for the last {row['sparse_suffix']} token(s); these and all that "
            f"follow are Top-k rows, one set a head.\n"
        )
    return "\n".join(parts) or _NONE_YET


def figure() -> str:
    """Draws the mean of tasks of the latest run."""
    shown = _shown()
    if not shown:
        raise ValueError(f"results: got none in {RESULTS.name}, wanted a committed run to draw")
    drawn = report.ratio_figure(_averages(shown), description=f"rows {results.digest(shown)}")
    assert drawn is not None  # every run has several ratios
    return drawn


def figure_link(prefix: str) -> str:
    """Returns the image, by a path relative to a page that lies `prefix` above this folder."""
    shown = _shown()
    if not shown:
        return _NONE_YET
    row = shown[0]
    return (
        f"![Mean score by what is kept]({prefix}results/{FIGURE.name})\n\n"
        f"*{row['model']} on one {row['device']}; bands are 95% intervals.*"
    )


def rows_digest() -> str | None:
    """Returns the fingerprint that a figure of the present rows carries; None where there are none."""
    shown = _shown()
    return results.digest(shown) if shown else None


def _shown() -> list[results.Row]:
    """Rows of the latest run, of an accelerator where there is one."""
    rows = [row for row in committed() if row["platform"] != "cpu"] or list(committed())
    if not rows:
        return []
    latest = max(rows, key=lambda row: row["date"])
    same = ("device", "commit")
    return [row for row in rows if all(row[name] == latest[name] for name in same)]


def _cells(rows: list[results.Row]) -> list[Cell]:
    return [_build(Cell, row) for row in rows if row["kind"] == "task"]


def _averages(rows: list[results.Row]) -> list[Average]:
    return [_build(Average, row) for row in rows if row["kind"] == "mean"]


def _build(kind: type, row: results.Row) -> Any:
    return kind(**{field.name: row[field.name] for field in dataclasses.fields(kind)})
