"""Run folders: files are whole or absent, JSON is strict, provenance names no machine."""

import dataclasses
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtopk.analysis import provenance
from jaxtopk.analysis.run_folder import RunFolder, jsonable, jsonl, write_text
from jaxtopk.attention import TopKAttention


def test_a_file_is_replaced_whole_and_leaves_no_neighbour(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    write_text(path, "one\n")
    write_text(path, "two\n")
    assert path.read_text() == "two\n"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_text(path, "old")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_results_with_a_number_that_is_not_finite_are_not_written(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="Out of range float"):
        folder.write_results([{"loss": 1.0}, {"loss": float("nan")}])
    assert list(tmp_path.iterdir()) == []


def test_configs_name_the_class_of_each_part(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config(TopKAttention(topk=3))
    written = json.loads(folder.config.read_text())
    assert written["type"] == "TopKAttention"
    assert written["topk"] == 3


def test_what_json_does_not_know_is_turned_or_refused():
    row = {
        "a": np.float32(0.1),
        "b": jnp.int32(3),
        "c": (1, pathlib.Path("x")),
        "d": None,
        "e": True,
    }
    assert jsonable(row) == {"a": 0.1, "b": 3, "c": [1, "x"], "d": None, "e": True}
    assert jsonl([{"x": 1 / 3}]) == '{"x": 0.3333333}\n'
    with pytest.raises(ValueError, match="got a ndarray"):
        jsonable({"a": np.zeros(2)})


def test_a_folder_that_cannot_be_written_is_found_out_early(tmp_path):
    RunFolder(tmp_path / "a" / "b").check()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="out: got"):
            RunFolder(path).check()


def test_commands_are_written_without_the_folders_of_a_machine():
    argv = [
        "/opt/venv/bin/python",
        "-m",
        "experiments.x",
        "--out",
        "/home/someone/runs",
        "--model=/data/m.gguf",
        "--n=3",
    ]
    assert provenance.command(argv) == "python -m experiments.x --out <runs> --model=<m.gguf> --n=3"


def test_provenance_is_complete_and_the_commit_can_be_stated(monkeypatch):
    monkeypatch.setenv("JAXTOPK_COMMIT", "abc123")
    provenance.commit.cache_clear()
    found = provenance.provenance()
    provenance.commit.cache_clear()
    assert found["commit"] == "abc123"
    assert found["platform"] in ("cpu", "gpu", "tpu")
    assert set(found["versions"]) >= {"python", "jax", "jaxlib"}
    assert all(found.values())
    json.dumps(found)


def test_a_copy_without_history_has_an_unknown_commit(monkeypatch):
    def no_git(*arguments):
        raise FileNotFoundError("git")

    monkeypatch.delenv("JAXTOPK_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "_git", no_git)
    provenance.commit.cache_clear()
    assert provenance.commit() == "unknown"
    provenance.commit.cache_clear()


def test_changes_beside_the_commit_are_said(monkeypatch):
    monkeypatch.delenv("JAXTOPK_COMMIT", raising=False)
    answers = {"rev-parse": "123456789abc", "status": " M README.md"}
    monkeypatch.setattr(provenance, "_git", lambda folder, *arguments: answers[arguments[0]])
    provenance.commit.cache_clear()
    assert provenance.commit() == "123456789abc+changes"
    provenance.commit.cache_clear()


def test_nested_dataclasses_become_nested_objects():
    @dataclasses.dataclass
    class Outer:
        inner: TopKAttention

    assert jsonable(Outer(TopKAttention(topk=1)))["inner"]["type"] == "TopKAttention"
