"""Static look at the TPU kernels, without a TPU: bundles, spills, code size and HBM temporaries, as a table and as a gate.

    python -m scripts.tpu_static            compile everything, print the table, write tests/kernels/tpu_static.json
    python -m scripts.tpu_static --check    compile everything again and fail where the file is exceeded

libtpu compiles each kernel for each chip and dumps its final schedule, of which this reads: the bundles (one bundle holds what
a core issues in one cycle), and the spills of vector and of scalar registers, in all and in the loops within the grid's. The
check fails on 5 % more bundles, in all or in those loops, on any new spill in those loops, and on more temporaries.

**Bundle counts are not time.** Every branch counts, a loop counts once however often it runs, and waiting for copies does not
count. They show that a kernel has grown or begun to spill, and nothing else. Of a workload of two kernels, the row is their
sum. The dumps belong to libtpu, go to a temporary folder, and are deleted.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence

TABLE = pathlib.Path(__file__).parents[1] / "tests" / "kernels" / "tpu_static.json"
GROWTH = 1.05  # bundles that a later schedule may have, times those on file
_DUMP_VARIABLE = "JAXTOPK_TPU_DUMP"
_LOOPS_OF_THE_GRID = 1
# Address, a loop's first bundle (LB) and such marks, one > for each loop around it: "  0x6a LB: >> { ..."
_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2}: ?| *: ?)(>*) *\{")
_SPILL = re.compile(r"(vst|sst)\S* \[[sv]mem:\[#allocation\d+_spill")


# ------------------------------------------------------------------------------------------------------------ schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a final schedule says; "loop" is what lies in a loop within the grid's own, and so runs most often.

    Spills are counted as stores of a register that the compiler ran out of, not as runs of one.
    """

    bundles: int
    loop_bundles: int
    vector_spills: int
    loop_vector_spills: int
    scalar_spills: int
    loop_scalar_spills: int


def read_schedule(text: str) -> Schedule:
    """Reads a `final_bundles` dump. A bundle's loops show as one > each; LB marks the first bundle of a loop."""
    depths, spills = [], []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            depths.append(len(match[1]))
            spills.append([])
        if depths:  # a bundle with long comments goes on in the next lines
            spills[-1] += _SPILL.findall(line)
    if not depths:
        raise ValueError(f"final_bundles: got {text[:80]!r}, wanted a schedule")
    looped = [depth >= _LOOPS_OF_THE_GRID + 1 for depth in depths]
    everywhere = [True] * len(depths)
    count = lambda kind, among: sum(s.count(kind) for s, a in zip(spills, among, strict=True) if a)
    return Schedule(
        bundles=len(depths),
        loop_bundles=sum(looped),
        vector_spills=count("vst", everywhere),
        loop_vector_spills=count("vst", looped),
        scalar_spills=count("sst", everywhere),
        loop_scalar_spills=count("sst", looped),
    )


# ------------------------------------------------------------------------------------------------------------ workloads


def workloads() -> dict[str, tuple[Callable, Sequence]]:
    """Returns name -> (function, argument shapes): each TPU kernel at the size that the project quotes for it."""
    import jax
    import jax.numpy as jnp

    import pallas_kernels as pk

    spec = jax.ShapeDtypeStruct
    f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32
    on_tpu = {"implementation": "mosaic_tpu"}
    b, s, n, k, h, topk, page = 8, 131072, 32, 8, 128, 2048, 16
    cache, pool = spec((b, s, k, h), bf16), spec((b * s // page, page, k, h), bf16)
    lengths, table = spec((b,), i32), spec((b, s // page), i32)
    query, rows = spec((b, n, h), bf16), spec((b, 1, n, h), bf16)

    def decode(query, key, value, lengths, table=None):
        options = dict(topk=topk, lengths=lengths, page_table=table)
        return pk.topk_decode_attention(query, key, value, **options, **on_tpu)

    def decode_by_copy(query, key, value, lengths, values, scale, error):
        copy = pk.QuantizedKeys(values, scale, error)
        options = dict(topk=topk, lengths=lengths, quantized_key=copy)
        return pk.topk_decode_attention(query, key, value, **options, **on_tpu)

    def in_float32(*arrays):
        return [spec(x.shape, f32 if x.dtype == bf16 else x.dtype) for x in arrays]

    def copy_of(dtype):
        numbers = spec(cache.shape[:3], f32)
        return spec(cache.shape, dtype), numbers, numbers

    def gather(query, key, value, indices, table=None):
        return pk.gather_attention(query, key, value, indices, page_table=table, **on_tpu)

    def lists(scopes):
        return spec((b, 1, scopes, topk), i32)

    def indexer(query, key, weights):
        return pk.indexer_select(query, key, weights, topk=topk, **on_tpu)

    def index_inputs(b, t, s):
        return spec((b, t, 64, 128), bf16), spec((b, s, 128), bf16), spec((b, t, 64), f32)

    return {
        "topk_select 32x131072": (
            lambda x: pk.topk_select(x, topk, with_indices=False, **on_tpu),
            (spec((32, s), f32),),
        ),
        "topk_decode_attention 8x131072": (decode, (query, cache, cache, lengths)),
        "topk_decode_attention 8x131072 paged": (decode, (query, pool, pool, lengths, table)),
        "topk_decode_attention 8x131072 int8": (
            decode_by_copy,
            (query, cache, cache, lengths, *copy_of(jnp.int8)),
        ),
        "topk_decode_attention 8x131072 float8": (
            decode_by_copy,
            (query, cache, cache, lengths, *copy_of(jnp.float8_e4m3fn)),
        ),
        "topk_decode_attention 8x131072 float32": (
            decode,
            in_float32(query, cache, cache, lengths),
        ),
        "gather_attention 8x131072 layer": (gather, (rows, cache, cache, lists(1))),
        "gather_attention 8x131072 group": (gather, (rows, cache, cache, lists(k))),
        "gather_attention 8x131072 head": (gather, (rows, cache, cache, lists(n))),
        "gather_attention 8x131072 layer float32": (
            gather,
            in_float32(rows, cache, cache, lists(1)),
        ),
        "gather_attention 8x131072 group float32": (
            gather,
            in_float32(rows, cache, cache, lists(k)),
        ),
        "gather_attention 8x131072 group paged": (gather, (rows, pool, pool, lists(k), table)),
        "indexer_select 8x131072 decode": (indexer, index_inputs(b, 1, s)),
        "indexer_select 8x131072 decode float32": (indexer, in_float32(*index_inputs(b, 1, s))),
        "indexer_select 32768 prefill": (indexer, index_inputs(1, 32768, 32768)),
        "knn_indices 4x1165": (
            lambda q, x, valid: pk.knn_indices(q, x, neighbours=16, key_valid=valid, **on_tpu),
            (spec((4, 1165, 3), f32), spec((4, 1165, 3), f32), spec((4, 1165), jnp.bool_)),
        ),
    }


# ------------------------------------------------------------------------------------------------------------ compiling


def _compile(names: Sequence[str], chip: str) -> list[dict]:
    """Compiles in this process, which was started with dumps on; returns the table's rows."""
    from tests.kernels import aot

    dump = pathlib.Path(os.environ[_DUMP_VARIABLE])
    known, result = workloads(), []
    for name in names:
        function, arguments = known[name]
        compiled = aot.compile_tpu(function, *arguments, chip=chip)
        text = compiled.as_text()
        kernels = re.findall(r"%(\S+) = [^\n]*custom_call_target=\"tpu_custom_call\"", text)
        if not kernels:
            raise RuntimeError(f"{name} on {chip}: got no kernel, wanted one")
        schedules = []
        for kernel in kernels:
            [schedule] = dump.glob(f"*-{kernel}-*-final_bundles.txt")
            schedules.append(dataclasses.asdict(read_schedule(schedule.read_text())))
        memory = compiled.memory_analysis()
        result.append(
            {
                "workload": name,
                "chip": chip,
                "kernel": " + ".join(kernel.rsplit(".", 1)[0] for kernel in kernels),
                **{column: sum(x[column] for x in schedules) for column in schedules[0]},
                "code_bytes": memory.generated_code_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
            }
        )
        for path in dump.iterdir():
            path.unlink()
    return result


def compile_rows(names: Sequence[str], chip: str) -> list[dict]:
    """Compiles workloads for a chip in a process of their own, as libtpu reads its flags once; returns the table's rows."""
    folder = tempfile.mkdtemp(prefix="tpu_static_")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        _DUMP_VARIABLE: folder,
    }
    command = [sys.executable, "-m", "scripts.tpu_static", "--emit", chip, *names]
    try:
        done = subprocess.run(
            command, env=environment, cwd=TABLE.parents[2], capture_output=True, text=True
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{chip}: the compiler failed\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    """Returns what the table depends on besides the kernels."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


# ---------------------------------------------------------------------------------------------------------- table, gate


def complaints(got: Iterable[dict], filed: Iterable[dict]) -> list[str]:
    """Returns one line for each number of `got` that exceeds what is on file."""
    known = {(row["workload"], row["chip"]): row for row in filed}
    found = []
    for row in got:
        place = row["workload"], row["chip"]
        if place not in known:
            found.append(f"{place[0]} on {place[1]}: not on file")
            continue
        before = known[place]
        for column in ("bundles", "loop_bundles"):
            if row[column] > GROWTH * before[column]:
                found.append(
                    f"{place[0]} on {place[1]}: {column} got {row[column]}, wanted at most 5 % over {before[column]}"
                )
        for column in ("loop_vector_spills", "loop_scalar_spills", "temporary_bytes"):
            if row[column] > before[column]:
                found.append(
                    f"{place[0]} on {place[1]}: {column} got {row[column]}, wanted at most {before[column]}"
                )
    return found


def as_text(rows: Iterable[dict]) -> str:
    """Returns the table for reading; spills are vector + scalar."""
    lines = [
        f"{'workload':40} {'chip':6} {'bundles':>8} {'loops':>6} {'spills':>9} {'loops':>9} {'code KiB':>9} {'temp KiB':>9}"
    ]
    for row in rows:
        spills = f"{row['vector_spills']} + {row['scalar_spills']}"
        in_loops = f"{row['loop_vector_spills']} + {row['loop_scalar_spills']}"
        lines.append(
            f"{row['workload']:40} {row['chip']:6} {row['bundles']:8} {row['loop_bundles']:6} {spills:>9} {in_loops:>9} "
            f"{row['code_bytes'] / 1024:9.0f} {row['temporary_bytes'] / 1024:9.0f}"
        )
    return "\n".join(lines)


def filed() -> dict:
    """Returns the committed table."""
    return json.loads(TABLE.read_text())


def main() -> int:
    """Compiles, prints, and writes or checks the table."""
    from tests.kernels import aot

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    parser.add_argument(
        "--only", default="", help="workloads whose name contains this; not filed without --check"
    )
    parser.add_argument("--chips", nargs="+", choices=aot.TOPOLOGIES, default=[*aot.TOPOLOGIES])
    parser.add_argument("--emit", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.emit:
        chip, *names = arguments.emit
        print(json.dumps(_compile(names, chip)))
        return 0
    names = [name for name in workloads() if arguments.only in name]
    rows = []
    for chip in arguments.chips:
        print(f"compiling {len(names)} kernels for {chip}", file=sys.stderr, flush=True)
        rows += compile_rows(names, chip)
    print(as_text(rows))
    if arguments.check:
        now, then = versions()["libtpu"], filed()["versions"]["libtpu"]
        if now != then:
            print(f"libtpu {now} makes other schedules than {then}, which filed", file=sys.stderr)
        found = complaints(rows, filed()["rows"])
        print("\n".join(found) or f"{len(rows)} rows are within the file")
        return 1 if found else 0
    if len(names) == len(workloads()) and len(arguments.chips) == len(aot.TOPOLOGIES):
        kinds = aot.DEVICE_KINDS
        note = "bundle counts are not time; see scripts/tpu_static.py"
        document = {"note": note, "versions": versions(), "device_kinds": kinds}
        body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        head = json.dumps(document, indent=2).removesuffix("\n}")
        TABLE.write_text(f'{head},\n  "rows": [\n{body}\n  ]\n}}\n')
        print(f"wrote {TABLE.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
