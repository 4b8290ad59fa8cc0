"""`python -m pallas_kernels.tuning`: searches block sizes on this device and writes its tables.

  python -m pallas_kernels.tuning --list                      what there is to tune
  python -m pallas_kernels.tuning                             everything, with this platform's own kernels
  python -m pallas_kernels.tuning --workloads decode --ops topk_decode_attention
  python -m pallas_kernels.tuning --out tables                not into the package

A table is written after each workload. What was measured with the same versions of JAX and of the device's software is left
alone, so a run that was stopped goes on where it was. A workload whose time is over is filed with the best sizes until then,
marked as not complete, and searched again by the next run.
"""

import argparse
import datetime
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from pallas_kernels.core import block_sizes, dispatch, platform
from pallas_kernels.tuning import search, tables, workloads

_PACKAGE = pathlib.Path(block_sizes.__file__).parents[1]
_QUIET_S = 10.0  # between two lines of a workload in a log
_OWN = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tuning", description=__doc__.split("\n")[0].split(": ")[1]
    )
    parser.add_argument("--ops", nargs="+", default=[], help="only these")
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=[],
        metavar="EXPRESSION",
        help="only those whose name in --list one of the expressions matches; default all but the tiny ones",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=[name for name in dispatch.IMPLEMENTATIONS if name != "reference"],
        help="default: the kernels of this device, xla where there are none",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=_PACKAGE / "tuned", help="folder of the tables"
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        help="try no candidate after so many seconds",
    )
    parser.add_argument("--again", action="store_true", help="measure what is in the tables too")
    parser.add_argument("--list", action="store_true", help="only list the workloads")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for bad input, 1 where a workload failed, 130 where it was stopped."""
    arguments = _arguments(given)
    try:
        chosen = workloads.chosen(ops=arguments.ops, workloads=arguments.workloads)
        if arguments.list:
            print("\n".join(workload.name for workload in chosen))
            return 0
        return _tune(chosen, arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _tune(chosen: Sequence[workloads.Workload], arguments: argparse.Namespace) -> int:
    end = time.monotonic() + arguments.budget_seconds
    over = lambda: time.monotonic() > end
    slug = platform.device_slug()
    names = arguments.implementations or [_OWN.get(platform.target_platform(), "xla")]
    todo = [(workload, name) for workload in chosen for name in names if workload.choices(name)]
    if not todo:
        raise ValueError(
            f"implementations: got {', '.join(names)}, wanted one that has a choice in {', '.join({w.op for w in chosen})}"
        )
    commit, failed = _commit(), 0
    tables_ = {
        op: tables.Table(arguments.out / slug, op) for op in {workload.op for workload, _ in todo}
    }
    print(f"{len(todo)} workloads on {platform.device_kind()}, tables in {arguments.out / slug}")
    for number, (workload, name) in enumerate(todo, start=1):
        line = f"[{number}/{len(todo)}] {name}, {workload.name}"
        if over():
            print(f"{line}: left out, and those after it: {arguments.budget_seconds:g} s are over")
            break
        show = _Progress(line)
        try:
            key = search.key_of(workload, name)
            if key is None:
                show.end("does not look for block sizes")
                failed += 1
                continue
            table = tables_[workload.op]
            if table.measured(key, workload.name) and not arguments.again:
                show.end("in the table")
                continue
            found = search.search(workload, name, key, on_candidate=show.candidate, stop=over)
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            show.end(f"failed: {str(error).strip().splitlines()[0]}")
            failed += 1
            continue
        us = lambda ms: round(1e3 * ms, 3)
        table.put(
            key,
            {
                "block_sizes": found.sizes,
                "workload": workload.name,
                "median_us": us(found.best.median),
                "p10_us": us(found.best.p10),
                "p90_us": us(found.best.p90),
                "heuristic_us": us(found.heuristic.median),
                "candidates": found.tried,
                "complete": found.complete,
                "commit": commit,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            },
        )
        gain = found.heuristic.median / found.best.median
        sizes = ", ".join(f"{size} {value}" for size, value in found.sizes.items()) or "heuristic"
        show.end(
            f"{sizes}, {us(found.best.median):g} us, {gain:.2f} x the heuristic, "
            f"{found.tried} tried, {found.refused} refused, {len(found.wrong)} wrong"
            + ("" if found.complete else ", not complete")
        )
        for reason in found.wrong:
            print(f"    left out: {reason}")
    return 1 if failed else 0


class _Progress:
    """One line a workload, rewritten with every candidate where there is a terminal, else followed by a line now and then.

    Args:
      line: how it begins.
    """

    def __init__(self, line: str):
        self._line, self._begin, self._live = line, time.monotonic(), sys.stderr.isatty()
        self._shown = self._begin
        self._show("compiling")

    def candidate(self, sizes: search.Sizes, ms: float, best_ms: float) -> None:
        """Shows what was tried, and the best time before it."""
        tried = ", ".join(f"{name} {value}" for name, value in sizes.items()) or "heuristic"
        self._show(f"{tried}: {1e3 * ms:.4g} us, best {1e3 * best_ms:.4g} us")

    def end(self, text: str) -> None:
        """Says how it ended, for good."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(f"{self._line}: {text} ({time.monotonic() - self._begin:.0f} s)", flush=True)

    def _show(self, text: str) -> None:
        if self._live:
            print(f"\r\x1b[K{self._line}: {text}"[:200], end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._shown > _QUIET_S:
            self._shown = time.monotonic()
            print(f"{self._line}: {text}", file=sys.stderr, flush=True)


def _commit() -> str | None:
    """Returns the commit that the package is checked out at, or that JAXTOPK_COMMIT states for a copy without history, or None."""
    if stated := os.environ.get("JAXTOPK_COMMIT"):
        return stated
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
