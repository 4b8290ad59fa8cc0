"""What the page shows of the committed results: a table a card and commit, and the two figures, as Markdown and SVG."""

import functools
import pathlib

from experiments import results
from experiments.kernel_latency import report
from experiments.quickstart.tables import markdown

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_NONE_YET = "*No results are committed yet.*"
# File: what draws it, and what it shows.
FIGURES = {
    "length.svg": (report.length_figure, "Time of a call by number of keys"),
    "budget.svg": (report.budget_figure, "Time of a call by number of keys kept"),
}


@functools.cache
def committed() -> tuple[results.Row, ...]:
    """Returns the rows of all committed runs."""
    return tuple(results.read(RESULTS))


def tables() -> str:
    """Every committed run, one table a card and commit, and below it what has no time."""
    parts = []
    for (device, _), rows in results.groups(committed(), "device", "commit").items():
        parts.append(f"### {device}\n")
        parts.append(_table(rows) + "\n")
        parts.append(report.caption(rows) + "\n")
        parts += [f"- {line}" for line in report.without_time(rows)]
        parts.append("")
    return "\n".join(parts) or _NONE_YET


def summary() -> str:
    """The main workloads of the latest run."""
    rows = [row for row in shown() if row["group"] == "main"]
    if not rows:
        return _NONE_YET
    return f"{_table(rows)}\n\n{report.caption(rows)}"


def figure(name: str) -> str:
    """Draws the latest run.

    Raises:
      ValueError: it has too few rows for a curve.
    """
    drawn = FIGURES[name][0](shown())
    if drawn is None:
        raise ValueError(f"results: got too few rows in {RESULTS.name}, wanted a curve for {name}")
    return drawn


def figure_links(prefix: str) -> str:
    """Returns the images, by paths relative to a page that lies `prefix` above this folder."""
    links = [
        f"![{shows}]({prefix}results/{name})"
        for name, (_, shows) in FIGURES.items()
        if rows_digest(name) is not None
    ]
    if not links:
        return _NONE_YET
    return "\n\n".join([*links, f"*One {shown()[0]['device']}.*"])


def rows_digest(name: str) -> str | None:
    """Returns the fingerprint that a figure of the present rows carries; None where they make no curve."""
    rows = shown()
    return results.digest(rows) if rows and FIGURES[name][0](rows) is not None else None


def shown() -> list[results.Row]:
    """Returns the rows of the latest run, of an accelerator where there is one."""
    rows = [row for row in committed() if row["platform"] != "cpu"] or list(committed())
    if not rows:
        return []
    latest = max(rows, key=lambda row: row["date"])
    same = ("device", "commit")
    return [row for row in rows if all(row[name] == latest[name] for name in same)]


def _table(rows: list[results.Row]) -> str:
    header, body = report.table(rows)
    return markdown(header, [[cell.replace("|", "\\|") for cell in line] for line in body])
