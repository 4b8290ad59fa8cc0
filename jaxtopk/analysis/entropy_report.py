"""How a measurement of attention entropy reads: tables by task and by layer, heat maps by head, mass against entropy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtopk.analysis import plots
from jaxtopk.analysis.measured_rows import MeasuredRows
from jaxtopk.analysis.report import Block, Figure, Section, Table, Text, render

_BINS = (32, 24)  # of entropy, of mass
_ABREAST = 2  # panels side by side
_STATE = (
    "The model ran under {attention}: every layer reads what the layers below it wrote under that strategy. What is measured "
    "at each row is the full softmax over all keys the row may see, H = - sum p ln p in nats, whatever the strategy attends to."
)
_TRUNCATED = (
    "The entropy inside a set of keys is at most the logarithm of its size, so it falls as the set shrinks, for free: compare "
    "full entropies with each other, and truncated ones only at equal k."
)
_BOUND = (
    "Rows of all layers and heads that see more than k keys: mass a(k) of the best k keys against the entropy of the full "
    "softmax. No row can lie below the dashed line, a >= 1 - H / ln k (k >= 2). Low entropy is sufficient for a large mass, far "
    "from necessary."
)


def page(
    rows: Mapping[str, MeasuredRows],
    results: Sequence[Mapping[str, Any]],
    *,
    attention: str,
    config: Any,
) -> str:
    """Renders report.html.

    Args:
      rows: measured rows by group (task); drawn together.
      results: the rows of results.jsonl, of which the tables are made.
      attention: the strategy in words.
      config: the run's, shown at the end.
    """
    together = MeasuredRows.join(list(rows.values()))
    totals = {row["group"]: row for row in results if row["level"] == "total"}
    whole = totals.get("all") or next(iter(totals.values()))
    sections = [
        Section(
            heading="By task" if set(rows) != {"text"} else "In all",
            blocks=[
                Text(text=_STATE.format(attention=attention)),
                _totals(totals),
                Text(text=_TRUNCATED),
            ],
        ),
        Section(heading="By layer and head", blocks=_heat_maps(together)),
        Section(heading="By layer", blocks=_layers(together, results, whole["group"])),
        Section(heading="Mass against entropy", blocks=_densities(together, whole)),
        Section(heading="Entropy of the next token", blocks=[_output(rows)]),
        Section(
            heading="How this was made",
            blocks=[_provenance(whole), Text(text=f"Configuration: {config}")],
        ),
    ]
    return render("Attention entropy", _lead(whole), sections)


def _lead(whole: Mapping[str, Any]) -> str:
    entropy, normalised = whole["entropy"]["mean"], whole["normalised"]["mean"]
    text = (
        f"A head's softmax has {entropy:.2f} nats on average, {100 * normalised:.0f}% of the most there could be, over "
        f"{whole['visible']:.0f} visible keys; exp(H) averages {whole['support']:.0f} keys."
    )
    told = [entry for entry in whole["topk"] if entry["mass"] is not None]
    shares = ", ".join(f"the best {entry['topk']} hold {_percent(entry['mass'])}" for entry in told)
    return f"{text} Where more keys are visible, {shares} of the mass." if told else text


def _totals(totals: Mapping[str, Mapping[str, Any]]) -> Table:
    first = next(iter(totals.values()))
    sizes = [entry["topk"] for entry in first["topk"]]
    header = [
        "task",
        "rows",
        "visible keys",
        "entropy [nats]",
        "median (quartiles)",
        "H / ln n",
        "exp(H)",
        *(f"mass of best {topk}" for topk in sizes),
        *(f"entropy in best {topk}" for topk in sizes),
        "keys attended",
        "mass attended",
        "next token [nats]",
    ]
    body = []
    for group, row in totals.items():
        entropy = row["entropy"]
        body.append(
            [
                group,
                str(row["n"]),
                f"{row['visible']:.0f}",
                f"{entropy['mean']:.3f}",
                f"{entropy['median']:.2f} ({entropy['quarter']:.2f} to {entropy['three_quarters']:.2f})",
                _percent(row["normalised"]["mean"]),
                f"{row['support']:.1f}",
                *(_percent(entry["mass"]) for entry in row["topk"]),
                *(_number(entry["entropy"], 2) for entry in row["topk"]),
                _number(row["attended"]["keys"], 0),
                _percent(row["attended"]["mass"]),
                f"{row['output_entropy']['mean']:.2f}",
            ]
        )
    caption = (
        f"{first['model']} in {first['dtype']} on {first['device']}, commit {first['commit']}, {first['date']}. Means over tokens, "
        "heads and layers. Rows of a task are those that predict its right answer, which the model is given; rows of a text are "
        "all. Mass of the best k: over rows that see more than k keys; a dash where none does."
    )
    return Table(header=header, rows=body, caption=caption)


def _heat_maps(rows: MeasuredRows) -> list[Block]:
    layers, heads, _ = rows.entropy.shape

    def heat_map(title: str, values: np.ndarray, **options: Any) -> plots.HeatMap:
        return plots.HeatMap(
            rows=[str(i) for i in range(layers)],
            columns=[str(i) for i in range(heads)],
            values=values.tolist(),
            x_label="head",
            y_label="layer",
            title=title,
            **options,
        )

    share = {"vmin": 0.0, "vmax": 1.0, "percent": True}
    panels = [
        heat_map("entropy as a share of ln n", rows.normalised.mean(axis=-1), **share),
        heat_map("entropy", rows.entropy.mean(axis=-1), vmin=0.0, colour_label="nats"),
    ]
    for topk in rows.topks:
        mass = rows.head_mass(topk)
        if not np.isnan(mass).all():
            panels.append(heat_map(f"mass of the best {topk} keys", mass, **share))
    height = 1.2 + 0.13 * min(layers, 40)
    figures = [
        plots.draw(panels[i : i + _ABREAST], panel_inches=(5.0, height))
        for i in range(0, len(panels), _ABREAST)
    ]
    caption = "Mean over rows of each head; mass over rows that see more keys than the set has."
    return [Figure(svg=svg, caption=caption) for svg in figures]


def _layers(rows: MeasuredRows, results: Sequence[Mapping[str, Any]], group: str) -> list[Block]:
    of_layer = [row for row in results if row["level"] == "layer" and row["group"] == group]
    index = [float(row["layer"]) for row in of_layer]
    spread = lambda name: [row["normalised"][name] for row in of_layer]
    sets = []
    for j, topk in enumerate(rows.topks):
        mass = [row["topk"][j]["mass"] for row in of_layer]
        if None not in mass:
            sets.append(plots.Curve(label=f"best {topk}", x=index, y=mass))
    kept = [row["attended"]["mass"] for row in of_layer]
    if None not in kept and min(kept) < 1:
        sets.append(plots.Curve(label="attended", x=index, y=kept, dashed=True))
    panel = {"x_label": "layer", "ratios": False, "y_percent": True, "y_range": (0.0, 1.02)}
    panels = [
        plots.Panel(
            curves=[
                plots.Curve(
                    label="",
                    x=index,
                    y=spread("mean"),
                    low=spread("quarter"),
                    high=spread("three_quarters"),
                )
            ],
            y_label="H / ln n",
            title="Entropy; the band holds half of the rows",
            **panel,
        )
    ]
    if sets:
        panels.append(plots.Panel(curves=sets, y_label="share", title="Mass", **panel))
    header = ["layer", "entropy [nats]", "median", "H / ln n", "exp(H)"]
    header += [f"mass of best {topk}" for topk in rows.topks]
    body = [
        [
            str(row["layer"]),
            f"{row['entropy']['mean']:.3f}",
            f"{row['entropy']['median']:.3f}",
            _percent(row["normalised"]["mean"]),
            f"{row['support']:.1f}",
            *(_percent(entry["mass"]) for entry in row["topk"]),
        ]
        for row in of_layer
    ]
    return [
        Figure(svg=plots.draw(panels), caption="Means over heads and rows of each layer."),
        Table(header=header, rows=body),
    ]


def _densities(rows: MeasuredRows, whole: Mapping[str, Any]) -> list[Block]:
    most = max(float(rows.entropy.max()), 1e-3)
    panels = []
    for j, topk in enumerate(rows.topks):
        told = rows.beyond(topk)
        if not told.any():
            continue
        counts, y_edges, x_edges = np.histogram2d(
            rows.mass[j][told],
            rows.entropy[told],
            bins=(_BINS[1], _BINS[0]),
            range=((0.0, 1.0), (0.0, most)),
        )
        end = min(most, np.log(topk))
        bound = [
            plots.Curve(
                label="1 - H / ln k", x=[0.0, end], y=[1.0, 1 - end / np.log(topk)], dashed=True
            )
        ]
        panels.append(
            plots.Density(
                x_edges=x_edges.tolist(),
                y_edges=y_edges.tolist(),
                counts=counts.tolist(),
                x_label="entropy of the full softmax [nats]",
                y_label="mass of the best keys",
                title=f"k = {topk}",
                curves=bound if topk > 1 else (),
                colour_label="rows",
                y_percent=True,
            )
        )
    if not panels:
        return [Text(text="No row sees more keys than the sets have.")]
    figures: list[Block] = [
        Figure(svg=plots.draw(panels[i : i + _ABREAST], panel_inches=(5.0, 3.8)), caption=_BOUND)
        for i in range(0, len(panels), _ABREAST)
    ]
    body = [
        [
            str(bound["topk"]),
            str(bound["rows"]),
            str(bound["broken"]),
            f"{bound['least_slack']:.2g}",
        ]
        for bound in whole["bound"]
    ]
    if body:
        caption = "Every row was checked against the bound; slack is mass less bound."
        header = ["k", "rows", "rows below the bound", "least slack"]
        figures.append(Table(header=header, rows=body, caption=caption))
    return figures


def _output(rows: Mapping[str, MeasuredRows]) -> Figure:
    most = max(float(part.output_entropy.max()) for part in rows.values())
    edges = np.linspace(0.0, max(most, 1e-3), 33)
    curves = []
    for group, part in rows.items():
        counts, _ = np.histogram(part.output_entropy, bins=edges)
        middle = (edges[1:] + edges[:-1]) / 2
        curves.append(
            plots.Curve(label=group, x=middle.tolist(), y=(counts / part.num_rows).tolist())
        )
    panel = plots.Panel(
        curves=curves,
        x_label="entropy of the next token's distribution [nats]",
        y_label="share of rows",
        ratios=False,
        y_percent=True,
    )
    return Figure(
        svg=plots.draw([panel], panel_inches=(7.0, 3.6)),
        caption="How sure the model is of the token that follows a row; 0 is certain.",
    )


def _provenance(row: Mapping[str, Any]) -> Table:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    entries = [
        ("command", row["command"]),
        ("device", f"{row['device']} ({row['platform']}, {row['cores']} CPU cores)"),
        ("versions", versions),
        ("commit", row["commit"]),
        ("date", row["date"]),
        ("seed", str(row["seed"])),
        ("seconds, without loading", f"{row['seconds']:.1f}"),
    ]
    return Table(header=["", ""], rows=entries)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


__all__ = ["page"]
