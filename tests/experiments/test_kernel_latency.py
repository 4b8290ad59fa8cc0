"""The latency study in tiny sizes on a CPU: its arithmetic, what it refuses to time, and that calls wait for one another."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from experiments import results
from experiments.kernel_latency import measure, oracles, peers, report, run, workloads
from experiments.kernel_latency.config import KernelLatencyConfig
from pallas_kernels import TopKSelection, topk_select
from pallas_kernels.tuning import timer

H200 = measure.FIXED["NVIDIA H200"]
RATES = measure.Rates(read=1e10, copy=1e10, matmul=1e11)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernel_latency") / "out"
    arguments = run.Arguments(
        preset="tiny", groups=("main",), implementations=("reference",), out=out
    )
    return out, run.run(arguments)


def test_every_op_is_checked_timed_and_written_down(finished):
    out, rows = finished
    read = results.read(out)
    assert len(read) == len(rows)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "results.jsonl",
        "report.html",
    }
    assert [row["op"] for row in read if row["role"] == "probe"] == ["read", "copy", "matmul"]
    ours = [row for row in read if row["role"] == "ours"]
    assert [row["status"] for row in ours] == ["ok"] * 6, [row["message"] for row in ours]
    for row in ours:
        assert row["ms"] > 0
        assert row["share_of_limit"] == pytest.approx(row["limit_ms"] / row["ms"], rel=1e-5)
        assert row["n"] > 0
        assert row["in_cache"]
    names = {row["implementation"]: row["status"] for row in read if row["role"] == "peer"}
    assert names["lax.top_k"] == names["einsum + lax.top_k"] == names["x[idx] alone"] == "ok"
    assert names["cuDNN, all keys"] == "absent"


def test_what_is_absent_has_a_reason_and_no_time(finished):
    absent = [row for row in finished[1] if row["status"] == "absent"]
    assert {row["message"] for row in absent} >= {"cuDNN needs an NVIDIA GPU"}
    assert all(row["ms"] is None and row["n"] == 0 for row in absent)


def test_the_report_is_one_page_with_every_op_and_reason(finished):
    page = (finished[0] / "report.html").read_text()
    for op in ("topk_decode_attention", "gather_attention", "indexer_select"):
        assert op in page
    assert "cuDNN needs an NVIDIA GPU" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_second_run_adds_its_rows_and_time_out_leaves_workloads_out(finished, capsys):
    out, rows = finished
    before = len(results.read(out))
    added = run.run(run.Arguments(preset="tiny", out=out, budget_seconds=0.0))
    assert [row["role"] for row in added] == ["probe"] * 3
    assert "were left out" in capsys.readouterr().out
    assert len(results.read(out)) == before + 3


def test_the_list_is_what_matches(capsys):
    assert run.run(run.Arguments(preset="gpu", only="select, R 32.*k 512", list=True)) == []
    assert capsys.readouterr().out.strip() == "budget: topk_select, R 32, S 131072, k 512"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": "nothing like it"}, "only: got 'nothing like it' in groups main"),
        ({"only": "("}, "only: got '(', wanted a regular expression"),
        ({"groups": ("best",)}, "groups: got ('best',), wanted some of main"),
        ({"rounds": 0}, "rounds: got 0, wanted at least 1"),
        ({"implementations": ()}, "implementations: got none"),
    ],
)
def test_bad_input_is_named_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        run.run(run.Arguments(preset="tiny", out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_bytes_and_operations_are_those_counted_by_hand():
    main = {(one.op, one.name): one for one in workloads.full() if one.group == "main"}
    select = main["topk_select", "R 1024, S 131072, k 2048"]
    assert select.least_bytes == 1024 * 131072 * 4
    assert select.limit_ms(*H200) == pytest.approx(0.130, abs=5e-4)
    decode = main["topk_decode_attention", "B 8, S 131072, k 2048"]
    # Keys of 8 heads of 128 in two bytes, and 2,048 values for each of 32 query heads.
    assert decode.least_bytes == 8 * 131072 * 2048 + 8 * 32 * 2048 * 256
    assert decode.limit_ms(*H200) == pytest.approx(0.551, abs=1e-3)
    gather = main["gather_attention", "B 8, S 131072, k 2048"]
    assert gather.least_bytes == 8 * 8 * 2048 * (256 + 256 + 4)
    assert gather.limit_ms(*H200) == pytest.approx(0.016, abs=5e-4)
    indexer = main["indexer_select", "B 8, T 1, S 131072, k 2048"]
    assert indexer.limit_ms(*H200) == pytest.approx(0.065, abs=5e-4)
    copied = {one.name: one for one in workloads.full() if one.group == "quantized"}
    selected = 8 * 32 * 2048 * 2 * 256
    ranked = copied["B 8, S 131072, k 2048, int8 keys"]
    assert ranked.least_bytes == 8 * 131072 * 8 * (128 + 4) + selected
    certified = copied["B 8, S 131072, k 2048, certified"]
    assert certified.least_bytes == 8 * 131072 * 8 * (128 + 8) + selected
    whole = main["indexer_select + gather_attention", "B 8, S 131072, k 2048"]
    assert whole.limit_ms(*H200) == pytest.approx(0.081, abs=5e-4)
    prefill = main["indexer_select", "B 1, T 32768, S 32768, k 2048"]
    assert prefill.least_flops == 2 * 64 * 128 * 32768**2 // 2
    assert prefill.limit_ms(*H200) == pytest.approx(11.4, abs=0.05)  # its products, not its bytes


def test_a_ragged_batch_counts_what_it_holds():
    full = workloads.Select(rows=8, keys=131072, topk=64)
    ragged = dataclasses.replace(full, pattern="ragged")
    assert ragged.lengths.tolist()[0] == 1024
    assert ragged.lengths.tolist()[-1] == 131072
    assert ragged.least_bytes == 4 * ragged.lengths.sum()
    assert ragged.least_bytes < full.least_bytes / 3


def test_workloads_in_pages_are_right_and_notice_a_wrong_table():
    paged = {one.op: one for one in workloads.tiny() if one.group == "pages"}
    assert set(paged) == {"topk_decode_attention", "gather_attention"}
    for one in paged.values():
        arguments = one.draw(0, 2)[1]
        fn = jax.jit(one.call("xla"))
        one.check(arguments, fn(*arguments))
        with pytest.raises(AssertionError, match="out: got"):  # the other sequence's pages
            one.check(arguments, fn(*arguments[:-1], arguments[-1][::-1]))


def test_workloads_of_a_copy_are_right_and_notice_another_one():
    copied = {one.pattern: one for one in workloads.tiny() if one.group == "quantized"}
    assert set(copied) == {"int8 keys", "float8 certified"}
    for one in copied.values():
        arguments = one.draw(0, 1)[0]
        right = jax.jit(one.call("xla"))(*arguments)
        one.check_of("xla", arguments, right)
        with pytest.raises(AssertionError, match="out: got"):
            one.check_of("xla", arguments, right[::-1])
    # Ranked by the copy of the other sequence's keys; what is certified does not care.
    for pattern, one in copied.items():
        *exact, values, scale, error = one.draw(0, 1)[0]
        arguments = *exact, values, scale, error
        found = jax.jit(one.call("xla"))(*exact, values[::-1], scale[::-1], error[::-1])
        if pattern.endswith("certified"):
            one.check_of("xla", arguments, found)
            with pytest.raises(AssertionError, match="1 of 128 elements other"):
                one.check_of("xla", arguments, found.at[0, 0, 0].multiply(1.01))
        else:
            with pytest.raises(AssertionError, match="out: got"):
                one.check_of("xla", arguments, found)


def test_no_two_workloads_have_one_name():
    for listed in (workloads.full(), workloads.tiny()):
        names = [(one.op, one.name) for one in listed]
        assert len(set(names)) == len(names)
    assert {one.group for one in workloads.full()} == set(KernelLatencyConfig.gpu().groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(workloads.Select):
    """A selection whose implementations go wrong, each in its own way."""

    def call(self, implementation):
        right = super().call("xla")

        def wrong(scores, lengths):
            found = right(scores, lengths)
            return found._replace(indices=found.indices.at[0, -1].add(1))

        def refused(scores, lengths):
            raise NotImplementedError("not of this shape")

        def broken(scores, lengths):
            raise RuntimeError("no memory, see /somewhere/on/this/machine.log")

        return {"wrong": wrong, "refused": refused, "broken": broken}[implementation]


def test_a_failure_is_a_row_with_its_message_and_no_time():
    config = dataclasses.replace(
        KernelLatencyConfig.tiny(), implementations=("wrong", "refused", "broken"), peers=False
    )
    odd = Odd(rows=2, keys=64, topk=4)
    rows = list(measure.rows_of(odd, config, RATES))
    assert [row["status"] for row in rows] == ["wrong", "unsupported", "failed"]
    assert [row["ms"] for row in rows] == [None] * 3
    assert "selection: got it wrong (list outside the set in 1 rows" in rows[0]["message"]
    assert rows[1]["message"] == "NotImplementedError: not of this shape"
    assert rows[2]["message"] == "RuntimeError: no memory, see <path>"
    _, body = report.table(rows)
    assert body[0][4] == "wrong, unsupported, failed"
    assert len(report.without_time(rows)) == 3


def test_an_implementation_that_is_not_of_this_device_is_unsupported():
    config = dataclasses.replace(
        KernelLatencyConfig.tiny(), implementations=("mosaic_gpu",), peers=False
    )
    (row,) = measure.rows_of(workloads.tiny()[0], config, RATES)
    assert row["status"] == "unsupported"
    assert "mosaic_gpu" in row["message"]


@pytest.fixture(scope="module")
def selection():
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 6, (3, 40)), jnp.float32)
    lengths = jnp.asarray([40, 25, 3], jnp.int32)
    return scores, lengths, topk_select(scores, 8, lengths=lengths, implementation="reference")


def test_the_right_selection_passes(selection):
    scores, lengths, found = selection
    oracles.assert_selected(scores, lengths, 8, found)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda x: x._replace(count=x.count - 1), "count"),
        (lambda x: x._replace(threshold=x.threshold + 1), "threshold"),
        (lambda x: x._replace(threshold=x.threshold - 0.5), "threshold"),
        (lambda x: x._replace(tie_cut=x.tie_cut + 1), "tie cut"),
        (lambda x: x._replace(indices=x.indices[:, ::-1]), "order of the list"),
        (lambda x: x._replace(indices=x.indices.at[0, 1].set(x.indices[0, 0])), "order of"),
        (lambda x: x._replace(indices=jnp.maximum(x.indices, 0)), "tail of the list"),
    ],
)
def test_a_wrong_selection_is_caught(selection, change, rule):
    scores, lengths, found = selection
    with pytest.raises(AssertionError, match=rule):
        oracles.assert_selected(scores, lengths, 8, TopKSelection(*change(found)))


def test_a_list_in_any_order_passes_and_one_that_leaves_a_larger_key_out_does_not():
    scores = jnp.asarray([[5.0, 1.0, 4.0, 4.0, 0.0]])
    oracles.assert_largest(scores, [[3, 0]])
    with pytest.raises(AssertionError, match="a larger key left out"):
        oracles.assert_largest(scores, [[1, 0]])
    with pytest.raises(AssertionError, match="a place twice"):
        oracles.assert_largest(scores, [[0, 0]])


def test_near_selections_may_differ_at_the_last_place_only():
    scores = jnp.asarray([[9.0, 5.0, 5.0 - 1e-5, 1.0]])
    visible = jnp.ones((1, 4), bool)
    near = lambda places: oracles.assert_nearly_selected(
        scores, visible, 2, None, jnp.asarray(places), slack=1e-3
    )
    near([[0, 1]])
    near([[0, 2]])
    for places, rule in (
        ([[1, 2]], "a larger key left out"),
        ([[0, 3]], "a smaller key"),
        ([[0, -1]], "count"),
    ):
        with pytest.raises(AssertionError, match=rule):
            near(places)


def test_attention_to_one_wrong_key_in_each_row_is_caught():
    one = workloads.Decode(batch=2, keys=256, topk=64, heads=4, kv_heads=2, head_size=16)
    (arguments,) = one.draw(0, 1)
    right = oracles.attention(*arguments, topk=64)
    one.check(arguments, right.astype(jnp.bfloat16))
    for topk in (63, 65, 256):
        with pytest.raises(AssertionError, match="of rows within 0.01"):
            one.check(arguments, oracles.attention(*arguments, topk=topk))


def test_full_attention_is_what_jax_makes_of_it():
    one = workloads.Decode(batch=2, keys=64, topk=8, heads=4, kv_heads=2, head_size=16)
    ((query, key, value, lengths),) = one.draw(0, 1)
    with jax.numpy_dtype_promotion("standard"):  # which jax's own function relies on
        out = jax.nn.dot_product_attention(query[:, None], key, value)[:, 0]
    one.check_full((query, key, value, lengths), out)
    listed = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (2, 2, 64))
    want = oracles.listed_attention(query, key, value, listed)
    oracles.assert_rows_close(out, want, topk=64, rounding=0.03)


def test_each_call_gets_its_arguments_and_waits_for_the_results_of_the_one_before():
    seen = []

    def record(x, small):
        seen.append((float(x[0]), int(small[0])))
        return np.int32(timer._NEVER)  # the one result that the chain takes for a 1

    def fn(x, small):
        return io_callback(record, jax.ShapeDtypeStruct((), jnp.int32), x, small, ordered=False)

    chain = timer._chain(fn, 1, 2)
    small = jnp.asarray([3], jnp.int32), jnp.asarray([7], jnp.int32)
    others = (jnp.full(4, 1.0),), (jnp.full(4, 2.0),)
    assert int(chain(jnp.int32(3), small, others)) == 1
    # The first call finds no results yet; each later one sees what the one before returned.
    assert seen == [(1.0, 3), (2.0, 8), *[(1.0, 4), (2.0, 8)] * 5]


def test_results_of_any_kind_leave_the_arguments_as_they_are():
    results_ = (jnp.asarray([jnp.nan]), jnp.full((2, 2), -1, jnp.int32), jnp.zeros(1, jnp.bfloat16))
    assert int(timer._always_zero(results_)) == 0


def test_a_slower_function_takes_longer():
    x = jnp.ones((96, 96))
    fast = timer.device_time(lambda x, y: x @ y, [(x, x[:, :8])], rounds=3, round_ms=4.0)
    slow = timer.device_time(
        lambda x, y: jax.lax.fori_loop(0, 40, lambda _, z: x @ z / 96, y),
        [(x, x[:, :8])],
        rounds=3,
        round_ms=4.0,
    )
    assert slow.median > 3 * fast.median > 0


def test_calls_that_could_not_be_chained_are_refused():
    x, small = jnp.ones(8), jnp.ones(1)
    with pytest.raises(ValueError, match="fn: got one that does not read argument 1"):
        timer.device_time(lambda x, small: x + 1, [(x, small)])
    with pytest.raises(ValueError, match="inputs: got none"):
        timer.device_time(lambda x: x, [])


def test_what_is_timed_reads_its_smallest_argument():
    # Otherwise calls would overlap; traced only.
    for one in workloads.tiny():
        (arguments,) = one.draw(0, 1)
        todo = [(one.call("reference"), arguments)]
        todo += [
            (jax.tree_util.Partial(peer.fn, one), peer.prepare(one, *arguments))
            for peer in peers.peers_of(one)
            if peer.library == "jax"
        ]
        for fn, given in todo:
            place = min(range(len(given)), key=lambda i: given[i].size)
            timer._check_used(jax.jit(fn), given, place)


def _row(implementation, role, ms, *, keys=1024, limit=0.5, status="ok"):
    return dict.fromkeys(results.REQUIRED, "x") | {
        "op": "topk_select",
        "workload": f"R 64, S {keys}, k 2048",
        "group": "main",
        "sizes": {"R": 64, "S": keys},
        "topk": 2048,
        "pattern": "random",
        "implementation": implementation,
        "role": role,
        "status": status,
        "message": "" if status == "ok" else "why",
        "ms": ms,
        "ms_p10": ms,
        "ms_p90": ms,
        "limit_ms": limit,
        "target_ms": 0.9,
        "target_ratio": 3.0,
        "limit_fixed_ms": None,
        "in_cache": False,
    }


def test_the_table_compares_the_fastest_of_ours_with_the_fastest_peer():
    rows = [
        _row("mosaic_gpu", "ours", 1.0),
        _row("xla", "ours", 8.0),
        _row("lax.top_k", "peer", 9.0),
        _row("torch.topk", "peer", 2.5),
        _row("other", "peer", None, status="failed"),
        _row("mosaic_gpu", "ours", 0.75),  # measured again: the last one counts
    ]
    _, ((op, workload, limit, peer, ours, target, over_limit, gain),) = report.table(rows)
    assert (op, workload, limit) == ("topk_select", "R 64, S 1024, k 2048", "0.5000")
    assert (peer, ours) == ("2.5 torch.topk", "0.7500 mosaic_gpu")
    assert (target, over_limit, gain) == ("3.00x limit", "1.50", "3.33x")
    _, ((*_, target, _, _),) = report.table([row | {"limit_fixed_ms": 0.3} for row in rows])
    assert target == "0.9000"
    assert report.without_time(rows) == ["other: failed, topk_select R 64, S 1024, k 2048: why"]


def test_the_figure_needs_two_lengths():
    one = [_row("mosaic_gpu", "ours", 1.0)]
    assert report.length_figure(one) is None
    drawn = report.length_figure([*one, _row("mosaic_gpu", "ours", 2.0, keys=8192)])
    assert drawn is not None
    assert "8,192" in drawn
    assert "limit" in drawn


def test_committed_rows_have_a_time_or_a_reason():
    folder = pathlib.Path(run.__file__).with_name("results")
    for row in results.read(folder):
        assert row["study"] == "kernel_latency"
        assert row["message"] or row["ms"] > 0
        assert "/root" not in json.dumps(row)
