"""A GGUF file seen as a Hugging Face checkpoint: the same tensor names, row order and configuration keys.

Conversion to GGUF renames everything and, for the llama architecture, reorders the rows of q and k so that the two numbers
of a rotary pair are neighbours. Both are undone here, so that one table of names serves both formats.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtopk.attention.rope import DefaultRope, Llama3Rope
from jaxtopk.models.decoder_lm.gguf_io import GGUFFile
from jaxtopk.models.decoder_lm.safetensors_io import Index

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# How published Llama 3.x checkpoints blend; the file states only the result, which is held against these.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _hf_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


class GGUFCheckpoint:
    """Tensors of a GGUF file under their Hugging Face names, and its configuration as config.json would state it."""

    def __init__(self, path: str | os.PathLike[str]):
        """Opens `path`; raises as `GGUFFile` does, and ValueError for an unsupported architecture."""
        self._path = path
        self._file = GGUFFile(path)
        self.metadata: Mapping[str, Any] = self._file.metadata
        self._arch = str(self.metadata.get("general.architecture"))
        if self._arch not in _ARCHITECTURES:
            raise ValueError(
                f"general.architecture: got {self._arch!r}, wanted one of {', '.join(_ARCHITECTURES)}"
            )
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(
                f"split.count: got {self.metadata['split.count']} in {path}, wanted a model in one file"
            )
        if experts := self.metadata.get(f"{self._arch}.expert_count", 0):
            raise ValueError(f"{self._arch}.expert_count: got {experts}, wanted a dense model")
        self._stored = {_hf_name(name): name for name in self._file.shapes if name != _ROPE_FACTORS}
        self._head_dim = self._find_head_dim()

    def _get(self, name: str) -> Any:
        """Reads a required setting of this architecture."""
        value = self.metadata.get(f"{self._arch}.{name}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"{self._arch}.{name}: got {value!r} in {self._path}, wanted a number for all layers"
            )
        return value

    def _find_head_dim(self) -> int:
        derived = self._get("embedding_length") // self._get("attention.head_count")
        head_dim = self.metadata.get(f"{self._arch}.attention.key_length", derived)
        for name in ("attention.value_length", "rope.dimension_count"):
            got = self.metadata.get(f"{self._arch}.{name}", head_dim)
            if got != head_dim:
                raise ValueError(
                    f"{self._arch}.{name}: got {got}, wanted the head size = {head_dim}"
                )
        return head_dim

    @property
    def config_json(self) -> dict[str, Any]:
        """The configuration in the words of a config.json."""
        heads = self._get("attention.head_count")
        config = {
            "architectures": [_ARCHITECTURES[self._arch]],
            "vocab_size": self._vocab_size(),
            "hidden_size": self._get("embedding_length"),
            "intermediate_size": self._get("feed_forward_length"),
            "num_hidden_layers": self._get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.metadata.get(
                f"{self._arch}.attention.head_count_kv", heads
            ),
            "head_dim": self._head_dim,
            "max_position_embeddings": self._get("context_length"),
            # Stored as float32; its shortest decimal form is the number that was meant.
            "rms_norm_eps": float(str(np.float32(self._get("attention.layer_norm_rms_epsilon")))),
            "tie_word_embeddings": "lm_head.weight" not in self._stored,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._stored,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self._stored,
            "rope_parameters": self._rope(),
        }
        window = self.metadata.get(f"{self._arch}.attention.sliding_window", 0)
        if window and self._arch == "llama":  # a llama with a window is a Mistral
            config |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
        elif window:
            config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
        return config

    def _vocab_size(self) -> int:
        shape = self.shapes.get("model.embed_tokens.weight")
        if shape is None:
            raise ValueError(f"token_embd.weight: got no such tensor in {self._path}, wanted it")
        return shape[0]

    def _rope(self) -> dict[str, Any]:
        theta = float(self.metadata.get(f"{self._arch}.rope.freq_base", 10000.0))
        prefix = f"{self._arch}.rope.scaling."
        stated = {
            name.removeprefix(prefix): value
            for name, value in self.metadata.items()
            if name.startswith(prefix)
        }
        kind = stated.pop("type", "none")
        old_linear = self.metadata.get(f"{self._arch}.rope.scale_linear", 1.0)
        if kind == "none" and old_linear != 1.0:
            kind, stated = "linear", {"factor": old_linear}
        if _ROPE_FACTORS in self._file.shapes:
            if kind != "none":
                raise ValueError(
                    f"{prefix}type: got {kind!r} beside {_ROPE_FACTORS}, wanted one of them"
                )
            return self._llama3_rope(theta)
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        names = {
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        stated.pop("finetuned", None)  # says how the model was made, changes nothing
        if unknown := stated.keys() - names.keys():
            raise ValueError(
                f"{prefix}{min(unknown)}: got a setting not supported, wanted none of it"
            )
        settings = {names[name]: value for name, value in stated.items()}
        return {"rope_type": kind, "rope_theta": theta, **settings}

    def _llama3_rope(self, theta: float) -> dict[str, Any]:
        """Finds the Llama 3 scaling that gives the stored frequency divisors, and proves that it does."""
        divisors = self._file.read(_ROPE_FACTORS, (slice(None),))
        settings = {**_LLAMA3, "factor": float(divisors.max())}
        rope = Llama3Rope(
            theta=theta,
            factor=settings["factor"],
            low_freq_factor=settings["low_freq_factor"],
            high_freq_factor=settings["high_freq_factor"],
            original_max_positions=settings["original_max_position_embeddings"],
        )
        plain = DefaultRope(theta=theta).frequencies(self._head_dim)
        if divisors.shape != plain.shape or not np.allclose(
            rope.frequencies(self._head_dim) * divisors, plain, rtol=1e-4
        ):
            raise ValueError(
                f"{_ROPE_FACTORS}: got divisors up to {divisors.max():g} that are not Llama 3's, wanted"
                " the published low 1, high 4, context 8192"
            )
        return {"rope_type": "llama3", "rope_theta": theta, **settings}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by its Hugging Face name."""
        shapes = self._file.shapes
        return {name: shapes[stored] for name, stored in self._stored.items()}

    def check_readable(self, name: str) -> None:
        """Raises ValueError unless `name` is stored in a type we read."""
        self._file.check_readable(self._stored[name])

    def read(self, name: str, index: Index) -> np.ndarray:
        """Dequantises the part of tensor `name` that `index` selects, in Hugging Face row order."""
        if self._arch == "llama" and re.search(r"\.[qk]_proj\.", name):
            rows = np.arange(self.shapes[name][0])[index[0]]
            head, row = np.divmod(rows, self._head_dim)
            half, pair = np.divmod(row, self._head_dim // 2)
            index = (head * self._head_dim + 2 * pair + half, *index[1:])
        return self._file.read(self._stored[name], index)
