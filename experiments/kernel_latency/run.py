"""Times every op at every workload next to its peers, in one process and on the device's clock, and writes a row each.

`python -m experiments.kernel_latency.run --help` lists what can be chosen; the README beside this file says what comes out.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from typing import Any, Literal

import rich.box
import rich.console
import rich.markup
import rich.table
import tyro

from experiments.kernel_latency.config import KernelLatencyConfig
from jaxtopk.analysis.run_folder import RunFolder, jsonl
from jaxtopk.commands.options import ModelOptions

_PIPE_WIDTH = 170  # columns of the table where there is no terminal to ask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Times the kernels next to other libraries and to the memory's limit."""

    preset: Literal["auto", "gpu", "tpu", "tiny"] = "auto"
    """Which sizes; "auto" follows the device, and takes tiny ones on a CPU, which say nothing about speed."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; the default is the best that JAX finds."""
    out: pathlib.Path = pathlib.Path("runs/kernel_latency")
    """Folder for config.json, results.jsonl and report.html; rows of another run into it are added to those there."""
    only: str | None = None
    """A regular expression, searched for in "OP, WORKLOAD", such as "topk_select, R 32|gather"."""
    groups: tuple[str, ...] | None = None
    """Only these groups of workloads: main, ragged, pages, quantized, budget, adversarial, length."""
    implementations: tuple[str, ...] | None = None
    """Only these of ours."""
    peers: bool = True
    """Also time the peers."""
    budget_seconds: float | None = None
    """Start nothing new after so many seconds; what was left out has no rows."""
    rounds: int | None = None
    """Differences that a median is taken of."""
    seed: int | None = None
    """Of the inputs."""
    list: bool = False
    """Only print the workloads chosen."""


def main() -> None:
    """Runs from the command line; bad input ends in one line and exit code 2."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.kernel_latency.run")
    try:
        run(arguments)
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        if os.environ.get("JAXTOPK_TRACEBACK") == "1":
            raise
        print(f"kernel_latency: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Does what `main` promises; returns the rows measured.

    Raises:
      ValueError: an argument is out of its range, or nothing matches.
    """
    begin = time.monotonic()
    folder = RunFolder(arguments.out)
    folder.check()
    try:
        pattern = re.compile(arguments.only or "")
    except re.error as error:
        raise ValueError(
            f"only: got {arguments.only!r}, wanted a regular expression ({error})"
        ) from None
    # Before JAX takes the device: it would take most of the memory at once, and torch has to fit beside it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    ModelOptions(device=arguments.device).select_device()

    import jax

    from experiments.kernel_latency import measure, report, workloads
    from jaxtopk.analysis.provenance import provenance

    config = _config(arguments, jax.default_backend())
    offered = getattr(workloads, config.sizes)()
    chosen = [
        workload
        for workload in offered
        if workload.group in config.groups and pattern.search(f"{workload.op}, {workload.name}")
    ]
    if not chosen:
        raise ValueError(
            f"only: got {arguments.only!r} in groups {', '.join(config.groups)}, wanted what matches one of the "
            f"{len(offered)} workloads (--list prints them)"
        )
    if arguments.list:
        for workload in chosen:
            print(f"{workload.group}: {workload.op}, {workload.name}")
        return []
    deadline = (
        float("inf") if arguments.budget_seconds is None else begin + arguments.budget_seconds
    )
    folder.write_config(config)

    rates, probes = measure.probe(config)
    common = provenance() | {
        "study": "kernel_latency",
        "seed": config.seed,
        "runtime": measure.one_line(jax.devices()[0].client.platform_version),
        "rates": rates._asdict(),
    }
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        # At once: a run that ends early leaves what it has measured.
        with folder.results.open("a", encoding="utf-8") as file:
            file.write(jsonl([common | row]))
        rows.append(json.loads(jsonl([common | row])))
        print(f"[{time.monotonic() - begin:6.1f} s] {_progress(row)}", flush=True)

    for row in probes:
        keep(row)
    left_out = 0
    for number, workload in enumerate(chosen):
        if time.monotonic() > deadline:
            left_out = len(chosen) - number
            break
        for row in measure.rows_of(workload, config, rates):
            keep(row)
            if time.monotonic() > deadline:
                break
    folder.write_report(report.page(config, rows))
    _print(rows, report)
    if left_out:
        print(f"out of time: {left_out} of {len(chosen)} workloads were left out")
    print(f"report: {folder.report}")
    return rows


def _config(arguments: Arguments, platform: str) -> KernelLatencyConfig:
    preset = arguments.preset
    if preset == "auto":
        preset = platform if platform in ("gpu", "tpu") else "tiny"
    names = ("groups", "implementations", "rounds", "seed")
    changes = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    config = getattr(KernelLatencyConfig, preset)()
    return dataclasses.replace(config, peers=arguments.peers, **changes)


def _progress(row: dict[str, Any]) -> str:
    what = f"{row['op']}, {row['workload']}: {row['implementation']}"
    if row["status"] != "ok":
        return f"{what} {row['status']}: {row['message']}"
    times = f"{row['ms']:.4f} ms ({row['ms_p10']:.4f} to {row['ms_p90']:.4f})"
    if row["role"] == "probe":
        return f"{what} {times}, {row['rate'] / 1e12:.3f} T/s"
    return f"{what} {times}, limit {row['limit_ms']:.4f} ms, first call {row['compile_s']:.1f} s"


def _print(rows: list[dict[str, Any]], report) -> None:
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_PIPE_WIDTH)
    header, body = report.table(rows)
    table = rich.table.Table(title="Latency of the kernels", box=rich.box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(
            rich.markup.escape(name), justify="left" if index < 2 else "right", no_wrap=index < 2
        )
    for row in body:
        table.add_row(*map(rich.markup.escape, row))
    console.print(table)
    console.print(report.caption(rows), style="dim", highlight=False)
    for line in report.without_time(rows):
        console.print(line, style="dim", highlight=False, markup=False)


if __name__ == "__main__":
    main()
