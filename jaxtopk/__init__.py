"""Sparse attention in JAX: language models that select the keys they attend to, on TPU, GPU and CPU.

The names below are imported on first use, so that `import jaxtopk` is quick and a command line can print its help at once.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from jaxtopk.decoding.generate import generate as generate
    from jaxtopk.pretrained import load_pretrained as load_pretrained

__version__ = "0.1.0"

_HOMES = {
    "generate": "jaxtopk.decoding.generate",
    "load_pretrained": "jaxtopk.pretrained",
}

__all__ = ["__version__", "generate", "load_pretrained"]


def __getattr__(name: str) -> typing.Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxtopk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
