"""Times every op at every workload next to its peers, in one process and on the device's clock, and writes a row each.

`python -m experiments.kernel_latency.run --help` lists what can be chosen; the README beside this file says what comes out.
"""

import dataclasses
import os
import pathlib
import re
from typing import Any, Literal

import tyro

from experiments import command, results
from experiments.kernel_latency.config import KernelLatencyConfig
from jaxtopk.analysis.run_folder import RunFolder
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
    with command.bad_input_in_one_line("kernel_latency"):
        run(arguments)


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Does what `main` promises; returns the rows measured.

    Raises:
      ValueError: an argument is out of its range, or nothing matches.
    """
    clock = command.Clock(arguments.budget_seconds)
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
        rows.extend(results.append(folder.results, [common | row]))
        clock.say(_progress(row))

    for row in probes:
        keep(row)
    left_out = 0
    for number, workload in enumerate(chosen):
        if clock.is_over:
            left_out = len(chosen) - number
            break
        for row in measure.rows_of(workload, config, rates):
            keep(row)
            if clock.is_over:
                break
    folder.write_report(report.page(config, rows))
    header, body = report.table(rows)
    command.print_table(
        "Latency of the kernels",
        header,
        body,
        words=2,
        caption=report.caption(rows),
        notes=report.without_time(rows),
        width=_PIPE_WIDTH,
    )
    if left_out:
        print(f"out of time: {left_out} of {len(chosen)} workloads were left out")
    print(f"report: {folder.report}")
    return rows


def _config(arguments: Arguments, platform: str) -> KernelLatencyConfig:
    preset = arguments.preset
    if preset == "auto":
        preset = platform if platform in ("gpu", "tpu") else "tiny"
    changes = command.given(arguments, "groups", "implementations", "rounds", "seed")
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


if __name__ == "__main__":
    main()
