"""Line plots with intervals, drawn the same way in every report, as SVG that is the same bytes for the same data."""

import dataclasses
import io
from collections.abc import Sequence

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker

# Dark enough on white, told apart by most colour-blind readers, and by marker without colour.
_COLOURS = ("#2858a8", "#c4501b", "#23805a", "#8a3b8f", "#6b6b6b")
_MARKERS = ("o", "s", "^", "D", "v")
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
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Args:
      ratios: the x axis is a share of keys: logarithmic, marked in percent at the points measured.
      y_percent: the y axis is a share.
      y_range: fixed ends of the y axis; None fits the data.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    title: str = ""
    ratios: bool = True
    y_percent: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None


def draw(
    panels: Sequence[Panel],
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


def _draw_panel(axes: matplotlib.axes.Axes, panel: Panel) -> None:
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
            markersize=5,
            linewidth=1.6,
            linestyle="--" if curve.dashed else "-",
        )
    percent = lambda x, _=None: f"{100 * x:g}%"
    if panel.ratios:
        ticks = sorted({x for curve in panel.curves for x in curve.x})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [percent(x) for x in ticks])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if panel.y_log:
        axes.set_yscale("log")
    if panel.y_percent:
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(percent))
    if panel.y_range is not None:
        axes.set_ylim(panel.y_range)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.title:
        axes.set_title(panel.title, fontsize=10, loc="left")
    if len(panel.curves) > 1 or panel.curves[0].label:
        axes.legend(
            fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.18), borderaxespad=0, ncols=2
        )
