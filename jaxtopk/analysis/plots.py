"""Line plots, heat maps and densities, drawn the same way in every report, as SVG that is the same bytes for the same data."""

import dataclasses
import io
import math
from collections.abc import Sequence

import matplotlib
import matplotlib.axes
import matplotlib.colors
import matplotlib.figure
import matplotlib.ticker
import numpy as np

# Dark enough on white, told apart by most colour-blind readers, and by marker without colour.
_COLOURS = ("#2858a8", "#c4501b", "#23805a", "#8a3b8f", "#6b6b6b")
_MARKERS = ("o", "s", "^", "D", "v")
_COLOUR_MAP = (
    "viridis"  # even steps of lightness: it survives grey printing and most colour blindness
)
_MAX_TICKS = 16  # labels along one side of a heat map
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "jaxtopk",  # element ids are otherwise random
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a plot.

    Args:
      x, y: points; one (x, y) a mark.
      low, high: ends of the interval at each point; None draws none.
      dashed: for bounds and controls, rather than measurements.
      joined: a line from point to point; False leaves small marks alone, for a cloud of points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    joined: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Args:
      ratios: the x axis is a share of keys: logarithmic, marked in percent at the points measured.
      x_log: without `ratios`, a logarithmic x axis, marked at the points measured.
      y_percent: the y axis is a share.
      y_range: fixed ends of the y axis; None fits the data.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    title: str = ""
    ratios: bool = True
    x_log: bool = False
    y_percent: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A grid of coloured cells, first row on top.

    Args:
      rows, columns: labels; where they are many, only every few are printed.
      values: one list a row; NaN leaves a cell blank.
      x_label, y_label: what columns and rows are.
      vmin, vmax: ends of the colours; None fits the data.
      colour_label: what the colours mean.
      percent: values are shares.
      decimals: write each value into its cell, in percent where `percent`, with so many decimals; None writes none.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    x_label: str
    y_label: str
    title: str = ""
    vmin: float | None = None
    vmax: float | None = None
    colour_label: str = ""
    percent: bool = False
    decimals: int | None = None

    def __post_init__(self) -> None:
        got, wanted = np.shape(self.values), (len(self.rows), len(self.columns))
        if got != wanted or 0 in wanted:
            raise ValueError(
                f"values: got shape {got}, wanted one value for each of {wanted[0]} rows and {wanted[1]} columns"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Density:
    """How many points fall where: a two-dimensional histogram with a logarithmic colour scale, and curves over it.

    Args:
      x_edges, y_edges: ends of the bins, ascending, one more than bins.
      counts: points in each bin, one list a bin of y; bins without any stay blank.
      curves: drawn on top, such as bounds; `label` names them in the legend.
      colour_label: what is counted.
    """

    x_edges: Sequence[float]
    y_edges: Sequence[float]
    counts: Sequence[Sequence[float]]
    x_label: str
    y_label: str
    title: str = ""
    curves: Sequence[Curve] = ()
    colour_label: str = ""
    y_percent: bool = False

    def __post_init__(self) -> None:
        got, wanted = np.shape(self.counts), (len(self.y_edges) - 1, len(self.x_edges) - 1)
        if got != wanted or min(wanted) < 1:
            raise ValueError(f"counts: got shape {got}, wanted {wanted} as between the edges")


def draw(
    panels: Sequence[Panel | HeatMap | Density],
    *,
    description: str = "",
    panel_inches: tuple[float, float] = (5.0, 3.4),
) -> str:
    """Draws panels side by side.

    Args:
      description: kept in the file's metadata, such as a digest of the data that was drawn.

    Returns:
      SVG markup.
    """
    width, height = panel_inches
    with matplotlib.rc_context(_STYLE):
        figure = matplotlib.figure.Figure(
            figsize=(width * len(panels), height), layout="constrained"
        )
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw_panel(axes, panel)
        return to_svg(figure, description=description)


def to_svg(figure: matplotlib.figure.Figure, *, description: str = "") -> str:
    """Returns a figure as SVG markup, without the date that matplotlib would put in."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Description": description or None}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _draw_panel(axes: matplotlib.axes.Axes, panel: Panel | HeatMap | Density) -> None:
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.title:
        axes.set_title(panel.title, fontsize=10, loc="left")
    match panel:
        case Panel():
            _draw_curves(axes, panel)
        case HeatMap():
            _draw_heat_map(axes, panel)
        case Density():
            _draw_density(axes, panel)


def _draw_curves(axes: matplotlib.axes.Axes, panel: Panel) -> None:
    for index, curve in enumerate(panel.curves):
        colour = _COLOURS[index % len(_COLOURS)]
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            curve.x,
            curve.y,
            label=curve.label,
            color=colour,
            marker=None if curve.dashed else _MARKERS[index % len(_MARKERS)],
            markersize=5 if curve.joined else 2.5,
            linewidth=1.6,
            linestyle="none" if not curve.joined else "--" if curve.dashed else "-",
        )
    if panel.ratios or panel.x_log:
        ticks = sorted({x for curve in panel.curves for x in curve.x})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [_percent(x) if panel.ratios else f"{x:,.0f}" for x in ticks])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if panel.y_log:
        axes.set_yscale("log")
    if panel.y_percent:
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_percent))
    if panel.y_range is not None:
        axes.set_ylim(panel.y_range)
    if len(panel.curves) > 1 or panel.curves[0].label:
        axes.legend(
            fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.18), borderaxespad=0, ncols=2
        )


def _draw_heat_map(axes: matplotlib.axes.Axes, panel: HeatMap) -> None:
    # Cells are paths, not pixels: sharp at any size, and text to a reader of the file.
    values = np.ma.masked_invalid(np.asarray(panel.values, np.float64))
    empty = values.count() == 0
    mesh = axes.pcolormesh(
        values,
        cmap=_COLOUR_MAP,
        vmin=0.0 if panel.vmin is None and empty else panel.vmin,
        vmax=1.0 if panel.vmax is None and empty else panel.vmax,
        edgecolors="face",
        linewidth=0.2,
    )
    axes.invert_yaxis()
    for axis, labels in ((axes.xaxis, panel.columns), (axes.yaxis, panel.rows)):
        step = math.ceil(len(labels) / _MAX_TICKS)
        axis.set_ticks(np.arange(0, len(labels), step) + 0.5, labels=list(labels[::step]))
    _bare(axes)
    _colour_bar(axes, mesh, panel.colour_label, panel.percent)
    if panel.decimals is None:
        return
    shade = np.ma.filled(mesh.norm(values), 0.0)
    for (row, column), value in np.ndenumerate(np.asarray(panel.values, np.float64)):
        if not np.isfinite(value):
            continue
        text = (
            f"{100 * value:.{panel.decimals}f}%" if panel.percent else f"{value:.{panel.decimals}f}"
        )
        ink = "black" if shade[row, column] > 0.6 else "white"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=8)


def _draw_density(axes: matplotlib.axes.Axes, panel: Density) -> None:
    counts = np.ma.masked_equal(np.asarray(panel.counts, np.float64), 0.0)
    most = float(counts.max()) if counts.count() else 1.0
    mesh = axes.pcolormesh(
        np.asarray(panel.x_edges),
        np.asarray(panel.y_edges),
        counts,
        cmap=_COLOUR_MAP,
        norm=matplotlib.colors.LogNorm(vmin=1.0, vmax=max(most, 10.0)),
        edgecolors="face",
        linewidth=0.2,
    )
    for curve in panel.curves:
        style = "--" if curve.dashed else "-"
        axes.plot(curve.x, curve.y, label=curve.label, color=_COLOURS[1], linestyle=style)
    axes.set_xlim(panel.x_edges[0], panel.x_edges[-1])
    axes.set_ylim(panel.y_edges[0], panel.y_edges[-1])
    if panel.y_percent:
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_percent))
    if panel.curves:
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.18), borderaxespad=0)
    _bare(axes)
    _colour_bar(axes, mesh, panel.colour_label, percent=False)


def _bare(axes: matplotlib.axes.Axes) -> None:
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _colour_bar(axes: matplotlib.axes.Axes, mesh, label: str, percent: bool) -> None:
    bar = axes.figure.colorbar(mesh, ax=axes, label=label)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")
        bar.solids.set_rasterized(False)  # an image would be a link to data
    if percent:
        bar.ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_percent))


def _percent(x: float, _=None) -> str:
    return f"{100 * x:g}%"
