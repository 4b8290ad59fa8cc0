"""The one module that asks which device a trace is for.

A trace under an abstract mesh that carries an abstract device (ahead-of-time compilation) is for that device; any other
trace is for the default backend.
"""

import functools

import jax


def _abstract_device():
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def target_platform() -> str:
    """Returns "cpu", "gpu" or "tpu": where the code being traced is going to run."""
    device = _abstract_device()
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def device_kind() -> str:
    """Returns the vendor's name of the target device, such as "NVIDIA H200" or "TPU v5 lite"."""
    device = _abstract_device()
    if device is not None:
        return device.device_kind
    return _default_device_kind()


@functools.cache
def _default_device_kind() -> str:
    return jax.devices()[0].device_kind


def device_slug() -> str:
    """Returns `device_kind` as a folder name: "nvidia_h200", "tpu_v5_lite"."""
    return device_kind().lower().replace(" ", "_").replace("/", "_")


def is_hopper() -> bool:
    """Whether the target is an sm_90 GPU, the only generation our Mosaic GPU kernels are written for."""
    return target_platform() == "gpu" and any(
        n in device_kind() for n in ("H100", "H200", "H20", "GH200", "H800")
    )
