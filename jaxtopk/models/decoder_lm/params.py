"""Loads the parameters of a DecoderLM from a Hugging Face folder or a GGUF file, each device only its own part.

Names, shapes and sizes are checked against headers first, so a bad checkpoint costs no memory. Then every parameter is
assembled shard by shard: a shard's index becomes rows and columns of the stored matrices, only those are read, layer by
layer, straight into the target dtype.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.attention.full import FullAttention
from jaxtopk.data.json_files import read_json
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.gguf_checkpoint import GGUFCheckpoint
from jaxtopk.models.decoder_lm.modeling import DecoderLM, param_shapes
from jaxtopk.models.decoder_lm.safetensors_io import Index, SafetensorsFolder
from jaxtopk.sharding import param_shardings

_ALIGNMENT = 64  # bytes, what XLA asks of a buffer

# Our parameter: its name in a checkpoint, and how stored axes (grouped ones lie flattened) become ours.
_LAYER_PREFIX = "model.layers.{layer}."
_TABLE = {
    "embed": ("model.embed_tokens.weight", "v d -> v d"),
    "final_norm": ("model.norm.weight", "d -> d"),
    "lm_head": ("lm_head.weight", "v d -> d v"),
    "layers.attention_norm": ("input_layernorm.weight", "d -> d"),
    "layers.q_weight": ("self_attn.q_proj.weight", "(n h) d -> d n h"),
    "layers.k_weight": ("self_attn.k_proj.weight", "(k h) d -> d k h"),
    "layers.v_weight": ("self_attn.v_proj.weight", "(k h) d -> d k h"),
    "layers.out_weight": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
    "layers.q_bias": ("self_attn.q_proj.bias", "(n h) -> n h"),
    "layers.k_bias": ("self_attn.k_proj.bias", "(k h) -> k h"),
    "layers.v_bias": ("self_attn.v_proj.bias", "(k h) -> k h"),
    "layers.out_bias": ("self_attn.o_proj.bias", "d -> d"),
    "layers.q_norm": ("self_attn.q_norm.weight", "h -> h"),
    "layers.k_norm": ("self_attn.k_norm.weight", "h -> h"),
    "layers.mlp_norm": ("post_attention_layernorm.weight", "d -> d"),
    "layers.gate_weight": ("mlp.gate_proj.weight", "f d -> d f"),
    "layers.up_weight": ("mlp.up_proj.weight", "f d -> d f"),
    "layers.down_weight": ("mlp.down_proj.weight", "d f -> f d"),
    "layers.gate_bias": ("mlp.gate_proj.bias", "f -> f"),
    "layers.up_bias": ("mlp.up_proj.bias", "f -> f"),
    "layers.down_bias": ("mlp.down_proj.bias", "d -> d"),
}


@runtime_checkable
class Checkpoint(Protocol):
    """Named tensors that can be read in part; both file formats look like this."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by its Hugging Face name."""

    def check_readable(self, name: str) -> None:
        """Raises ValueError unless the stored type of `name` is one we read."""

    def read(self, name: str, index: Index) -> np.ndarray:
        """Copies the part of tensor `name` that `index` (per axis a slice or positions) selects."""


def load_folder(
    folder: str | os.PathLike[str],
    *,
    attention: AttentionStrategy = FullAttention(),
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> DecoderLM:
    """Loads a Hugging Face folder (config.json, safetensors).

    Args:
      folder: config.json decides the architecture.
      attention: strategy of the model.
      dtype: of all parameters, whatever the file holds.
      mesh: spread the parameters over it as `param_shardings` says; None loads to the default device.

    Raises:
      FileNotFoundError: config.json, the weights or one of their shards is missing.
      ValueError: truncated or malformed file, unknown architecture, missing, extra or misshapen tensor.
    """
    config_json = read_json(pathlib.Path(folder) / "config.json")
    if quantization := config_json.get("quantization_config"):
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise ValueError(
            f"quantization_config: got {method!r}, wanted unquantized weights or a GGUF"
        )
    config = DecoderConfig.from_hf(config_json)
    params = load_params(
        config, SafetensorsFolder(folder), dtype=dtype, shardings=_shardings(config, mesh)
    )
    return DecoderLM.from_params(config, params, attention=attention)


def load_gguf(
    checkpoint: str | os.PathLike[str] | GGUFCheckpoint,
    *,
    attention: AttentionStrategy = FullAttention(),
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> DecoderLM:
    """Loads a `.gguf` file, dequantised to `dtype`; arguments and errors as `load_folder`."""
    if not isinstance(checkpoint, GGUFCheckpoint):
        checkpoint = GGUFCheckpoint(checkpoint)
    config = DecoderConfig.from_hf(checkpoint.config_json)
    params = load_params(config, checkpoint, dtype=dtype, shardings=_shardings(config, mesh))
    return DecoderLM.from_params(config, params, attention=attention)


def load_params(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Mapping[str, Sharding] | None = None,
) -> dict[str, Array]:
    """Reads every parameter of `DecoderLM(config)` by its dotted name, stacked over layers.

    Args:
      config: says which parameters there are.
      checkpoint: where they are read.
      dtype: of all of them.
      shardings: by dotted name; parameters without one go whole to the default device.

    Raises:
      ValueError: a tensor is missing, unknown, of another shape or of a type we do not read; nothing is allocated then.
    """
    check_checkpoint(config, checkpoint)
    shardings = shardings or {}
    return {
        name: _load(checkpoint, name, shape, jnp.dtype(dtype), shardings.get(name))
        for name, shape in param_shapes(config).items()
    }


def _shardings(config: DecoderConfig, mesh: Mesh | None) -> Mapping[str, Sharding] | None:
    return None if mesh is None else param_shardings(mesh, param_shapes(config))


def check_checkpoint(config: DecoderConfig, checkpoint: Checkpoint) -> None:
    """Raises ValueError unless `checkpoint` holds exactly the tensors `config` needs, in types we read."""
    if config.indexer is not None:
        raise ValueError(
            f"config.indexer: got {config.indexer}, wanted None: these files hold none (DecoderLM.with_indexer adds one)"
        )
    found = checkpoint.shapes
    wanted = {}
    for name, shape in param_shapes(config).items():
        layers = range(shape[0]) if name.startswith("layers.") else (None,)
        own_shape = shape[1:] if name.startswith("layers.") else shape
        wanted |= {_stored_name(name, layer): _stored_shape(name, own_shape) for layer in layers}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ValueError(
            f"checkpoint: got no tensor {missing[0]} ({len(missing)} missing of {len(wanted)}), wanted"
            f" all that {config.architecture} with {config.num_layers} layers has"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(
                f"{name}: got shape {found[name]}, wanted {shape} by the configuration"
            )
        checkpoint.check_readable(name)
    extra = sorted(found.keys() - wanted.keys())
    # Buffers that old checkpoints carry along, and the copy of a tied head.
    extra = [name for name in extra if not name.endswith(".rotary_emb.inv_freq")]
    if config.tied_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]
    if extra:
        raise ValueError(
            f"checkpoint: got tensor {extra[0]} ({len(extra)} such), wanted only what"
            f" {config.architecture} with {config.num_layers} layers has"
        )


def _stored_name(name: str, layer: int | None) -> str:
    stored, _ = _TABLE[name]
    return stored if layer is None else _LAYER_PREFIX.format(layer=layer) + stored


def _axes(name: str) -> tuple[list[list[str]], list[str]]:
    """Splits a table formula: "(n h) d -> d n h" is [[n, h], [d]] and [d, n, h]."""
    stored, ours = _TABLE[name][1].split(" -> ")
    groups: list[list[str]] = []
    inside = False
    for word in stored.replace("(", "( ").replace(")", " )").split():
        if word in "()":
            inside = word == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups, ours.split()


def _stored_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    groups, ours = _axes(name)
    sizes = dict(zip(ours, shape, strict=True))
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)


def _flat_index(parts: Sequence[tuple[range, int]]) -> slice | np.ndarray:
    """Joins the selections of axes that lie flattened: (positions, size) of each, outermost first."""
    (outer, outer_size), *inner = parts
    stride = math.prod(size for _, size in inner)
    if all(len(positions) == size for positions, size in inner):
        return slice(outer.start * stride, outer.stop * stride)
    flat = np.array(outer)
    for positions, size in inner:
        flat = (flat[:, None] * size + np.array(positions)).reshape(-1)
    return flat


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocates memory that JAX can take over on a CPU instead of copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _load(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: Sharding | None,
) -> Array:
    groups, ours = _axes(name)
    stacked = name.startswith("layers.")
    sizes = dict(zip(ours, shape[1:] if stacked else shape, strict=True))
    flat = [axis for group in groups for axis in group]
    parts: dict[tuple[range, ...], np.ndarray] = {}  # a replicated shard is asked for once a device

    def read_part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = (slice(None),) * len(shape) if index is None else index
        key = tuple(range(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        if key not in parts:
            parts[key] = part = _aligned_empty([len(positions) for positions in key], dtype)
            chosen = dict(zip(ours, key[1:] if stacked else key, strict=True))
            stored_index = tuple(
                _flat_index([(chosen[axis], sizes[axis]) for axis in group]) for group in groups
            )
            for row, layer in enumerate(key[0] if stacked else (None,)):
                block = checkpoint.read(_stored_name(name, layer), stored_index)
                block = block.reshape([len(chosen[axis]) for axis in flat])
                part[row if stacked else ...] = block.transpose([flat.index(axis) for axis in ours])
        return parts[key]

    if sharding is None:
        return jax.device_put(read_part(None))
    return jax.make_array_from_callback(shape, sharding, read_part)
