"""What the studies' commands share: the one line of bad input, flags that were given, the clock and the table."""

import json
import types

import pytest

from experiments import command, results


def test_bad_input_is_one_line_and_exit_code_two_unless_a_traceback_is_wanted(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended, command.bad_input_in_one_line("study"):
        raise ValueError("rounds: got 0,\n  wanted at least 1")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "study: error: rounds: got 0, wanted at least 1\n"
    with pytest.raises(RuntimeError), command.bad_input_in_one_line("study"):
        raise RuntimeError("not the input's fault")
    monkeypatch.setenv("JAXTOPK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="rounds"), command.bad_input_in_one_line("study"):
        raise ValueError("rounds: got 0")


def test_flags_that_were_given_are_those_with_a_value():
    arguments = types.SimpleNamespace(rounds=0, seed=None, groups=(), other=3)
    assert command.given(arguments, "rounds", "seed", "groups") == {"rounds": 0, "groups": ()}


def test_a_clock_is_over_after_its_budget_and_never_without_one(capsys, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    clock, endless = command.Clock(3.0), command.Clock(None)
    now[0] = 53.0
    assert not clock.is_over
    now[0] = 53.5
    assert clock.is_over
    assert not endless.is_over
    clock.say("select: 1 ms")
    assert capsys.readouterr().out == "[   3.5 s] select: 1 ms\n"


def test_a_table_keeps_its_words_and_brackets_however_narrow_the_page(capsys):
    command.print_table(
        "Times",
        ["op", "ms [ms]", "a long header of numbers"],
        [["topk_select [R 64]", "1.25", "2"]],
        words=1,
        caption="of [one] run",
        notes=["xla: failed [x]"],
        width=40,
    )
    told = capsys.readouterr().out
    for text in ("Times", "topk_select [R 64]", "[ms]", "1.25", "of [one] run", "xla: failed [x]"):
        assert text in told
    assert max(map(len, told.splitlines())) <= 40


def test_rows_are_added_to_their_file_and_returned_as_read_back(tmp_path):
    path = tmp_path / "results.jsonl"
    assert results.append(path, [{"n": (1, 2)}]) == [{"n": [1, 2]}]
    assert results.append(path, [{"n": 0.1 + 0.2}, {"n": 3}]) == [{"n": 0.3}, {"n": 3}]
    lines = path.read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [[1, 2], 0.3, 3]
