"""Compiles for a TPU on a machine that has none, through libtpu's ahead-of-time topologies."""

import importlib.util
import os

# libtpu reads these when it is loaded: look for no metadata server, and share the lock with other test workers.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
DEVICE_KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


def libtpu_is_missing() -> bool:
    """Whether the compiler is not installed (extra `tpu-aot`)."""
    return importlib.util.find_spec("libtpu") is None


def abstract_tpu(device_kind: str):
    """Returns a context in which a trace is for one TPU of this kind; needs no libtpu."""
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def lower_tpu(fn, *specs: jax.ShapeDtypeStruct, chip: str):
    """Lowers `fn` for a TPU; only jax is needed. `chip` is a key of `DEVICE_KINDS`."""
    with abstract_tpu(DEVICE_KINDS[chip]):
        return jax.jit(fn).trace(*specs).lower(lowering_platforms=("tpu",))


def compile_tpu(fn, *specs: jax.ShapeDtypeStruct, chip: str):
    """Compiles `fn` for one device of a TPU topology; `chip` is a key of `TOPOLOGIES`."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    device = topology.devices[0]
    sharding = SingleDeviceSharding(device)
    placed = [jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding) for spec in specs]
    with abstract_tpu(device.device_kind):
        return jax.jit(fn).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
