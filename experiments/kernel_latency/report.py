"""How a run reads: the table, what did not run, the two plots and the page, made of result rows."""

from collections.abc import Sequence
from typing import Any

from experiments import results
from experiments.results import Row
from jaxtopk.analysis import plots
from jaxtopk.analysis.report import Figure, Section, Table, Text, render

_HEADER = (
    "op", "workload", "limit [ms]", "best peer [ms]", "ours [ms]", "target [ms]", "ours / limit", "peer / ours",
)  # fmt: skip
_HOW = (
    "Limit: the bytes that any implementation has to read at the read rate that this card was measured at, or the operations "
    "of its matrix products at the measured rate, whichever takes longer. Ours: the fastest implementation. Target: stated for "
    "an NVIDIA H200; on another card as a multiple of the limit there. Times are medians on the device, after the result was "
    "checked on the same inputs. * The inputs fit the second-level cache at least in "
    "part, so the limit is not one of memory."
)
_ABOUT = "Time of one call, bands are 10th to 90th percentile of the rounds; the dashed line is the limit."
# Panel: its title, op, what the rows must have, and what varies.
_BY_LENGTH = (
    ("topk_select, 64 rows, k 2048", "topk_select", {"R": 64}, 2048),
    ("topk_decode_attention, batch 8, k 2048", "topk_decode_attention", {"B": 8}, 2048),
    ("indexer_select, batch 8, one row, k 2048", "indexer_select", {"B": 8, "T": 1}, 2048),
)
_BY_BUDGET = (
    ("topk_select, 1,024 x 131,072", "topk_select", {"R": 1024, "S": 131072}),
    ("topk_decode_attention, 8 x 131,072", "topk_decode_attention", {"B": 8, "S": 131072}),
    ("gather_attention, 8 x 131,072", "gather_attention", {"B": 8, "S": 131072}),
)


def latest(rows: Sequence[Row]) -> list[Row]:
    """Returns the last row of each way to do each workload, in order of first appearance."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found[row["op"], row["workload"], row["implementation"]] = row
    return list(found.values())


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells, a line a workload."""
    body = []
    measured = [row for row in latest(rows) if row["role"] != "probe"]
    for (op, workload), of_workload in results.groups(measured, "op", "workload").items():
        first = of_workload[0]
        ours, peer = _fastest(of_workload, "ours"), _fastest(of_workload, "peer")
        note = " *" if any(row.get("in_cache") for row in of_workload) else ""
        body.append(
            [
                op,
                workload + note,
                _ms(first["limit_ms"]),
                "-" if peer is None else _named(peer),
                _statuses(of_workload) if ours is None else _named(ours),
                _target(first),
                "-" if ours is None else f"{ours['ms'] / first['limit_ms']:.2f}",
                "-" if ours is None or peer is None else f"{peer['ms'] / ours['ms']:.2f}x",
            ]
        )
    return list(_HEADER), body


def _target(row: Row) -> str:
    """The target in milliseconds on the card that it was stated for, elsewhere as a multiple of that card's limit."""
    if row["target_ms"] is None:
        return "-"
    stated_here = row["limit_fixed_ms"] is not None
    return _ms(row["target_ms"]) if stated_here else f"{row['target_ratio']:.2f}x limit"


def every_time(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells, a line a way to do a workload, with its spread; probes first."""
    header = ["op", "workload", "implementation", "ms", "p10 to p90", "of the limit", "compile [s]"]
    body = []
    for row in latest(rows):
        if row["status"] != "ok":
            continue
        share, compile_s = row.get("share_of_limit"), row.get("compile_s")
        body.append(
            [
                row["op"],
                row["workload"],
                row["implementation"],
                _ms(row["ms"]),
                f"{_ms(row['ms_p10'])} to {_ms(row['ms_p90'])}",
                "-" if share is None else f"{100 * share:.0f}%",
                "-" if compile_s is None else f"{compile_s:.1f}",
            ]
        )
    return header, body


def without_time(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each reason why something has no time, with what it concerns."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in latest(rows):
        if row["status"] != "ok":
            reason = row["implementation"], row["status"], row["message"]
            reasons.setdefault(reason, []).append(f"{row['op']} {row['workload']}")
    lines = []
    for (implementation, status, message), concerned in reasons.items():
        more = f" and {len(concerned) - 1} more" if len(concerned) > 1 else ""
        lines.append(f"{implementation}: {status}, {concerned[0]}{more}: {message}")
    return lines


def caption(rows: Sequence[Row]) -> str:
    """Says what the numbers are: the card and what it was measured to do, versions, commit, date."""
    row = rows[-1]
    rates = row["rates"]
    return (
        f"{row['device']}: read {rates['read'] / 1e12:.2f} TB/s, copy {rates['copy'] / 1e12:.2f} TB/s, bfloat16 product "
        f"{rates['matmul'] / 1e12:.0f} TF/s, measured in the same run; jax {row['versions']['jax']}, commit {row['commit']}, "
        f"{row['date']}."
    )


def length_figure(rows: Sequence[Row]) -> str | None:
    """Draws time against the number of keys; None where nothing was measured at two of them."""
    panels = [
        _panel(rows, title, op, sizes, topk, by=lambda row: row["sizes"]["S"], x_label="keys (S)")
        for title, op, sizes, topk in _BY_LENGTH
    ]
    return _drawn(rows, panels)


def budget_figure(rows: Sequence[Row]) -> str | None:
    """Draws time against the number of keys kept; None where nothing was measured at two of them."""
    panels = [
        _panel(rows, title, op, sizes, None, by=lambda row: row["topk"], x_label="keys kept (k)")
        for title, op, sizes in _BY_BUDGET
    ]
    return _drawn(rows, panels)


def page(config: Any, rows: Sequence[Row]) -> str:
    """Renders report.html."""
    header, body = table(rows)
    timed = [row for row in latest(rows) if row["status"] == "ok" and row["role"] == "ours"]
    lead = (
        f"{len(timed)} times of our kernels on one {rows[-1]['device']}, beside the memory's limit and what other libraries "
        f"take for the same work on the same inputs."
    )
    figures = [drawn for drawn in (length_figure(rows), budget_figure(rows)) if drawn is not None]
    sections = [
        Section(
            heading="Times",
            blocks=[Table(header=header, rows=body, caption=caption(rows)), Text(text=_HOW)],
        )
    ]
    if figures:
        sections.append(
            Section(
                heading="By number of keys, and of keys kept",
                blocks=[Figure(svg=drawn, caption=_ABOUT) for drawn in figures],
            )
        )
    header, body = every_time(rows)
    sections.append(
        Section(heading="Every time", blocks=[Table(header=header, rows=body, caption="")])
    )
    if lines := without_time(rows):
        sections.append(
            Section(heading="Without a time", blocks=[Text(text=line) for line in lines])
        )
    sections.append(
        Section(
            heading="How this was made",
            blocks=[_provenance(rows[-1]), Text(text=f"Configuration: {config}")],
        )
    )
    return render("Latency of the kernels", lead, sections)


def how() -> str:
    """What the columns of the table mean."""
    return _HOW


def _fastest(rows: Sequence[Row], role: str) -> Row | None:
    timed = [row for row in rows if row["role"] == role and row["status"] == "ok"]
    return min(timed, key=lambda row: row["ms"], default=None)


def _named(row: Row) -> str:
    return f"{_ms(row['ms'])} {row['implementation']}"


def _statuses(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row["status"] for row in rows if row["role"] == "ours")) or "-"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value >= 1 else f"{value:.4f}"


def _panel(rows: Sequence[Row], title, op, sizes, topk, *, by, x_label) -> plots.Panel | None:
    """Draws the rows of one op that have these sizes; None where no curve has two points."""
    fits = [
        row
        for row in latest(rows)
        if row["role"] != "probe"
        and row["op"] == op
        and row["pattern"] == "random"
        and sizes.items() <= row["sizes"].items()
        and topk in (None, row["topk"])
    ]
    curves = []
    timed = [row for row in fits if row["status"] == "ok"]
    for (name,), of_name in results.groups(timed, "implementation").items():
        points = sorted(of_name, key=by)
        if len(points) > 1:
            curves.append(
                plots.Curve(
                    label=name,
                    x=[float(by(row)) for row in points],
                    y=[row["ms"] for row in points],
                    low=[row["ms_p10"] for row in points],
                    high=[row["ms_p90"] for row in points],
                )
            )
    if not curves:
        return None
    limits = sorted({by(row): row["limit_ms"] for row in timed}.items())
    curves.append(
        plots.Curve(
            label="limit", x=[float(x) for x, _ in limits], y=[y for _, y in limits], dashed=True
        )
    )
    return plots.Panel(
        curves=curves,
        x_label=x_label,
        y_label="ms",
        title=title,
        ratios=False,
        x_log=True,
        y_log=True,
    )


def _drawn(rows: Sequence[Row], panels: Sequence[plots.Panel | None]) -> str | None:
    present = [panel for panel in panels if panel is not None]
    if not present:
        return None
    return plots.draw(present, description=f"rows {results.digest(list(rows))}")


def _provenance(row: Row) -> Table:
    entries = [
        ("command", row["command"]),
        ("device", f"{row['device']} ({row['platform']}, {row['cores']} CPU cores)"),
        ("runtime", row["runtime"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in row["versions"].items())),
        ("commit", row["commit"]),
        ("date", row["date"]),
        ("seed", str(row["seed"])),
    ]
    return Table(header=["", ""], rows=entries)
