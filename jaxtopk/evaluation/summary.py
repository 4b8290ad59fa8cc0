"""What the rows of an evaluation say: the mean score of each task, length and setting, how sure, and compared with a reference."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtopk.evaluation import statistics

type Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Scores of one setting on one task at one length.

    Args:
      samples: how many.
      low, high: 95% bootstrap interval of the mean.
      difference: mean score less that of the reference, on the same samples; None for the reference itself.
      difference_low, difference_high: its 95% interval.
      p: of the paired test that both score alike.
      p_holm: the same, adjusted for all settings of this task and length.
      keys_visible, keys_attended: means over samples, at the first row of the reply.
    """

    task: str
    length: int
    setting: str
    ratio: float | None
    topk: int | None
    metric: str
    wording: str
    aggregation: bool
    samples: int
    mean: float
    low: float
    high: float
    keys_visible: float
    keys_attended: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_holm: float | None = None


def gather(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Gathers rows that agree in the named fields, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def reference_setting(rows: Sequence[Row]) -> str:
    """Returns what others are compared with: full attention, or else the first setting."""
    names = list(dict.fromkeys(row["setting"] for row in rows))
    return "full" if "full" in names else names[0]


def summarise(rows: Sequence[Row], *, seed: int = 0) -> list[Cell]:
    """Returns a cell for every task, length and setting, settings in the order of the rows; lengths ascending.

    Args:
      seed: of the resampling.
    """
    if not rows:
        return []
    reference = reference_setting(rows)
    cells = []
    groups = gather(rows, "length", "task")
    for (length, task), of_task in sorted(groups.items(), key=lambda entry: entry[0][0]):
        of_settings = {name: of for (name,), of in gather(of_task, "setting").items()}
        scores = {name: _scores(of) for name, of in of_settings.items()}
        compared = [name for name in scores if name != reference] if reference in scores else []
        paired = {name: _paired(scores[reference], scores[name]) for name in compared}
        p_values = [statistics.paired_test(*paired[name], seed=seed) for name in compared]
        adjusted = dict(zip(compared, statistics.holm(p_values), strict=True))
        p_of = dict(zip(compared, p_values, strict=True))
        for name, of in of_settings.items():
            values = list(scores[name].values())
            low, high = statistics.bootstrap_interval(values, seed=seed)
            first = of[0]
            cell = Cell(
                task=task,
                length=length,
                setting=name,
                ratio=first["ratio"],
                topk=first["topk"],
                metric=first["metric"],
                wording=first["wording"],
                aggregation=first["aggregation"],
                samples=len(values),
                mean=_mean(values),
                low=low,
                high=high,
                keys_visible=_mean([row["keys_visible"] for row in of]),
                keys_attended=_mean([row["keys_attended"] for row in of]),
            )
            if name in paired:
                before, after = paired[name]
                ends = statistics.difference_interval(before, after, seed=seed)
                cell = dataclasses.replace(
                    cell,
                    difference=_mean(after) - _mean(before),
                    difference_low=ends[0],
                    difference_high=ends[1],
                    p=p_of[name],
                    p_holm=adjusted[name],
                )
            cells.append(cell)
    return cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    """Plain mean of the mean scores of several tasks at one length, under one setting, with its 95% interval.

    Args:
      relative: the mean as a share of the reference's; None where that is 0.
    """

    length: int
    setting: str
    ratio: float | None
    topk: int | None
    tasks: int
    mean: float
    low: float
    high: float
    relative: float | None
    share_attended: float  # keys attended / keys visible, mean over tasks


def average(rows: Sequence[Row], *, seed: int = 0) -> list[Average]:
    """Returns the mean over tasks of each length and setting, each task resampled by itself."""
    if not rows:
        return []
    reference = reference_setting(rows)
    found = []
    for (length,), of_length in sorted(gather(rows, "length").items()):
        of_settings = {name: of for (name,), of in gather(of_length, "setting").items()}
        strata = {
            name: [list(_scores(task).values()) for task in gather(of, "task").values()]
            for name, of in of_settings.items()
        }
        whole = _mean([_mean(values) for values in strata[reference]]) if reference in strata else 0
        for name, of in of_settings.items():
            mean = _mean([_mean(values) for values in strata[name]])
            low, high = statistics.stratified_interval(strata[name], seed=seed)
            shares = [
                _mean([row["keys_attended"] / row["keys_visible"] for row in task])
                for task in gather(of, "task").values()
            ]
            found.append(
                Average(
                    length=length,
                    setting=name,
                    ratio=of[0]["ratio"],
                    topk=of[0]["topk"],
                    tasks=len(strata[name]),
                    mean=mean,
                    low=low,
                    high=high,
                    relative=mean / whole if whole else None,
                    share_attended=_mean(shares),
                )
            )
    return found


def _scores(rows: Sequence[Row]) -> dict[int, float | int]:
    """Returns scores by sample, in the order of samples: what processes or resumed runs wrote first does not matter."""
    return dict(sorted((row["index"], row["score"]) for row in rows))


def _paired(
    first: Mapping[int, float | int], second: Mapping[int, float | int]
) -> tuple[list[float | int], ...]:
    both = [index for index in first if index in second]
    return [first[index] for index in both], [second[index] for index in both]


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values)


__all__ = ["Average", "Cell", "average", "gather", "reference_setting", "summarise"]
