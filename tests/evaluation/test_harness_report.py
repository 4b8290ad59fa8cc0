"""What rows come to: means, paired comparisons, and the page that shows them; on rows made by hand."""

import re

import numpy as np
import pytest

from jaxtopk.evaluation import report
from jaxtopk.evaluation.summary import average, reference_setting, summarise

SETTINGS = {
    "full": (None, None, 1.0),
    "top-k 50%": (0.5, None, 0.5),
    "top-k 5%": (0.05, None, 0.05),
    "top-k 8": (None, 8, 0.08),
    "top-k 64": (None, 64, 0.64),
}


def _row(task, length, index, setting, score, **changes):
    ratio, topk, share = SETTINGS[setting]
    return {
        "task": task,
        "length": length,
        "index": index,
        "setting": setting,
        "ratio": ratio,
        "topk": topk,
        "metric": "match_all",
        "aggregation": task == "cwe",
        "wording": "own",
        "keys_visible": 100,
        "keys_attended": 100 * share,
        "score": score,
        "reply": f"reply {index} of <{setting}>",
        "answers": ["amber"],
        "depth": (index % 5) / 4 if task == "niah" else None,
        "meta": {"difficulty": "easy" if index % 2 else "hard", "id": str(index)},
        "prompt_tail": f"end of prompt {index}",
    } | changes


def _rows():
    rows = []
    for task in ("niah", "cwe"):
        for length in (2048, 1024):
            for index in range(20):
                for setting in SETTINGS:
                    wrong = setting == "top-k 5%" and index < 12
                    score = 0.0 if wrong or index == 19 else 1.0
                    rows.append(_row(task, length, index, setting, score))
    return rows


CONFIG = {"model": "tiny", "seed": 0}
SESSIONS = [
    {"session": "s-0", "device": "a card", "platform": "gpu", "commit": "abc", "versions": {"jax": "1"}, "command": "python -m x"},
    {"session": "s-0", "samples": 80, "seconds": {"total": 30.0, "compile": 10.0, "prefill": 4.0, "decode": 12.0, "host": 3.0, "drawing": 2.0}},
]  # fmt: skip


def test_a_cell_is_a_mean_with_an_interval_and_a_paired_comparison():
    cells = {(c.task, c.length, c.setting): c for c in summarise(_rows())}
    assert len(cells) == 2 * 2 * len(SETTINGS)
    full, sparse, same = (cells["cwe", 1024, name] for name in ("full", "top-k 5%", "top-k 50%"))
    assert (full.mean, full.samples, full.p) == (0.95, 20, None)
    assert full.low < 0.95 <= full.high
    assert sparse.mean == pytest.approx(0.35)
    assert sparse.difference == pytest.approx(-0.6)
    assert sparse.difference_low < -0.6 < sparse.difference_high < 0
    assert sparse.p == 2 / 2**12
    assert sparse.p_holm == pytest.approx(4 * sparse.p)
    assert (same.difference, same.p, same.p_holm) == (0, 1, 1)


def test_the_order_of_rows_does_not_matter_to_a_mean():
    rows = _rows()
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    cell = lambda cells: next(c for c in cells if (c.task, c.length, c.setting) == ("niah", 2048, "top-k 5%"))  # fmt: skip
    first, second = cell(summarise(rows)), cell(summarise(shuffled))
    assert (first.mean, first.low, first.p) == (second.mean, second.low, second.p)


def test_an_average_weighs_tasks_alike_whatever_their_samples():
    rows = [_row("niah", 8, index, "full", 1.0) for index in range(9)]
    rows += [_row("cwe", 8, 0, "full", 0.0)]
    (found,) = average(rows)
    assert (found.mean, found.tasks, found.relative) == (0.5, 2, 1.0)


def test_the_reference_is_full_attention_or_the_first():
    rows = [_row("niah", 8, 0, name, 1.0) for name in ("top-k 8", "top-k 64")]
    assert reference_setting(rows) == "top-k 8"
    assert reference_setting([*rows, _row("niah", 8, 0, "full", 1.0)]) == "full"
    assert summarise([]) == average([]) == []


def test_a_score_of_zero_everywhere_has_no_ratio():
    rows = [_row("niah", 8, index, name, 0.0) for index in range(3) for name in SETTINGS]
    assert {entry.relative for entry in average(rows)} == {None}
    assert "<svg" in report.page(CONFIG, rows, [])


def test_the_page_shows_tables_curves_maps_failures_and_times():
    page = report.page(CONFIG, _rows(), SESSIONS)
    for text in (
        "80 samples of 2 tasks", "At 2048 tokens the mean score is 95.0% with full, 35.0% with top-k 5%",
        "mean of tasks", "35.0 (15 to 55)*", "Share of the reference", "niah, top-k 5%", "depth of the answer",
        "difficulty: easy", "reply 0 of &lt;top-k 5%&gt;", "end of prompt 0", "amber", "12.0 s (60%)", "python -m x", "a card",
    ):  # fmt: skip
        assert text in page, text
    assert "id: 3" not in page  # a property that is different for every sample is no group
    assert page.count("<svg") == 1 + 2 + 2  # means, tasks by ratio and by number, five maps
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert [link for link in links if not link.startswith("#")] == []


def test_failures_are_what_a_setting_lost_one_of_each_task_first():
    page = report.page(CONFIG, _rows(), [])
    order = re.findall(r"<p>(\w+) at (\d+) tokens, sample (\d+):</p>", page)
    assert order[:2] == [("cwe", "1024", "0"), ("niah", "1024", "0")]
    assert len(order) == 12
    assert "sample 19" not in page  # all settings failed it alike


def test_one_setting_and_one_task_make_a_page_too():
    rows = [_row("cwe", 8, index, "full", index % 2) for index in range(4)]
    page = report.page(CONFIG, rows, [])
    assert "sample 0" in page
    assert "<svg" not in page
    with pytest.raises(ValueError, match="rows: got none"):
        report.page(CONFIG, [], [])


def test_many_depths_are_binned():
    rows = [_row("niah", 8, index, "full", 1.0, depth=index / 99) for index in range(100)]
    page = report.page(CONFIG, rows, [])
    assert ">5%</text>" in page
    assert ">95%</text>" in page
