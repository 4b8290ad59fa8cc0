"""Finds or makes the environment that `transformers` runs in, apart from the project's own."""

import pathlib
import shutil
import subprocess
import sys

REQUIREMENTS = pathlib.Path(__file__).with_name("requirements-transformers.txt")
# torch has wheels for fewer versions of Python than JAX, and some indexes for one only: each is tried.
_NAMES = ("python3.11", "python3.12", "python3.13", "python3.10", "python3", "python")
_PROBE = "import torch, transformers"


def find_or_make(folder: pathlib.Path) -> pathlib.Path:
    """Returns the Python of an environment that imports torch and transformers, making it on first use.

    Args:
      folder: of the environment; an unfinished one in its place is made anew.

    Raises:
      FileNotFoundError: no Python on this machine could install them; ends with pip's last line.
    """
    python = folder / "bin" / "python"
    if works(python):
        return python
    said = "no Python found"
    for candidate in _candidates():
        print(
            f"making {folder} with {candidate} for torch and transformers (some minutes, once)",
            file=sys.stderr,
        )
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [candidate, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--no-input", "-r", str(REQUIREMENTS)],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
            )
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                break
        if works(python):
            return python
    shutil.rmtree(folder, ignore_errors=True)
    raise FileNotFoundError(
        f"transformers: could not be installed ({said}); wanted a Python with it: --transformers-python PATH"
    )


def works(python: pathlib.Path) -> bool:
    """Whether this Python is there and imports what the comparison needs."""
    if not python.exists():
        return False
    done = subprocess.run(
        [str(python), "-c", _PROBE], capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    return done.returncode == 0


def _candidates() -> list[str]:
    """Every Python at hand, by its own path and once: those on PATH, then pyenv's, whose shims may answer for one only."""
    named = [shutil.which(name) for name in _NAMES]
    versions = sorted((pathlib.Path.home() / ".pyenv/versions").glob("3.1*/bin/python"))
    found: dict[str, None] = {}
    for candidate in [*named, *map(str, versions)]:
        if candidate is None:
            continue
        asked = subprocess.run(
            [
                candidate,
                "-c",
                "import sys; print(getattr(sys, '_base_executable', sys.executable))",
            ],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if asked.returncode == 0:
            found[asked.stdout.strip()] = None
    return list(found)
