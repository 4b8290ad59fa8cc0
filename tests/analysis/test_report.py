"""Reports and plots: escaped, self-contained, the same bytes for the same data."""

import dataclasses
import html.parser
import math
import xml.etree.ElementTree as ET

import pytest

from jaxtopk.analysis.plots import Curve, Density, HeatMap, Panel, draw
from jaxtopk.analysis.report import Examples, Figure, Section, Table, Text, render

PANEL = Panel(
    curves=[
        Curve(
            label="measured",
            x=[0.01, 0.1, 1.0],
            y=[0.2, 0.8, 1.0],
            low=[0.1, 0.7, 1.0],
            high=[0.3, 0.9, 1.0],
        ),
        Curve(label="bound", x=[0.01, 0.1, 1.0], y=[0.01, 0.1, 1.0], dashed=True),
    ],
    x_label="keys kept",
    y_label="share",
    y_percent=True,
)


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that is closed out of turn, and collects what the page would fetch."""

    void = ("meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "circle", "line")

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and value[0] != "#"
        ]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def page() -> str:
    blocks = [
        Text(text="a <b> & 'c'"),
        Table(header=["name", "x"], rows=[["<script>", "1"]], caption="n < 5"),
        Figure(svg=draw([PANEL]), caption='said "so"'),
        Examples(context="once\nupon", texts=[("full", "a </dd> time")]),
    ]
    return render("Title & more", "Lead <i>.", [Section(heading="H <2>", blocks=blocks)])


def test_a_page_is_well_formed_and_fetches_nothing():
    parser = Balanced()
    parser.feed(page())
    assert parser.open == []
    assert parser.fetched == []


def test_text_of_any_kind_is_escaped():
    written = page()
    for raw in ("<script>", "a <b>", "a </dd>", "n < 5", "Lead <i>", "H <2>", '"so"'):
        assert raw not in written
    for escaped in (
        "&lt;script&gt;",
        "a &lt;b&gt; &amp;",
        "Title &amp; more",
        "said &quot;so&quot;",
    ):
        assert escaped in written


def test_a_row_of_another_length_and_a_figure_without_svg_are_refused():
    with pytest.raises(ValueError, match="rows: got 1 cells, wanted 2"):
        Table(header=["a", "b"], rows=[["1"]])
    with pytest.raises(ValueError, match="svg: got 'png'"):
        Figure(svg="png", caption="").html()


def test_a_plot_shows_its_labels_and_points_and_is_reproducible():
    svg = draw([PANEL, PANEL], description="rows 0123")
    assert draw([PANEL, PANEL], description="rows 0123") == svg
    texts = [
        element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    for wanted in ("measured", "bound", "keys kept", "share", "1%", "10%", "100%"):
        assert texts.count(wanted) >= 2, wanted  # once a panel
    assert "rows 0123" in svg


def test_a_plot_moves_with_its_data():
    low = draw([PANEL])
    curve = Curve(label="measured", x=[0.01, 0.1, 1.0], y=[0.2, 0.5, 1.0])
    assert draw([Panel(curves=[curve], x_label="keys kept", y_label="share")]) != low


GRID = HeatMap(
    rows=["top", "bottom"],
    columns=["left", "middle", "right"],
    values=[[0.0, 0.25, math.nan], [0.5, 1.0, 0.125]],
    x_label="side",
    y_label="height",
    percent=True,
    decimals=1,
    colour_label="share",
)
CLOUD = Density(
    x_edges=[0.0, 1.0, 2.0, 3.0],
    y_edges=[0.0, 0.5, 1.0],
    counts=[[1.0, 0.0, 10.0], [100.0, 0.0, 0.0]],
    x_label="across",
    y_label="up",
    curves=[Curve(label="bound", x=[0.0, 3.0], y=[1.0, 0.0], dashed=True)],
    colour_label="rows",
)


def texts(svg: str) -> list[str]:
    found = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [element.text for element in found]


def test_a_heat_map_shows_labels_and_values_and_leaves_unknown_cells_blank():
    svg = draw([GRID, PANEL])
    assert draw([GRID, PANEL]) == svg
    shown = texts(svg)
    for wanted in ("top", "bottom", "left", "right", "side", "height", "share", "measured"):
        assert wanted in shown
    assert sum(text.endswith(".0%") or text.endswith(".5%") for text in shown if text) >= 5
    assert not any("nan" in text.lower() for text in shown)
    assert "data:" not in svg  # drawn, not embedded as an image


def test_a_heat_map_puts_its_first_row_on_top():
    svg = draw([GRID])
    height = {
        element.text: float(element.get("y") or element.get("transform").split()[-1].strip(")"))
        for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        if element.text in ("top", "bottom")
    }
    assert height["top"] < height["bottom"]


def test_a_heat_map_of_nothing_known_and_one_of_many_rows_are_drawn():
    blank = HeatMap(rows=["a"], columns=["b"], values=[[math.nan]], x_label="", y_label="")
    draw([blank])
    names = [f"row {i}" for i in range(60)]
    tall = HeatMap(
        rows=names, columns=["b"], values=[[float(i)] for i in range(60)], x_label="", y_label=""
    )
    assert 10 <= sum(text in names for text in texts(draw([tall]))) <= 16


def test_a_density_counts_and_draws_its_bound():
    svg = draw([CLOUD])
    assert {"bound", "across", "up", "rows"} <= set(texts(svg))
    other = Density(x_edges=[0.0, 1.0], y_edges=[0.0, 1.0], counts=[[0.0]], x_label="", y_label="")
    assert draw([other]) != svg


def test_grids_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"values: got shape \(1, 1\), wanted one value for each of 2"
    ):
        HeatMap(rows=["a", "b"], columns=["c"], values=[[1.0]], x_label="", y_label="")
    with pytest.raises(ValueError, match=r"counts: got shape \(1, 2\), wanted \(2, 1\)"):
        Density(
            x_edges=[0.0, 1.0], y_edges=[0.0, 1.0, 2.0], counts=[[1.0, 2.0]], x_label="", y_label=""
        )


def test_points_that_are_not_joined_are_marks_without_a_line():
    cloud = Curve(label="heads", x=[0.0, 1.0, 2.0], y=[0.3, 0.1, 0.2], joined=False)
    panel = Panel(curves=[cloud], x_label="x", y_label="y", ratios=False)
    joined = dataclasses.replace(panel, curves=[dataclasses.replace(cloud, joined=True)])
    # Marks are references to one shape; the line is a path of its own.
    marks, lines = (draw([shown]).count("<use") for shown in (panel, joined))
    assert marks == lines
    assert draw([panel]).count("stroke-width: 1.6") < draw([joined]).count("stroke-width: 1.6")
