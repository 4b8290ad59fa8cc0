"""The entropy half of the Top-k ratio study: a run on random weights, its sums, and how its page reads them."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from experiments import results
from experiments.topk_ratio import entropy, entropy_tables, tables
from jaxtopk.analysis.correlation import head_loss_correlation
from jaxtopk.analysis.measured_rows import MeasuredRows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("entropy") / "out"
    return out, entropy.run(entropy.Arguments(preset="tiny", out=out, samples=1))


def test_a_run_measures_each_head_at_the_answers_and_no_row_breaks_the_bound(finished):
    out, rows = finished
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "entropy.jsonl"]
    written = [json.loads(line) for line in (out / "entropy.jsonl").read_text().splitlines()]
    for row in written:
        results.check(row, "entropy.jsonl")
    assert [(row["kind"], row.get("task"), row["n"]) for row in written] == [
        ("task", "niah_single_1", 1),
        ("task", "fwe", 1),
        ("all", None, 2),
    ]
    needle, words, whole = written
    assert (needle["aggregation"], words["aggregation"]) == (False, True)
    assert whole["rows"] == needle["rows"] + words["rows"]
    assert whole["entropy"] == pytest.approx((needle["entropy"] + words["entropy"]) / 2)
    for row in written:
        assert [entropy.label(entry) for entry in row["sets"]] == ["16", "10%"]
        for entry in row["sets"]:
            assert entry["checked"] == 4 * row["rows"]  # four heads
            assert entry["broken"] == 0
            assert entry["least_slack"] > 0
        # A tenth of 1,000 keys holds more than 16 do; random weights spread evenly, so that both lose most.
        assert 0.3 < row["sets"][1]["lost"] < row["sets"][0]["lost"] < 1
        assert row["entropy"] == pytest.approx(
            row["normalised"] * math.log(row["visible"]), rel=0.01
        )
    for row in (needle, words):
        heads = row["heads"]
        assert np.shape(heads["lost_e4"]) == (2, 2, 2)
        assert np.mean(heads["entropy"]) == pytest.approx(row["entropy"], abs=1e-3)
        for lost, entry in zip(heads["lost_e4"], row["sets"], strict=True):
            assert np.mean(lost) / 10_000 == pytest.approx(entry["lost"], abs=1e-4)
    assert len(rows) == len(written)


def _measured(entropy_heads: np.ndarray, mass_heads: np.ndarray, rows: int) -> MeasuredRows:
    """Rows that all see 100 keys, alike in each head; one set of 8 keys and one of a tenth."""
    of_rows = lambda heads: np.repeat(np.asarray(heads, np.float32)[..., None], rows, axis=-1)
    found = of_rows(entropy_heads)
    return MeasuredRows(
        topks=(8,),
        visible=np.full((found.shape[0], rows), 100, np.int32),
        entropy=found,
        normalised=found / np.float32(np.log(100)),
        mass=of_rows(mass_heads)[None],
        set_entropy=found[None],
        attended_mass=np.ones_like(found),
        attended_entropy=found,
        attended_count=np.full(found.shape, 100, np.int32),
        output_entropy=np.zeros(rows, np.float32),
        ratios=(0.1,),
        ratio_mass=of_rows(1 - 0.5 * (1 - np.asarray(mass_heads)))[None],
    )


def test_tasks_count_alike_and_correlations_are_those_of_head_means():
    rng = np.random.default_rng(0)
    spread = {"short": False, "long": True}
    heads = {task: rng.uniform(1, 2, size=(3, 4)) for task in spread}
    mass = {task: 1 - 0.2 * heads[task] + rng.uniform(0, 0.1, size=(3, 4)) for task in spread}
    measured = {
        (1000, task): _measured(heads[task], mass[task], rows)
        for task, rows in (("short", 1), ("long", 9))
    }
    short, long, whole = entropy.summarise(measured, (8, 0.1), samples=1, seed=3, spread=spread)
    assert whole["entropy"] == pytest.approx((short["entropy"] + long["entropy"]) / 2)
    assert (whole["rows"], whole["sets"][0]["checked"]) == (10, 10 * 12)
    assert whole["sets"][1]["lost"] == pytest.approx(whole["sets"][0]["lost"] / 2, rel=1e-5)
    mean_entropy, mean_mass = (np.mean(list(found.values()), axis=0) for found in (heads, mass))
    wanted = head_loss_correlation(mean_entropy, 1 - mean_mass, seed=3)
    np.testing.assert_allclose(whole["sets"][0]["pearson"], wanted.pearson, atol=1e-5)
    np.testing.assert_allclose(whole["sets"][0]["spearman"], wanted.spearman, atol=1e-5)
    alone = head_loss_correlation(heads["long"], 1 - mass["long"], seed=3)
    np.testing.assert_allclose(long["sets"][0]["spearman"], alone.spearman, atol=1e-5)


def test_rows_below_the_bound_are_counted_and_what_cannot_be_told_is_none():
    heads = np.linspace(0.1, 1.5, 6).reshape(2, 3)
    kept = np.full((2, 3), 0.4)  # below 1 - H / ln 8 where H is small
    broken, _ = entropy.summarise(
        {(1000, "task"): _measured(heads, kept, 2)}, (8,), samples=1, seed=0, spread={"task": False}
    )
    (entry,) = broken["sets"]
    assert entry["broken"] == 2 * int((0.4 < 1 - heads / np.log(8)).sum()) > 0
    assert entry["spearman"] is entry["pearson"] is None  # all heads lose alike
    few = _measured(heads, kept, 2)
    few = dataclasses.replace(few, visible=np.full_like(few.visible, 5))
    told, _ = entropy.summarise(
        {(1000, "task"): few}, (8,), samples=1, seed=0, spread={"task": False}
    )
    assert told["sets"][0]["lost"] is told["sets"][0]["spearman"] is None
    assert told["heads"]["lost_e4"] == [None]


def test_the_page_shows_committed_rows_beside_the_scores(finished, tmp_path, monkeypatch):
    out, _ = finished
    (tmp_path / "card-entropy.jsonl").write_text((out / "entropy.jsonl").read_text())
    for module in (tables, entropy_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        module.committed.cache_clear()
    try:
        page, links = entropy_tables.tables(), entropy_tables.figure_links("")
        assert "1000 tokens" in page
        assert "| fwe |" in page
        assert "| mean of tasks |" in page
        assert "| 10% |" in page
        heads, loss = (entropy_tables.figure(name) for name in entropy_tables.FIGURES)
        for name, drawn in zip(entropy_tables.FIGURES, (heads, loss), strict=True):
            assert entropy_tables.rows_digest() in drawn
            assert f"results/{name}" in links
            assert "niah_single_1" in drawn
            assert "fwe" in drawn
        assert "H / ln k" in loss
        assert tables.committed() == ()  # these rows are no scores
        (tmp_path / "card-entropy.jsonl").unlink()
        entropy_tables.committed.cache_clear()
        assert entropy_tables.rows_digest() is None
        assert "No results" in entropy_tables.tables()
        assert "No results" in entropy_tables.figure_links("")
        with pytest.raises(ValueError, match="results: got none"):
            entropy_tables.figure("entropy-loss.svg")
    finally:
        for module in (tables, entropy_tables):
            module.committed.cache_clear()


def test_the_default_run_is_small_and_asks_what_the_study_asks():
    config = entropy._config(entropy.Arguments())
    assert (config.lengths, config.samples, len(config.tasks)) == ((2048,), 4, 11)
    assert len(entropy._config(entropy.Arguments(qa="somewhere")).tasks) == 13
    for changes, message in (
        ({"samples": 0}, "samples: got 0"),
        ({"lengths": (0,)}, r"lengths: got \(0,\)"),
        ({"seed": -1}, "seed: got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            entropy._config(entropy.Arguments(**changes))


def test_bad_input_ends_in_one_line_and_exit_code_two():
    arguments = ["--preset", "tiny", "--lengths", "9000", "--out", "never"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.topk_ratio.entropy", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "topk_ratio: error: lengths: got 9000, wanted at most the model's context of 4096\n"
    )
