"""How an evaluation reads: the page with tables, ratio curves, depth maps, failures and time shares, made of its rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtopk.analysis import plots
from jaxtopk.analysis.report import Block, Examples, Figure, Section, Table, Text, render
from jaxtopk.evaluation.summary import (
    Average,
    Cell,
    Row,
    average,
    gather,
    reference_setting,
    summarise,
)

_SURE = 0.05  # adjusted p-value below which a difference is marked
_FAILURES = 12
_PANELS = 3  # side by side
_DEPTH_BINS = 10
_MOST_DEPTHS = 21  # different depths that are shown one by one, not in bins
_MOST_GROUPS = 8  # different values of a sample's property that make it one to group by
_TABLE_CAPTION = (
    "Mean scores, with 95% bootstrap intervals. * marks a setting that differs from {reference} on the same samples: paired "
    "sign-flip test, p < 0.05 after Holm's correction over the settings of a task and length."
)


def page(config: Mapping[str, Any], rows: Sequence[Row], sessions: Sequence[Row]) -> str:
    """Renders report.html.

    Args:
      config: contents of config.json.
      rows: of all parts, at least one.
      sessions: as `harness.sessions` reads them.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows: got none, wanted at least one")
    cells, averages = summarise(rows), average(rows)
    samples = len({(row["task"], row["length"], row["index"]) for row in rows})
    lead = (
        f"{config['model']}: {samples} samples of {len({row['task'] for row in rows})} tasks, each prefilled once and "
        f"answered under {len({row['setting'] for row in rows})} attention settings. {_lead(averages, rows)}"
    )
    sections = [
        Section(heading="Scores", blocks=_tables(cells, averages, rows)),
        *_optional("Scores by the share of keys kept", _curves(cells, averages)),
        *_optional("Depth and length", _depth_maps(rows)),
        *_optional("Scores by group", _groups(rows)),
        *_optional("Worst failures", _failures(rows)),
        *_optional("Where the time went", _times(sessions)),
        Section(heading="How this was made", blocks=_making(config, cells, sessions)),
    ]
    return render("Evaluation of attention settings", lead, sections)


def score_table(
    cells: Sequence[Cell], averages: Sequence[Average], *, intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells of one length: a row a task and a last one for their mean, a column a setting.

    Args:
      cells, averages: of one length.
      intervals: give the 95% intervals too; without them the table is narrow.
    """
    settings = list(dict.fromkeys(cell.setting for cell in cells))
    tasks = {task: of for (task,), of in _by(cells, "task").items()}
    body = []
    for task, of_task in tasks.items():
        by_setting = {cell.setting: cell for cell in of_task}
        shown = [
            _interval(cell.mean, cell.low, cell.high, intervals)
            + ("*" if cell.p_holm is not None and cell.p_holm < _SURE else "")
            if (cell := by_setting.get(name)) is not None
            else ""
            for name in settings
        ]
        body.append([task, str(max(cell.samples for cell in of_task)), *shown])
    if len(tasks) > 1:
        of_settings = {entry.setting: entry for entry in averages}
        shown = [
            _interval(entry.mean, entry.low, entry.high, intervals)
            if (entry := of_settings.get(name)) is not None
            else ""
            for name in settings
        ]
        body.append(["mean of tasks", "", *shown])
    return ["task", "n", *settings], body


def ratio_figure(averages: Sequence[Average], *, description: str = "") -> str | None:
    """Draws the mean of all tasks against what is kept, and the same as a share of the reference's score.

    A curve a length; ratios and numbers of keys have panels of their own. Returns None where neither has two settings.

    Args:
      description: kept in the file's metadata, such as a digest of the rows.
    """
    by_ratio, by_number = (_lines(averages, kind) for kind in ("ratio", "topk"))
    mean, relative = (lambda entry: entry.mean), (lambda entry: entry.relative)
    panels = _panel("ratio", by_ratio, "Mean score of all tasks", mean, True)
    kind, lines = ("ratio", by_ratio) if by_ratio else ("topk", by_number)
    known = [entries for entries in lines if all(x.relative is not None for x in entries)]
    panels += _panel(kind, known, "Share of the reference's score", relative, False)
    panels += _panel("topk", by_number, "Mean score of all tasks", mean, True)
    if not panels:
        return None
    return plots.draw(panels, description=description, panel_inches=(3.8, 3.2))


def task_figures(cells: Sequence[Cell]) -> list[str]:
    """Draws the score of each task against what is kept, a curve a length; a few panels a figure."""
    panels = []
    for kind in ("ratio", "topk"):
        for (task,), of_task in _by(cells, "task").items():
            panels += _panel(kind, _lines(of_task, kind), task, lambda entry: entry.mean, True)
    return _figures(panels)


def _tables(cells, averages, rows) -> list[Block]:
    blocks: list[Block] = []
    caption = _TABLE_CAPTION.format(reference=reference_setting(rows))
    for (length,), of_length in _by(cells, "length").items():
        header, body = score_table(of_length, [x for x in averages if x.length == length])
        blocks.append(Text(text=f"At {length} tokens, prompt and reply together:"))
        blocks.append(Table(header=header, rows=body, caption=caption))
    return blocks


def _curves(cells, averages) -> list[Block]:
    caption = (
        "Of every setting that keeps a share of the visible keys, or a number of them; bands are 95% intervals. All visible "
        "keys are scored to find those."
    )
    overall = ratio_figure(averages)
    blocks: list[Block] = [] if overall is None else [Figure(svg=overall, caption=caption)]
    if len({cell.task for cell in cells}) > 1:
        blocks += [Figure(svg=svg, caption="Score by task.") for svg in task_figures(cells)]
    return blocks


def _depth_maps(rows) -> list[Block]:
    """One map a setting, of tasks whose answer has a place: the plain needle where it was run, else the single needles."""
    tasks = {row["task"] for row in rows if row["depth"] is not None}
    chosen = [name for name in sorted(tasks) if name == "niah"] or [
        name for name in sorted(tasks) if name.startswith("niah_single") or name == "passkey"
    ]
    blocks: list[Block] = []
    for task in chosen:
        of_task = [row for row in rows if row["task"] == task and row["depth"] is not None]
        depths = sorted({row["depth"] for row in of_task})
        binned = len(depths) > _MOST_DEPTHS
        bins = [(i + 0.5) / _DEPTH_BINS for i in range(_DEPTH_BINS)] if binned else depths
        place = lambda depth, binned=binned: (
            min(int(depth * _DEPTH_BINS), _DEPTH_BINS - 1) if binned else bins.index(depth)  # noqa: B023
        )
        lengths = sorted({row["length"] for row in of_task})
        panels = []
        for (setting,), of_setting in gather(of_task, "setting").items():
            scores: dict[tuple[int, int], list[float]] = {}
            for row in of_setting:
                key = place(row["depth"]), lengths.index(row["length"])
                scores.setdefault(key, []).append(row["score"])
            values = [
                [
                    sum(found) / len(found) if (found := scores.get((i, j))) else math.nan
                    for j in range(len(lengths))
                ]
                for i in range(len(bins))
            ]
            panels.append(
                plots.HeatMap(
                    rows=[f"{100 * depth:.0f}%" for depth in bins],
                    columns=[str(length) for length in lengths],
                    values=values,
                    x_label="tokens",
                    y_label="depth of the answer",
                    title=f"{task}, {setting}",
                    vmin=0.0,
                    vmax=1.0,
                    colour_label="score",
                    percent=True,
                )
            )
        caption = f"{task}: mean score by where the answer stands and how long the prompt is. Blank: no sample."
        blocks += [Figure(svg=svg, caption=caption) for svg in _figures(panels)]
    return blocks


def _groups(rows) -> list[Block]:
    """Tables of properties that take few values, such as a suite's difficulty."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    blocks: list[Block] = []
    for (task,), of_task in gather(rows, "task").items():
        names = dict.fromkeys(name for row in of_task for name in row["meta"])
        body = []
        for name in names:
            values = sorted({row["meta"][name] for row in of_task if name in row["meta"]})
            if not 2 <= len(values) <= _MOST_GROUPS:
                continue
            for value in values:
                of_value = [row for row in of_task if row["meta"].get(name) == value]
                scores = {
                    setting: [row["score"] for row in of]
                    for (setting,), of in gather(of_value, "setting").items()
                }
                count = max(map(len, scores.values()))
                shown = [
                    f"{100 * sum(of) / len(of):.1f}" if (of := scores.get(setting)) else ""
                    for setting in settings
                ]
                body.append([f"{name}: {value}", str(count), *shown])
        if body:
            caption = f"{task}: mean scores in percent."
            blocks.append(Table(header=[task, "n", *settings], rows=body, caption=caption))
    return blocks


def _failures(rows) -> list[Block]:
    """Samples that a setting lost against the reference most, or where there is one setting, the lowest scores."""
    reference = reference_setting(rows)
    ranked = []
    for key, of_sample in gather(rows, "task", "length", "index").items():
        scores = {row["setting"]: row["score"] for row in of_sample}
        lowest = min(scores.values())
        if len(scores) > 1 and reference in scores:
            # The reference was right and others were not: what the setting costs, not what the model cannot do.
            lost = scores[reference] - lowest
        else:
            lost = 1 - lowest
        if lost > 0:
            ranked.append((-lost, key, of_sample))
    ranked.sort(key=lambda entry: entry[:2])
    # The worst of each task before the second worst of any.
    turn: dict[str, int] = {}
    ordered = []
    for lost, key, of_sample in ranked:
        turn[key[0]] = turn.get(key[0], 0) + 1
        ordered.append((turn[key[0]], lost, key, of_sample))
    ordered.sort(key=lambda entry: entry[:3])
    blocks: list[Block] = []
    for _, _, (task, length, index), of_sample in ordered[:_FAILURES]:
        first = of_sample[0]
        texts = [("wanted", " | ".join(first["answers"]))]
        texts += [
            (f"{row['setting']}: {100 * row['score']:.0f}%", row["reply"] or "(nothing)")
            for row in of_sample
        ]
        blocks.append(Text(text=f"{task} at {length} tokens, sample {index}:"))
        blocks.append(Examples(context=f"… {first['prompt_tail']}", texts=texts))
    return blocks


def _times(sessions) -> list[Block]:
    ended = [entry for entry in sessions if "seconds" in entry]
    if not ended:
        return []
    body = []
    for entry in ended:
        seconds = entry["seconds"]
        busy = seconds["total"] - seconds["compile"]
        share = lambda name, seconds=seconds, busy=busy: (
            f"{seconds[name]:.1f} s" + (f" ({100 * seconds[name] / busy:.0f}%)" if busy > 0 else "")
        )
        body.append(
            [
                entry["session"],
                str(entry["samples"]),
                f"{seconds['total']:.1f} s",
                f"{seconds['compile']:.1f} s",
                *map(share, ("prefill", "decode", "host", "drawing")),
            ]
        )
    caption = (
        "Shares are of the time without compiling. Host: waiting for samples, scoring, writing. Drawing samples goes on in a "
        "thread beside the others. What is missing is placing the model and tracing."
    )
    header = ["run", "samples", "total", "compiling", "prefill", "decode", "host", "drawing"]
    return [Table(header=header, rows=body, caption=caption)]


def _making(config, cells, sessions) -> list[Block]:
    wordings = sorted({f"{cell.task}: {cell.wording}" for cell in cells})
    metrics = sorted({f"{cell.task}: {cell.metric}" for cell in cells})
    entries = []
    for entry in (entry for entry in sessions if "device" in entry):
        versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        entries.append(
            [
                entry["session"],
                f"{entry['device']} ({entry['platform']})",
                entry["commit"],
                versions,
            ]
        )
    blocks: list[Block] = []
    if entries:
        blocks.append(Table(header=["run", "device", "commit", "versions"], rows=entries))
        blocks.append(
            Text(text=f"Command: {sessions[-1].get('command') or _last_command(sessions)}")
        )
    blocks += [
        Text(text=f"Scores: {'; '.join(metrics)}."),
        Text(text=f"Whose prompt wording: {'; '.join(wordings)}."),
        Text(text=f"Configuration: {config}"),
    ]
    return blocks


def _last_command(sessions) -> str:
    return next((x["command"] for x in reversed(sessions) if "command" in x), "unknown")


def _lead(averages: Sequence[Average], rows: Sequence[Row]) -> str:
    reference = reference_setting(rows)
    longest = max(entry.length for entry in averages)
    of_longest = {entry.setting: entry for entry in averages if entry.length == longest}
    if reference not in of_longest:
        return ""
    others = [entry for name, entry in of_longest.items() if name != reference]
    text = f"At {longest} tokens the mean score is {100 * of_longest[reference].mean:.1f}% with {reference}"
    if not others:
        return f"{text}."
    fewest = min(others, key=lambda entry: entry.share_attended)
    return f"{text}, {100 * fewest.mean:.1f}% with {fewest.setting}."


def _lines(entries: Sequence[Any], kind: str) -> list[list[Any]]:
    """Cuts averages or cells into one curve a length, in the order of the budget; a single point is no curve."""
    budget = lambda entry: getattr(entry, kind)
    found = [
        sorted((entry for entry in of_length if budget(entry) is not None), key=budget)
        for of_length in _by(entries, "length").values()
    ]
    return [line for line in found if len(line) > 1]


def _panel(
    kind: str,
    lines: Sequence[Sequence[Any]],
    title: str,
    value: Callable[[Any], float],
    bands: bool,
) -> list[plots.Panel]:
    """Returns a panel of these lines, none where there are none."""
    if not lines:
        return []
    curves = [
        plots.Curve(
            label=f"{line[0].length} tokens",
            x=[float(getattr(entry, kind)) for entry in line],
            y=[value(entry) for entry in line],
            low=[entry.low for entry in line] if bands else None,
            high=[entry.high for entry in line] if bands else None,
        )
        for line in lines
    ]
    highest = max(max(curve.y) for curve in curves)
    return [
        plots.Panel(
            curves=curves,
            x_label="share of keys kept by each head"
            if kind == "ratio"
            else "keys kept by each head",
            y_label="",
            title=title,
            ratios=kind == "ratio",
            y_percent=True,
            y_range=(0.0, max(1.08, 1.05 * highest)),
        )
    ]


def _figures(panels: Sequence[Any]) -> list[str]:
    return [
        plots.draw(panels[start : start + _PANELS], panel_inches=(3.8, 3.2))
        for start in range(0, len(panels), _PANELS)
    ]


def _by(entries: Sequence[Any], name: str) -> dict[tuple[Any, ...], list[Any]]:
    found: dict[tuple[Any, ...], list[Any]] = {}
    for entry in entries:
        found.setdefault((getattr(entry, name),), []).append(entry)
    return found


def _interval(mean: float, low: float, high: float, intervals: bool) -> str:
    text = f"{100 * mean:.1f}"
    return f"{text} ({100 * low:.0f} to {100 * high:.0f})" if intervals else text


def _optional(heading: str, blocks: list[Block]) -> list[Section]:
    return [Section(heading=heading, blocks=blocks)] if blocks else []


__all__ = ["page", "ratio_figure", "score_table", "task_figures"]
