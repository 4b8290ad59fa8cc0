"""Reads metadata and dequantised slices of a GGUF file, after checking its header against its size.

Layout: magic, version, counts, key-value metadata, tensor table, padding, data. The header is parsed here rather than by
`gguf.GGUFReader`, which takes seconds on a vocabulary of 50k words and reports a truncated file as an index error; the
arithmetic of the quantised blocks is that of the `gguf` package.
"""

import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from jaxtopk.models.decoder_lm.safetensors_io import Index, take

_SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class _Cursor:
    """Walks the header; every read past the end of the file becomes one clear error."""

    def __init__(self, data: memoryview, path: pathlib.Path):
        self.data, self.path, self.offset = data, path, 0

    def bytes(self, count: int) -> memoryview:
        end = self.offset + count
        if end > len(self.data):
            raise ValueError(
                f"{self.path}: got {len(self.data)} bytes, wanted at least {end} for its GGUF header"
                " (truncated)"
            )
        part = self.data[self.offset : end]
        self.offset = end
        return part

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        # A token may be half of a UTF-8 sequence; such bytes survive as surrogates.
        return str(self.bytes(self.unpack("Q")), "utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.unpack("I"), self.unpack("Q")
            if item in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[item])
                return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()
            return [self.value(item) for _ in range(count)]
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])
        raise ValueError(f"{self.path}: got GGUF value type {kind}, wanted 0 to 12")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    """One table entry; `shape` is outermost first, `offset` in bytes from the start of the file."""

    kind: int
    shape: tuple[int, ...]
    offset: int

    @property
    def kind_name(self) -> str:
        try:
            return gguf.GGMLQuantizationType(self.kind).name
        except ValueError:
            return f"number {self.kind}"

    @property
    def nbytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.kind)]
        return math.prod(self.shape) // block * block_bytes


class GGUFFile:
    """The metadata and the tensors of one `.gguf` file, by name. No tensor is read on construction."""

    def __init__(self, path: str | os.PathLike[str]):
        """Opens `path`, parses its header and checks that all its data is there.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: not GGUF, another version, truncated, or malformed.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path.name}: not found in {path.parent}")
        if path.stat().st_size < 8:
            raise ValueError(f"{path}: got {path.stat().st_size} bytes, wanted a GGUF file")
        self._map = np.memmap(path, dtype=np.uint8, mode="r")
        cursor = _Cursor(self._map.data, path)
        magic = bytes(cursor.bytes(4))
        if magic != _MAGIC:
            raise ValueError(f"{path}: got magic {magic!r}, wanted {_MAGIC!r} (not a GGUF file)")
        version = cursor.unpack("I")
        if version not in _VERSIONS:
            raise ValueError(f"{path}: got GGUF version {version}, wanted little-endian 2 or 3")
        num_tensors, num_values = cursor.unpack("Q"), cursor.unpack("Q")
        self.metadata: Mapping[str, Any] = {
            cursor.string(): cursor.value(cursor.unpack("I")) for _ in range(num_values)
        }
        entries = {}
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.unpack("I")
            if num_dims > _MAX_DIMS:
                raise ValueError(f"{path}: {name}: got {num_dims} axes, wanted at most {_MAX_DIMS}")
            shape = tuple(cursor.unpack("Q") for _ in range(num_dims))[::-1]
            entries[name] = (shape, cursor.unpack("I"), cursor.unpack("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment: got {alignment!r} in {path}, wanted at least 1")
        start = -(-cursor.offset // alignment) * alignment
        self._tensors = {
            name: _Tensor(kind=kind, shape=shape, offset=start + offset)
            for name, (shape, kind, offset) in entries.items()
        }
        for name, tensor in self._tensors.items():
            if tensor.kind_name in _SUPPORTED:
                self._check_extent(path, name, tensor)

    def _check_extent(self, path: pathlib.Path, name: str, tensor: _Tensor) -> None:
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        if not tensor.shape or tensor.shape[-1] % block:
            raise ValueError(
                f"{name}: got shape {tensor.shape} in {path}, wanted rows of whole {block}-value"
                f" {tensor.kind_name} blocks"
            )
        if tensor.offset + tensor.nbytes > self._map.size:
            raise ValueError(
                f"{path}: got {self._map.size} bytes, wanted at least {tensor.offset + tensor.nbytes}"
                f" for {name} (truncated)"
            )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name, outermost axis first (as in PyTorch)."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def check_readable(self, name: str) -> None:
        """Raises ValueError unless `name` is stored in a type we read."""
        kind = self._tensors[name].kind_name
        if kind not in _SUPPORTED:
            raise ValueError(f"{name}: got ggml type {kind}, wanted one of {', '.join(_SUPPORTED)}")

    def read(self, name: str, index: Index) -> np.ndarray:
        """Dequantises to float32 the part of tensor `name` that `index` selects.

        Only the rows asked for are read, and of these only the quantisation blocks that hold a wanted column.
        """
        tensor = self._tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = self._map[tensor.offset : tensor.offset + tensor.nbytes]
        raw = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block, block_bytes)

        *outer, last = index
        columns = np.arange(tensor.shape[-1])[last]
        if columns.size == 0:
            sizes = [np.arange(n)[part].size for n, part in zip(tensor.shape, index, strict=True)]
            return np.zeros(sizes, np.float32)
        first, stop = columns.min() // block, columns.max() // block + 1
        blocks = take(raw, (*outer, slice(first, stop), slice(None)))
        values = gguf.quants.dequantize(blocks.reshape(*blocks.shape[:-2], -1), kind)
        if columns.size == values.shape[-1] and isinstance(last, slice):
            return values  # whole blocks: spare the copy
        return np.take(values, columns - first * block, axis=-1)
