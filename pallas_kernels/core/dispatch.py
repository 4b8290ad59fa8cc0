"""Which implementation of an op runs, and what is said when it is not the first choice.

An implementation refuses what it cannot do with `NotImplementedError`, while tracing. A single name given by the caller
fails fast with that error; a sequence, and the default order of the platform, go on to the next name and report the
refusal once through `logging`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pallas_kernels.core import platform
from pallas_kernels.core.interpret import interpret_options

logger = logging.getLogger("pallas_kernels")

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")

Implementation = str | Sequence[str] | None

_DEFAULT_ORDER = {"gpu": ("mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla")}
_PLATFORM_OF = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}
_reported: set[tuple[str, str, str]] = set()


def call(
    op: str,
    implementation: Implementation,
    table: Mapping[str, Callable[..., Any]],
    *args,
    **kwargs,
) -> Any:
    """Calls the chosen implementation of `op`.

    Args:
      op: the op's public name, for messages.
      implementation: a name (fails fast), names in order of preference, or None for the platform's own order.
      table: the implementations that exist for this op, by name.

    Raises:
      ValueError: `implementation` names something unknown, or is empty.
      NotImplementedError: no implementation allowed by the caller takes these arguments on this device.
    """
    names, explicit = _candidates(op, implementation, table)
    refusals = []
    for name in names:
        try:
            _check_available(op, name, table)
            result = table[name](*args, **kwargs)
        except NotImplementedError as error:
            if explicit:
                raise
            refusals.append((name, str(error)))
            continue
        for refused, reason in refusals:
            _report(op, refused, name, reason)
        return result
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise NotImplementedError(f"{op}: no implementation takes these arguments ({reasons})")


def _candidates(op: str, implementation: Implementation, table) -> tuple[tuple[str, ...], bool]:
    if implementation is None:
        order = _DEFAULT_ORDER.get(platform.target_platform(), ("xla",))
        return tuple(name for name in order if name in table), False
    explicit = isinstance(implementation, str)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"{op}: implementation got {name!r}, wanted one of {', '.join(IMPLEMENTATIONS)}"
            )
    if not names:
        raise ValueError(f"{op}: implementation got an empty sequence, wanted at least one name")
    return names, explicit


def _check_available(op: str, name: str, table) -> None:
    if name not in table:
        raise NotImplementedError(
            f"{op}: implementation {name!r} does not exist; this op has {', '.join(table)}"
        )
    wanted = _PLATFORM_OF.get(name)
    if wanted is None or interpret_options() is not None:
        return
    if (got := platform.target_platform()) != wanted:
        raise NotImplementedError(
            f"{op}: implementation {name!r} got device platform {got!r}, wanted {wanted!r} "
            "(or pallas_kernels.interpret_mode() on a CPU)"
        )
    if name == "mosaic_gpu" and not platform.is_hopper():
        raise NotImplementedError(
            f"{op}: implementation 'mosaic_gpu' got device {platform.device_kind()!r}, wanted a Hopper GPU (sm_90)"
        )


def _report(op: str, refused: str, used: str, reason: str) -> None:
    if (key := (op, refused, reason)) not in _reported:
        _reported.add(key)
        logger.warning("%s: %s refused, running %s instead: %s", op, refused, used, reason)
