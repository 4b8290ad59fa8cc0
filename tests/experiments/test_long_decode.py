"""The study of long contexts in tiny sizes on a CPU: what it times, the bytes it counts, and what it writes down."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import results
from experiments.long_decode import measure, report, run
from experiments.long_decode.config import LongDecodeConfig, Workload
from jaxtopk.attention import FullAttention, IndexerAttention, TopKAttention
from jaxtopk.models.decoder_lm.config import DecoderConfig, IndexerConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM

LLAMA = "llama-3.1-8b-shape"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("long_decode") / "out"
    return out, run.run(run.Arguments(preset="tiny", contexts=(128,), out=out))


def test_every_attention_is_timed_and_written_down(finished):
    out, rows = finished
    assert {path.name for path in out.iterdir()} == {"config.json", "results.jsonl", "report.html"}
    assert results.read(out) == rows
    assert [row["attention"] for row in rows] == ["full", "topk", "indexer"]
    config = json.loads((out / "config.json").read_text())
    assert [one["context"] for one in config["workloads"]] == [128]
    for row in rows:
        assert row["status"] == "ok", row["message"]
        assert (row["model"], row["context"], row["batch"], row["n"]) == ("tiny", 128, 1, 2)
        low, high = row["ms_per_step_range"]
        assert 0 < low <= row["ms_per_step"] <= high
        assert row["limit_ms"] == pytest.approx(
            1e3 * (row["weight_bytes"] + row["cache_bytes"]) / row["bytes_per_s"], rel=1e-5
        )
    full, topk, indexer = rows
    assert full["speed_over_full"] == 1.0
    assert full["cache_bytes"] > topk["cache_bytes"] > indexer["cache_bytes"]
    assert indexer["weight_bytes"] > full["weight_bytes"] == topk["weight_bytes"]


def test_the_report_is_one_page_with_every_row(finished):
    page = (finished[0] / "report.html").read_text()
    for name in ("full", "topk 16", "indexer 16"):
        assert f">{name}<" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_time_out_leaves_workloads_out_and_rows_as_they_were(finished, capsys):
    out, rows = finished
    assert run.run(run.Arguments(preset="tiny", out=out, budget_seconds=0.0)) == []
    assert "out of time: 2 of 2 workloads were left out" in capsys.readouterr().out
    assert results.read(out) == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": (LLAMA,)}, "wanted what leaves one of: tiny 128 x 1, tiny 256 x 2"),
        ({"batches": (3,)}, "wanted what leaves one of: tiny 128 x 1, tiny 256 x 2"),
        ({"rounds": 0}, "rounds: got 0, wanted at least 1"),
        ({"new_tokens": 128}, "context: got 128, wanted more than new_tokens = 128"),
        ({"only": ()}, "attentions: got"),
    ],
)
def test_bad_input_is_named_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run.run(run.Arguments(preset="tiny", out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="model: got 'gpt', wanted one of"):
        Workload(model="gpt", context=8)


def test_bytes_are_those_counted_by_hand():
    plain = DecoderConfig.llama31_8b()
    config = dataclasses.replace(plain, indexer=IndexerConfig.for_decoder(plain))
    study = dataclasses.replace(LongDecodeConfig.accelerator(), new_tokens=1)
    workload = Workload(model=LLAMA, context=131072, batch=2)
    count = lambda strategy: measure.cache_bytes(strategy, config, workload, study)
    # 32 layers, two sequences, rows of 128 numbers of two bytes, 8 key/value heads.
    keys = 32 * 2 * 256 * 8 * 131072
    assert count(FullAttention()) == 2 * keys
    assert count(TopKAttention(topk=2048)) == keys + 32 * 2 * 256 * 32 * 2048
    assert count(IndexerAttention(topk=2048)) == 32 * 2 * (128 * 131072 + 2 * 256 * 8 * 2048)
    short = Workload(model=LLAMA, context=1024)
    everything = 2 * 32 * 256 * 8 * 1024
    assert measure.cache_bytes(TopKAttention(topk=2048), config, short, study) == everything

    shape = lambda config: nnx.eval_shape(
        lambda: DecoderLM(config, rngs=nnx.Rngs(params=0), dtype=jnp.bfloat16)
    )
    assert measure.weight_bytes(shape(plain)) == 2 * (8_030_261_248 - 128256 * 4096)
    small = DecoderConfig.smollm2_135m()
    assert measure.weight_bytes(shape(small)) == 2 * 134_515_008  # its embedding is the head


def test_a_random_cache_is_of_unit_scale_and_short_of_the_context_by_the_steps():
    config = LongDecodeConfig.tiny()
    models = measure.make_models("tiny", config)
    assert models.stacked is None
    found = measure.prefilled(config.workloads[1], models, config)
    np.testing.assert_array_equal(found.cache.lengths, [254, 254])
    found.cache.validate()
    for layers in (found.cache.key, found.cache.value, found.cache.index_key):
        drawn = np.stack([np.asarray(layer).reshape(2, 256, -1) for layer in layers])
        assert abs(drawn.mean()) < 0.05
        assert drawn.std() == pytest.approx(1.0, abs=0.05)
    assert np.any(np.asarray(found.cache.key[0]) != np.asarray(found.cache.key[1]))
    shared = zip(
        jax.tree.leaves(models.plain.embed),
        jax.tree.leaves(models.indexed.embed),
        strict=True,
    )
    assert all(one is other for one, other in shared)


def test_pretrained_weights_run_a_prompt(monkeypatch):
    config = LongDecodeConfig.tiny()
    loaded = DecoderLM(DecoderConfig.tiny(), rngs=nnx.Rngs(params=0))
    monkeypatch.setattr(measure, "load_pretrained", lambda name, dtype: (loaded, None))
    models = measure.make_models("smollm2-135m", config)
    found = measure.prefilled(Workload(model="smollm2-135m", context=66), models, config)
    np.testing.assert_array_equal(found.cache.lengths, [64])
    assert all(np.any(np.asarray(layer)[:, :64]) for layer in found.cache.index_key)
    plain, indexed = models.plain.layers[1], models.indexed.layers[1]
    np.testing.assert_array_equal(plain.q_weight[...], indexed.q_weight[...])


def test_a_failure_is_a_row_and_other_workloads_go_on(monkeypatch):
    config = dataclasses.replace(LongDecodeConfig.tiny(), attentions=("full",))
    right = measure.time_steps

    def fails_once(models, prefilled, **settings):
        if prefilled.cache.batch == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out\n of memory")
        return right(models, prefilled, **settings)

    monkeypatch.setattr(measure, "time_steps", fails_once)
    (failed,), (fine,) = measure.rows_of(config.workloads, config, bytes_per_s=1e9)
    assert (failed["status"], failed["n"]) == ("failed", 0)
    assert "ms_per_step" not in failed
    assert (fine["status"], fine["batch"]) == ("ok", 2)
    assert report.failures([failed, fine]) == [
        "tiny, context 128, batch 1, full: RESOURCE_EXHAUSTED: out of memory"
    ]
    assert len(report.table([failed, fine])[1]) == 1


def _row(context, attention, **more):
    return {
        "model": LLAMA,
        "context": context,
        "batch": 1,
        "attention": attention,
        "topk": 2048,
        "status": "ok",
        "tokens_per_second": 50.0,
        "tokens_per_second_range": [40.0, 60.0],
        "ms_per_step": 20.0,
        "ms_per_step_range": [18.0, 22.0],
        "limit_ms": 10.0,
        "limit_weights_ms": 5.0,
        **more,
    }


def test_lines_are_in_order_of_context_and_the_last_row_of_a_workload_counts():
    rows = [
        _row(131072, "full", ms_per_step=40.0),
        _row(131072, "topk", speed_over_full=1.5),
        _row(8192, "full"),
        _row(131072, "full", ms_per_step=25.0),
    ]
    _, body = report.table(rows)
    assert [line[1:4] for line in body] == [
        ["8,192", "1", "full"],
        ["131,072", "1", "full"],
        ["131,072", "1", "topk 2048"],
    ]
    assert body[1][5] == "25"
    assert body[2][7:] == ["1.50x", "10", "50%", "50%"]


def test_the_figure_wants_two_contexts_and_carries_the_digest_of_its_rows():
    one = [_row(8192, "full"), _row(8192, "topk")]
    assert report.figure(one) is None
    both = [*one, _row(131072, "full"), _row(131072, "topk")]
    drawn = report.figure(both)
    assert results.digest(both) in drawn
    assert f"{LLAMA}, batch 1" in drawn
