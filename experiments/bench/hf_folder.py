"""Writes a loaded model out as a Hugging Face folder, so that another library can read the very same weights."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from jaxtopk.attention.rope import DefaultRope
from jaxtopk.models.decoder_lm.modeling import DecoderLM

# Parameter of a layer: name in the folder, axes of ours that its two stand for, output features first.
_LAYER = {
    "attention_norm": ("input_layernorm", None),
    "q_weight": ("self_attn.q_proj", 1),
    "k_weight": ("self_attn.k_proj", 1),
    "v_weight": ("self_attn.v_proj", 1),
    "out_weight": ("self_attn.o_proj", 2),
    "mlp_norm": ("post_attention_layernorm", None),
    "gate_weight": ("mlp.gate_proj", 1),
    "up_weight": ("mlp.up_proj", 1),
    "down_weight": ("mlp.down_proj", 1),
}


def write(model: DecoderLM, folder: pathlib.Path) -> None:
    """Writes config.json and model.safetensors in the parameters' own dtype.

    Raises:
      ValueError: the model has a part that a plain Llama has not (biases, q/k norms, windows, scaled rope, an indexer).
    """
    config = model.config
    parts = (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm, config.windows)
    plain = not any((*parts, config.indexer))
    if config.architecture != "llama" or not plain or not isinstance(config.rope, DefaultRope):
        raise ValueError(
            f"model: got {config}, wanted a plain Llama without biases, windows or scaled rope"
        )
    tensors = {
        "model.embed_tokens.weight": np.asarray(model.embed[...]),
        "model.norm.weight": np.asarray(model.final_norm[...]),
    }
    if model.lm_head is not None:
        tensors["lm_head.weight"] = np.ascontiguousarray(np.asarray(model.lm_head[...]).T)
    for ours, (theirs, inputs) in _LAYER.items():
        stacked = np.asarray(getattr(model.layers, ours)[...])
        for layer, array in enumerate(stacked):
            tensors[f"model.layers.{layer}.{theirs}.weight"] = (
                array if inputs is None else _transposed(array, inputs)
            )
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": config.vocab_size,
                "hidden_size": config.embed_dim,
                "intermediate_size": config.mlp_dim,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "hidden_act": "silu",
                "max_position_embeddings": config.max_positions,
                "rms_norm_eps": config.norm_epsilon,
                "rope_theta": config.rope.theta,
                "tie_word_embeddings": config.tied_embeddings,
                "torch_dtype": str(tensors["model.norm.weight"].dtype),
            }
        )
    )


def _transposed(array: np.ndarray, inputs: int) -> np.ndarray:
    """Turns [in..., out...] into the matrix [out, in], the first `inputs` axes being the inputs."""
    rows = int(np.prod(array.shape[:inputs]))
    return np.ascontiguousarray(array.reshape(rows, -1).T)
