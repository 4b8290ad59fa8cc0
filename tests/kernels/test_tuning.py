"""Tuned tables: kernels look into them, and the search fills them with what is right, faster, and kept over a kill."""

import contextlib
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.core import block_sizes
from pallas_kernels.tuning import __main__ as command
from pallas_kernels.tuning import search, tables, timer, workloads
from pallas_kernels.tuning.shapes import CacheSizes, IndexSizes
from pallas_kernels.tuning.timer import Timing


def cache(**sizes):
    return CacheSizes(heads=4, kv_heads=2, head_size=64, **sizes)


def indexer(op, **options):
    index = IndexSizes(batch=1, keys=1024, index_heads=8, index_size=64)
    return workloads.indexer(op, "tiny", index, rows=4, **options)


# A workload, an implementation, and sizes that the heuristic does not choose.
LOOKUPS = {
    "topk_select-gpu": (workloads.select("tiny", rows=3, keys=1500, topk=7), "mosaic_gpu", {"block_s": 512}),
    "topk_select-gpu-split": (workloads.select("tiny", rows=2, keys=40_000, topk=7), "mosaic_gpu", {"num_splits": 3}),
    "decode-gpu": (workloads.decode("tiny", cache(batch=2, keys=600), topk=300), "mosaic_gpu", {"num_splits": 2}),
    "decode-gpu-lists": (workloads.decode("tiny", cache(batch=2, keys=600), topk=300), "mosaic_gpu", {"list_splits": 2}),
    "gather-gpu": (workloads.gather("tiny", cache(batch=1, keys=900), rows=1, slots=300), "mosaic_gpu", {"num_splits": 2}),
    "indexer_scores-gpu": (indexer("indexer_scores"), "mosaic_gpu", {"block_q": 2}),
    "indexer_select-gpu": (indexer("indexer_select", topk=9), "mosaic_gpu", {"num_splits": 3}),
    "topk_select-tpu": (workloads.select("tiny", rows=20, keys=300, topk=7), "mosaic_tpu", {"block_rows": 8}),
    "decode-tpu": (workloads.decode("tiny", cache(batch=2, keys=600), topk=9), "mosaic_tpu", {"block_kv": 128}),
    "indexer_select-tpu": (indexer("indexer_select", topk=9), "mosaic_tpu", {"block_kv": 256}),
    "knn-tpu": (workloads.neighbours("tiny", batch=1, rows=20, keys=40, wanted=4), "mosaic_tpu", {"block_q": 8}),
    "topk_attention-xla": (workloads.attention("tiny", CacheSizes(batch=1, keys=40), topk=5), "xla", {"block_q": 8}),
    "gather-xla": (workloads.gather("tiny", cache(batch=1, keys=40), rows=9, slots=5), "xla", {"block_q": 2}),
    "indexer_scores-xla": (indexer("indexer_scores"), "xla", {"block_q": 2}),
    "indexer_select-xla": (indexer("indexer_select", topk=9), "xla", {"block_q": 2}),
    "knn-xla": (workloads.neighbours("tiny", batch=2, rows=9, keys=40, wanted=4), "xla", {"block_q": 2}),
}  # fmt: skip


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """An empty folder of tables, in the place of the package's."""
    monkeypatch.setattr(block_sizes, "_TUNED", tmp_path)
    block_sizes.forget_tables()
    yield tmp_path
    block_sizes.forget_tables()


def write(tuned, workload, key, sizes, *, device="cpu"):
    tables.Table(tuned / device, workload.op).put(key, {"block_sizes": sizes})
    block_sizes.forget_tables()


def program(workload, implementation, sizes=None):
    """The text of the program that the op makes; with sizes None it looks into the table."""
    explicit = None if sizes is None else workload.cls(**sizes)
    arguments = jax.eval_shape(lambda: workload.draw(jax.random.key(0), False))
    fn = lambda *arguments: workload.run(
        *arguments, implementation=implementation, block_sizes=explicit
    )
    with interpreted(implementation):
        return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(fn)(*arguments)))


def interpreted(implementation):
    return contextlib.nullcontext() if implementation == "xla" else pallas_kernels.interpret_mode()


@pytest.mark.parametrize(
    ("workload", "implementation", "sizes"), LOOKUPS.values(), ids=LOOKUPS.keys()
)
def test_an_op_takes_its_sizes_from_the_table_unless_it_is_given_some(
    workload, implementation, sizes, tuned
):
    with interpreted(implementation):
        key = search.key_of(workload, implementation)
    assert key is not None
    heuristic = program(workload, implementation)
    write(tuned, workload, key, sizes)
    tabled = program(workload, implementation)
    assert tabled != heuristic
    assert tabled == program(workload, implementation, sizes)
    assert program(workload, implementation, {}) == heuristic  # given, if only to leave it open


def test_the_table_of_another_device_is_not_looked_at(tuned):
    workload, implementation, sizes = LOOKUPS["knn-xla"]
    key = search.key_of(workload, implementation)
    write(tuned, workload, key, sizes, device="another_device")
    assert program(workload, implementation) == program(workload, implementation, {})
    write(tuned, workload, key, sizes, device="cpu")
    assert program(workload, implementation) == program(workload, implementation, sizes)


def test_every_choice_is_a_field_of_its_op_and_every_workload_has_one():
    for (op, _), choices in workloads.CHOICES.items():
        cls = next(workload.cls for workload in workloads.WORKLOADS if workload.op == op)
        for name, values in choices.items():
            cls(**{name: values[0]})
    for workload in workloads.WORKLOADS:
        assert workload.group in workloads.GROUPS
        assert any(workload.choices(name) for name in ("mosaic_gpu", "mosaic_tpu", "xla"))
    assert len({workload.name for workload in workloads.WORKLOADS}) == len(workloads.WORKLOADS)


ENTRY = {"implementation": "xla", "dtype": "float32", "bucket": {"s": 8}, "block_sizes": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "got JSONDecodeError"),
        ("[]", "got TypeError"),
        ('{"rows": []}', "got KeyError"),
        (json.dumps({"entries": [ENTRY, 3]}), "entry 1 got 3, wanted implementation"),
        (json.dumps({"entries": [{**ENTRY, "bucket": {"s": 9}}]}), "entry 0 .*powers of two"),
        (json.dumps({"entries": [{**ENTRY, "block_sizes": 3}]}), "entry 0 .*sizes by name"),
        (json.dumps({"entries": [ENTRY, ENTRY]}), "entry 1 got Key.* a second time"),
    ],
    ids=["half", "list", "no-entries", "no-entry", "bucket", "sizes", "twice"],
)
def test_a_broken_table_is_refused_by_file_and_entry(tuned, text, message):
    (tuned / "cpu").mkdir()
    (tuned / "cpu" / "knn_indices.json").write_text(text)
    workload, implementation, _ = LOOKUPS["knn-xla"]
    with pytest.raises(ValueError, match=rf"cpu/knn_indices\.json: {message}"):
        program(workload, implementation)


@pytest.mark.parametrize("sizes", [{"block_p": 3}, {"block_q": 0}], ids=["name", "value"])
def test_sizes_that_are_not_the_ops_are_refused_by_file_and_entry(tuned, sizes):
    workload, implementation, _ = LOOKUPS["knn-xla"]
    key = search.key_of(workload, implementation)
    write(tuned, workload, key, sizes)
    with pytest.raises(ValueError, match=r"knn_indices\.json: entry of Key.* got block_sizes"):
        program(workload, implementation)


COMMITTED = sorted(block_sizes._TUNED.glob("*/*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_committed_table_is_of_todays_workloads_and_sizes(path):
    known = {workload.name: workload for workload in workloads.WORKLOADS}
    entries = block_sizes.read_table(path)
    assert entries
    for key, entry in entries.items():
        workload = known[entry["workload"]]
        assert workload.op == path.stem
        choices = workload.choices(key.implementation)
        assert all(value in choices[name] for name, value in entry["block_sizes"].items())
        workload.cls(**entry["block_sizes"])
        assert entry["median_us"] <= entry["heuristic_us"]
        assert {"jax", "backend"} <= entry["versions"].keys()
        assert len(entry["commit"]) >= 7


# ------------------------------------------------------------------------------------------------------------ search
KNN = LOOKUPS["knn-xla"][0]


@pytest.fixture
def clock(monkeypatch):
    """Times by the block_q of a candidate instead of a clock; returns the times [ms], None being the heuristic."""
    times = {None: 10.0, 8: 10.0, 2: 10.0, 4: 10.0}
    monkeypatch.setitem(workloads.CHOICES, ("knn_indices", "xla"), {"block_q": (8, 4, 2)})

    def device_time(fn, inputs, **_):
        sizes = fn.__wrapped__.keywords["block_sizes"]
        jax.block_until_ready(fn(*inputs[0]))
        ms = times[sizes.block_q]
        return Timing(ms, ms, ms, 3, 8, 0.0, "chain")

    monkeypatch.setattr(timer, "device_time", device_time)
    return times


def searched(workload=KNN):
    return search.search(workload, "xla", search.key_of(workload, "xla"))


def test_the_fastest_candidate_wins_if_it_is_clearly_faster(clock):
    clock[4], clock[2] = 9.8, 9.9
    found = searched()
    assert (found.sizes, found.best.median, found.tried) == ({}, 10.0, 4)
    clock[4], clock[2] = 9.0, 8.0
    found = searched()
    assert (found.sizes, found.best.median, found.heuristic.median) == ({"block_q": 2}, 8.0, 10.0)
    assert found.key == search.key_of(KNN, "xla")


def test_a_search_leaves_a_direction_after_two_values_that_are_no_faster(clock, monkeypatch):
    values = (1, 2, 3, 4, 5, 6, 7)
    monkeypatch.setitem(workloads.CHOICES, ("knn_indices", "xla"), {"block_q": values})
    clock |= {4: 5.0, 5: 5.0, 6: 6.0, 7: 1.0, 3: 4.0, 2: 4.5, 1: 2.0}
    told = []
    found = search.search(
        KNN,
        "xla",
        search.key_of(KNN, "xla"),
        on_candidate=lambda sizes, *_: told.append(sizes.get("block_q")),
    )
    assert told == [None, 4, 5, 6, 3, 2, 1]
    assert found.sizes == {"block_q": 1}
    clock |= {6: 4.9}
    assert searched().sizes == {"block_q": 7}


def test_a_win_that_does_not_happen_again_is_none(clock, monkeypatch):
    clock[4] = 5.0
    again = search._Trials.again
    monkeypatch.setattr(
        search._Trials, "again", lambda self, sizes: clock.update({4: 10.0}) or again(self, sizes)
    )
    assert searched().sizes == {}


def test_a_program_is_timed_once(clock, monkeypatch):
    monkeypatch.setitem(workloads.CHOICES, ("knn_indices", "xla"), {"block_q": (16, 32, 64)})
    assert searched().tried == 1  # all are more than there are rows, as the heuristic's are


def test_candidates_that_are_wrong_or_refused_are_left_out(clock):
    clock[2] = clock[4] = clock[8] = 1.0

    def run(*arguments, block_sizes, **options):
        if block_sizes.block_q == 4:
            raise NotImplementedError("not four")
        indices = KNN.run(*arguments, block_sizes=block_sizes, **options)
        return indices.at[0, 0, 0].add(1) if block_sizes.block_q == 2 else indices

    found = searched(_with(run=run))
    assert (found.sizes, found.refused, len(found.wrong)) == ({"block_q": 8}, 1, 1)
    assert found.wrong[0].startswith("{'block_q': 2}: ")


def test_a_wrong_heuristic_is_an_error(clock):
    def run(*arguments, implementation, block_sizes):
        indices = KNN.run(*arguments, implementation="xla", block_sizes=block_sizes)
        return indices if implementation == "xla" else indices + 1

    key = search.key_of(KNN, "xla")
    with pytest.raises(RuntimeError, match="wanted the heuristic's sizes to work"):
        search.search(_with(run=run), "mosaic_tpu", key)


def _with(**changes):
    return dataclasses.replace(KNN, **changes)


def test_an_output_may_differ_by_a_rounding_only():
    wanted = jnp.asarray([1.0, 2.0, -jnp.inf], jnp.bfloat16)
    search._check_same(wanted * jnp.bfloat16(1.01), wanted)
    for flaw in (wanted.at[0].add(0.1), wanted.at[2].set(0.0), wanted.at[1].set(jnp.nan)):
        with pytest.raises(AssertionError):
            search._check_same(flaw, wanted)


# ----------------------------------------------------------------------------------------------------------- command
def tune(capsys, *arguments):
    code = command.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_fills_the_table_and_the_next_one_leaves_it(clock, tuned, capsys):
    clock[4] = 5.0
    arguments = ("--ops", "knn_indices", "--workloads", "tiny", "--out", str(tuned))
    code, out, _ = tune(capsys, *arguments)
    assert code == 0
    assert "[1/1] xla, tiny: knn_indices, B 2, T 9, S 40, k 4, float32: block_q 4, 5000 us" in out
    (entry,) = block_sizes.read_table(tuned / "cpu" / "knn_indices.json").values()
    assert entry["block_sizes"] == {"block_q": 4}
    assert entry["median_us"] == 5000.0
    assert entry["heuristic_us"] == 10000.0
    assert entry["versions"]["jax"] == jax.__version__
    block_sizes.forget_tables()
    assert program(KNN, "xla") == program(KNN, "xla", {"block_q": 4})
    clock[4], clock[2] = 10.0, 5.0
    assert "in the table" in tune(capsys, *arguments)[1]
    assert "block_q 2" in tune(capsys, *arguments, "--again")[1]


def test_a_table_is_whole_whenever_a_run_is_stopped(tuned, monkeypatch):
    table = tables.Table(tuned, "knn_indices")
    key = search.key_of(KNN, "xla")
    table.put(key, {"block_sizes": {"block_q": 2}, "workload": "a", "complete": True})
    before = table.path.read_text()

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tables.pathlib.Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            table.put(key, {"block_sizes": {"block_q": 4}, "workload": "a", "complete": True})
    assert table.path.read_text() == before
    assert [path.name for path in tuned.iterdir()] == ["knn_indices.json"]
    again = tables.Table(tuned, "knn_indices")
    assert again.measured(key, "a")
    assert not again.measured(key, "b")
    assert not again.measured(key._replace(dtype="bfloat16"), "a")
    monkeypatch.setattr(tables, "versions", lambda: {"jax": "0.0"})
    assert not again.measured(key, "a")


def test_time_out_leaves_workloads_out(clock, tuned, capsys):
    code, out, _ = tune(
        capsys, "--workloads", "tiny: knn", "--out", str(tuned), "--budget-seconds", "-1"
    )
    assert (code, list(tuned.iterdir())) == (0, [])
    assert "left out" in out


def test_a_search_that_is_out_of_time_files_the_best_until_then_and_is_made_again(
    clock, tuned, capsys, monkeypatch
):
    clock[4], clock[8] = 5.0, 1.0
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    on_candidate = command._Progress.candidate

    def tick(self, *told):  # a second each: the heuristic, 4 and 2, and then time is over
        now[0] += 1.0
        on_candidate(self, *told)

    monkeypatch.setattr(command._Progress, "candidate", tick)
    arguments = ("--workloads", "tiny: knn", "--out", str(tuned), "--budget-seconds", "2.5")
    code, out, _ = tune(capsys, *arguments)
    assert code == 0
    assert "block_q 4, 5000 us" in out
    assert "not complete" in out
    (entry,) = block_sizes.read_table(tuned / "cpu" / "knn_indices.json").values()
    assert (entry["block_sizes"], entry["complete"]) == ({"block_q": 4}, False)
    code, out, _ = tune(capsys, *arguments[:-1], "100")
    assert "block_q 8, 1000 us" in out
    assert "not complete" not in out
    assert "in the table" in tune(capsys, *arguments)[1]


def test_a_log_without_a_terminal_says_now_and_then_what_is_tried(
    clock, tuned, capsys, monkeypatch
):
    monkeypatch.setattr(command, "_QUIET_S", -1.0)
    _, _, err = tune(capsys, "--workloads", "tiny: knn", "--out", str(tuned))
    assert "float32: compiling" in err
    assert "float32: heuristic: 1e+04 us" in err
    assert "float32: block_q 8: 1e+04 us, best 1e+04 us" in err


def test_the_list_is_what_matches(capsys):
    code, out, _ = tune(capsys, "--list", "--workloads", "S 131072", "--ops", "gather_attention")
    assert code == 0
    assert out.splitlines() == [
        f"decode: gather_attention, B {b}, T 1, S 131072, N 32, K 8, H 128, k 2048, bfloat16"
        for b in (8, 1)
    ]
    assert "tiny" not in tune(capsys, "--list")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "topk"], "error: ops: got 'topk', wanted one of topk_decode_attention, "),
        (["--workloads", "huge"], "error: workloads: got huge, wanted expressions that match"),
        (
            ["--ops", "topk_select", "--implementations", "xla"],
            "error: implementations: got xla, wanted one that has a choice in topk_select",
        ),
    ],
    ids=["op", "workload", "no-choice"],
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, arguments, message):
    code, out, err = tune(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)


def test_a_broken_table_is_not_written_over(tuned, capsys):
    (tuned / "cpu").mkdir()
    (tuned / "cpu" / "knn_indices.json").write_text("{")
    code, _, err = tune(capsys, "--workloads", "tiny: knn", "--out", str(tuned))
    assert code == 2
    assert "knn_indices.json: got JSONDecodeError" in err
    assert (tuned / "cpu" / "knn_indices.json").read_text() == "{"


def test_a_candidate_is_timed_for_real(monkeypatch):
    monkeypatch.setitem(workloads.CHOICES, ("knn_indices", "xla"), {"block_q": (2,)})
    found = search.search(KNN, "xla", search.key_of(KNN, "xla"), rounds=3, round_ms=0.5)
    assert (found.tried, found.wrong) == (2, ())
    assert found.best.median > 0
