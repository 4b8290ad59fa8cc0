"""How a run reads: the table, what failed, the plot and the page, made of result rows."""

from collections.abc import Sequence
from typing import Any

from experiments import results
from experiments.results import Row
from jaxtopk.analysis import plots
from jaxtopk.analysis.report import Figure, Section, Table, Text, render

_HEADER = (
    "model", "context", "batch", "attention", "tokens/s", "ms/step", "range", "to full", "limit [ms]", "of it weights",
    "limit / time",
)  # fmt: skip
_HOW = (
    "A step is one token of every sequence: ms/step is its time, tokens/s counts all sequences. Medians of rounds, each some "
    "steps in one compiled loop, the one that generation runs; the kinds of attention take turns, so that whatever else the "
    "machine does falls on all alike. To full: speed against full attention, round by round. Limit: the bytes that a step has to "
    "read, at the read rate measured on the same device in the same run. Those are the weights, whatever the attention, and of "
    "the cache all keys and values (full), all keys and each head's selected values (topk), or all index keys and the selected "
    "keys and values (indexer). Where the weights are most of it, no attention can help much."
)


def latest(rows: Sequence[Row]) -> list[Row]:
    """Returns the last row of each attention and workload, in order of first appearance."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found[row["model"], row["context"], row["batch"], row["attention"]] = row
    return list(found.values())


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells, a line a workload and attention; workloads in order of model, batch and context."""
    shown = [row for row in latest(rows) if row["status"] == "ok"]
    models = list(dict.fromkeys(row["model"] for row in shown))
    # Stable: the kinds of attention stay in the order in which they ran.
    shown.sort(key=lambda row: (models.index(row["model"]), row["batch"], row["context"]))
    body = []
    for row in shown:
        low, high = row["ms_per_step_range"]
        body.append(
            [
                row["model"],
                f"{row['context']:,}",
                str(row["batch"]),
                _name(row),
                f"{row['tokens_per_second']:,.1f}",
                f"{row['ms_per_step']:.3g}",
                f"{low:.3g} to {high:.3g}",
                f"{row['speed_over_full']:.2f}x" if "speed_over_full" in row else "-",
                f"{row['limit_ms']:.3g}",
                f"{row['limit_weights_ms'] / row['limit_ms']:.0%}",
                f"{row['limit_ms'] / row['ms_per_step']:.0%}",
            ]
        )
    return list(_HEADER), body


def caption(rows: Sequence[Row]) -> str:
    """Says what the numbers are: the device and its read rate, models and caches, versions, commit, date."""
    row = rows[-1]
    commits = dict.fromkeys(row["commit"] for row in rows)
    rates = dict.fromkeys(f"{row['bytes_per_s'] / 1e12:.3g}" for row in rows)
    caches = {(row["model"], row["cache"]) for row in rows}
    made = "; ".join(f"{model}: cache {cache}" for model, cache in sorted(caches))
    return (
        f"{row['device']}, {', '.join(rates)} TB/s read in the same run; {row['dtype']}; {made}; indexer weights "
        f"random; medians of {row['n']} rounds of {row['new_tokens']} steps; jax {row['versions']['jax']}, commit "
        f"{', '.join(commits)}, {row['date']}."
    )


def failures(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each row without a time."""
    return [
        f"{row['model']}, context {row['context']}, batch {row['batch']}, {row['attention']}: {row['message']}"
        for row in latest(rows)
        if row["status"] != "ok"
    ]


def figure(rows: Sequence[Row]) -> str | None:
    """Draws tokens per second against context, a panel a model and batch; None where nothing has two contexts."""
    timed = [row for row in latest(rows) if row["status"] == "ok"]
    panels = []
    for (model, batch), of_panel in results.groups(timed, "model", "batch").items():
        curves = []
        for (name,), of_name in results.groups(of_panel, "attention").items():
            points = sorted(of_name, key=lambda row: row["context"])
            curves.append(
                plots.Curve(
                    label=_name(points[0]),
                    x=[float(row["context"]) for row in points],
                    y=[row["tokens_per_second"] for row in points],
                    low=[row["tokens_per_second_range"][0] for row in points],
                    high=[row["tokens_per_second_range"][1] for row in points],
                )
            )
            del name
        if len({row["context"] for row in of_panel}) < 2:
            continue
        panels.append(
            plots.Panel(
                curves=curves,
                x_label="context [tokens]",
                y_label="tokens per second",
                title=f"{model}, batch {batch}",
                ratios=False,
                x_log=True,
            )
        )
    if not panels:
        return None
    return plots.draw(panels, description=f"rows {results.digest(list(rows))}")


def page(config: Any, rows: Sequence[Row]) -> str:
    """Renders report.html."""
    header, body = table(rows)
    blocks = [Table(header=header, rows=body, caption=caption(rows)), Text(text=_HOW)]
    sections = [Section(heading="Times", blocks=blocks)]
    drawn = figure(rows)
    if drawn is not None:
        about = "Tokens per second by context: medians, and the range of the rounds as a band."
        sections.append(Section(heading="By context", blocks=[Figure(svg=drawn, caption=about)]))
    if lines := failures(rows):
        sections.append(
            Section(heading="Without a time", blocks=[Text(text=line) for line in lines])
        )
    row = rows[-1]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    made = (
        f"{row['device']} ({row['platform']}, {row['cores']} CPU cores), {row['runtime']}; {versions}; commit {row['commit']}, "
        f"{row['date']}, seed {row['seed']}: {row['command']}"
    )
    sections.append(
        Section(
            heading="How this was made",
            blocks=[Text(text=made), Text(text=f"Configuration: {config}")],
        )
    )
    return render(
        "Decoding at long contexts",
        f"Tokens per second of whole models on one {row['device']}, under {', '.join(dict.fromkeys(map(_name, rows)))}.",
        sections,
    )


def how() -> str:
    """What the columns of the table mean."""
    return _HOW


def _name(row: Row) -> str:
    return row["attention"] if row["attention"] == "full" else f"{row['attention']} {row['topk']}"
