"""How TPU kernels are launched: the VMEM they may ask for, and the frame of those that know their references by name."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import compat
from pallas_kernels.core.interpret import interpret_options

# For what the compiler adds: pipeline bookkeeping, spills, lane padding of narrow columns.
_VMEM_MARGIN = 8 << 20


def check_vmem(op: str, needed: int, shape: str) -> int:
    """Returns the VMEM limit to ask the compiler for; refuses what the target device cannot hold."""
    limit, capacity = needed + _VMEM_MARGIN, compat.tpu_vmem_bytes()
    if limit > capacity:
        raise NotImplementedError(
            f"{op}: mosaic_tpu got {shape}, which needs {limit >> 20} MiB of VMEM, wanted at most {capacity >> 20} MiB"
        )
    return limit


def call_by_name(
    kernel: Callable[[Any], None],
    refs: Callable[..., Any],
    operands: Mapping[str, jax.Array],
    *,
    scalars: Collection[str] = (),
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    in_hbm: Collection[str],
    in_smem: Collection[str] = (),
    vmem_limit_bytes: int,
    cost_estimate: pl.CostEstimate,
    name: str,
) -> Sequence[jax.Array]:
    """Launches kernel(refs(operand=ref, ..., output=ref, ..., buffer=ref, ...)) over the first axis of the outputs, in parallel.

    Every copy that the kernel makes must lie within its array, for that is not checked.

    Args:
      kernel: what one grid step does.
      refs: makes what the kernel takes of the references by name; a dataclass that says what each of them holds.
      operands: whole arrays, the scalars among them first.
      scalars: operands that all steps read from SMEM.
      outputs: shapes and dtypes, first axes alike.
      scratch: kinds of the kernel's buffers and semaphores.
      in_hbm: operands and outputs that the kernel copies itself; of all others a step has its own entry of the first axis.
      in_smem: those whose entry is in SMEM rather than VMEM.

    Returns:
      The outputs, in order.
    """

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name in in_hbm:
            return pl.BlockSpec(memory_space=pl.ANY)
        space = pltpu.SMEM if name in in_smem else None
        at = lambda i, *_: (i, *(0 for _ in shape[1:]))
        return pl.BlockSpec((1, *shape[1:]), at, memory_space=space)

    names = (*operands, *outputs, *scratch)
    (steps,) = {x.shape[0] for x in outputs.values()}
    return pl.pallas_call(
        lambda *given: kernel(refs(**dict(zip(names, given, strict=True)))),
        out_shape=list(outputs.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(steps,),
            in_specs=[spec(name, x.shape) for name, x in operands.items() if name not in scalars],
            out_specs=[spec(name, x.shape) for name, x in outputs.items()],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,
        ),
        cost_estimate=cost_estimate,
        interpret=compat.tpu_interpret(interpret_options()),
        name=name,
    )(*operands.values())
