"""Measures exact Top-k decoding of a real model at each ratio, and writes a table, a report and results.

`python -m experiments.quickstart.run --help` lists what can be changed; the README beside this file says what comes out.
"""

import dataclasses
import math
import pathlib
from typing import Literal

import rich.box
import rich.console
import rich.progress
import rich.table
import tyro

from experiments import command
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
    with command.bad_input_in_one_line("quickstart"):
        run(arguments)


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
        progress.advance(loading)
        common = provenance() | _common(config, loaded)
        rows, examples = [], []
        for context in config.contexts:
            found = _one_context(context, config, loaded, measure, progress)
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


def _one_context(context, config, loaded, measure, progress) -> dict:
    """Measures everything at one context; returns a row a setting, and an example completion a setting."""
    windows = measure.windows(loaded, config, context)
    # The first window is also the example: after its scored tokens it goes on by itself.
    first = windows[0]
    windows[0] = dataclasses.replace(first, steps=config.scored_tokens + config.shown_tokens)
    samples = [
        measure.task_samples(task, loaded.tokenizer, config, context) for task in config.tasks
    ]
    jobs = [*windows, *(job for drawn in samples for _, job in drawn)]

    bar = progress.add_task(f"decoding at context {context}", total=len(jobs))
    advance = lambda done, bar=bar: progress.advance(bar, done)
    followed = list(measure.follow(loaded.model, jobs, config, done=advance))
    settings = list(followed[0])
    bar = progress.add_task("timing", total=len(settings) * config.timed_rounds)
    advance = lambda done, bar=bar: progress.advance(bar, done)
    times = measure.step_milliseconds(loaded.model, first, config, done=advance)

    scored, replies = followed[: config.windows], followed[config.windows :]
    rows = []
    for setting in settings:
        row = {
            "context": context,
            "attention": "full" if setting == measure.FULL else "topk",
            "ratio": 1.0 if setting == measure.FULL else setting,
            "keys_visible": context + (config.scored_tokens - 1) / 2,
        }
        row |= _scores(setting, scored, config, measure.FULL)
        row["ms_per_token"] = measure.median(times[setting])
        row["ms_per_token_range"] = [min(times[setting]), max(times[setting])]
        row["tasks"] = {}
        for number, (task, drawn) in enumerate(zip(config.tasks, samples, strict=True)):
            of_task = replies[number * config.samples : (number + 1) * config.samples]
            texts = [_text(loaded.tokenizer, of[setting].tokens) for of in of_task]
            row["tasks"][task.name] = _accuracy(task, [sample for sample, _ in drawn], texts)
        rows.append(row)
    shown = {
        setting: _text(loaded.tokenizer, found.tokens[config.scored_tokens :])
        for setting, found in followed[0].items()
    }
    prompt = loaded.tokenizer.decode([*first.prompt, *first.targets][-80:])
    return {"rows": rows, "example": {"context": context, "prompt": prompt, "texts": shown}}


def _scores(setting, scored, config, full) -> dict:
    """Perplexity, its change against full attention, and what was kept, over the scored tokens of all windows."""
    from jaxtopk.evaluation import metrics

    part = slice(0, config.scored_tokens)
    loss = lambda of, which: -float(of[which].log_probs[part].mean())
    mean = lambda values: sum(values) / len(values)
    changes = [loss(of, setting) - loss(of, full) for of in scored]
    interval = [math.expm1(end) for end in metrics.mean_interval(changes)]
    return {
        "n": len(scored) * config.scored_tokens,
        "windows": len(scored),
        "perplexity": math.exp(mean([loss(of, setting) for of in scored])),
        "perplexity_change": math.expm1(mean(changes)),
        "perplexity_change_95": None if len(changes) == 1 else interval,
        "mass_kept": mean([float(of[setting].mass[part].mean()) for of in scored]),
        "keys_attended": mean([float(of[setting].attended[part].mean()) for of in scored]),
    }


def _accuracy(task, samples, texts) -> dict:
    """The share of replies that hold the answer, with its interval."""
    from jaxtopk.evaluation import metrics

    right = sum(task.score(sample, text) for sample, text in zip(samples, texts, strict=True))
    return {
        "n": len(samples),
        "accuracy": right / len(samples),
        "accuracy_95": list(metrics.wilson_interval(right, len(samples))),
    }


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
    changes = command.given(arguments, "model", "contexts", "ratios", "windows", "samples", "seed")
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
