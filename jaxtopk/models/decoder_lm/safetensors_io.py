"""Reads slices of a folder's safetensors tensors, after checking every file against its own header.

Format: eight bytes with the length of a JSON header, the header, then raw little-endian arrays. Files are memory-mapped, so
a slice costs the pages it touches and no file is ever read whole.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxtopk.data.json_files import read_json

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference implementation
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Index = tuple[slice | np.ndarray, ...]  # one entry per axis; arrays are positions along that axis


def take(array: np.ndarray, index: Index) -> np.ndarray:
    """Copies the outer product of per-axis selections out of `array`, touching nothing else.

    Unlike NumPy's own rule, index arrays on two axes select a grid, not a diagonal.
    """
    basic = tuple(part if isinstance(part, slice) else slice(None) for part in index)
    picked = array[basic]
    for axis, part in enumerate(index):
        if not isinstance(part, slice):
            picked = np.take(picked, part, axis=axis)
    return np.array(picked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    """Where one array lies: `offset` is in bytes from the start of `file`."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def _read_header(path: pathlib.Path) -> dict[str, _Tensor]:
    """Parses one file's header and holds it against the size of the file."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError(f"{path}: got {file_bytes} bytes, wanted a safetensors header")
        header_bytes = int.from_bytes(head, "little")
        if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(
                f"{path}: got {file_bytes} bytes, wanted at least {header_bytes + 8} for the header it"
                " announces (truncated, or not safetensors)"
            )
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
        entries = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = map(int, entry["data_offsets"])
                entries[name] = (str(entry["dtype"]), tuple(map(int, entry["shape"])), begin, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: got an unreadable safetensors header ({error!r}), wanted JSON"
        ) from None
    start = 8 + header_bytes
    wanted_bytes = start + max((end for _, _, _, end in entries.values()), default=0)
    if file_bytes < wanted_bytes:
        raise ValueError(
            f"{path}: got {file_bytes} bytes, wanted {wanted_bytes} from its header (truncated)"
        )
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype in _DTYPES:  # other dtypes are refused when somebody asks for the tensor
            nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
            if begin < 0 or end - begin != nbytes:
                raise ValueError(
                    f"{path}: {name}: got {end - begin} bytes, wanted {nbytes} for {dtype} {shape}"
                )
        tensors[name] = _Tensor(file=path, dtype=dtype, shape=shape, offset=start + begin)
    return tensors


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of all shards its index names, by name.

    All headers are read and checked on construction; no tensor is.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens `folder`.

        Raises:
          FileNotFoundError: neither a single file nor an index is there, or a shard of the index is missing.
          ValueError: a file is truncated or malformed, or a shard lacks a tensor the index promises.
        """
        self._folder = pathlib.Path(folder)
        self._tensors: dict[str, _Tensor] = {}
        self._maps: dict[pathlib.Path, np.memmap] = {}
        if (self._folder / INDEX_FILE).is_file():
            self._open_shards(read_json(self._folder / INDEX_FILE))
        elif (self._folder / SINGLE_FILE).is_file():
            self._tensors = _read_header(self._folder / SINGLE_FILE)
        else:
            raise FileNotFoundError(
                f"weights: got no {SINGLE_FILE} and no {INDEX_FILE} in {self._folder}, wanted one of"
                " them (pickled weights are never read)"
            )

    def _open_shards(self, index: Mapping[str, Any]) -> None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(
                f"{INDEX_FILE}: got no weight_map, wanted tensor names and their files"
            )
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if pathlib.PurePath(shard).name != shard:
                raise ValueError(
                    f"{INDEX_FILE}: got shard {shard!r}, wanted a file name in the folder"
                )
        missing = [shard for shard in shards if not (self._folder / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]}: not found in {self._folder}; {len(missing)} of {len(shards)} shards"
                f" named by {INDEX_FILE} are missing"
            )
        headers = {shard: _read_header(self._folder / shard) for shard in shards}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise ValueError(f"{shard}: got no tensor {name!r}, wanted it as {INDEX_FILE} says")
            self._tensors[name] = headers[shard][name]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def check_readable(self, name: str) -> None:
        """Raises ValueError unless the dtype of `name` is one we read."""
        tensor = self._tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: got dtype {tensor.dtype} in {tensor.file.name}, wanted one of"
                f" {', '.join(_DTYPES)}"
            )

    def read(self, name: str, index: Index) -> np.ndarray:
        """Copies the part of tensor `name` that `index` selects, in the dtype of the file."""
        tensor = self._tensors[name]
        if tensor.file not in self._maps:
            self._maps[tensor.file] = np.memmap(tensor.file, dtype=np.uint8, mode="r")
        dtype = _DTYPES[tensor.dtype]
        array = np.ndarray(
            tensor.shape, dtype, buffer=self._maps[tensor.file].data, offset=tensor.offset
        )
        return take(array, index)
