"""The static table of the TPU kernels: how it is read, what the gate refuses, and that today's kernels are within it."""

import importlib.metadata
import re

import pytest

from scripts import tpu_static
from tests.kernels import aot

# A grid loop around two loops, one of which goes on in a predicated region; a comment that runs over lines is no bundle.
SCHEDULE = """= control target key start
LB: loop body
= control target key end

     0   :  { %1 = sst [smem:[#allocation9_spill]] %s1_s0 }
   0x1 LB: > { %2 = vst [vmem:[#allocation7_spill] sm:$0xff] %v2_v3  ;;  %s3_s1 = smov.u32 0 }
   0x2   : > { %4 = vsyncpa [#allocation3], 0 /* a comment
 0x99 of more than : one line
 */ }
   0x3 LB: >> { %5 = vst [vmem:[#allocation7_spill] sm:$0xff] %v5_v1  ;;  %6 = sst [smem:[#allocation8_spill]] %s6_s2 }
   0x4   : >> { %7 = vst [vmem:[#allocation2] sm:$0xff] %v7_v1 }
   0x5 PF: > { %8 = sst [smem:[#allocation4]] %s8_s0 }
   0x6 LB: >> { %9 = vld [vmem:[#allocation7_spill] sm:$0xff] }
   0x7   :  { %10 = vsyncpa [#allocation3], 1 }
"""


def test_a_schedule_is_read_by_loops_and_by_kinds_of_spill():
    assert tpu_static.read_schedule(SCHEDULE) == tpu_static.Schedule(
        bundles=8,
        loop_bundles=3,
        vector_spills=2,
        loop_vector_spills=1,
        scalar_spills=2,
        loop_scalar_spills=1,
    )


def test_what_is_no_schedule_is_refused():
    with pytest.raises(ValueError, match="final_bundles: got 'HloModule', wanted a schedule"):
        tpu_static.read_schedule("HloModule")


def test_the_file_covers_every_workload_and_chip_within_the_limits():
    table = tpu_static.filed()
    wanted = {(name, chip) for name in tpu_static.workloads() for chip in aot.TOPOLOGIES}
    assert {(row["workload"], row["chip"]) for row in table["rows"]} == wanted
    assert len(table["rows"]) == len(wanted)
    assert table["device_kinds"] == aot.DEVICE_KINDS
    assert table["versions"].keys() == {"jax", "libtpu"}
    for row in table["rows"]:
        assert row["temporary_bytes"] <= 16 << 20
        assert row["bundles"] > row["loop_bundles"] > 0


@pytest.mark.parametrize(
    ("column", "grow", "message"),
    [
        ("bundles", lambda x: int(1.06 * x), "bundles got [0-9]+, wanted at most 5 % over"),
        ("loop_bundles", lambda x: int(1.06 * x), "loop_bundles got .* at most 5 % over"),
        ("loop_vector_spills", lambda x: x + 1, "loop_vector_spills got .* at most"),
        ("loop_scalar_spills", lambda x: x + 1, "loop_scalar_spills got .* at most"),
        ("temporary_bytes", lambda x: x + 1, "temporary_bytes got .* at most"),
        ("chip", lambda _: "v9", "not on file"),
    ],
    ids=[
        "bundles",
        "bundles in loops",
        "vector spills",
        "scalar spills",
        "temporaries",
        "new chip",
    ],
)
def test_the_gate_names_what_has_grown(column, grow, message):
    filed = tpu_static.filed()["rows"]
    assert tpu_static.complaints(filed, filed) == []
    grown = filed[1] | {column: grow(filed[1][column])}
    [line] = tpu_static.complaints([filed[0], grown, filed[2]], filed)
    assert re.fullmatch(f"{grown['workload']} on {grown['chip']}: {message}.*", line)


def test_less_of_everything_is_no_complaint():
    filed = tpu_static.filed()["rows"]
    numbers = {name for name, value in filed[0].items() if isinstance(value, int)}
    got = [row | {name: row[name] // 2 for name in numbers} for row in filed]
    assert tpu_static.complaints(got, filed) == []


def within_the_file(names, chip):
    filed = tpu_static.filed()
    # The schedule is libtpu's; jax 0.11.2 and 0.12.0.1 hand it the same kernels.
    installed, wanted = importlib.metadata.version("libtpu"), filed["versions"]["libtpu"]
    if installed != wanted:
        pytest.skip(f"the table is of libtpu {wanted}, installed is {installed}")
    rows = tpu_static.compile_rows(names, chip)
    assert [row["workload"] for row in rows] == list(names)
    assert tpu_static.complaints(rows, filed["rows"]) == []


@pytest.mark.tpu_aot
def test_a_kernel_is_within_the_table():
    within_the_file(["gather_attention 8x131072 group"], "v5e")


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_every_kernel_is_within_the_table(chip):
    within_the_file(tuple(tpu_static.workloads()), chip)
