"""What the pages show of the committed results: tables, a summary, and the figure, as Markdown and SVG."""

import functools
import pathlib
from collections.abc import Sequence

from experiments import results
from experiments.quickstart import report

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
FIGURE = RESULTS / "quality.svg"
_NONE_YET = "*No results are committed yet.*"


@functools.cache
def committed() -> tuple[results.Row, ...]:
    """Returns the rows of all committed runs."""
    return tuple(results.read(RESULTS))


def runs() -> dict[tuple, list[results.Row]]:
    """Gathers committed rows by what they can be compared within: device, context, dtype and commit."""
    return results.groups(committed(), "device", "context", "dtype", "commit")


def tables() -> str:
    """Every committed run, one table a device and context."""
    parts = []
    for (device, context, *_), rows in runs().items():
        parts.append(f"### {device}, context {context}\n")
        parts.append(markdown(*report.table(rows)) + "\n")
        parts.append(report.caption(rows) + "\n")
    return "\n".join(parts) or _NONE_YET


def summary() -> str:
    """The table of the run that the figure shows first."""
    shown = _shown()
    if not shown:
        return _NONE_YET
    first = next(iter(results.groups(shown, "context").values()))
    return f"{markdown(*report.table(first))}\n\n{report.caption(first)}"


def figure() -> str:
    """Draws the contexts of the figure's device."""
    shown = _shown()
    if not shown:
        raise ValueError(
            f"results: got none in {RESULTS.name}, wanted at least one committed run to draw"
        )
    return report.figure(shown)


def figure_link(prefix: str) -> str:
    """Returns the image, by a path relative to a page that lies `prefix` above this folder."""
    shown = _shown()
    if not shown:
        return _NONE_YET
    row = shown[0]
    return (
        f"![Quality of exact Top-k decoding, and the softmax mass it keeps, by ratio]({prefix}results/{FIGURE.name})\n\n"
        f"*{row['model']} on one {row['device']}, full prefill, exact Top-k decode.*"
    )


def rows_digest() -> str:
    """Returns the fingerprint that a figure of the present rows carries."""
    return results.digest(_shown())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first column flush left, the others flush right."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(map(line, [list(header), rule, *map(list, rows)]))


def _shown() -> list[results.Row]:
    """Rows of the figure: one device, an accelerator where there is one, its latest run."""
    rows = [row for row in committed() if row["platform"] != "cpu"] or list(committed())
    if not rows:
        return []
    latest = max(rows, key=lambda row: row["date"])
    same = ("device", "commit", "date")
    return [row for row in rows if all(row[name] == latest[name] for name in same)]
