"""Pages show what the result files say, and the check notices when they do not."""

import json
import pathlib

import pytest

from experiments import results, tables
from experiments.quickstart import tables as quickstart
from jaxtopk.analysis.run_folder import jsonl

ROW = dict.fromkeys(results.REQUIRED, "x")


def test_every_page_and_figure_is_what_its_result_files_say():
    assert tables.stale() == [], "run: python -m experiments.tables"


def test_committed_results_say_how_they_were_made_and_name_no_folder_of_a_machine():
    for path in quickstart.RESULTS.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert row["commit"] not in ("", "unknown")
            assert "/home" not in line
            assert "/root" not in line
            assert "/tmp" not in line


def test_the_check_notices_a_page_that_differs(monkeypatch):
    page = tables.PAGES["experiments/quickstart/README.md"]
    monkeypatch.setitem(page, "tables", lambda: "| other | numbers |")
    assert "experiments/quickstart/README.md" in tables.stale()


def test_what_stands_between_the_markers_is_replaced_and_nothing_else():
    text = "a\n<!-- generated: t -->\nold\n<!-- end: t -->\nb\n<!-- generated: u -->\n<!-- end: u -->\n"
    written = tables.replace(text, "t", "new\nlines")
    assert written == text.replace("old", "new\nlines")
    assert tables.between(written, "t") == "new\nlines"
    assert tables.replace(written, "t", "new\nlines") == written
    assert tables.between(tables.replace(text, "u", "x"), "u") == "x"


@pytest.mark.parametrize(
    "text",
    ["no markers", "<!-- generated: t -->\n", 2 * "<!-- generated: t -->\n<!-- end: t -->\n"],
    ids=["none", "no end", "twice"],
)
def test_a_page_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(ValueError, match="markers of 't': got"):
        tables.replace(text, "t", "x")


def test_rows_come_back_as_written_in_the_order_of_file_names(tmp_path):
    (tmp_path / "b.jsonl").write_text(jsonl([ROW | {"value": 2}]))
    (tmp_path / "a.jsonl").write_text(jsonl([ROW | {"value": 0.125}, ROW | {"value": 1}]))
    assert [row["value"] for row in results.read(tmp_path)] == [0.125, 1, 2]
    assert results.read(pathlib.Path(tmp_path / "absent")) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl line 2: got Expecting property name"),
        ("[1]", "a.jsonl line 2: got list"),
        (json.dumps(ROW | {"commit": ""}), "a.jsonl line 2: got no commit"),
        (json.dumps({"n": 1}), "a.jsonl line 2: got no study, device"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(jsonl([ROW]) + line + "\n")
    with pytest.raises(ValueError, match=message):
        results.read(tmp_path)


def test_groups_keep_the_order_of_first_appearance():
    rows = [{"a": 2, "b": 1}, {"a": 1, "b": 1}, {"a": 2, "b": 2}]
    assert list(results.groups(rows, "a").items()) == [
        ((2,), [rows[0], rows[2]]),
        ((1,), [rows[1]]),
    ]
    assert len(results.groups(rows, "a", "b")) == 3
