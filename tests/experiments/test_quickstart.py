"""The quickstart study end to end on random weights, and what it refuses."""

import dataclasses
import io
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from experiments import results
from experiments.quickstart import measure, report, run, sources
from experiments.quickstart.config import QuickstartConfig
from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.decoding.loops import prefill


@pytest.fixture(scope="module")
def config():
    return QuickstartConfig.tiny()


@pytest.fixture(scope="module")
def loaded(config):
    return sources.load(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    rows = run.run(run.Arguments(preset="tiny", out=folder / "out"))
    return folder / "out", rows


def test_a_run_leaves_config_results_and_report_and_nothing_half_written(finished):
    folder, rows = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "report.html",
        "results.jsonl",
    ]
    assert json.loads((folder / "config.json").read_text())["ratios"] == [1.0, 0.25, 0.05]
    read = results.read(folder)
    assert [(row["attention"], row["ratio"]) for row in read] == [
        ("full", 1.0),
        ("topk", 1.0),
        ("topk", 0.25),
        ("topk", 0.05),
    ]
    assert len(read) == len(rows)


def test_fewer_keys_keep_less_mass_and_the_control_keeps_all(finished):
    full, control, quarter, twentieth = finished[1]
    assert full["mass_kept"] == pytest.approx(1)
    assert control["mass_kept"] == pytest.approx(1, abs=1e-6)
    assert 1 > quarter["mass_kept"] > twentieth["mass_kept"] > 0.05
    assert control["keys_attended"] == pytest.approx(control["keys_visible"], abs=0.51)
    assert quarter["keys_attended"] == pytest.approx(quarter["keys_visible"] / 4, abs=1)
    assert control["perplexity"] == pytest.approx(full["perplexity"], rel=1e-5)
    assert quarter["perplexity"] != pytest.approx(full["perplexity"], rel=1e-5)


def test_the_report_is_one_page_that_asks_for_nothing_else(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") == 1
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert [link for link in links if not link.startswith("#")] == []
    assert "@import" not in page
    assert "top-k 25%" in page
    assert "nothing about quality" in page  # random weights


def test_perplexity_is_that_of_a_whole_forward_pass(loaded, config):
    jobs = measure.windows(loaded, config, 384)
    full = [
        found[measure.FULL]
        for found in measure.follow(loaded.model, jobs, config, done=lambda n: None)
    ]
    for job, found in zip(jobs, full, strict=True):
        tokens = jnp.asarray([job.prompt + job.targets])
        log_probs = jax.nn.log_softmax(jax.jit(loaded.model)(tokens)[0])
        wanted = [
            float(log_probs[len(job.prompt) - 1 + i, target])
            for i, target in enumerate(job.targets)
        ]
        np.testing.assert_allclose(found.log_probs, wanted, atol=2e-5)
        assert tuple(found.tokens) == job.targets


def test_a_setting_scores_as_it_does_when_run_alone(loaded, config):
    (job,) = measure.windows(loaded, dataclasses.replace(config, windows=1), 384)
    together = next(measure.follow(loaded.model, [job], config, done=lambda n: None))
    alone = dataclasses.replace(config, ratios=(1.0, 0.05), batch=1)
    apart = next(measure.follow(loaded.model, [job], alone, done=lambda n: None))
    for setting in (measure.FULL, 1.0, 0.05):
        np.testing.assert_allclose(together[setting].log_probs, apart[setting].log_probs, atol=1e-5)
        np.testing.assert_allclose(together[setting].mass, apart[setting].mass, atol=1e-5)


def test_a_longer_sparse_suffix_changes_sparse_rows_only(loaded, config):
    (job,) = measure.windows(loaded, dataclasses.replace(config, windows=1), 384)
    one = dataclasses.replace(config, batch=1)
    eight = dataclasses.replace(one, sparse_suffix=8)
    short, long = (
        next(measure.follow(loaded.model, [job], c, done=lambda n: None)) for c in (one, eight)
    )
    for setting in (measure.FULL, 1.0):
        np.testing.assert_allclose(short[setting].log_probs, long[setting].log_probs, atol=2e-5)
    assert not np.allclose(short[0.05].log_probs, long[0.05].log_probs, atol=1e-4)
    assert short[0.05].tokens.tolist() == long[0.05].tokens.tolist()


def test_a_drawn_token_is_the_most_likely_one(loaded, config):
    (job,) = measure.windows(loaded, dataclasses.replace(config, windows=1), 384)
    free = dataclasses.replace(job, targets=(), steps=3)
    found = next(measure.follow(loaded.model, [free], config, done=lambda n: None))[measure.FULL]
    tokens = [*job.prompt, *map(int, found.tokens)]
    likely = jnp.argmax(jax.jit(loaded.model)(jnp.asarray([tokens]))[0], axis=-1)
    assert likely[len(job.prompt) - 1 : -1].tolist() == tokens[len(job.prompt) :]


def test_task_prompts_fit_the_context_and_batches_are_filled(loaded, config):
    for task in config.tasks:
        drawn = measure.task_samples(task, loaded.tokenizer, config, 384)
        assert len(drawn) == config.samples
        for sample, job in drawn:
            assert 250 < len(job.prompt) <= 384
            assert loaded.tokenizer.decode(list(job.prompt)) == sample.text


def test_timing_counts_the_rounds_of_every_setting(loaded, config):
    (job,) = measure.windows(loaded, dataclasses.replace(config, windows=1), 384)
    times = measure.step_milliseconds(loaded.model, job, config, done=lambda n: None)
    assert list(times) == [measure.FULL, *config.ratios]
    assert {len(rounds) for rounds in times.values()} == {config.timed_rounds}
    assert min(min(rounds) for rounds in times.values()) > 0


def test_the_timed_loop_of_a_ratio_attends_as_the_strategy_does(loaded, config):
    # What is timed takes its budget as an argument; at a ratio it must write into the cache what the strategy would.
    model = loaded.model.unstacked()
    (job,) = measure.windows(loaded, dataclasses.replace(config, windows=1), 384)
    start = lambda: prefill(
        model.with_attention(TopKAttention(topk_ratio=1.0)), [job.prompt], new_tokens=8
    )
    token = jnp.asarray(start().forced[:, 0])
    budget = jnp.full((1, 1), 20, jnp.int32)
    timed = measure._timed_topk(model, token, start().cache, budget, steps=1)
    _, wanted = jax.jit(model.with_attention(TopKAttention(topk=20)).decode)(token, start().cache)
    _, dense = jax.jit(model.with_attention(FullAttention()).decode)(token, start().cache)
    np.testing.assert_allclose(timed.key[-1], wanted.key[-1], atol=1e-6)
    assert not np.allclose(timed.key[-1], dense.key[-1], atol=1e-6)


def test_a_control_that_differs_from_full_attention_fails_the_run():
    row = {"context": 8, "attention": "full", "ratio": 1.0, "perplexity": 20.0}
    run.check_control([row, row | {"attention": "topk", "perplexity": 20.0001}])
    with pytest.raises(RuntimeError, match="wanted the same to 1e-05"):
        run.check_control([row, row | {"attention": "topk", "perplexity": 20.001}])


def test_the_table_fits_a_terminal(finished):
    console = rich.console.Console(width=80, file=io.StringIO(), record=True)
    run._print_tables(console, report, finished[1])
    assert all(len(line) <= 80 for line in console.export_text().splitlines())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (0.5, 1.0)}, "ratios: got .* wanted 1.0 first"),
        ({"ratios": (1.0, 0.0)}, "ratios: got .* wanted numbers in"),
        ({"ratios": (1.0, 0.5, 0.5)}, "ratios: got .* each once"),
        ({"contexts": ()}, "contexts: got"),
        ({"contexts": (1,)}, "contexts: got .* above sparse_suffix = 1"),
        ({"windows": 0}, "windows: got 0"),
    ],
)
def test_a_bad_configuration_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_a_context_beyond_the_model_is_refused_before_work(config):
    with pytest.raises(
        ValueError, match="contexts: got 5000 and 9 more, wanted at most the model's 4096"
    ):
        sources.load(dataclasses.replace(config, contexts=(5000,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny", "--ratios", "0.5"], "ratios: got"),
        (["--preset", "tiny", "--out", "README.md/inside"], "out: got"),
        (["--preset", "tiny", "--device", "tpu"], "device: got 'tpu'"),
    ],
    ids=["ratios", "out", "device"],
)
def test_bad_input_ends_in_one_line_and_exit_code_two(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart.run", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("quickstart: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
