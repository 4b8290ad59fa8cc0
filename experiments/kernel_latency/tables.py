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
    """The main workloads, pages and eight-bit keys, each as the latest run that has it measured it."""
    accelerated = [row for row in committed() if row["platform"] != "cpu"]
    main = [row for row in accelerated if row["group"] in ("main", "pages", "quantized")]
    if not main:
        return _NONE_YET
    # Files are read in the order of their names; later rows replace earlier ones.
    latest = {(row["op"], row["workload"]): row["commit"] for row in main}
    measured = results.groups(main, "op", "workload")  # in the order of the first run
    rows = [row for key, found in measured.items() for row in found if row["commit"] == latest[key]]
    commits = ", ".join(dict.fromkeys(latest.values()))
    last = main[-1]
    return (
        f"{_table(rows)}\n\n{last['device']}, jax {last['versions']['jax']}, commits {commits}, {last['date']}; each line from one run. "
        "*limit*: what has to be read, at the read rate measured in that run, or the products, at the measured rate."
    )


def figure(name: str) -> str:
    """Draws the latest run that has a curve.

    Raises:
      ValueError: none has.
    """
    drawn = _drawn(name)
    if drawn is None:
        raise ValueError(f"results: got too few rows in {RESULTS.name}, wanted a curve for {name}")
    return drawn[1]


def figure_links(prefix: str) -> str:
    """Returns the images, by paths relative to a page that lies `prefix` above this folder."""
    links, devices = [], {}
    for name, (_, shows) in FIGURES.items():
        if (drawn := _drawn(name)) is not None:
            links.append(f"![{shows}]({prefix}results/{name})")
            devices[f"{drawn[0][0]['device']}, commit {drawn[0][0]['commit']}"] = None
    if not links:
        return _NONE_YET
    return "\n\n".join([*links, f"*One {'; '.join(devices)}.*"])


def rows_digest(name: str) -> str | None:
    """Returns the fingerprint that a figure of the present rows carries; None where they make no curve."""
    drawn = _drawn(name)
    return None if drawn is None else results.digest(drawn[0])


def _drawn(name: str) -> tuple[list[results.Row], str] | None:
    """Returns a figure and the rows of one card and commit that it shows: the latest that make one, of an accelerator if any do."""
    accelerated = [row for row in committed() if row["platform"] != "cpu"]
    runs = list(results.groups(accelerated or committed(), "device", "commit").values())
    runs.sort(key=lambda rows: max(row["date"] for row in rows))  # of one day, as they are filed
    for rows in reversed(runs):
        if (drawn := FIGURES[name][0](rows)) is not None:
            return rows, drawn
    return None


def _table(rows: list[results.Row]) -> str:
    header, body = report.table(rows)
    return markdown(header, [[cell.replace("|", "\\|") for cell in line] for line in body])
