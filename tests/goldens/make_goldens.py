"""Writes the small random checkpoints, and what `transformers` computes from them, that the parity tests compare with.

One folder each: config.json, model.safetensors (bfloat16, so that each stays below 100 kB) and expected.npz with float32
results on the CPU:
  tokens int32 [2, 40] and logits float32 [2, 40, V] of whole sequences; greedy int32 [2, 24], the continuation of the
  first 10 tokens of each.
Weights have a spread at which attention is neither uniform nor one-hot. A greedy choice nearer than 1e-2 to its runner-up
is refused, so the recorded tokens do not hang on rounding.

Run in an environment of its own, since the project does not depend on these packages (Python 3.11, CPU build of torch):
  pip install "torch==2.13.*" "transformers==5.24.*" numpy
  python tests/goldens/make_goldens.py
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

# Name -> (config class, settings beside SIZES). Together they cover every optional part of the model.
CHECKPOINTS = {
    "smollm2": (
        "LlamaConfig",
        dict(
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=100000.0),
        ),
    ),
    "llama_linear_bias": (
        "LlamaConfig",
        dict(
            attention_bias=True,
            mlp_bias=True,
            hidden_act="gelu_pytorch_tanh",
            rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0),
        ),
    ),
    "llama3": (
        "LlamaConfig",
        dict(head_dim=16, rope_parameters=dict(LLAMA3, rope_theta=500000.0)),
    ),
    "llama_yarn": ("LlamaConfig", dict(rope_parameters=dict(YARN, rope_theta=10000.0))),
    "mistral_window": (
        "MistralConfig",
        dict(sliding_window=7, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    ),
    "qwen2_window": (
        "Qwen2Config",
        dict(
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
    ),
    "qwen3_yarn": (
        "Qwen3Config",
        dict(
            head_dim=12,
            rope_parameters=dict(YARN, rope_theta=1000000.0, attention_factor=1.3, beta_fast=16.0),
        ),
    ),
}
# These folders get the older layout of config.json: rope_scaling beside rope_theta.
OLDER_LAYOUT = ("llama3", "llama_linear_bias")

BATCH, LENGTH, PROMPT, NEW_TOKENS, MIN_MARGIN = 2, 40, 10, 24, 1e-2


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fills the parameters so that every part matters, with values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            values = 0.3 * noise
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            values = gain * noise * parameter.shape[-1] ** -0.5
        parameter.data.copy_(values.to(torch.bfloat16).float())


@torch.no_grad()
def greedy(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Continues by the most likely token, from whole sequences each time (no cache to go wrong)."""
    start = tokens.shape[1]
    for _ in range(NEW_TOKENS):
        best, index = model(tokens).logits[:, -1].topk(2)
        margin = (best[:, 0] - best[:, 1]).min().item()
        if margin < MIN_MARGIN:
            raise ValueError(f"margin: got {margin}, wanted at least {MIN_MARGIN}")
        tokens = torch.cat([tokens, index[:, :1]], dim=1)
    return tokens[:, start:]


def use_older_layout(path: pathlib.Path) -> None:
    """Rewrites rope_parameters as rope_scaling and rope_theta."""
    settings = json.loads(path.read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = rope
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def make(name: str, folder: pathlib.Path) -> None:
    """Writes one checkpoint; tries seeds until the greedy choices are clear."""
    kind, settings = CHECKPOINTS[name]
    config = getattr(transformers, kind)(**SIZES, **settings)
    for seed in range(1000):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.float().eval()
        draw_weights(model, seed)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=generator)
        try:
            continuation = greedy(model, tokens[:, :PROMPT])
        except ValueError:
            continue
        break
    else:
        raise SystemExit(f"{name}: no seed gave clear greedy choices")
    with torch.no_grad():
        logits = model(tokens).logits

    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name in OLDER_LAYOUT:
        use_older_layout(folder / "config.json")

    # The folder alone must give the same numbers again, older layout included.
    again = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, logits, rtol=0, atol=0)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        greedy=continuation.numpy().astype(np.int32),
    )
    print(f"{name}: seed {seed}, logits up to {logits.abs().max():.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for checkpoint in CHECKPOINTS:
        make(checkpoint, pathlib.Path(__file__).parent / checkpoint)
