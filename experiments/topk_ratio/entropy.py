"""Measures attention entropy and the mass of the best keys by layer, head and task, and how well one foretells the other.

`python -m experiments.topk_ratio.entropy --help` lists what can be changed. Rows measured are those that predict a right
answer, which the model is given to read after a full prefill of its prompt; attention is full in every layer. A head's loss
is the mass that its best keys do not hold, 1 - a(k), mean over rows.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tyro

from experiments import command
from experiments.topk_ratio.config import QUESTION_TASKS, StudyConfig
from jaxtopk.analysis.correlation import Correlation, head_loss_correlation
from jaxtopk.analysis.run_folder import RunFolder, jsonable, write_text
from jaxtopk.commands.options import ModelOptions
from jaxtopk.commands.progress import progress_bar

if TYPE_CHECKING:
    from jaxtopk.analysis.measured_rows import MeasuredRows

STUDY = "topk_ratio_entropy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures attention entropy and the mass of the best keys, by layer, head and task."""

    preset: Literal["gpu", "tiny"] = "gpu"
    """How much to measure; tiny downloads nothing and says nothing about models."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; the default is the best that JAX finds."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of parameters; the default is float32 on a CPU, bfloat16 on accelerators."""
    out: pathlib.Path = pathlib.Path("runs/topk_ratio_entropy")
    """Folder for config.json and entropy.jsonl, which is what gets committed."""
    model: str | None = None
    """Another model: a folder with safetensors, a .gguf file, a hub id."""
    tasks: tuple[str, ...] | None = None
    """Only these tasks."""
    lengths: tuple[int, ...] | None = None
    """Tokens of a sequence, answer included; the default is the shortest of the study's."""
    samples: int | None = None
    """Of each task and length; the default is 4, with the preset tiny 2."""
    seed: int = 0
    """Of the samples and of the resampling."""
    qa: pathlib.Path | None = None
    """A folder with squad.jsonl and hotpotqa.jsonl: adds RULER's two question tasks."""


def main() -> None:
    """Runs from the command line; bad input ends in one line and exit code 2, a row below the bound in exit code 1."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.topk_ratio.entropy")
    with command.bad_input_in_one_line("topk_ratio"):
        rows = run(arguments)
    for row in rows:
        print(_line(row))
    broken = sum(entry["broken"] for row in rows if row["kind"] == "task" for entry in row["sets"])
    print(f"{len(rows)} rows in {arguments.out}")
    if broken:
        sys.exit(f"topk_ratio: {broken} measured rows lie below 1 - H / ln k, which none can")


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Does what `main` promises; returns the rows of entropy.jsonl: one a task and length, and one a length for all tasks.

    Raises:
      ValueError: an argument is out of its range.
    """
    config = _config(arguments)
    folder = RunFolder(arguments.out)
    folder.check()
    ModelOptions(device=arguments.device).select_device()

    # After the device is chosen, since these import JAX and may ask for it.
    from experiments.topk_ratio.run import load_model
    from jaxtopk.analysis.measure import measure
    from jaxtopk.analysis.measured_rows import MeasuredRows
    from jaxtopk.analysis.pieces import task_pieces
    from jaxtopk.analysis.provenance import provenance
    from jaxtopk.evaluation.tasks.haystack import Haystack
    from jaxtopk.evaluation.tasks.registry import make_task

    # All keys lose nothing, of which there is nothing to say.
    sizes = (*config.topks, *(ratio for ratio in config.ratios if ratio < 1))
    measured: dict[tuple[int, str], MeasuredRows] = {}
    with progress_bar() as progress:
        bar = progress.add_task(f"loading {config.model}", total=None)
        haystack = Haystack.named(config.haystack)
        tasks = [make_task(name, haystack=haystack, qa=arguments.qa) for name in config.tasks]
        model, tokenizer = load_model(config.model, arguments.dtype)
        if max(config.lengths) > model.config.max_positions:
            raise ValueError(
                f"lengths: got {max(config.lengths)}, wanted at most the model's context of {model.config.max_positions}"
            )
        count = 0
        progress.update(bar, total=len(tasks) * len(config.lengths) * config.samples)
        for length in config.lengths:
            pieces = []
            for task in tasks:
                progress.update(bar, description=f"making {task.name}, {length} tokens")
                pieces += task_pieces(
                    task,
                    tokenizer,
                    tokens=length,
                    samples=config.samples,
                    seed=config.seed,
                    vocab_size=model.config.vocab_size,
                )
            found: dict[str, list[MeasuredRows]] = {}
            ratios = tuple(size for size in sizes if isinstance(size, float))
            for piece, rows in zip(
                pieces, measure(model, pieces, topks=config.topks, ratios=ratios), strict=True
            ):
                found.setdefault(piece.group, []).append(rows)
                count += 1
                progress.update(bar, description=f"{piece.group}, {length}", completed=count)
            measured |= {(length, name): MeasuredRows.join(parts) for name, parts in found.items()}
    common = {
        "study": STUDY,
        "model": config.model,
        "dtype": str(model.embed[...].dtype),
        "haystack": config.haystack,
        "seed": config.seed,
        **provenance(),
    }
    spread = {task.name: task.aggregation for task in tasks}
    rows = summarise(measured, sizes, samples=config.samples, seed=config.seed, spread=spread)
    rows = [row | common for row in rows]
    # Nearly all of it is short integers: blanks between them would be a quarter of the file.
    lines = (json.dumps(jsonable(row), separators=(",", ":"), allow_nan=False) for row in rows)
    folder.write_config(config)
    write_text(folder.path / "entropy.jsonl", "".join(line + "\n" for line in lines))
    return rows


class Heads(NamedTuple):
    """Means over rows of each head, [layer, head].

    entropy, normalised: of the full softmax, [nats] and as a share of ln n.
    lost: by size of the set, the mass that its best keys do not hold; NaN where no row sees more keys than the set has.
    """

    entropy: np.ndarray
    normalised: np.ndarray
    lost: Mapping[int | float, np.ndarray]

    @classmethod
    def of(cls, rows: "MeasuredRows", sizes: Sequence[int | float]) -> "Heads":
        """Averages over rows."""
        return cls(
            rows.entropy.mean(axis=-1, dtype=np.float64),
            rows.normalised.mean(axis=-1, dtype=np.float64),
            {size: 1 - rows.head_mass(size) for size in sizes},
        )

    @classmethod
    def average(cls, parts: Sequence["Heads"]) -> "Heads":
        """Averages over tasks, each counting alike."""
        mean = lambda arrays: np.mean(list(arrays), axis=0)
        return cls(
            mean(part.entropy for part in parts),
            mean(part.normalised for part in parts),
            {size: mean(part.lost[size] for part in parts) for size in parts[0].lost},
        )


def summarise(
    measured: Mapping[tuple[int, str], "MeasuredRows"],
    sizes: Sequence[int | float],
    *,
    samples: int,
    seed: int,
    spread: Mapping[str, bool],
) -> list[dict[str, Any]]:
    """Returns one row a length and task, with its heads, and one a length for the mean of tasks.

    Args:
      measured: by length and task.
      sizes: of sets: ints are numbers of keys, floats are shares.
      samples: of each task and length.
      spread: by task, whether its answer depends on much of the context at once.
    """
    found = []
    for length in dict.fromkeys(length for length, _ in measured):
        of_length = {task: rows for (at, task), rows in measured.items() if at == length}
        heads = {task: Heads.of(rows, sizes) for task, rows in of_length.items()}
        for task, rows in of_length.items():
            bounds = {size: rows.bound(size) for size in sizes}
            found.append(
                {
                    "kind": "task",
                    "task": task,
                    "aggregation": spread[task],
                    "length": length,
                    "n": samples,
                    "rows": rows.num_rows,
                    "visible": float(rows.visible.mean(dtype=np.float64)),
                    **_summary(heads[task], bounds, seed),
                    "heads": _arrays(heads[task]),
                }
            )
        bounds = {
            size: _together([rows.bound(size) for rows in of_length.values()]) for size in sizes
        }
        total = sum(rows.num_rows for rows in of_length.values())
        visible = np.mean([rows.visible.mean(dtype=np.float64) for rows in of_length.values()])
        found.append(
            {
                "kind": "all",
                "tasks": len(of_length),
                "length": length,
                "n": samples * len(of_length),
                "rows": total,
                "visible": float(visible),
                **_summary(Heads.average(list(heads.values())), bounds, seed),
            }
        )
    return found


def label(entry: Mapping[str, Any]) -> str:
    """Returns how tables call a set: its number of keys, or their share."""
    return f"{100 * entry['ratio']:g}%" if "ratio" in entry else str(entry["topk"])


def _summary(
    heads: Heads, bounds: Mapping[int | float, Mapping[str, Any] | None], seed: int
) -> dict[str, Any]:
    quarter, median, three_quarters = np.quantile(heads.entropy, [0.25, 0.5, 0.75])
    sets = []
    for size, lost in heads.lost.items():
        bound = bounds[size] or {"rows": 0, "broken": 0, "least_slack": None}
        spearman, pearson = _correlate(heads.entropy, lost, seed)
        sets.append(
            {
                "ratio" if isinstance(size, float) else "topk": size,
                "lost": None if np.isnan(lost).any() else float(lost.mean()),
                "spearman": spearman,
                "pearson": pearson,
                "checked": bound["rows"],
                "broken": bound["broken"],
                "least_slack": bound["least_slack"],
            }
        )
    return {
        "entropy": float(heads.entropy.mean()),
        "normalised": float(heads.normalised.mean()),
        "quarter": float(quarter),
        "median": float(median),
        "three_quarters": float(three_quarters),
        "sets": sets,
    }


def _correlate(
    entropy: np.ndarray, lost: np.ndarray, seed: int
) -> tuple[Correlation | None, Correlation | None]:
    """Returns rank and linear correlation over heads; None where nothing is lost, or it is not known."""
    known = ~np.isnan(lost)
    if known.sum() < 3 or np.ptp(lost[known]) == 0 or np.ptp(entropy[known]) == 0:
        return None, None
    found = head_loss_correlation(entropy, lost, seed=seed)
    return found.spearman, found.pearson


def _together(bounds: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    known = [bound for bound in bounds if bound is not None]
    if not known:
        return None
    return {
        "rows": sum(bound["rows"] for bound in known),
        "broken": sum(bound["broken"] for bound in known),
        "least_slack": min(bound["least_slack"] for bound in known),
    }


def _arrays(heads: Heads) -> dict[str, Any]:
    """Returns [layer, head] as lists: nats and shares to three decimals, lost mass in ten-thousandths, None if not known."""
    whole = lambda lost: (
        None if np.isnan(lost).any() else np.rint(10_000 * lost).astype(int).tolist()
    )
    return {
        "entropy": np.round(heads.entropy, 3).tolist(),
        "normalised": np.round(heads.normalised, 3).tolist(),
        "lost_e4": [whole(lost) for lost in heads.lost.values()],
    }


def _line(row: Mapping[str, Any]) -> str:
    found = [
        f"{label(entry)}: {100 * entry['lost']:.1f}% lost, Spearman "
        + ("-" if entry["spearman"] is None else f"{entry['spearman'][0]:.2f}")
        for entry in row["sets"]
        if entry["lost"] is not None
    ]
    name = row["task"] if row["kind"] == "task" else "all tasks"
    return f"{name}, {row['length']} tokens: {row['entropy']:.2f} nats; {'; '.join(found)}"


def _config(arguments: Arguments) -> StudyConfig:
    config = getattr(StudyConfig, arguments.preset)()
    changes: dict[str, Any] = {
        "lengths": arguments.lengths or config.lengths[:1],
        "samples": arguments.samples or (2 if arguments.preset == "tiny" else 4),
        "seed": arguments.seed,
    }
    for name in ("model", "tasks"):
        if (value := getattr(arguments, name)) is not None:
            changes[name] = value
    if arguments.qa is not None and arguments.tasks is None:
        changes["tasks"] = (*config.tasks, *QUESTION_TASKS)
    for name in ("samples", "lengths"):
        given = getattr(arguments, name)
        if given is not None and np.min(given, initial=1) < 1:
            raise ValueError(f"{name}: got {given}, wanted at least 1")
    if arguments.seed < 0:
        raise ValueError(f"seed: got {arguments.seed}, wanted at least 0")
    return dataclasses.replace(config, **changes)


if __name__ == "__main__":
    main()
