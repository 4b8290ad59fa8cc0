"""The search for a Python and the set-up of an environment, on made-up machines; nothing is installed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FIND_PYTHON = ROOT / "scripts" / "find_python.sh"


def write_program(path: pathlib.Path, body: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def good_python(path: pathlib.Path) -> pathlib.Path:
    return write_program(path, f'exec "{sys.executable}" "$@"')


def old_python(path: pathlib.Path) -> pathlib.Path:
    """A Python 3.11: it runs, and the version check inside it fails."""
    return write_program(path, "exit 1")


def find_python(tmp_path: pathlib.Path, **env: str) -> subprocess.CompletedProcess:
    """Runs the search on a machine whose only programs are those in tmp_path/bin and a few of the shell's own."""
    path = tmp_path / "bin"
    path.mkdir(exist_ok=True)
    for tool in ("dirname", "sed"):
        (path / tool).symlink_to(shutil.which(tool))
    return subprocess.run(
        [shutil.which("sh"), FIND_PYTHON],
        env={"PATH": str(path), "HOME": str(tmp_path / "home")} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_python_on_the_path_is_taken(tmp_path):
    good_python(tmp_path / "bin" / "python3")
    result = find_python(tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, sys.executable)


def test_a_shim_that_does_not_answer_is_passed_over(tmp_path):
    write_program(
        tmp_path / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127"
    )
    old_python(tmp_path / "bin" / "python3")
    good_python(tmp_path / "home" / ".pyenv" / "versions" / "3.12.7" / "bin" / "python")
    result = find_python(tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, sys.executable)


def test_pyenv_root_is_searched(tmp_path):
    good_python(tmp_path / "elsewhere" / "versions" / "3.13.0" / "bin" / "python")
    assert find_python(tmp_path, PYENV_ROOT=str(tmp_path / "elsewhere")).returncode == 0


def test_pyenv_is_asked_for_its_root(tmp_path):
    good_python(tmp_path / "opt" / "versions" / "3.12.1" / "bin" / "python")
    write_program(tmp_path / "bin" / "pyenv", f'[ "$1" = root ] && echo "{tmp_path}/opt"')
    assert find_python(tmp_path).returncode == 0


def test_uv_is_asked_last(tmp_path):
    python = good_python(tmp_path / "uv" / "python3.12")
    write_program(tmp_path / "bin" / "uv", f'[ "$1 $2" = "python find" ] && echo "{python}"')
    assert find_python(tmp_path).returncode == 0


def test_no_python_is_one_clear_line(tmp_path):
    old_python(tmp_path / "bin" / "python3")
    result = find_python(tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "no Python >= 3.12" in result.stderr
    assert "tried: python3;" in result.stderr


def test_a_named_python_is_the_only_candidate(tmp_path):
    good_python(tmp_path / "bin" / "python3")
    named = old_python(tmp_path / "old")
    result = find_python(tmp_path, PYTHON=str(named))
    assert (result.returncode, result.stdout) == (1, "")
    assert str(named) in result.stderr


# -------------------------------------------------------------------------------------------------- the environment
@pytest.fixture
def checkout(tmp_path):
    """A copy of what the set-up reads, with a Python whose `-m venv` is real (without pip) and whose pip is recorded."""
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    write_program(
        tmp_path / "fake" / "python",
        f"""
case "$*" in
  "-m venv --clear "*)
    echo venv >>"{tmp_path}/log"
    rm -rf "$4"; mkdir -p "$4/bin"
    echo 'version = 3.12.1' >"$4/pyvenv.cfg"
    cp "$0" "$4/bin/python" ;;
  "-m pip "*)
    for last; do :; done
    echo "pip $last" >>"{tmp_path}/log"
    if [ -e "{tmp_path}/offline" ]; then exit 1; fi
    if [ -e "{tmp_path}/kill" ]; then kill -9 $(eval echo "$(cat "{tmp_path}/kill")"); fi ;;
  "-c import pip") ;;
  *) exec "{sys.executable}" "$@" ;;
esac""",
    )
    # find_python answers with sys.executable, which would be the real one.
    write_program(tmp_path / "scripts" / "find_python.sh", f'echo "{tmp_path}/fake/python"')
    return tmp_path


def bootstrap(checkout: pathlib.Path, *extras: str) -> tuple[int, list[str], str]:
    """Returns the exit code, what was done (`venv`, `pip TARGET`), and stderr."""
    log = checkout / "log"
    log.write_text("")
    env = {k: v for k, v in os.environ.items() if k not in ("VENV", "CONSTRAINTS")}
    result = subprocess.run(
        [checkout / "scripts" / "bootstrap.sh", *extras],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.returncode, log.read_text().splitlines(), result.stderr


def test_the_second_setup_does_nothing(checkout):
    assert bootstrap(checkout)[:2] == (0, ["venv", "pip ."])
    assert bootstrap(checkout)[:2] == (0, [])


def test_requirements_come_alone_and_are_not_the_project(checkout):
    assert bootstrap(checkout, "--requirements")[:2] == (0, ["venv", "pip requirements.txt"])
    assert bootstrap(checkout, "--requirements")[:2] == (0, [])
    assert bootstrap(checkout)[:2] == (0, ["pip ."])


def test_an_extra_is_added_to_what_is_there(checkout):
    bootstrap(checkout)
    assert bootstrap(checkout, "cuda13")[:2] == (0, ["pip .[cuda13]"])
    assert bootstrap(checkout, "cuda13")[:2] == (0, [])
    assert bootstrap(checkout)[:2] == (0, [])


def test_changed_requirements_are_installed(checkout):
    bootstrap(checkout)
    with (checkout / "requirements.txt").open("a") as file:
        file.write("einops>=0.8\n")
    assert bootstrap(checkout)[:2] == (0, ["pip ."])


@pytest.mark.parametrize("victim", ["$PPID", "$$"], ids=["setup", "pip"])
def test_a_killed_setup_is_made_anew(checkout, victim):
    (checkout / "kill").write_text(victim)
    assert bootstrap(checkout)[0] != 0
    (checkout / "kill").unlink()
    assert bootstrap(checkout)[:2] == (0, ["venv", "pip ."])


def test_a_failed_install_is_tried_again_without_losing_the_environment(checkout):
    bootstrap(checkout)
    (checkout / "offline").touch()
    code, done, stderr = bootstrap(checkout, "tpu")
    assert (code, done) == (1, ["pip .[tpu]"])
    assert "error: could not install .[tpu]" in stderr
    (checkout / "offline").unlink()
    assert bootstrap(checkout, "tpu")[:2] == (0, ["pip .[tpu]"])


def test_a_copied_checkout_gets_its_own_environment(checkout):
    bootstrap(checkout)
    copy = checkout.parent / f"{checkout.name}-copy"
    shutil.copytree(checkout, copy)
    (checkout / "log").write_text("")
    bootstrap(copy)
    assert (checkout / "log").read_text().splitlines() == ["venv", "pip ."]  # its programs log here
    assert (copy / ".venv" / ".location").read_text().strip() == str(copy)


def test_an_unknown_extra_is_one_clear_line(checkout):
    code, done, stderr = bootstrap(checkout, "cuda99")
    assert (code, done) == (2, [])
    assert stderr.startswith("error: EXTRA: got 'cuda99', wanted one of: cuda13 tpu ")
