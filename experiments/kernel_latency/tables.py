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
    """The main workloads, each as the latest run that has it measured it."""
    accelerated = [row for row in committed() if row["platform"] != "cpu"]
    main = [row for row in accelerated if row["group"] == "main"]
    if not main:
        return _NONE_YET
    latest = {
        (row["op"], row["workload"]): row["commit"] for row in main
    }  # later rows replace earlier
    measured = results.groups(main, "op", "workload")  # in the order of the first run
    rows = [row for key, found in measured.items() for row in found if row["commit"] == latest[key]]
    commits = ", ".join(dict.fromkeys(latest.values()))
    last = main[-1]
    return (
        f"{_table(rows)}\n\n{last['device']}, jax {last['versions']['jax']}, commits {commits}, {last['date']}; each line from one run. "
        "*limit*: what has to be read, at the read rate measured in that run, or the products, at the measured rate. *wanted*: the "
        "target's share of that limit, stated for an NVIDIA H200, which was not at hand."
    )


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
    latest = sorted(rows, key=lambda row: row["date"])[-1]  # of one day, the last one filed
    same = ("device", "commit")
    return [row for row in rows if all(row[name] == latest[name] for name in same)]


def _table(rows: list[results.Row]) -> str:
    header, body = report.table(rows)
    return markdown(header, [[cell.replace("|", "\\|") for cell in line] for line in body])
