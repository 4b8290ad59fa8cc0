"""Every Pallas name that differs between the supported JAX versions (0.11.2 to 0.12), or that is not public."""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from jax._src.lib.mlir.dialects import llvm as llvm
from jax._src.lib.mlir.dialects import nvvm as nvvm
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import platform
from pallas_kernels.core.interpret import InterpretOptions

_TPU_INTERPRETER = "jax._src.pallas.mosaic.interpret.interpret_pallas_call"
_GPU_INTERPRETER = "jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks"


def _params(cls: type, **wanted):
    """Builds an interpreter's parameters, leaving out those that this JAX version does not know."""
    known = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in wanted.items() if name in known})


def tpu_interpret(options: InterpretOptions | None):
    """Returns what `pl.pallas_call(interpret=...)` takes for a Mosaic TPU kernel."""
    if options is None:
        return False
    if not options.simulate:
        return True
    # Races are collected, not raised inside the callback: 0.11.2 can only do that, and one behaviour is enough.
    return _params(
        pltpu.InterpretParams,
        detect_races=options.detect_races,
        num_cores_or_threads=2,
        uninitialized_memory="nan",
        # A copy runs at its start, so that one which is never waited for is seen as a race; without the detector it runs
        # at its wait, so that it is seen in the values.
        dma_execution_mode="eager" if options.detect_races else "on_wait",
        on_race="warn",
    )


def tpu_vmem_bytes() -> int:
    """Returns the VMEM of one core of the target TPU; when interpreting, the smallest of the supported generations."""
    if platform.target_platform() != "tpu":
        return 64 << 20
    return pltpu.get_tpu_info().vmem_capacity_bytes


def gpu_interpret(options: InterpretOptions | None):
    """Returns what `plgpu.kernel(interpret=...)` takes."""
    if options is None:
        return False
    return _params(plgpu.InterpretGPUParams, detect_races=options.detect_races, on_race="warn")


def reset_interpreters() -> None:
    """Clears the simulators' state; needed after an exception inside one, harmless otherwise."""
    pltpu.reset_tpu_interpret_mode_state()
    importlib.import_module(_GPU_INTERPRETER).reset_gpu_interpret_mode_state()


@contextlib.contextmanager
def watched_races() -> Iterator[Callable[[], str | None]]:
    """Yields a function that names the simulator which has seen a race since the context was opened, if any.

    A simulator keeps only the races of its last kernel call, and 0.11.2 can only print them; so every state object made
    while the context is open is kept and asked.
    """
    states: list[tuple[str, Any]] = []
    with contextlib.ExitStack() as stack:
        for name, module_name, attribute in (
            ("Mosaic TPU", _TPU_INTERPRETER, "RaceDetectionState"),
            ("Mosaic GPU", _GPU_INTERPRETER, "GPURaceDetectionState"),
        ):
            module = importlib.import_module(module_name)
            original = getattr(module, attribute)

            def recording(*args, _original=original, _name=name, **kwargs):
                state = _original(*args, **kwargs)
                states.append((_name, state))
                return state

            setattr(module, attribute, recording)
            stack.callback(setattr, module, attribute, original)
        yield lambda: next((name for name, state in states if state.races_found), None)
