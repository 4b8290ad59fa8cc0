"""`jaxtopk analyze`: what it prints and writes, and how it refuses bad input."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from jaxtopk import cli

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TEXT = (
    "the quick brown fox jumps over the lazy dog, and over the lazy cat as well; so it goes. " * 2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny random model of 96 tokens and a context of 64, with a tokenizer of one token a character."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "smollm2" / name, folder)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={chr(32 + index): index for index in range(95)}, merges=[])
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["analyze", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _rows(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_text_is_measured_by_layer_and_head_and_all_is_written(capsys, folder, text, tmp_path):
    out = tmp_path / "runs" / "first"
    code, printed, err = _run(
        capsys, "--model", folder, "--text", text, "--tokens", "24", "--windows", "2", "--topks", "4", "9", "64",
        "--topk", "3", "--implementation", "reference", "--out", str(out), "--save-arrays",
    )  # fmt: skip
    assert code == 0, err
    assert printed.startswith("text: entropy ")
    assert printed.count("\n") == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "arrays.npz",
        "config.json",
        "report.html",
        "results.jsonl",
    ]
    config = json.loads((out / "config.json").read_text())
    assert (config["topks"], config["attention"]["topk"]) == ([4, 9, 64], 3)
    rows = _rows(out)
    heads = [row for row in rows if row["level"] == "head"]
    layers, (total,) = (
        [row for row in rows if row["level"] == level] for level in ("layer", "total")
    )
    assert len(heads) == len(layers) * (heads[-1]["head"] + 1)
    assert total["n"] == 48
    assert total["visible"] == 12.5
    assert total["attended"]["keys"] == pytest.approx((1 + 2 + 22 * 3) / 24)
    assert total["topk"][2] == {"topk": 64, "rows": 0, "mass": None, "entropy": None}
    assert [entry["broken"] for entry in total["bound"]] == [0, 0]
    assert 0 < total["output_entropy"]["mean"] <= np.log(96)
    with np.load(out / "arrays.npz") as arrays:
        entropy = arrays["text/entropy"]
        assert entropy.shape == (len(layers), heads[-1]["head"] + 1, 48)
        np.testing.assert_array_equal(arrays["topks"], [4, 9, 64])
        assert total["entropy"]["mean"] == pytest.approx(entropy.mean(), rel=1e-5)
        assert heads[1]["entropy"]["median"] == pytest.approx(np.median(entropy[0, 1]), rel=1e-5)
        mass = arrays["text/mass"][0][:, :, arrays["text/visible"][0] > 4]
        assert total["topk"][0]["mass"] == pytest.approx(mass.mean(), rel=1e-5)
    report = (out / "report.html").read_text()
    assert report.count("<svg") >= 5
    for wanted in ("TopKAttention(topk=3", "mass of the best 9 keys", "1 - H / ln k", "H / ln n"):
        assert wanted in report
    assert "mass of the best 64 keys" not in report  # no row sees so many


def test_tasks_are_measured_where_they_are_answered(capsys, folder, tmp_path):
    code, printed, err = _run(
        capsys, "--model", folder, "--tasks", "mqar", "--tokens", "48", "--samples", "3", "--topks", "4",
        "--attention", "full", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    assert printed.startswith("mqar: entropy ")
    (total,) = (row for row in _rows(tmp_path) if row["level"] == "total")
    assert total["n"] == 3 * 3  # three pairs in 48 tokens, each asked once
    assert total["attended"]["mass"] == 1
    assert "By task" in (tmp_path / "report.html").read_text()


def test_a_text_and_tasks_are_told_apart_and_summed_up_together(capsys, folder, text, tmp_path):
    """With a dense prefill the rows of a text are all sparse, those of a prompt only at its end."""
    code, _, err = _run(
        capsys, "--model", folder, "--text", text, "--tasks", "mqar", "--tokens", "48", "--samples", "1",
        "--topks", "4", "--topk", "2", "--implementation", "reference", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    totals = {row["group"]: row for row in _rows(tmp_path) if row["level"] == "total"}
    assert list(totals) == ["text", "mqar", "all"]
    assert totals["all"]["n"] == totals["text"]["n"] + totals["mqar"]["n"] == 48 + 3
    assert totals["mqar"]["attended"]["keys"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "text: got none, wanted --text FILE or --tasks NAME"),
        (["--text", "nowhere.txt"], "text: got nowhere.txt, wanted an existing file"),
        (["--text", "EMPTY"], "text: got EMPTY, which is empty, wanted a text"),
        (["--text", "BYTES"], "text: got BYTES, which is no UTF-8 at byte 2, wanted UTF-8 text"),
        (["--text", "TEXT", "--tokens", "1"], "tokens: got 1, wanted at least 2"),
        (["--text", "TEXT", "--windows", "0"], "windows: got 0, wanted at least 1"),
        (["--text", "TEXT", "--topks", "4", "0"], "topks: got 0, wanted ints of at least 1"),
        (["--text", "TEXT", "--topk", "0"], "TopKAttention: topk got 0, wanted an int >= 1"),
        (
            ["--text", "TEXT", "--tokens", "65"],
            "tokens: got 65, wanted at most the model's context of 64",
        ),
        (
            ["--text", "TEXT", "--tokens", "64", "--windows", "3"],
            "text: got 176 tokens, wanted at least windows x tokens = 3 x 64 = 192",
        ),
        (["--tasks", "mqr"], "task: got 'mqr', wanted one of mqar"),
        (["--tasks", "vt", "--tokens", "20"], "vt: target_tokens got 20, wanted at least"),
        (["--text", "TEXT", "--out", "TEXT"], "out: got TEXT, wanted a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_two(
    capsys, folder, text, tmp_path, arguments, message
):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    names = {"TEXT": text, "EMPTY": str(tmp_path / "empty"), "BYTES": str(tmp_path / "bytes")}
    arguments = [names.get(argument, argument) for argument in arguments]
    for name, path in names.items():
        message = message.replace(name, path)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "runs")]
    code, printed, err = _run(capsys, "--model", folder, *out, *arguments)
    assert code == 2
    assert printed == ""
    assert err.count("\n") == 1
    assert err.startswith(f"jaxtopk: error: {message}")
    assert not (tmp_path / "runs").exists()


def test_flags_are_read_without_importing_jax():
    script = (
        "import sys\nfrom jaxtopk.cli import main\n"
        "try:\n    main(['analyze', '--help'])\nexcept SystemExit as end:\n    sys.exit(end.code or 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--topks" in done.stdout
