"""What every result carries about its making: device, versions, commit, command, time."""

import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def provenance() -> dict[str, Any]:
    """Returns the fields that make a result traceable; the same in every row of a run.

    `commit` is the short hash of the checkout the code runs from, with "+changes" where tracked files differ from it; the
    variable JAXTOPK_COMMIT speaks for a copy without history; else "unknown". Folders and files of this machine are left
    out of `command`.
    """
    return {
        "device": device_name(),
        "platform": jax.default_backend(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "versions": versions(),
        "commit": commit(),
        "command": command(sys.orig_argv),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def device_name() -> str:
    """Returns what the first device calls itself; for a CPU, the processor's model."""
    device = jax.devices()[0]
    return _processor() if device.platform == "cpu" else device.device_kind


def versions() -> dict[str, str]:
    """Returns the versions that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def commit() -> str:
    """Returns the commit of the code; see `provenance`."""
    stated = os.environ.get("JAXTOPK_COMMIT")
    if stated:
        return stated
    here = pathlib.Path(__file__).resolve().parent
    try:
        revision = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return revision + ("+changes" if changed else "")


def command(argv: Sequence[str]) -> str:
    """Returns the command line as a reader would type it: `python` for the interpreter, no absolute paths."""
    words = ["python"]
    for word in argv[1:]:
        name, equals, value = word.rpartition("=")
        if pathlib.PurePath(value).is_absolute():
            word = f"{name}{equals}<{pathlib.PurePath(value).name}>"
        words.append(word)
    return " ".join(words)


def _git(folder: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=20,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
