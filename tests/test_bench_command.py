"""`jaxtopk bench`: that what it times is what generation runs, what it prints and writes, and how it refuses bad input."""

import json
import pathlib
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtopk import cli
from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.commands.bench import prefills_of
from jaxtopk.decoding import loops
from jaxtopk.decoding.timing import time_decoding
from jaxtopk.evaluation.settings import make_settings
from tests.evaluation import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny.save(path)
    return str(path)


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


PROMPTS = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (2, 40))
STRATEGIES = {"full": FullAttention(), "few": TopKAttention(topk=2, implementation="reference")}


def _time(strategies, new_tokens: int, **more):
    model = tiny.model()
    return time_decoding(
        model,
        model.unstacked(),
        PROMPTS,
        prefills={"full": FullAttention()},
        strategies=strategies,
        new_tokens=new_tokens,
        rounds=3,
        **more,
    )


@pytest.fixture(scope="module")
def timed():
    runs = []
    found = _time(STRATEGIES, 6, done=lambda: runs.append(None))
    assert len(runs) == 4 * (1 + 2)
    return found


def test_what_is_timed_writes_what_generation_writes(timed):
    model = tiny.model()
    prefilled = loops.prefill(model, PROMPTS.tolist(), new_tokens=7)
    first = jnp.argmax(prefilled.logits, axis=-1, keepdims=True).astype(jnp.int32)
    for name, strategy in STRATEGIES.items():
        wanted = loops.continue_tokens(
            model.with_attention(strategy), prefilled.cache, first, max_new_tokens=6
        )
        np.testing.assert_array_equal(timed.tokens[name][:, :1], first)
        np.testing.assert_array_equal(timed.tokens[name][:, 1:], wanted.tokens)
    assert (timed.tokens["few"] != timed.tokens["full"]).any()
    assert timed.capacity == prefilled.cache.capacity


def test_the_clock_waits_for_every_step(timed):
    for times in (*timed.prefill.values(), *timed.decode.values()):
        assert len(times.rounds) == 3
        assert min(times.first, *times.rounds) > 0
    long = _time({"full": FullAttention()}, 600)
    median = lambda found: statistics.median(found.decode["full"].rounds)
    assert median(long) > 3 * median(timed)  # a hundred times the steps, and what a call costs


def test_every_context_and_setting_is_timed_and_all_is_written(folder, capsys, tmp_path):
    out = tmp_path / "runs" / "first"
    code, printed, err = _run(
        capsys, "--model", folder, "--contexts", "96", "120", "--batch", "2", "--new-tokens", "3", "--rounds", "3",
        "--topk", "8", "--implementation", "reference", "--dtype", "bfloat16", "--out", str(out),
    )  # fmt: skip
    assert code == 0, err
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "report.html",
        "results.jsonl",
    ]
    config = json.loads((out / "config.json").read_text())
    assert (config["contexts"], config["topk"], config["batch"]) == ([96, 120], [8], 2)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    settings = ["full", "top-k 8"]
    assert [(row["context"], row["measured"], row["setting"]) for row in rows] == [
        (context, measured, setting)
        for context in (96, 120)
        for measured, setting in [("prefill", "full"), *(("decode", name) for name in settings)]
    ]
    for row in rows:
        low, high = row["tokens_per_second_range"]
        assert 0 < low <= row["tokens_per_second"] <= high
        assert (row["n"], row["batch"], row["dtype"]) == (3, 2, "bfloat16")
        assert {"device", "versions", "commit", "command", "date"} <= row.keys()
        if row["measured"] == "prefill":
            rate = 2 * row["context"] / row["seconds"]
            assert row["tokens_per_second"] == pytest.approx(rate, rel=1e-4)
            continue
        assert row["tokens_per_second"] == pytest.approx(2e3 / row["ms_per_token"], rel=1e-4)
        assert row["ms_per_token"] == statistics.median(row["ms_per_token_rounds"])
    decoded = {(row["context"], row["setting"]): row for row in rows if row["measured"] == "decode"}
    assert decoded[120, "full"]["keys_attended"] == 122  # of 121, 122, 123
    assert decoded[96, "top-k 8"]["keys_attended"] == 8
    assert decoded[96, "full"]["speed_over_full_range"] == [1, 1]
    assert decoded[96, "top-k 8"]["attention"]["implementation"] == "reference"
    pairs = zip(
        decoded[96, "full"]["ms_per_token_rounds"],
        decoded[96, "top-k 8"]["ms_per_token_rounds"],
        strict=True,
    )
    ratio = statistics.median(full / sparse for full, sparse in pairs)
    assert decoded[96, "top-k 8"]["speed_over_full"] == pytest.approx(ratio, rel=1e-4)
    page = (out / "report.html").read_text()
    for text in ("random tokens", "<svg", "top-k 8", rows[0]["commit"]):
        assert text in page
    for text in (*settings, "Decoding", "Prefill", "120"):
        assert text in printed


def test_a_sparse_prefill_is_timed_under_its_setting(folder, capsys, tmp_path):
    code, _, err = _run(
        capsys, "--model", folder, "--contexts", "64", "--new-tokens", "1", "--rounds", "1", "--attention", "topk",
        "--topk-ratio", "0.1", "--prefill", "topk", "--implementation", "reference", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    results = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    prefill, decode = map(json.loads, results)
    assert (prefill["measured"], prefill["setting"]) == ("prefill", "top-k 10%")
    assert prefill["attention"]["topk_ratio"] == 0.1
    assert decode["keys_attended"] == 7  # a tenth of 65, rounded up
    assert "speed_over_full" not in decode


def test_settings_that_run_prompts_alike_share_a_prefill():
    dense = make_settings(ratios=(0.1,), topks=(8, 16))
    assert prefills_of(dense) == {"full": FullAttention()}
    sparse = make_settings(topks=(8, 16), options={"prefill": "topk"})
    assert list(prefills_of(sparse)) == ["full", "top-k 8", "top-k 16"]


def test_flags_are_read_without_importing_jax():
    script = (
        "import sys\nfrom jaxtopk.cli import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit as end:\n    sys.exit(end.code or 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "random tokens" in done.stdout
    assert "--topk-ratio" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "0"], "contexts: got (0,), wanted at least one, each at least 1"),
        (["--contexts", "64", "64"], "contexts: got 64 twice, wanted each once"),
        (
            ["--contexts", "64", "1000"],
            "contexts: got 1000 tokens + 32 new ones = 1032, wanted at most the model's context of 1024",
        ),
        (["--batch", "0"], "batch: got 0, wanted at least 1"),
        (["--new-tokens", "0"], "new_tokens: got 0"),
        (["--rounds", "-1"], "rounds: got -1"),
        (["--seed", "-1"], "seed: got -1"),
        (["--topk", "8", "8"], "settings: got top-k 8 twice, wanted each once"),
        (["--topk-ratio", "0.1", "0.1"], "settings: got top-k 10% twice"),
        (["--attention", "full", "full"], "attention: got full twice"),
        (["--attention", "topk"], "attention: got topk without a budget, wanted --topk or"),
        (["--attention", "full", "--topk", "8"], "topk: got a value for full attention"),
        (["--scope", "layer"], "scope: got a value for full attention"),
        (["--topk", "0"], "TopKAttention: topk got 0"),
        (["--topk-ratio", "2"], "TopKAttention: topk_ratio got 2.0"),
        (["--contexts", "9", "--topk", "8", "--layers", "5"], "TopKAttention: layers got 5"),
        (["--topk", "8", "--sparse-suffix", "3"], "sparse_suffix: got 3, wanted none"),
        (
            ["--contexts", "9", "--topk", "8", "--implementation", "mosaic_tpu"],
            "topk_decode_attention: implementation 'mosaic_tpu' got device platform 'cpu'",
        ),
        (["--model", "nowhere.gguf"], "model: got 'nowhere.gguf'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, folder, tmp_path, arguments, message):
    model = [] if "--model" in arguments else ["--model", folder]
    code, out, err = _run(capsys, *model, *arguments, "--out", str(tmp_path / "out"))
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.removeprefix("jaxtopk: error: ").startswith(message)
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_is_one_line(capsys, folder, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(loops, "prefill", full)
    code, _, err = _run(capsys, "--model", folder, "--contexts", "64", "--batch", "3")
    assert code == 2
    assert (
        err
        == "jaxtopk: error: contexts: got 64 at batch 3, which the device's memory does not hold, wanted less\n"
    )


def test_an_output_path_that_is_a_file_is_refused_before_any_work(capsys, tmp_path):
    path = pathlib.Path(tmp_path / "taken")
    path.write_text("")
    code, _, err = _run(capsys, "--model", "never looked at", "--out", str(path))
    assert code == 2
    assert err.startswith("jaxtopk: error: out: got")
