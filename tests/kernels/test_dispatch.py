"""Which implementation runs: names, fallbacks and their report, devices that do not fit; and where block sizes come from."""

import dataclasses
import json
import logging

import pytest

from pallas_kernels import interpret_mode
from pallas_kernels.core import block_sizes, dispatch, interpret, platform


def refusing(*args, **kwargs):
    raise NotImplementedError("wanted something smaller")


def working(x, *, y=0):
    return ("worked", x, y)


@pytest.fixture(autouse=True)
def _nothing_reported_yet(monkeypatch):
    monkeypatch.setattr(dispatch, "_reported", set())


@pytest.fixture
def on(monkeypatch):
    """Returns a function that makes the default device look like another."""

    def pretend(name, kind="some device"):
        monkeypatch.setattr(platform, "target_platform", lambda: name)
        monkeypatch.setattr(platform, "device_kind", lambda: kind)

    return pretend


def test_a_single_name_fails_fast_with_the_reason_of_the_implementation(caplog):
    table = {"reference": working, "xla": refusing}
    with pytest.raises(NotImplementedError, match="^wanted something smaller$"):
        dispatch.call("op", "xla", table, 1)
    assert not caplog.records
    assert dispatch.call("op", "reference", table, 1, y=2) == ("worked", 1, 2)


def test_a_sequence_falls_back_and_says_so_once(caplog):
    table = {"reference": working, "xla": refusing}
    for _ in range(2):
        assert dispatch.call("op", ["xla", "reference"], table, 1) == ("worked", 1, 0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == "op: xla refused, running reference instead: wanted something smaller"


def test_where_all_refuse_the_error_has_every_reason():
    table = {"xla": refusing}
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu: .*does not exist.*; xla: wanted s"):
        dispatch.call("op", ["mosaic_gpu", "xla"], table, 1)


@pytest.mark.parametrize(
    ("device", "first"), [("cpu", "xla"), ("gpu", "mosaic_gpu"), ("tpu", "mosaic_tpu")]
)
def test_each_platform_has_its_own_order(device, first, on):
    on(device, "NVIDIA H200")
    table = {name: lambda name=name: name for name in dispatch.IMPLEMENTATIONS}
    assert dispatch.call("op", None, table) == first
    assert dispatch.call("op", None, {"xla": lambda: "xla", "reference": working}) == "xla"


def test_an_older_gpu_falls_back_to_xla_aloud(on, caplog):
    on("gpu", "NVIDIA A100")
    table = {"mosaic_gpu": working, "xla": lambda: "xla"}
    assert dispatch.call("op", None, table) == "xla"
    assert "got device 'NVIDIA A100', wanted a Hopper GPU" in caplog.text


@pytest.mark.parametrize(("name", "wanted"), [("mosaic_tpu", "tpu"), ("mosaic_gpu", "gpu")])
def test_a_mosaic_name_needs_its_device_or_an_interpreter(name, wanted, on):
    table = {name: lambda: name}
    on("cpu")
    with pytest.raises(
        NotImplementedError, match=f"platform 'cpu', wanted '{wanted}' .or pallas_k"
    ):
        dispatch.call("op", name, table)
    with interpret_mode():
        assert dispatch.call("op", name, table) == name
    assert interpret.interpret_options() is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cuda", "got 'cuda', wanted one of reference, xla, mosaic_tpu, mosaic_gpu"),
        (["xla", "pallas"], "got 'pallas', wanted one of"),
        ([], "got an empty sequence, wanted at least one name"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(names, message):
    with pytest.raises(ValueError, match=f"op: implementation {message}"):
        dispatch.call("op", names, {"xla": working}, 1)


def test_race_detection_implies_the_simulator():
    with interpret_mode(detect_races=True):
        assert interpret.interpret_options().simulate
    with interpret_mode():
        assert not interpret.interpret_options().simulate


@dataclasses.dataclass(frozen=True)
class Sizes:
    block: int


@pytest.fixture
def tuned(tmp_path, monkeypatch, on):
    """A table with one entry, for rows up to 8 and keys up to 1024 in bfloat16, of an op called "op"."""
    entry = {
        "implementation": "xla",
        "dtype": "bfloat16",
        "bucket": {"s": 1024, "rows": 8},
        "block_sizes": {"block": 77},
        "median_us": 12.5,
    }
    (tmp_path / "some_device").mkdir()
    (tmp_path / "some_device" / "op.json").write_text(json.dumps({"entries": [entry]}))
    monkeypatch.setattr(block_sizes, "_TUNED", tmp_path)
    on("gpu", "Some Device")
    caches = block_sizes._table, block_sizes._report_miss
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def resolve(explicit=None, *, implementation="xla", dtype="bfloat16", rows=5, s=1000, op="op"):
    return block_sizes.resolve(
        op,
        implementation,
        explicit,
        cls=Sizes,
        dtype=dtype,
        bucket={"rows": rows, "s": s},
        heuristic=lambda: Sizes(1),
    ).block


@pytest.mark.usefixtures("tuned")
def test_block_sizes_are_the_callers_else_the_tables_else_the_heuristics(caplog):
    caplog.set_level(logging.INFO)
    assert resolve(Sizes(5)) == 5
    assert resolve() == resolve(rows=8, s=1024) == resolve(rows=5, s=513) == 77
    assert not caplog.records
    misses = [dict(rows=9), dict(s=512), dict(dtype="float32"), dict(op="other")]
    assert [resolve(**miss) for miss in misses] == [1] * 4
    assert len(caplog.records) == 4
    assert resolve(rows=9) == 1
    assert len(caplog.records) == 4  # a miss is reported once


@pytest.mark.parametrize(
    ("value", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048)]
)
def test_buckets_are_powers_of_two(value, power):
    assert block_sizes.round_up_to_power_of_two(value) == power
