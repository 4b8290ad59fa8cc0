"""The Top-k ratio study end to end on random weights, and how its page reads summaries."""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments import results
from experiments.topk_ratio import run, tables
from experiments.topk_ratio.config import QUESTION_TASKS, TASKS, StudyConfig
from jaxtopk.evaluation.tasks.registry import task_names


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One task after the other, in one folder, as a long study is run."""
    out = tmp_path_factory.mktemp("topk_ratio") / "out"
    for task in StudyConfig.tiny().tasks:
        _, rows = run.run(run.Arguments(preset="tiny", tasks=(task,), out=out, batch=2))
    return out, rows


def test_a_run_leaves_rows_a_report_and_a_summary(finished):
    out, rows = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "report.html",
        "results.jsonl",
        "sessions.jsonl",
        "summary.jsonl",
    ]
    written = [json.loads(line) for line in (out / "summary.jsonl").read_text().splitlines()]
    for row in written:
        results.check(row, "summary.jsonl")
    kinds = [(row["kind"], row.get("task"), row["setting"], row["n"]) for row in written]
    names = ("full", "top-k 100%", "top-k 10%", "top-k 16")
    assert kinds == [
        *(("task", task, name, 2) for task in ("niah_single_1", "fwe") for name in names),
        *(("mean", None, name, 4) for name in names),
    ]
    assert len(rows) == len(written)


def test_ratio_one_scores_as_full_attention(finished):
    out, _ = finished
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    replies = {}
    for row in rows:
        replies.setdefault(row["setting"], []).append(row["reply"])
    assert replies["top-k 100%"] == replies["full"]
    assert replies["top-k 10%"] != replies["full"]


def test_the_page_shows_committed_summaries(finished, tmp_path, monkeypatch):
    _, rows = finished
    (tmp_path / "card.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.committed.cache_clear()
    try:
        page, figure = tables.tables(), tables.figure()
        assert "1000 tokens" in page
        assert "| niah_single_1 | 2 |" in page
        assert "| mean of tasks |" in page
        assert tables.rows_digest() in figure
        assert "results/ratio.svg" in tables.figure_link("")
        (tmp_path / "card.jsonl").unlink()
        tables.committed.cache_clear()
        assert tables.rows_digest() is None
        assert "No results" in tables.tables()
        with pytest.raises(ValueError, match="results: got none"):
            tables.figure()
    finally:
        tables.committed.cache_clear()


def test_the_tasks_are_the_thirteen_of_ruler():
    assert set(TASKS + QUESTION_TASKS) == set(task_names("ruler"))
    with_questions = run._config(run.Arguments(qa="somewhere"))
    assert len(with_questions.tasks) == 13


def test_rows_of_two_devices_are_not_summed_up():
    made = [{"device": name, "commit": "a"} for name in ("one card", "another card")]
    with pytest.raises(ValueError, match="device: got another card, one card in one folder"):
        run.summarise([{}], made, StudyConfig.tiny())
    with pytest.raises(ValueError, match="rows: got none"):
        run.summarise([], made, StudyConfig.tiny())


def test_the_default_study_fits_the_model_and_asks_what_the_page_says():
    config = StudyConfig.gpu()
    assert config.lengths == (2048, 4096, 8192)
    assert config.ratios[-1] == 0.01
    assert (config.topks[0], config.topks[-1]) == (64, 1024)
    assert dataclasses.asdict(config)["samples"] == 100


def test_bad_input_ends_in_one_line_and_exit_code_two():
    arguments = ["--preset", "tiny", "--lengths", "9000", "--out", "never"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.topk_ratio.run", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "topk_ratio: error: lengths: got 9000, wanted at most the model's context of 4096\n"
    )
