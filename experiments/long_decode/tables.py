"""What the pages show of the committed results: a table a device and commit, and the figure, as Markdown and SVG."""

import functools
import pathlib

from experiments import results
from experiments.long_decode import report
from experiments.quickstart.tables import markdown

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
FIGURE = RESULTS / "context.svg"
_NONE_YET = "*No results are committed yet.*"


@functools.cache
def committed() -> tuple[results.Row, ...]:
    """Returns the rows of all committed runs."""
    return tuple(results.read(RESULTS))


def tables() -> str:
    """Every committed run, one table a device and commit, and below it what failed."""
    parts = []
    for (device, _), rows in results.groups(committed(), "device", "commit").items():
        parts.append(f"### {device}\n")
        parts.append(markdown(*report.table(rows)) + "\n")
        parts.append(report.caption(rows) + "\n")
        parts += [f"- {line}" for line in report.failures(rows)]
    return "\n".join([*parts, report.how()]) if parts else _NONE_YET


def summary() -> str:
    """The table of the runs that the figure shows."""
    rows = shown()
    if not rows:
        return _NONE_YET
    return f"{markdown(*report.table(rows))}\n\n{report.caption(rows)}"


def figure() -> str:
    """Draws each model's latest run.

    Raises:
      ValueError: it has no model at two contexts.
    """
    drawn = report.figure(shown())
    if drawn is None:
        raise ValueError(f"results: got too few rows in {RESULTS.name}, wanted two contexts")
    return drawn


def figure_link(prefix: str) -> str:
    """Returns the image, by a path relative to a page that lies `prefix` above this folder."""
    if rows_digest() is None:
        return _NONE_YET
    return (
        f"![Tokens per second by context and attention]({prefix}results/{FIGURE.name})\n\n"
        f"*One {shown()[0]['device']}; bands are the range of the rounds.*"
    )


def rows_digest() -> str | None:
    """Returns the fingerprint that a figure of the present rows carries; None where they make no curve."""
    rows = shown()
    return results.digest(rows) if rows and report.figure(rows) is not None else None


def shown() -> list[results.Row]:
    """Returns the rows of each model's latest run, of accelerators where there are any."""
    rows = [row for row in committed() if row["platform"] != "cpu"] or list(committed())
    if not rows:
        return []
    run_of = lambda row: (row["device"], row["commit"])
    by_date = sorted(rows, key=lambda row: row["date"])  # of one day, as they are filed
    latest = {row["model"]: run_of(row) for row in by_date}
    return [row for row in rows if latest[row["model"]] == run_of(row)]
