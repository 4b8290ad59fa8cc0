"""From a workload to rows: every way to do it, checked on the timed inputs, then timed; a failure is a row without a time."""

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_latency import torch_peers
from experiments.kernel_latency.config import KernelLatencyConfig
from experiments.kernel_latency.peers import Peer, peers_of
from experiments.kernel_latency.workloads import Arrays, Workload
from pallas_kernels.tuning import timer
from pallas_kernels.tuning.timer import Timing

_MOST_MESSAGE = 400  # characters of an error that a row keeps
_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*")

# What the targets were stated against, by device: bytes/s of a read, FLOP/s of a bfloat16 product.
FIXED = {"NVIDIA H200": (4.14e12, 774e12)}


class Rates(NamedTuple):
    """What the card does at best, as measured in this run.

    read, copy: bytes/s; a copy counts those read and those written.
    matmul: FLOP/s of a bfloat16 product.
    """

    read: float
    copy: float
    matmul: float


def probe(config: KernelLatencyConfig) -> tuple[Rates, list[dict[str, Any]]]:
    """Measures the card itself; returns its rates, and a row for each."""
    elements = config.probe_mib * 2**20 // 4
    row = min(elements, 16384)
    array = jnp.ones((elements // row, row), jnp.float32)
    side = config.probe_matmul
    matrix = jax.random.normal(jax.random.key(config.seed), (side, side), jnp.bfloat16)
    product = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.bfloat16)
    work: list[tuple[str, Callable[..., Any], Arrays, int, int]] = [
        ("read", lambda x: jnp.sum(x, axis=-1), (array,), array.nbytes, 0),
        ("copy", lambda x: x + 1, (array,), 2 * array.nbytes, 0),
        ("matmul", product, (matrix, matrix + 0), 3 * matrix.nbytes, 2 * side**3),
    ]
    rates, rows = {}, []
    for name, fn, arguments, num_bytes, flops in work:
        found = timer.device_time(fn, [arguments], rounds=config.rounds, round_ms=config.round_ms)
        rates[name] = 1e3 * (flops or num_bytes) / found.median
        size = f"{side} x {side}, bfloat16" if flops else f"{config.probe_mib} MiB, float32"
        rows.append(
            {
                "op": name,
                "workload": size,
                "group": "probe",
                "role": "probe",
                "implementation": "xla",
                "bytes": num_bytes,
                "flops": flops,
                "rate": rates[name],
                "status": "ok",
                "message": "",
                **_times(found),
            }
        )
    return Rates(**rates), rows


def rows_of(
    workload: Workload, config: KernelLatencyConfig, rates: Rates
) -> Iterator[dict[str, Any]]:
    """Yields a row for each implementation and each peer, as soon as it is measured.

    A caller that stops early leaves the others out. Inputs are freed at the end.
    """
    common = _common(workload, rates)
    try:
        working_set = config.working_set_mib * 2**20
        count = min(config.most_inputs, -(-working_set // workload.least_bytes))
        inputs = workload.draw(config.seed, count)
        jax.block_until_ready(inputs)
    except Exception as error:  # such as memory: the other workloads can still run
        yield common | {"role": "ours", "implementation": "none"} | _failure(error)
        return
    common |= {
        "inputs": len(inputs),
        "in_cache": len(inputs) * workload.least_bytes < working_set,
    }
    for name in config.implementations:
        ours = functools.partial(_ours, workload, name, inputs, config)
        yield _row(common | {"role": "ours", "implementation": name}, ours)
    for peer in peers_of(workload) if config.peers else ():
        reason = peer.missing()
        head = common | {"role": "peer", "implementation": peer.name}
        if reason is not None:
            yield head | _no_time() | {"status": "absent", "message": reason}
            continue
        theirs = _torch_peer if peer.library == "torch" else _jax_peer
        row = _row(head, functools.partial(theirs, workload, peer, inputs, config))
        if peer.library == "torch":
            torch_peers.release()  # for JAX, which shares the card
        yield row


def _row(head: dict[str, Any], measured: Callable[[], tuple[Timing, float]]) -> dict[str, Any]:
    try:
        found, compile_s = measured()
    except Exception as error:  # a failure is a result
        return head | _failure(error)
    return (
        head
        | _times(found)
        | {
            "compile_s": compile_s,
            "share_of_limit": head["limit_ms"] / found.median,
            "status": "ok",
            "message": "",
        }
    )


def _ours(
    workload: Workload, implementation: str, inputs: Sequence[Arrays], config: KernelLatencyConfig
) -> tuple[Timing, float]:
    fn = jax.jit(workload.call(implementation))
    compile_s = _first_call(fn, inputs[0])
    for arguments in inputs:
        workload.check_of(implementation, arguments, fn(*arguments))
    return timer.device_time(fn, inputs, rounds=config.rounds, round_ms=config.round_ms), compile_s


def _jax_peer(
    workload: Workload, peer: Peer, inputs: Sequence[Arrays], config: KernelLatencyConfig
) -> tuple[Timing, float]:
    fn = jax.jit(functools.partial(peer.fn, workload))
    prepared = [peer.prepare(workload, *arguments) for arguments in inputs]
    compile_s = _first_call(fn, prepared[0])
    for arguments, ready in zip(inputs, prepared, strict=True):
        peer.check(workload, arguments, fn(*ready))
    found = timer.device_time(fn, prepared, rounds=config.rounds, round_ms=config.round_ms)
    return found, compile_s


def _torch_peer(
    workload: Workload, peer: Peer, inputs: Sequence[Arrays], config: KernelLatencyConfig
) -> tuple[Timing, float]:
    import torch

    fn = functools.partial(peer.fn, workload)
    with torch.inference_mode():
        prepared = [
            peer.prepare(workload, *map(torch.from_dlpack, arguments)) for arguments in inputs
        ]
        begin = time.perf_counter()
        fn(*prepared[0])
        torch.cuda.synchronize()
        first_s = time.perf_counter() - begin
        for arguments, ready in zip(inputs, prepared, strict=True):
            peer.check(workload, arguments, _as_jax(fn(*ready)))
    found, calls = torch_peers.device_time(
        fn, prepared, rounds=config.rounds, round_ms=config.round_ms
    )
    return timer.summarise(found, calls=calls), first_s


def _as_jax(tensor) -> jax.Array:
    array = tensor.float() if tensor.is_floating_point() else tensor.int()
    return jnp.asarray(np.asarray(array.cpu()))


def _first_call(fn: Callable[..., Any], arguments: Arrays) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(fn(*arguments))
    return time.perf_counter() - begin


def _common(workload: Workload, rates: Rates) -> dict[str, Any]:
    fixed = FIXED.get(jax.devices()[0].device_kind)
    target = workload.target_ms
    stated = workload.limit_ms(*FIXED["NVIDIA H200"])
    return {
        "op": workload.op,
        "workload": workload.name,
        "group": workload.group,
        "sizes": dict(workload.sizes),
        "topk": workload.topk,
        "pattern": workload.pattern,
        "dtype": "float32" if workload.op == "topk_select" else "bfloat16",
        "bytes": workload.least_bytes,
        "flops": workload.least_flops,
        "limit_ms": workload.limit_ms(rates.read, rates.matmul),
        "limit_fixed_ms": None if fixed is None else workload.limit_ms(*fixed),
        "target_ms": target,
        "target_ratio": None if target is None else target / stated,
    }


def _times(found: Timing) -> dict[str, Any]:
    return {
        "ms": found.median,
        "ms_p10": found.p10,
        "ms_p90": found.p90,
        "n": found.rounds,
        "calls": found.calls,
        "chain_ms": found.chain_ms,
        "clock": found.clock,
    }


def _no_time() -> dict[str, Any]:
    return {
        "ms": None,
        "ms_p10": None,
        "ms_p90": None,
        "n": 0,
        "calls": 0,
        "chain_ms": None,
        "clock": None,
        "compile_s": None,
        "share_of_limit": None,
    }


def _failure(error: Exception) -> dict[str, Any]:
    match error:
        case NotImplementedError():
            status = "unsupported"
        case AssertionError():
            status = "wrong"
        case _:
            status = "failed"
    return _no_time() | {"status": status, "message": one_line(f"{type(error).__name__}: {error}")}


def one_line(text: str) -> str:
    """Returns text as a row keeps it: one line, not too long, without folders of this machine."""
    return _FOLDERS.sub("<path>", " ".join(text.split()))[:_MOST_MESSAGE]
