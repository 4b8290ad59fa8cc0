"""A random model over characters, as objects and as a folder, that evaluations can be run on without a download."""

import json
import pathlib

import jax
import tokenizers
from flax import nnx

from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM, param_shapes
from jaxtopk.sharding import param_name

CONFIG = DecoderConfig(
    vocab_size=128,
    num_layers=2,
    embed_dim=32,
    mlp_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=1024,
    tied_embeddings=True,
)


def model() -> DecoderLM:
    """What attention finds counts for much, so that replies differ from one setting to another."""
    drawn = jax.jit(lambda: DecoderLM(CONFIG, rngs=nnx.Rngs(params=3)))()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 8 if param_name(path).endswith("out_weight") else leaf, drawn
    )


def backend() -> tokenizers.Tokenizer:
    """One token a printable character, and an end token."""
    letters = ["\n", *(chr(32 + index) for index in range(95))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={letter: index for index, letter in enumerate(letters)}, merges=[]
        )
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    return backend


def tokenizer() -> Tokenizer:
    """As a model's own."""
    return Tokenizer(
        backend(),
        eos_ids=(backend().token_to_id("<end>"),),
        chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}",
    )


def save(folder: pathlib.Path) -> None:
    """Writes a Hugging Face folder of the model."""
    import safetensors.numpy

    names = {
        "embed": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "q_weight": "self_attn.q_proj.weight",
        "k_weight": "self_attn.k_proj.weight",
        "v_weight": "self_attn.v_proj.weight",
        "out_weight": "self_attn.o_proj.weight",
        "gate_weight": "mlp.gate_proj.weight",
        "up_weight": "mlp.up_proj.weight",
        "down_weight": "mlp.down_proj.weight",
    }
    tensors = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(model())
    for path, leaf in leaves:
        name, array = param_name(path), jax.device_get(leaf)
        assert array.shape == param_shapes(CONFIG)[name]
        short = name.rsplit(".", 1)[-1]
        if not name.startswith("layers."):
            tensors[names[short]] = array
            continue
        for index, of_layer in enumerate(array):
            if short == "out_weight":
                of_layer = of_layer.reshape(-1, of_layer.shape[-1])
            elif of_layer.ndim == 3:
                of_layer = of_layer.reshape(of_layer.shape[0], -1)
            # A file holds [out, in].
            tensors[f"model.layers.{index}.{names[short]}"] = of_layer.T.copy()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    backend().save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "num_hidden_layers": CONFIG.num_layers,
        "hidden_size": CONFIG.embed_dim,
        "intermediate_size": CONFIG.mlp_dim,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "max_position_embeddings": CONFIG.max_positions,
        "rms_norm_eps": CONFIG.norm_epsilon,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"eos_token": "<end>", "chat_template": tokenizer().chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
