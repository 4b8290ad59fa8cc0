"""How a run reads: the table, its caption, the two plots and the page, made of result rows and example texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import results
from experiments.results import Row
from jaxtopk.analysis import plots
from jaxtopk.analysis.report import Examples, Figure, Section, Table, Text, render

_TASK_TITLES = {
    "niah": "needle",
    "niah_multikey": "needle among needles",
    "json_kv": "JSON",
    "json_kv_words": "JSON",
}
_COST = (
    "Exact Top-k scores every visible key to find the best, so a decode step still reads all keys; what it saves is the "
    "values of the keys it drops. At equal bandwidth that is at most about twice as fast as full attention, whatever the "
    "ratio. The fewer keys the attended set needs, the more a cheaper scorer could save."
)
_FIGURE = (
    "Left: perplexity of full attention over that of Top-k, and accuracy on tasks with known answers; bands are 95% "
    "intervals. Right: softmax mass of the kept keys, against their number as a share of the visible ones."
)
_NO_MEANING = "Random weights and made-up text: these numbers say that the code runs, and nothing about quality."


def table(rows: Sequence[Row], *, intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells for the rows of one context, one row a setting.

    Args:
      intervals: give the 95% intervals too; without them the table fits a terminal.
    """
    tasks = list(rows[0]["tasks"])
    visible = f"{rows[0]['keys_visible']:.0f}"
    header = [
        "attention",
        "perplexity",
        "change",
        *map(task_title, tasks),
        "mass kept",
        f"keys of {visible}",
        "ms/token",
    ]
    body = []
    for row in rows:
        accuracies = [row["tasks"][task] for task in tasks]
        body.append(
            [
                setting_name(row),
                f"{row['perplexity']:.3f}",
                "" if row["attention"] == "full" else _change(row, intervals),
                *(_accuracy(entry, intervals) for entry in accuracies),
                f"{100 * row['mass_kept']:.1f}%",
                f"{row['keys_attended']:.0f}",
                f"{row['ms_per_token']:.3g}",
            ]
        )
    return header, body


def caption(rows: Sequence[Row]) -> str:
    """Says what the numbers are: model, device, counts, how sure, and which rows were sparse."""
    row = rows[0]
    counts = ", ".join(f"{task_title(name)} n = {task['n']}" for name, task in row["tasks"].items())
    timing = "" if row["dtype"] == row["timing_dtype"] else f", times {row['timing_dtype']}"
    text = (
        f"{row['model']} in {row['dtype']}{timing}, {row['device']}, jax {row['versions']['jax']}, commit {row['commit']}, "
        f"{row['date']}. Prompts are prefilled with full attention but for the last {row['sparse_suffix']} token(s); these and "
        f"all that follow are Top-k rows, one set a head. Perplexity: {row['n']} decoded tokens of {row['windows']} windows, "
        f"change paired with full attention. Tasks: {counts}; ranges are 95% intervals. Mass kept and keys attended: mean over layers, heads and tokens; all "
        f"keys are scored. Time: median, one sequence."
    )
    return f"{_NO_MEANING} {text}" if row["model"] == "random" else text


def setting_name(row: Row) -> str:
    """Returns "full" or "top-k 5%"."""
    return "full" if row["attention"] == "full" else f"top-k {100 * row['ratio']:g}%"


def task_title(name: str) -> str:
    """Returns the short name of a task for a column."""
    return _TASK_TITLES.get(name, name)


def figure(rows: Sequence[Row]) -> str:
    """Draws two panels as SVG: quality against ratio, and mass kept against the share of keys attended."""
    contexts = results.groups(rows, "context")
    several = len(contexts) > 1
    quality, kept = [], []
    for (context,), of_context in contexts.items():
        suffix = f", {context} tokens" if several else ""
        points = sorted(
            (row for row in of_context if row["attention"] == "topk"), key=lambda row: row["ratio"]
        )
        full = next(row for row in of_context if row["attention"] == "full")
        ratios = [row["ratio"] for row in points]
        intervals = [
            row["perplexity_change_95"] or [row["perplexity_change"]] * 2 for row in points
        ]
        inverse = lambda change: (
            1 / (1 + change)
        )  # perplexity of full attention / this one: 100% is as good as full
        quality.append(
            plots.Curve(
                label=f"perplexity, full / top-k{suffix}",
                x=ratios,
                y=[inverse(row["perplexity_change"]) for row in points],
                low=[inverse(high) for _, high in intervals],
                high=[inverse(low) for low, _ in intervals],
            )
        )
        for task in full["tasks"]:
            of_task = [row["tasks"][task] for row in points]
            quality.append(
                plots.Curve(
                    label=f"{task_title(task)}, accuracy{suffix}",
                    x=ratios,
                    y=[entry["accuracy"] for entry in of_task],
                    low=[entry["accuracy_95"][0] for entry in of_task],
                    high=[entry["accuracy_95"][1] for entry in of_task],
                )
            )
        kept.append(
            plots.Curve(
                label=f"softmax mass kept{suffix}", x=ratios, y=[row["mass_kept"] for row in points]
            )
        )
        kept.append(
            plots.Curve(
                label=f"keys attended{suffix}",
                x=ratios,
                y=[row["keys_attended"] / row["keys_visible"] for row in points],
                dashed=True,
            )
        )
    x_label = "keys kept by each head (topk_ratio)"
    panels = [
        plots.Panel(
            curves=quality,
            x_label=x_label,
            y_label="",
            title="Quality",
            y_percent=True,
            y_range=(0.0, 1.08),
        ),
        plots.Panel(
            curves=kept,
            x_label=x_label,
            y_label="",
            title="What is kept",
            y_percent=True,
            y_range=(0.0, 1.08),
        ),
    ]
    return plots.draw(panels, description=f"rows {results.digest(list(rows))}")


def page(config: Any, rows: Sequence[Row], examples: Sequence[Mapping[str, Any]]) -> str:
    """Renders report.html.

    Args:
      config: the run's, shown at the end.
      rows: all rows of the run.
      examples: a context, the end of its prompt, and what each setting wrote after it.
    """
    lowest = min(rows, key=lambda row: row["ratio"])
    lead = (
        f"Each head attends only to its best keys. At {100 * lowest['ratio']:g}% of {lowest['context']} keys, "
        f"{100 * lowest['mass_kept']:.0f}% of the softmax mass is kept and perplexity changes by "
        f"{100 * lowest['perplexity_change']:+.1f}%."
    )
    tables = []
    for (context,), of_context in results.groups(rows, "context").items():
        header, body = table(of_context)
        tables += [
            Text(text=f"After a prompt of {context} tokens:"),
            Table(header=header, rows=body, caption=caption(rows)),
        ]
    sections = [
        Section(heading="Results", blocks=[*tables, Text(text=_COST)]),
        Section(
            heading="Quality and what is kept, by ratio",
            blocks=[Figure(svg=figure(rows), caption=_FIGURE)],
        ),
        Section(
            heading="The same continuation at each ratio",
            blocks=[
                Examples(
                    context=f"… {example['prompt']}",
                    texts=[
                        (_setting_label(setting), text)
                        for setting, text in example["texts"].items()
                    ],
                )
                for example in examples
            ],
        ),
        Section(
            heading="How this was made",
            blocks=[_provenance(rows[0]), Text(text=f"Configuration: {config}")],
        ),
    ]
    return render("Exact Top-k decoding", lead, sections)


def _provenance(row: Row) -> Table:
    entries = [
        ("command", row["command"]),
        ("device", f"{row['device']} ({row['platform']}, {row['cores']} CPU cores)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in row["versions"].items())),
        ("commit", row["commit"]),
        ("date", row["date"]),
        ("seed", str(row["seed"])),
    ]
    return Table(header=["", ""], rows=entries)


def _setting_label(setting: str | float) -> str:
    return "full" if isinstance(setting, str) else f"{100 * setting:g}%"


def _change(row: Row, intervals: bool) -> str:
    change = f"{100 * row['perplexity_change']:+.2f}%"
    if not intervals or row["perplexity_change_95"] is None:
        return change
    low, high = row["perplexity_change_95"]
    return f"{change} ({100 * low:+.1f} to {100 * high:+.1f})"


def _accuracy(entry: Mapping[str, Any], intervals: bool) -> str:
    low, high = entry["accuracy_95"]
    return f"{100 * entry['accuracy']:.0f}%" + (
        f" ({100 * low:.0f} to {100 * high:.0f})" if intervals else ""
    )
