"""load_pretrained: presets, folders, GGUF files and hub ids end in the same model and tokenizer, or in one clear line."""

import json
import pathlib

import gguf
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import decoders, models, pre_tokenizers

import jaxtopk
from jaxtopk import load_pretrained, pretrained
from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.attention.full import FullAttention
from jaxtopk.attention.topk import TopKAttention
from jaxtopk.data import assets
from jaxtopk.sharding import make_mesh

D, F, H, N, K, L = 16, 32, 8, 2, 1, 2


def tiny_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|im_end|>", *alphabet, "th", "the"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer, list(vocab)


def tiny_tensors(vocab_size):
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab_size, D), "model.norm.weight": (D,)}
    for i in range(L):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (D,),
                "post_attention_layernorm": (D,),
                "self_attn.q_proj": (N * H, D),
                "self_attn.k_proj": (K * H, D),
                "self_attn.v_proj": (K * H, D),
                "self_attn.o_proj": (D, N * H),
                "mlp.gate_proj": (F, D),
                "mlp.up_proj": (F, D),
                "mlp.down_proj": (D, F),
            }.items()
        }
    return {name: rng.normal(size=shape).astype(np.float32) / 4 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer, tokens = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokens),
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tiny_tensors(len(tokens)), folder / "model.safetensors")
    return folder


def write_gguf(path):
    """The model of `folder` as a GGUF file of the llama architecture."""
    _, tokens = tiny_tokenizer()
    tensors = tiny_tensors(len(tokens))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(L)
    writer.add_context_length(32)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    short = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, value in tensors.items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        if stem in ("self_attn.q_proj", "self_attn.k_proj"):  # rotary pairs side by side
            value = value.reshape(-1, 2, H // 2, D).swapaxes(1, 2).reshape(-1, D)
        writer.add_tensor(f"{prefix}{short[stem]}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TOKENS = jnp.array([[5, 9, 200, 31, 7, 255]], jnp.int32)


def assert_same_model(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_folder_gives_model_and_tokenizer(folder):
    model, tokenizer = load_pretrained(folder)
    assert model.embed[...].dtype == jnp.float32
    assert model.attention == FullAttention()
    assert tokenizer.decode(tokenizer.encode("the 12 é")) == "the 12 é"
    assert tokenizer.eos_ids == (0,)
    assert tokenizer.vocab_size == model.config.vocab_size


def test_gguf_file_gives_the_same_model_and_tokenizer(folder, tmp_path):
    wanted, wanted_tokenizer = load_pretrained(str(folder))
    model, tokenizer = load_pretrained(write_gguf(tmp_path / "model.gguf"))
    assert model.config == wanted.config
    assert_same_model(model, wanted)
    np.testing.assert_array_equal(model(TOKENS), wanted(TOKENS))
    assert tokenizer.encode("the 42") == wanted_tokenizer.encode("the 42")
    assert tokenizer.eos_ids == wanted_tokenizer.eos_ids


def test_preset_is_fetched_and_loaded(folder, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(pretrained, "fetch", {"smollm2-135m": path}.__getitem__)
    assert_same_model(load_pretrained("smollm2-135m")[0], load_pretrained(folder)[0])
    assert set(pretrained.PRESETS) <= assets.ASSETS.keys()


def test_strategy_and_dtype_are_the_ones_asked_for(folder):
    strategy: AttentionStrategy = TopKAttention(topk=3)
    model, _ = load_pretrained(folder, attention=strategy, dtype=jnp.bfloat16)
    assert model.attention == strategy
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="dtype: got int32, wanted a floating dtype"):
        load_pretrained(folder, dtype=jnp.int32)


@pytest.mark.multidevice
def test_mesh_spreads_the_parameters(folder, tmp_path):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    whole, _ = load_pretrained(folder)
    for source in (folder, write_gguf(tmp_path / "model.gguf")):
        model, _ = load_pretrained(source, mesh=mesh)
        assert_same_model(model, whole)
        gate = model.layers.gate_weight[...]
        assert gate.sharding == NamedSharding(mesh, P(None, "fsdp", "tensor"))
        assert gate.addressable_shards[0].data.shape == (L, D // 2, F // 2)


def test_hub_id_loads_what_the_hub_brings(folder, monkeypatch):
    asked = {}

    def snapshot(repo_id, *, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model, _ = load_pretrained("owner/some-model_1.5")
    assert_same_model(model, load_pretrained(folder)[0])
    assert asked["repo_id"] == "owner/some-model_1.5"
    files = (path.name for path in folder.iterdir())
    matches = [
        any(pathlib.PurePath(name).match(p) for p in asked["allow_patterns"]) for name in files
    ]
    assert matches == [True] * 3
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="owner/no-such-model: could not be fetched") as error:
        load_pretrained("owner/no-such-model")
    assert "\n" not in str(error.value)
    assert "a local folder" in str(error.value)


@pytest.mark.parametrize("name", ["smollm9", "./no/such/folder", "models/nothing.gguf"])
def test_unknown_name_lists_what_there_is(name):
    with pytest.raises(
        FileNotFoundError, match=r"wanted a preset \(smollm2-135m\), an existing folder"
    ):
        load_pretrained(name)


def test_file_of_another_kind_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"got the file .*config\.json, wanted a \.gguf file or a folder"
    ):
        load_pretrained(folder / "config.json")


def test_package_exports_are_lazy_and_complete():
    assert {"generate", "load_pretrained"} <= set(dir(jaxtopk))
    assert callable(jaxtopk.generate)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jaxtopk.nothing  # noqa: B018


@pytest.mark.slow
def test_the_real_model_knows_english():
    """Every part at once: dequantisation, row order, tokenizer and architecture; any error there shows as nonsense."""
    if not (assets.cache_dir() / assets.ASSETS["smollm2-135m"].file_name).is_file():
        pytest.skip("smollm2-135m is not in the cache, and tests do not download")
    model, tokenizer = load_pretrained("smollm2-135m")
    text = (
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the"
        " engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
    )
    tokens = jnp.array([tokenizer.encode(text)], jnp.int32)
    log_probs = jax.nn.log_softmax(model(tokens)[0, :-1])
    nats = -jnp.take_along_axis(log_probs, tokens[0, 1:, None], axis=-1).mean()
    assert jnp.exp(nats) < 10
    answer = jaxtopk.generate(
        model, tokenizer, "What is the capital of France?", max_new_tokens=16, chat=True
    )
    assert "Paris" in answer
