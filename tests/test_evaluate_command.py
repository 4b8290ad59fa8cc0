"""`jaxtopk evaluate`: its folder, that a killed run resumes to the rows of one that was not, and how it refuses bad input."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxtopk import cli
from tests.evaluation import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = ["--tasks", "niah", "json_kv_words", "--lengths", "600", "--samples", "8", "--batch", "1"]
SETTINGS = ["--ratios", "0.5", "0.1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny.save(path)
    return str(path)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    code = cli.main(["evaluate", "--model", folder, *TASKS, *SETTINGS, "--out", str(out)])
    assert code == 0
    return out


def _refusal(capsys, *arguments: str) -> str:
    """Runs a command that must fail, and returns its only line."""
    capsys.readouterr()
    code = cli.main(["evaluate", *arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("jaxtopk: error: ")
    return captured.err.removeprefix("jaxtopk: error: ").rstrip("\n")


def test_a_run_leaves_config_results_sessions_and_a_report(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "config.json",
        "report.html",
        "results.jsonl",
        "sessions.jsonl",
    ]
    rows = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 8 * 3
    assert [row["setting"] for row in rows[:3]] == ["full", "top-k 50%", "top-k 10%"]
    assert {row["task"] for row in rows} == {"niah", "json_kv_words"}
    assert all(row["prompt_tokens"] <= 600 for row in rows)
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"][1]["strategy"]["topk_ratio"] == 0.5
    page = (finished / "report.html").read_text()
    assert "16 samples of 2 tasks" in page
    assert "Where the time went" in page


def test_a_killed_run_resumes_to_the_rows_of_one_that_was_not(finished, folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", "--model", folder, *TASKS, *SETTINGS, "--out", str(out)]
    started = subprocess.Popen(
        [sys.executable, "-m", "jaxtopk", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    results = out / "results.jsonl"
    deadline = time.monotonic() + 240
    while not results.exists() or results.read_bytes().count(b"\n") < 6:
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    left = results.read_bytes()
    wanted = (finished / "results.jsonl").read_bytes()
    assert wanted.startswith(left)
    assert len(left) < len(wanted)
    assert not (out / "report.html").exists()
    assert cli.main(arguments) == 0
    assert results.read_bytes() == wanted
    assert "top-k 10%" in capsys.readouterr().out
    sessions = [json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines()]
    assert len({entry["session"] for entry in sessions}) == 2
    assert sessions[-1]["samples"] == 16 - left.count(b"\n") // 3


def test_two_runs_do_not_write_one_file(finished, folder, capsys):
    fcntl = pytest.importorskip("fcntl")
    with (finished / "results.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        message = _refusal(capsys, "--model", folder, *TASKS, *SETTINGS, "--out", str(finished))
    assert message.startswith("out: got results.jsonl that another run appends to")


def test_flags_are_read_without_importing_jax():
    script = (
        "import sys\nfrom jaxtopk.cli import main\n"
        "try:\n    main(['evaluate', '--help'])\nexcept SystemExit as end:\n    sys.exit(end.code or 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--ratios" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "niah_singel_1"], "task: got 'niah_singel_1', wanted one of niah_single_1"),
        ([], "tasks: got none, wanted --tasks, --suite or both"),
        (["--tasks", "niah", "niah"], "tasks: got niah twice"),
        (["--tasks", "niah", "--lengths", "0"], "lengths: got (0,), wanted at least one"),
        (["--tasks", "niah", "--lengths", "4000"], "lengths: got 4000, wanted at most the model's context of 1024"),
        (["--tasks", "niah", "--lengths", "100"], "niah, length 100, sample 0: niah: target_tokens got 100"),
        (["--tasks", "niah", "--samples", "0"], "samples: got 0"),
        (["--tasks", "niah", "--batch", "-2"], "batch: got -2"),
        (["--tasks", "niah", "--ratios", "0.5", "0.5"], "settings: got top-k 50% twice"),
        (["--tasks", "niah", "--ratios", "0"], "TopKAttention: topk_ratio got 0.0"),
        (["--tasks", "niah", "--attention", "topk"], "attention: got topk without a budget"),
        (["--tasks", "niah", "--scope", "layer"], "scope: got a value for full attention"),
        (["--tasks", "fwe", "--depths", "0.5"], "depths: got (0.5,) without the task niah"),
        (["--tasks", "niah", "--depths", "1.5"], "depth: got 1.5"),
        (["--tasks", "niah", "--haystack", "nowhere.txt"], "haystack: got 'nowhere.txt'"),
        (["--tasks", "qa_1"], "qa: got None"),
        (["--suite", "ruler"], "suite: got 'ruler', wanted NAME=FOLDER"),
        (["--suite", "rulr=nowhere"], "suite: got 'rulr'"),
        (["--tasks", "niah", "--mesh", "rows=2"], "mesh: got 'rows=2', wanted AXIS=DEVICES"),
        (["--tasks", "niah", "--mesh", "data=2", "data=2"], "mesh: got data twice"),
        (["--tasks", "niah", "--mesh", "data=64"], "mesh: got data=64, wanted at most the"),
        (["--tasks", "niah", "--part", "4/4"], "part: got 4 of 4, wanted 0 to 3"),
        (["--tasks", "niah", "--part", "one"], "part: got 'one', wanted P/N"),
        (["--tasks", "niah", "--model", "nowhere.gguf"], "model: got 'nowhere.gguf'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_two(capsys, folder, tmp_path, arguments, message):
    model = [] if "--model" in arguments else ["--model", folder]
    got = _refusal(capsys, *model, *arguments, "--out", str(tmp_path / "out"))
    assert got.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    message = _refusal(
        capsys, "--tasks", "niah", "--model", "never looked at", "--out", str(tmp_path / "taken")
    )
    assert message.startswith("out: got")


def test_results_of_another_configuration_are_refused(capsys, finished, folder):
    message = _refusal(
        capsys, "--model", folder, *TASKS, *SETTINGS, "--seed", "3", "--out", str(finished)
    )
    assert message.startswith("out: got results of another configuration in")
    assert "seed is 3 now, wanted 0 as there" in message
