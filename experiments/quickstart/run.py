"""Measures exact Top-k decoding of a real model at each ratio, and writes a table, a report and results.

`python -m experiments.quickstart.run --help` lists what can be changed; the README beside this file says what comes out.
"""

import dataclasses
import math
import os
import pathlib
import sys
from typing import Literal

import rich.box
import rich.console
import rich.progress
import rich.table
import tyro

from experiments.quickstart.config import QuickstartConfig
from jaxtopk.analysis.run_folder import RunFolder

_TOLERANCE = 1e-5  # of perplexity, ratio 100% against full attention, relative
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Decodes a pretrained model with exact Top-k attention at several ratios, and reports quality, keys and time."""

    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Where to run; "auto" takes an accelerator if JAX finds one."""
    preset: Literal["auto", "cpu", "gpu", "tiny"] = "auto"
    """How much to measure; "auto" follows the device; "tiny" downloads nothing and says nothing about quality."""
    out: pathlib.Path = pathlib.Path("runs/quickstart")
    """Folder for config.json, results.jsonl and report.html."""
    model: str | None = None
    """Another model: a folder with safetensors, a .gguf file, a hub id."""
    contexts: tuple[int, ...] | None = None
    """Prompt lengths, in tokens."""
    ratios: tuple[float, ...] | None = None
    """Shares of keys kept, 1.0 first."""
    windows: int | None = None
    """Pieces of text scored."""
    samples: int | None = None
    """Samples of each task."""
    seed: int | None = None
    """Of windows and samples."""


def main() -> None:
    """Runs from the command line; bad input ends in one line and exit code 2."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.quickstart.run")
    try:
        run(arguments)
    except (ValueError, FileNotFoundError, NotImplementedError, ConnectionError) as error:
        if os.environ.get("JAXTOPK_TRACEBACK") == "1":
            raise
        print(f"quickstart: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def run(arguments: Arguments) -> list[dict]:
    """Does everything `main` promises; returns the rows of results.

    Raises:
      ValueError: an argument is out of its range, or the device is not there.
      RuntimeError: the control failed: ratio 100% did not score as full attention does.
    """
    folder = RunFolder(arguments.out)
    folder.check()
    platform = _choose_device(arguments.device)
    config = _config(arguments, platform)

    # After the device is chosen, since these import JAX and may ask for it.
    from experiments.quickstart import measure, report, sources
    from jaxtopk.analysis.provenance import provenance

    console = rich.console.Console(stderr=False)
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(stderr=True),
    ) as progress:
        loading = progress.add_task("loading the model", total=1)
        loaded = sources.load(config)
        unstacked = loaded.model.unstacked()
        progress.advance(loading)
        common = provenance() | _common(config, loaded)
        rows, examples = [], []
        for context in config.contexts:
            found = _one_context(context, config, loaded, unstacked, measure, progress)
            rows += [common | row for row in found["rows"]]
            examples.append(found["example"])
    check_control(rows)
    folder.write_config(config)
    folder.write_results(rows)
    folder.write_report(report.page(config, rows, examples))
    _print_tables(console, report, rows)
    console.print(f"report: {folder.report}", soft_wrap=True, highlight=False)
    return rows


def check_control(rows: list[dict]) -> None:
    """Compares the control, ratio 100%, with full attention in every context, and prints both.

    Raises:
      RuntimeError: they differ by more than 1e-5, relative: nothing measured beside them can be trusted.
    """
    full = {row["context"]: row["perplexity"] for row in rows if row["attention"] == "full"}
    for row in rows:
        if row["ratio"] != 1.0 or row["attention"] == "full":
            continue
        wanted, got = full[row["context"]], row["perplexity"]
        line = f"perplexity at context {row['context']}: full attention {wanted:.7g}, Top-k at ratio 100% {got:.7g}"
        if not math.isclose(wanted, got, rel_tol=_TOLERANCE):
            raise RuntimeError(f"{line}; wanted the same to {_TOLERANCE}")
        print(line)


def _one_context(context, config, loaded, unstacked, measure, progress) -> dict:
    """Measures everything at one context; returns a row a setting, and an example completion a setting."""
    from jaxtopk.evaluation import metrics

    window_jobs = measure.windows(loaded, config, context)
    example = dataclasses.replace(window_jobs[0], targets=(), steps=config.shown_tokens)
    samples = {
        task.name: measure.task_samples(task, loaded.tokenizer, config, context)
        for task in config.tasks
    }
    jobs = [*window_jobs, example, *(job for drawn in samples.values() for _, job in drawn)]

    bar = progress.add_task(f"decoding at context {context}", total=len(jobs))
    advance = lambda done, bar=bar: progress.advance(bar, done)
    results = list(measure.follow(unstacked, jobs, config, done=advance))
    settings = list(results[0])
    bar = progress.add_task("timing", total=len(settings) * (config.timed_rounds + 1))
    times = measure.step_milliseconds(
        unstacked, example, config, done=lambda done: progress.advance(bar, done)
    )

    scored, [shown], replies = (
        results[: config.windows],
        results[config.windows :][:1],
        results[config.windows + 1 :],
    )
    losses = {
        setting: [-float(of[setting].log_probs.mean()) for of in scored] for setting in settings
    }
    read = lambda setting, field: float(
        sum(getattr(of[setting], field).mean() for of in scored) / len(scored)
    )
    rows = []
    for setting in settings:
        mean_loss = sum(losses[setting]) / len(scored)
        changes = [a - b for a, b in zip(losses[setting], losses[measure.FULL], strict=True)]
        low, high = metrics.mean_interval(changes)
        full = setting == measure.FULL
        row = {
            "context": context,
            "attention": "full" if full else "topk",
            "ratio": 1.0 if full else setting,
            "n": len(scored) * config.scored_tokens,
            "windows": len(scored),
            "perplexity": math.exp(mean_loss),
            "perplexity_change": math.expm1(sum(changes) / len(changes)),
            "perplexity_change_95": None
            if len(changes) == 1
            else [math.expm1(low), math.expm1(high)],
            "mass_kept": read(setting, "mass"),
            "keys_attended": read(setting, "attended"),
            "keys_visible": context + (config.scored_tokens - 1) / 2,
            "ms_per_token": measure.median(times[setting]),
            "ms_per_token_range": [min(times[setting]), max(times[setting])],
            "tasks": {},
        }
        for number, (task, drawn) in enumerate(zip(config.tasks, samples.values(), strict=True)):
            of_task = replies[number * config.samples : (number + 1) * config.samples]
            texts = [_text(loaded.tokenizer, of[setting].tokens) for of in of_task]
            right = sum(
                task.score(sample, text) for (sample, _), text in zip(drawn, texts, strict=True)
            )
            row["tasks"][task.name] = {
                "n": len(drawn),
                "accuracy": right / len(drawn),
                "accuracy_95": list(metrics.wilson_interval(right, len(drawn))),
            }
        rows.append(row)
    texts = {setting: _text(loaded.tokenizer, shown[setting].tokens) for setting in settings}
    prompt = loaded.tokenizer.decode(list(example.prompt[-60:]))
    return {"rows": rows, "example": {"context": context, "prompt": prompt, "texts": texts}}


def _common(config, loaded) -> dict:
    """What the rows of a run share, beside their provenance."""
    return {
        "study": "quickstart",
        "model": config.model,
        "seed": config.seed,
        "sparse_suffix": config.sparse_suffix,
        "scope": "head",
        "dtype": config.dtype,
        "timing_dtype": config.timing_dtype,
        "layers": loaded.model.config.num_layers,
    }


def _text(tokenizer, tokens) -> str:
    """Decodes a reply up to its end token."""
    kept = []
    for token in map(int, tokens):
        if token in tokenizer.eos_ids:
            break
        kept.append(token)
    return tokenizer.decode(kept)


def _choose_device(device: str) -> str:
    """Points JAX at the device asked for, and returns what it is."""
    import jax

    if device != "auto":
        jax.config.update("jax_platforms", _PLATFORMS[device])
    try:
        return jax.default_backend()
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, wanted one that JAX finds ({error})") from None


def _config(arguments: Arguments, platform: str) -> QuickstartConfig:
    preset = arguments.preset
    if preset == "auto":
        preset = "cpu" if platform == "cpu" else "gpu"
    names = ("model", "contexts", "ratios", "windows", "samples", "seed")
    changes = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    return dataclasses.replace(getattr(QuickstartConfig, preset)(), **changes)


def _print_tables(console, report, rows) -> None:
    from experiments import results

    for (context,), of_context in results.groups(rows, "context").items():
        header, body = report.table(of_context, intervals=False)
        table = rich.table.Table(
            title=f"Exact Top-k decoding after {context} tokens", box=rich.box.SIMPLE_HEAD
        )
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in body:
            table.add_row(*row)
        console.print(table)
    console.print(report.caption(rows), style="dim", highlight=False)


if __name__ == "__main__":
    main()
