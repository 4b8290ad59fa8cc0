"""Times decoding of whole models at long contexts under full, exact Top-k and indexer attention, and writes a row each.

`python -m experiments.long_decode.run --help` lists what can be chosen; the README beside this file says what comes out.
"""

import dataclasses
import itertools
import pathlib
from typing import Any, Literal

import tyro

from experiments import command, results
from experiments.long_decode.config import LongDecodeConfig
from jaxtopk.analysis.run_folder import RunFolder
from jaxtopk.commands.options import ModelOptions

_PIPE_WIDTH = 150  # columns of the table where there is no terminal to ask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokens per second of decoding at long contexts, by attention."""

    preset: Literal["auto", "accelerator", "tiny"] = "auto"
    """Which workloads; "auto" follows the device, and takes tiny ones on a CPU, which say nothing about speed."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; the default is the best that JAX finds."""
    out: pathlib.Path = pathlib.Path("runs/long_decode")
    """Folder for config.json, results.jsonl and report.html; rows of another run into it are added to those there."""
    models: tuple[str, ...] | None = None
    """Only the preset's workloads of these models: smollm2-135m, llama-3.1-8b-shape, tiny."""
    contexts: tuple[int, ...] | None = None
    """Only its workloads of these contexts, in tokens."""
    batches: tuple[int, ...] | None = None
    """Only its workloads of these batch sizes."""
    only: tuple[Literal["full", "topk", "indexer"], ...] | None = None
    """Only these kinds of attention."""
    topk: int | None = None
    """Keys that a row keeps, of Top-k and indexer."""
    new_tokens: int | None = None
    """Decode steps of one timing."""
    rounds: int | None = None
    """Timings that count, of each attention in turn."""
    pretrained: str | None = None
    """Where the weights of smollm2-135m are: a preset, a folder with safetensors, a .gguf file, a hub id."""
    budget_seconds: float | None = None
    """Start no workload after so many seconds; what was left out has no rows."""
    seed: int | None = None
    """Of random weights, caches and prompts."""


def main() -> None:
    """Runs from the command line; bad input ends in one line and exit code 2."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.long_decode.run")
    with command.bad_input_in_one_line("long_decode"):
        run(arguments)


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Does what `main` promises; returns the rows measured.

    Raises:
      ValueError: an argument is out of its range, or no workload is left.
      FileNotFoundError, ConnectionError: the pretrained weights are not there.
    """
    clock = command.Clock(arguments.budget_seconds)
    folder = RunFolder(arguments.out)
    folder.check()
    ModelOptions(device=arguments.device).select_device()

    import jax

    config = _config(arguments, jax.default_backend())

    from experiments.kernel_latency.measure import one_line, probe
    from experiments.long_decode import measure, report
    from jaxtopk.analysis.provenance import provenance

    folder.write_config(config)
    rates, _ = probe(config.probe)
    common = provenance() | {
        "study": "long_decode",
        "seed": config.seed,
        "runtime": one_line(jax.devices()[0].client.platform_version),
        "bytes_per_s": rates.read,
    }
    rows: list[dict[str, Any]] = []
    left_out = len(config.workloads)
    for _, group in itertools.groupby(config.workloads, key=lambda workload: workload.model):
        if clock.is_over:
            break
        for found in measure.rows_of(list(group), config, bytes_per_s=rates.read):
            rows += results.append(folder.results, [common | row for row in found])
            left_out -= 1
            for row in found:
                clock.say(_progress(row))
            if clock.is_over:
                break
    if left_out:
        print(f"out of time: {left_out} of {len(config.workloads)} workloads were left out")
    if rows:
        folder.write_report(report.page(config, rows))
        header, body = report.table(rows)
        command.print_table(
            "Decoding at long contexts",
            header,
            body,
            words=1,
            caption=report.caption(rows),
            notes=report.failures(rows),
            width=_PIPE_WIDTH,
        )
        print(f"report: {folder.report}")
    return rows


def _config(arguments: Arguments, platform: str) -> LongDecodeConfig:
    preset = arguments.preset
    if preset == "auto":
        preset = "tiny" if platform == "cpu" else "accelerator"
    config: LongDecodeConfig = getattr(LongDecodeConfig, preset)()
    wanted = {
        "model": arguments.models,
        "context": arguments.contexts,
        "batch": arguments.batches,
    }
    chosen = tuple(
        workload
        for workload in config.workloads
        if all(those is None or getattr(workload, name) in those for name, those in wanted.items())
    )
    if not chosen:
        offered = ", ".join(
            f"{workload.model} {workload.context} x {workload.batch}"
            for workload in config.workloads
        )
        raise ValueError(
            f"models, contexts, batches: got {arguments.models}, {arguments.contexts}, {arguments.batches}, "
            f"wanted what leaves one of: {offered}"
        )
    changes = command.given(arguments, "topk", "new_tokens", "rounds", "pretrained", "seed")
    if arguments.only is not None:
        changes["attentions"] = arguments.only
    return dataclasses.replace(config, workloads=chosen, **changes)


def _progress(row: dict[str, Any]) -> str:
    what = f"{row['model']}, context {row['context']}, batch {row['batch']}: {row['attention']}"
    if row["status"] != "ok":
        return f"{what} {row['status']}: {row['message']}"
    low, high = row["ms_per_step_range"]
    return (
        f"{what} {row['ms_per_step']:.3f} ms a step ({low:.3f} to {high:.3f}), limit {row['limit_ms']:.3f} ms, "
        f"first run {row['first_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
