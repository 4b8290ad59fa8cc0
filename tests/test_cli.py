"""The command line: what it lists, what it prints and writes, and how it refuses bad input."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import tokenizers

from jaxtopk import cli

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SHORT = ["--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny random model of 96 tokens with a tokenizer of one token a printable ASCII character, and an end token."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "smollm2" / name, folder)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={chr(32 + index): index for index in range(95)}, merges=[])
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": "<end>",
        "chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["generate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _refusal(capsys, *arguments: str) -> str:
    """Runs a command that must fail, and returns its only line."""
    code, out, err = _run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("jaxtopk: error: ")
    return err.removeprefix("jaxtopk: error: ").rstrip("\n")


def test_help_lists_the_commands_that_exist_without_importing_jax():
    script = "import sys; from jaxtopk.cli import main; code = main(['--help']); sys.exit(code or 'jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    assert "simulate" not in done.stdout  # promised, but not there yet


def test_flags_are_read_without_importing_jax():
    script = (
        "import sys\nfrom jaxtopk.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit as end:\n    sys.exit(end.code or 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--topk-ratio" in done.stdout


def test_an_unknown_command_is_refused_and_the_known_ones_named(capsys):
    assert cli.main(["simulat"]) == 2
    assert (
        capsys.readouterr().err
        == "jaxtopk: error: command: got 'simulat', wanted one of generate, analyze, evaluate, bench\n"
    )


def test_no_command_prints_the_usage_and_fails(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: jaxtopk")


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "x", "--topp", "3"])
    assert caught.value.code == 2


def test_text_goes_to_standard_output_and_the_rest_to_standard_error(capsys, folder):
    code, out, err = _run(capsys, "hello", "--model", folder, *SHORT)
    assert code == 0
    assert len(out) == 6  # five characters and the end of the line
    assert "tokens" in err


def test_every_way_to_give_a_prompt_gives_the_same_text(capsys, folder, tmp_path, monkeypatch):
    expected = _run(capsys, "hello", "--model", folder, *SHORT)[1]
    (tmp_path / "prompt.txt").write_text("hello")
    assert _run(capsys, "--prompt", "hello", "--model", folder, *SHORT)[1] == expected
    assert (
        _run(capsys, "--prompt-file", str(tmp_path / "prompt.txt"), "--model", folder, *SHORT)[1]
        == expected
    )
    assert _run(capsys, "hello", "--model", folder, "--stream", *SHORT)[1] == expected
    with (tmp_path / "prompt.txt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert _run(capsys, "--model", folder, *SHORT)[1] == expected
    chat = _run(capsys, "[hello]", "--model", folder, *SHORT)[1]
    assert _run(capsys, "hello", "--chat", "--model", folder, *SHORT)[1] == chat


def test_flags_of_attention_reach_the_model(capsys, folder):
    full = _run(capsys, "a longer prompt", "--model", folder, "--max-new-tokens", "12")[1]
    everything = _run(
        capsys,
        "a longer prompt",
        "--model",
        folder,
        "--max-new-tokens",
        "12",
        "--topk-ratio",
        "1.0",
    )[1]
    sparse = _run(
        capsys, "a longer prompt", "--model", folder, "--max-new-tokens", "12", "--topk", "1"
    )[1]
    exempt = _run(
        capsys, "a longer prompt", "--model", folder, "--max-new-tokens", "12", "--topk", "1", "--layers", "2", "0",
        "--implementation", "reference", "--scope", "group", "--sparse-suffix", "3",
    )[1]  # fmt: skip
    assert everything == full
    assert len({full, sparse, exempt}) == 3


def test_a_run_folder_holds_config_results_and_a_report(capsys, folder, tmp_path):
    out = tmp_path / "runs" / "first"
    code, text, _ = _run(
        capsys, "hello", "good <b>bye", "--model", folder, "--topk", "3", "--seed", "4", "--temperature", "0.9",
        "--out", str(out), *SHORT,
    )  # fmt: skip
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "report.html",
        "results.jsonl",
    ]
    config = json.loads((out / "config.json").read_text())
    assert (config["seed"], config["attention"]["topk"], config["temperature"]) == (4, 3, 0.9)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["hello", "good <b>bye"]
    assert all(
        row["completion"] in text and 0 < row["new_tokens"] == len(row["tokens"]) for row in rows
    )
    assert rows[0]["attention"]["topk"] == 3
    report = (out / "report.html").read_text()
    assert "good &lt;b&gt;bye" in report


def test_a_run_that_fails_leaves_no_folder(capsys, folder, tmp_path):
    message = _refusal(capsys, "x" * 70, "--model", folder, "--out", str(tmp_path / "runs"), *SHORT)
    assert (
        message
        == "prompt 0: got 70 tokens + 5 new ones = 75, wanted at most the model's context of 64"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--topk", "0"], "TopKAttention: topk got 0, wanted an int >= 1"),
        (
            ["x", "--topk-ratio", "1.5"],
            "TopKAttention: topk_ratio got 1.5, wanted a number in (0, 1]",
        ),
        (
            ["x", "--topk", "3", "--topk-ratio", "0.5"],
            "TopKAttention: got topk 3 and topk_ratio 0.5",
        ),
        (["x", "--attention", "topk"], "TopKAttention: got topk None and topk_ratio None"),
        (
            ["x", "--scope", "group", "--layers", "1"],
            "scope, layers: got a value for full attention",
        ),
        (["x", "--attention", "full", "--topk", "3"], "topk: got a value for full attention"),
        (["x", "--topk", "3", "--layers", "9"], "TopKAttention: layers got 9, wanted 0 to 2"),
        (
            ["x", "--topk", "3", "--implementation", "cuda"],
            "topk_decode_attention: implementation got 'cuda'",
        ),
        (
            ["x", "--topk", "3", "--implementation", "mosaic_tpu"],
            "topk_decode_attention: implementation 'mosaic_tpu' got device platform 'cpu'",
        ),
        (["x", "--temperature", "-1"], "temperature: got -1.0, wanted a number of at least 0"),
        (["x", "--max-new-tokens", "0"], "max_new_tokens: got 0, wanted an int of at least 1"),
        ([""], "prompt 0: got an empty one, wanted at least one token"),
        (["x", "y", "--stream"], "stream: got 2 prompts, wanted one"),
        (["--prompt-file", "nowhere.txt"], "prompt_file: got nowhere.txt, wanted an existing file"),
        (["x", "--model", "nowhere.gguf"], "model: got 'nowhere.gguf', wanted a preset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, folder, arguments, message):
    model = [] if "--model" in arguments else ["--model", folder]
    assert _refusal(capsys, *model, *SHORT, *arguments).startswith(message)


def test_a_prompt_that_is_no_text_is_refused(capsys, tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"ab\xff")
    message = _refusal(capsys, "--prompt-file", str(tmp_path / "prompt.bin"))
    assert message.endswith("got bytes that are no UTF-8 at 2, wanted UTF-8 text")


def test_a_truncated_model_is_refused(capsys, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in _refusal(capsys, "x", "--model", str(tmp_path / "cut"))


def test_an_output_path_that_is_a_file_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "out: got" in _refusal(
        capsys, "x", "--model", "never looked at", "--out", str(tmp_path / "taken")
    )


def test_the_traceback_is_there_on_request(capsys, monkeypatch):
    monkeypatch.setenv("JAXTOPK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="topk got 0"):
        cli.main(["generate", "x", "--topk", "0"])
