"""What the page shows of the committed entropy rows: tables by task and by set, heat maps and clouds of heads."""

import functools
import math
import pathlib
from collections.abc import Sequence

from experiments import results
from experiments.quickstart.tables import markdown
from experiments.topk_ratio.entropy import STUDY, label
from jaxtopk.analysis import plots

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
FIGURES = ("entropy-heads.svg", "entropy-loss.svg")
_NONE_YET = "*No results are committed yet.*"
_NEEDLE, _AGGREGATION = "niah_multikey_1", "cwe"  # drawn where a run has them
_CLOUDS = ("64", "5%")  # sets that losses are drawn for, likewise


@functools.cache
def committed() -> tuple[results.Row, ...]:
    """Returns the rows of all committed runs."""
    return tuple(row for row in results.read(RESULTS) if row["study"] == STUDY)


def tables() -> str:
    """Every committed run: three tables a device and length."""
    parts = []
    for (device, _, length), rows in results.groups(
        committed(), "device", "commit", "length"
    ).items():
        (whole,) = (row for row in rows if row["kind"] == "all")
        parts += [
            f"### {device}, {length} tokens\n",
            markdown(*_by_task(rows)) + "\n",
            f"Means over the rows that predict a right answer, then over the {_heads(rows)} heads (quartiles: over heads), then "
            f"over tasks; {whole['n'] // whole['tasks']} samples a task. Lost: the mass that the best keys do not hold.\n",
            markdown(*_by_set(whole)) + "\n",
            "Over heads, each head the mean of tasks: does a head of higher entropy lose more? Correlation of its entropy with "
            "what it loses, with 95% bootstrap intervals over heads. Every row of every head that sees more keys was checked "
            "against a(k) >= 1 - H / ln k; below counts those that miss it by more than rounding (1e-4), slack is the least of "
            "a(k) less its bound.\n",
            markdown(*_correlations(rows)) + "\n",
            "Rank correlation within each task, over heads.\n",
            f"{whole['model']} in {whole['dtype']}, {device}, jax {whole['versions']['jax']}, commit {whole['commit']}, "
            f"{whole['date']}, seed {whole['seed']}.\n",
        ]
    return "\n".join(parts) or _NONE_YET


def figure(name: str) -> str:
    """Draws one of `FIGURES` from the latest run."""
    shown = _shown()
    if not shown:
        raise ValueError(f"results: got none in {RESULTS.name}, wanted a committed run to draw")
    panels = {"entropy-heads.svg": _heat_maps, "entropy-loss.svg": _clouds}[name](shown)
    return plots.draw(panels, description=f"rows {results.digest(shown)}", panel_inches=(5.0, 4.6))


def figure_links(prefix: str) -> str:
    """Returns the images, by paths relative to a page that lies `prefix` above this folder."""
    shown = _shown()
    if not shown:
        return _NONE_YET
    row = shown[0]
    made = f"{row['model']} on one {row['device']}, {row['length']} tokens"
    heads, loss = FIGURES
    return (
        f"![Entropy of each head, a needle task beside one that counts]({prefix}results/{heads})\n\n"
        f"*Mean entropy of each head as a share of ln n; {made}.*\n\n"
        f"![What each head loses against its entropy]({prefix}results/{loss})\n\n"
        f"*A mark a head and task; no head can lie above the dashed line, H / ln k.*"
    )


def rows_digest() -> str | None:
    """Returns the fingerprint that a figure of the present rows carries; None where there are none."""
    shown = _shown()
    return results.digest(shown) if shown else None


def _shown() -> list[results.Row]:
    """Rows of the latest run, of an accelerator where there is one, at its shortest length."""
    rows = [row for row in committed() if row["platform"] != "cpu"] or list(committed())
    if not rows:
        return []
    latest = max(rows, key=lambda row: row["date"])
    rows = [row for row in rows if all(row[name] == latest[name] for name in ("device", "commit"))]
    shortest = min(row["length"] for row in rows)
    return [row for row in rows if row["length"] == shortest]


def _by_task(rows: Sequence[results.Row]) -> tuple[list[str], list[list[str]]]:
    header = ["task", "rows", "visible keys", "entropy [nats]", "quartiles", "H / ln n"]
    header += [f"lost at {label(entry)}" for entry in rows[0]["sets"]]
    body = [
        [
            _name(row),
            f"{row['rows']}",
            f"{row['visible']:.0f}",
            f"{row['entropy']:.2f}",
            f"{row['quarter']:.2f} to {row['three_quarters']:.2f}",
            _percent(row["normalised"]),
            *(_percent(entry["lost"]) for entry in row["sets"]),
        ]
        for row in rows
    ]
    return header, body


def _by_set(whole: results.Row) -> tuple[list[str], list[list[str]]]:
    header = [
        "keys kept",
        "lost",
        "Spearman",
        "Pearson",
        "rows checked",
        "below the bound",
        "slack",
    ]
    body = [
        [
            label(entry),
            _percent(entry["lost"]),
            _interval(entry["spearman"]),
            _interval(entry["pearson"]),
            f"{entry['checked']:,}",
            f"{entry['broken']}",
            "–" if entry["least_slack"] is None else f"{entry['least_slack']:.1e}",
        ]
        for entry in whole["sets"]
    ]
    return header, body


def _correlations(rows: Sequence[results.Row]) -> tuple[list[str], list[list[str]]]:
    header = ["task", *(label(entry) for entry in rows[0]["sets"])]
    return header, [
        [_name(row), *(_interval(entry["spearman"]) for entry in row["sets"])]
        for row in rows
        if row["kind"] == "task"
    ]


def _heat_maps(rows: Sequence[results.Row]) -> list[plots.HeatMap]:
    panels = []
    for row in _two_tasks(rows):
        values = row["heads"]["normalised"]
        panels.append(
            plots.HeatMap(
                rows=[str(i) for i in range(len(values))],
                columns=[str(i) for i in range(len(values[0]))],
                values=values,
                x_label="head",
                y_label="layer",
                title=row["task"],
                vmin=0.0,
                vmax=1.0,
                colour_label="entropy, share of ln n",
                percent=True,
            )
        )
    return panels


def _clouds(rows: Sequence[results.Row]) -> list[plots.Panel]:
    chosen = _two_tasks(rows)
    known = [i for i, entry in enumerate(chosen[0]["sets"]) if entry["lost"] is not None]
    labels = {label(chosen[0]["sets"][i]): i for i in known}
    panels = []
    for name in [name for name in _CLOUDS if name in labels] or list(labels)[:2]:
        index, curves = labels[name], []
        for row in chosen:
            entropy = _flat(row["heads"]["entropy"])
            lost = [x / 10_000 for x in _flat(row["heads"]["lost_e4"][index])]
            curves.append(plots.Curve(label=row["task"], x=entropy, y=lost, joined=False))
        entry = chosen[0]["sets"][index]
        # The budgets of a share differ from row to row, and with them the bound: it is drawn for numbers of keys.
        if entry.get("topk", 1) > 1:
            ln_k = math.log(entry["topk"])
            curves.append(plots.Curve(label="H / ln k", x=[0.0, ln_k], y=[0.0, 1.0], dashed=True))
        panels.append(
            plots.Panel(
                curves=curves,
                x_label="entropy of the full softmax [nats]",
                y_label="mass lost",
                title=f"best {name} of the keys" if name.endswith("%") else f"best {name} keys",
                ratios=False,
                y_percent=True,
                y_range=(-0.02, 1.02),
            )
        )
    return panels


def _two_tasks(rows: Sequence[results.Row]) -> list[results.Row]:
    """Returns a needle task and one that needs much of the context at once, as far as there are such."""
    found = []
    for spread, wanted in ((False, _NEEDLE), (True, _AGGREGATION)):
        kind = {row["task"]: row for row in rows if row.get("aggregation") is spread}
        found += [kind[wanted]] if wanted in kind else list(kind.values())[:1]
    return found


def _name(row: results.Row) -> str:
    return row["task"] if row["kind"] == "task" else "mean of tasks"


def _heads(rows: Sequence[results.Row]) -> int:
    return len(_flat(rows[0]["heads"]["entropy"]))


def _flat(values: Sequence[Sequence[float]]) -> list[float]:
    return [value for layer in values for value in layer]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _interval(found: Sequence[float] | None) -> str:
    return "–" if found is None else f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"
