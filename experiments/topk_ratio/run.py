"""Scores a model on RULER's tasks under full attention and every budget of Top-k, and sums the scores up for the page.

`python -m experiments.topk_ratio.run --help` lists what can be changed. The same command goes on where it was stopped, and
pieces (`--lengths 2048 --tasks vt cwe`, `--minutes 8`) may go into one folder one after the other.
"""

import dataclasses
import pathlib
from typing import Any, Literal

import tyro

from experiments import command
from experiments.topk_ratio.config import QUESTION_TASKS, StudyConfig
from jaxtopk.analysis.run_folder import RunFolder, jsonl, write_text
from jaxtopk.commands.options import ModelOptions
from jaxtopk.commands.progress import progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Scores a model on RULER's tasks under full attention and every budget of exact Top-k decoding."""

    preset: Literal["gpu", "tiny"] = "gpu"
    """How much to measure; tiny downloads nothing and says nothing about quality."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; the default is the best that JAX finds."""
    out: pathlib.Path = pathlib.Path("runs/topk_ratio")
    """Folder for config.json, results.jsonl, sessions.jsonl, report.html, and summary.jsonl, which is what gets committed."""
    model: str | None = None
    """Another model: a folder with safetensors, a .gguf file, a hub id."""
    tasks: tuple[str, ...] | None = None
    """Only these tasks."""
    lengths: tuple[int, ...] | None = None
    """Only these lengths."""
    samples: int | None = None
    """Of each task and length."""
    seed: int | None = None
    """Of the samples; only in a folder of its own."""
    qa: pathlib.Path | None = None
    """A folder with squad.jsonl and hotpotqa.jsonl: adds RULER's two question tasks."""
    batch: int | None = None
    """Samples at a time; the default is what fits the device's memory."""
    minutes: float | None = None
    """Stop after the batch in which so many minutes are over; the same command then goes on."""


def main() -> None:
    """Runs from the command line; bad input ends in one line and exit code 2."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.topk_ratio.run")
    with command.bad_input_in_one_line("topk_ratio"):
        seconds, rows = run(arguments)
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    print(f"{len(rows)} summary rows and a report in {arguments.out}")


def run(arguments: Arguments) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Does what `main` promises; returns where the time went, and the summary of all that the folder holds.

    Raises:
      ValueError: an argument is out of its range, or the folder holds another configuration's results.
    """
    config = _config(arguments)
    folder = RunFolder(arguments.out)
    folder.check()
    ModelOptions(device=arguments.device).select_device()

    # After the device is chosen, since these import JAX and may ask for it.
    from jaxtopk.evaluation import harness, records, report, settings
    from jaxtopk.evaluation.tasks.haystack import Haystack
    from jaxtopk.evaluation.tasks.registry import make_task

    compared = settings.make_settings(
        ratios=config.ratios,
        topks=config.topks,
        options={"sparse_suffix": config.sparse_suffix},
    )
    with progress_bar() as progress:
        bar = progress.add_task(f"loading {config.model}", total=None)
        haystack = Haystack.named(config.haystack)
        tasks = [make_task(name, haystack=haystack, qa=arguments.qa) for name in config.tasks]
        model, tokenizer = load_model(config.model, config.dtype)
        evaluation = harness.EvaluationConfig(
            model=config.model,
            tasks=config.tasks,
            lengths=config.lengths,
            samples=config.samples,
            settings=compared,
            seed=config.seed,
            dtype=config.dtype,
            made_with={"haystack": config.haystack},
        )
        seconds = harness.evaluate(
            model,
            tokenizer,
            tasks,
            evaluation,
            folder,
            batch=arguments.batch,
            minutes=arguments.minutes,
            on_progress=lambda done, total, what: progress.update(
                bar, description=what, completed=done, total=total
            ),
        )
        rows = records.read_rows(folder, len(compared))
        sessions = harness.sessions(folder)
        summary = summarise(rows, sessions, config)
        write_text(folder.path / "summary.jsonl", jsonl(summary))
        folder.write_report(report.page(dataclasses.asdict(config), rows, sessions))
    return seconds, summary


def summarise(rows, sessions, config: StudyConfig) -> list[dict[str, Any]]:
    """Returns the compact rows: one a task, length and setting, and one a length and setting for the mean of tasks.

    Raises:
      ValueError: there are no rows, or they were made on different devices or by different code.
    """
    from jaxtopk.evaluation import summary

    if not rows:
        raise ValueError("rows: got none, wanted at least one decoded sample")
    made = [entry for entry in sessions if "device" in entry]
    for name in ("device", "commit"):
        if len(found := {entry[name] for entry in made}) > 1:
            raise ValueError(f"{name}: got {', '.join(sorted(found))} in one folder, wanted one")
    fields = ("device", "platform", "versions", "commit", "command", "date")
    common = {
        "study": "topk_ratio",
        "model": config.model,
        "dtype": config.dtype,
        "haystack": config.haystack,
        "sparse_suffix": config.sparse_suffix,
        "scope": "head",
        "seed": config.seed,
        **{name: made[-1][name] for name in fields},
    }
    counts: dict[int, int] = {}
    for length, _, _ in {(row["length"], row["task"], row["index"]) for row in rows}:
        counts[length] = counts.get(length, 0) + 1
    found = [
        {"kind": "task", "n": cell.samples, **dataclasses.asdict(cell), **common}
        for cell in summary.summarise(rows)
    ]
    found += [
        {"kind": "mean", "n": counts[entry.length], **dataclasses.asdict(entry), **common}
        for entry in summary.average(rows)
    ]
    return found


def _config(arguments: Arguments) -> StudyConfig:
    config = getattr(StudyConfig, arguments.preset)()
    changes = command.given(arguments, "model", "tasks", "lengths", "samples", "seed")
    if arguments.qa is not None and arguments.tasks is None:
        changes["tasks"] = (*config.tasks, *QUESTION_TASKS)
    return dataclasses.replace(config, **changes)


def load_model(name: str, dtype: str | None):
    """Returns a model and its tokenizer; "random" is a tiny one in float32, over bytes."""
    if name == "random":
        from experiments.quickstart import sources
        from experiments.quickstart.config import QuickstartConfig

        made_up = sources.load(QuickstartConfig.tiny())
        return made_up.model, made_up.tokenizer
    from jaxtopk import load_pretrained

    return load_pretrained(name, dtype=dtype)


if __name__ == "__main__":
    main()
