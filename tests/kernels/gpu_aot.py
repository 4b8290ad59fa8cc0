"""Lowers and compiles for a Hopper GPU on a machine that has none."""

import importlib.util
import re
import shutil

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

# What the compiler wants to know of an H200.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def cuda_plugin_is_missing() -> bool:
    """Whether JAX's CUDA compiler is not installed; lowering works without it."""
    return importlib.util.find_spec("jax_cuda13_plugin") is None


def needs_compiler(test):
    """Skips a test where `compile_gpu` would not work."""
    for missing, reason in (
        (cuda_plugin_is_missing(), "needs JAX's CUDA plugin"),
        (shutil.which("ptxas") is None, "needs ptxas on the path"),
    ):
        test = pytest.mark.skipif(missing, reason=reason)(test)
    return test


def abstract_gpu(device_kind: str = "NVIDIA H200"):
    """Returns a context in which a trace is for one GPU of this kind; needs no plugin."""
    device = AbstractDevice(device_kind=device_kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def lower_gpu(fn, *specs: jax.ShapeDtypeStruct):
    """Lowers `fn` for an H200; only jax is needed."""
    with abstract_gpu():
        return jax.jit(fn).trace(*specs).lower(lowering_platforms=("cuda",))


def compile_gpu(fn, *specs: jax.ShapeDtypeStruct):
    """Compiles `fn` for an H200, down to machine code; needs the CUDA plugin and ptxas, but no GPU."""
    topology = topologies.get_topology_desc("h200", "cuda", target_config=_TARGET, topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = [jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding) for spec in specs]
    return lower_gpu(fn, *placed).compile()


def compile_without_spills(fn, *specs: jax.ShapeDtypeStruct, monkeypatch, capfd):
    """Compiles `fn` as `compile_gpu` does, and checks that no kernel of it keeps registers in memory.

    Args:
      monkeypatch, capfd: the test's fixtures; the compiler prints what it did.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compiled = compile_gpu(fn, *specs)
    report = "".join(capfd.readouterr())
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert spilled, report
    assert not any(spilled), report
    return compiled
