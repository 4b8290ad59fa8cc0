"""Loading checkpoints: every tensor lands where it belongs, each device reads its part, bad files fail early and clearly."""

import json

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtopk.models.decoder_lm import params as params_module
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.gguf_checkpoint import GGUFCheckpoint
from jaxtopk.models.decoder_lm.modeling import param_shapes
from jaxtopk.models.decoder_lm.params import load_folder, load_gguf, load_params
from jaxtopk.models.decoder_lm.safetensors_io import SafetensorsFolder

N, K, H, D, F, V, L = 4, 2, 8, 32, 64, 40, 3
BASE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama_biases": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 7},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}


def config_json(name="llama"):
    return BASE | CONFIGS[name]


def random_tensors(config, seed=0):
    """A checkpoint under its Hugging Face names, every number different from every other."""
    rng = np.random.default_rng(seed)
    wanted = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.get("tie_word_embeddings"):
        wanted["lm_head.weight"] = (V, D)
    qwen2 = config["architectures"] == ["Qwen2ForCausalLM"]
    for i in range(L):
        layer = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (N * H, D),
            "self_attn.k_proj.weight": (K * H, D),
            "self_attn.v_proj.weight": (K * H, D),
            "self_attn.o_proj.weight": (D, N * H),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }
        if config.get("attention_bias") or qwen2:
            layer |= {
                f"self_attn.{p}_proj.bias": (s * H,) for p, s in zip("qkv", (N, K, K), strict=True)
            }
        if config.get("attention_bias"):
            layer["self_attn.o_proj.bias"] = (D,)
        if config.get("mlp_bias"):
            layer |= {
                "mlp.gate_proj.bias": (F,),
                "mlp.up_proj.bias": (F,),
                "mlp.down_proj.bias": (D,),
            }
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            layer |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
        wanted |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in wanted.items()}


def expected_params(config, tensors):
    """What the model should hold, said once more without the loader's table."""

    def stack(name, turn):
        return np.stack([turn(tensors[f"model.layers.{i}.{name}"]) for i in range(L)])

    wanted = {
        "embed": tensors["model.embed_tokens.weight"],
        "final_norm": tensors["model.norm.weight"],
        "layers.attention_norm": stack("input_layernorm.weight", np.array),
        "layers.mlp_norm": stack("post_attention_layernorm.weight", np.array),
        "layers.q_weight": stack("self_attn.q_proj.weight", lambda w: w.T.reshape(D, N, H)),
        "layers.k_weight": stack("self_attn.k_proj.weight", lambda w: w.T.reshape(D, K, H)),
        "layers.v_weight": stack("self_attn.v_proj.weight", lambda w: w.T.reshape(D, K, H)),
        "layers.out_weight": stack("self_attn.o_proj.weight", lambda w: w.T.reshape(N, H, D)),
        "layers.gate_weight": stack("mlp.gate_proj.weight", np.transpose),
        "layers.up_weight": stack("mlp.up_proj.weight", np.transpose),
        "layers.down_weight": stack("mlp.down_proj.weight", np.transpose),
    }
    if "lm_head.weight" in tensors:
        wanted["lm_head"] = tensors["lm_head.weight"].T
    if "model.layers.0.self_attn.q_proj.bias" in tensors:
        wanted |= {
            f"layers.{p}_bias": stack(f"self_attn.{p}_proj.bias", lambda b: b.reshape(-1, H))
            for p in "qkv"
        }
    if "model.layers.0.self_attn.o_proj.bias" in tensors:
        wanted["layers.out_bias"] = stack("self_attn.o_proj.bias", np.array)
    if "model.layers.0.mlp.up_proj.bias" in tensors:
        wanted |= {
            f"layers.{p}_bias": stack(f"mlp.{p}_proj.bias", np.array)
            for p in ("gate", "up", "down")
        }
    if "model.layers.0.self_attn.q_norm.weight" in tensors:
        wanted |= {f"layers.{p}_norm": stack(f"self_attn.{p}_norm.weight", np.array) for p in "qk"}
    return wanted


def write_folder(folder, config, tensors, *, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = names[shard::shards]
        safetensors.numpy.save_file({name: tensors[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gguf_name(name):
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, *rest, kind = name.split(".")
    short = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    return f"blk.{layer}.{short['.'.join(rest)]}.{kind}"


def interleave_pairs(rows, heads):
    """Row order of q and k in a llama GGUF: the two halves of each head, alternating."""
    out = np.empty_like(rows)
    for head in range(heads):
        for pair in range(H // 2):
            for half in range(2):
                out[head * H + 2 * pair + half] = rows[head * H + half * (H // 2) + pair]
    return out


def write_gguf(path, tensors, *, arch="llama", kind="F32", metadata=None, extra_tensors=None):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_key_length(H)
    writer.add_value_length(H)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](key, value)
    kind = gguf.GGMLQuantizationType[kind]
    for name, value in tensors.items():
        if arch == "llama" and ".q_proj" in name:
            value = interleave_pairs(value, N)
        if arch == "llama" and ".k_proj" in name:
            value = interleave_pairs(value, K)
        own_kind = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            gguf_name(name), gguf.quants.quantize(value, own_kind), raw_dtype=own_kind
        )
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def leaves(model):
    flat, _ = jax.tree_util.tree_flatten_with_path(model)
    return {".".join(entry.name for entry in path[:-1]): np.asarray(leaf) for path, leaf in flat}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


# ---------------------------------------------------------------------------------------------------- right numbers


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_folder_fills_every_parameter(tmp_path, name, shards):
    config = config_json(name)
    tensors = random_tensors(config)
    model = load_folder(write_folder(tmp_path / "model", config, tensors, shards=shards))
    assert_same(leaves(model), expected_params(config, tensors))


@pytest.mark.parametrize(
    ("name", "arch"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_gguf_undoes_the_row_order_of_its_architecture(tmp_path, name, arch):
    config = config_json(name)
    tensors = random_tensors(config)
    model = load_gguf(write_gguf(tmp_path / "model.gguf", tensors, arch=arch))
    assert_same(leaves(model), expected_params(config, tensors))
    assert model.config.architecture == name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_arrive_in_the_dtype_asked_for(tmp_path, dtype):
    config = config_json()
    tensors = random_tensors(config)
    model = load_folder(write_folder(tmp_path / "model", config, tensors), dtype=dtype)
    wanted = expected_params(config, tensors)
    assert_same(leaves(model), {name: value.astype(dtype) for name, value in wanted.items()})


def test_half_precision_files_load_exactly(tmp_path):
    config = config_json()
    stored = {k: v.astype(ml_dtypes.bfloat16) for k, v in random_tensors(config).items()}
    model = load_folder(write_folder(tmp_path / "model", config, stored))
    wanted = {name: value.astype(np.float32) for name, value in stored.items()}
    assert_same(leaves(model), expected_params(config, wanted))


def test_a_stored_copy_of_a_tied_head_is_left_alone(tmp_path):
    config = config_json()
    tensors = random_tensors(config)
    stored = tensors | {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(H // 2, np.float32),
    }
    model = load_folder(write_folder(tmp_path / "model", config, stored))
    assert_same(leaves(model), expected_params(config, tensors))


# ------------------------------------------------------------------------------------------------ each device its part

SPECS = {
    "embed": P("tensor", "fsdp"),
    "lm_head": P("fsdp", "tensor"),
    "layers.q_weight": P(None, "fsdp", "tensor", None),
    "layers.k_weight": P(
        None, "fsdp", None, "tensor"
    ),  # inside a head: rows that do not lie together
    "layers.v_weight": P(None, "fsdp", "tensor", None),
    "layers.out_weight": P(None, "tensor", None, "fsdp"),
    "layers.gate_weight": P(None, "fsdp", "tensor"),
    "layers.up_weight": P(None, "fsdp", "tensor"),
    "layers.down_weight": P(None, "tensor", "fsdp"),
    "layers.attention_norm": P(None, "fsdp"),
}


class RecordingCheckpoint:
    """Passes reads on, and notes how many numbers each took."""

    def __init__(self, inner):
        self.inner, self.sizes = inner, {}

    @property
    def shapes(self):
        return self.inner.shapes

    def check_readable(self, name):
        self.inner.check_readable(name)

    def read(self, name, index):
        part = self.inner.read(name, index)
        self.sizes.setdefault(name, []).append(part.size)
        return part


def some_shardings():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


@pytest.mark.multidevice
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_devices_read_their_slices_once_and_nothing_else(tmp_path, form):
    config = config_json("qwen3") | {"architectures": ["LlamaForCausalLM"]}
    tensors = random_tensors(config)
    if form == "gguf":
        inner = GGUFCheckpoint(write_gguf(tmp_path / "model.gguf", tensors))
    else:
        inner = SafetensorsFolder(write_folder(tmp_path / "model", config, tensors))
    checkpoint = RecordingCheckpoint(inner)
    shardings = some_shardings()
    params = load_params(DecoderConfig.from_hf(config), checkpoint, shardings=shardings)
    assert_same(jax.tree.map(np.asarray, params), expected_params(config, tensors))
    for name, sharding in shardings.items():
        assert params[name].sharding == sharding
    # "data" replicates, so the four parts of a matrix are read once each, not once a device.
    for name, value in tensors.items():
        sharded = value.ndim == 2 or name.endswith("input_layernorm.weight")
        parts = 4 if value.ndim == 2 else 2 if sharded else 1
        assert checkpoint.sizes[name] == [value.size // parts] * parts, name


@pytest.mark.multidevice
def test_only_the_rows_of_a_shard_are_dequantised(tmp_path, monkeypatch):
    config = config_json()
    checkpoint = GGUFCheckpoint(
        write_gguf(tmp_path / "model.gguf", random_tensors(config), kind="Q8_0")
    )
    seen = []
    whole = gguf.quants.dequantize
    monkeypatch.setattr(
        gguf.quants, "dequantize", lambda data, kind: seen.append(data.nbytes) or whole(data, kind)
    )
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("tensor", None))
    load_params(DecoderConfig.from_hf(config), checkpoint, shardings={"embed": sharding})
    embed_bytes = V * D // 32 * 34
    assert seen[:8] == [embed_bytes // 8] * 8


# ------------------------------------------------------------------------------------------- bad files, before any memory


@pytest.fixture
def no_allocation(monkeypatch):
    def fail(*_):
        raise AssertionError("memory was allocated before the checkpoint was checked")

    monkeypatch.setattr(params_module, "_aligned_empty", fail)


def _cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def _drop(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def _put(name, value):
    return lambda tensors: tensors | {name: value}


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _drop("model.layers.1.mlp.up_proj.weight"),
            r"no tensor model\.layers\.1\.mlp\.up_proj\.weight \(1 missing",
        ),
        (
            _put("model.layers.2.self_attn.k_proj.weight", np.zeros((N * H, D), np.float32)),
            r"k_proj\.weight: got shape \(32, 32\), wanted \(16, 32\)",
        ),
        (
            _put("model.layers.0.self_attn.q_proj.bias", np.zeros(N * H, np.float32)),
            r"got tensor model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            _put("model.layers.3.mlp.up_proj.weight", np.zeros((F, D), np.float32)),
            r"layers\.3\.mlp",
        ),
        (
            _put("model.norm.weight", np.zeros(D, np.int32)),
            r"model\.norm\.weight: got dtype I32 in model\.safetensors, wanted one of F64",
        ),
    ],
    ids=["missing", "shape", "extra", "too-many-layers", "dtype"],
)
def test_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path, change, message):
    config = config_json()
    folder = write_folder(tmp_path / "model", config, change(random_tensors(config)))
    with pytest.raises(ValueError, match=message) as error:
        load_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("count", [0, 7, 8, 100, 5000, -1])
def test_truncated_safetensors_are_refused(tmp_path, count):
    config = config_json()
    folder = write_folder(tmp_path / "model", config, random_tensors(config))
    _cut(folder / "model.safetensors", count)
    with pytest.raises(ValueError, match=r"model\.safetensors: got \d+ bytes, wanted"):
        load_folder(folder)


@pytest.mark.usefixtures("no_allocation")
def test_header_that_is_no_json_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model", config_json(), random_tensors(config_json()))
    (folder / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"not json at all!")
    with pytest.raises(ValueError, match="unreadable safetensors header"):
        load_folder(folder)


@pytest.mark.usefixtures("no_allocation")
def test_offsets_that_contradict_the_shape_are_refused(tmp_path):
    header = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(ValueError, match=r"x: got 8 bytes, wanted 16 for F32 \(4,\)"):
        SafetensorsFolder(tmp_path)


@pytest.mark.usefixtures("no_allocation")
def test_missing_files_are_named(tmp_path):
    config = config_json()
    folder = write_folder(tmp_path / "model", config, random_tensors(config), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00003\.safetensors: not found .* 1 of 3"
    ):
        load_folder(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(FileNotFoundError, match="pickled weights are never read"):
        load_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        load_folder(folder)


@pytest.mark.usefixtures("no_allocation")
def test_index_must_stay_in_its_folder_and_tell_the_truth(tmp_path):
    config = config_json()
    folder = write_folder(tmp_path / "model", config, random_tensors(config), shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"got shard '\.\./secret\.safetensors', wanted a file name"
    ):
        load_folder(folder)
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="got no tensor 'ghost'"):
        load_folder(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="got invalid JSON"):
        load_folder(folder)


@pytest.mark.usefixtures("no_allocation")
def test_quantized_folder_is_refused(tmp_path):
    config = config_json() | {"quantization_config": {"quant_method": "gptq"}}
    folder = write_folder(tmp_path / "model", config, random_tensors(config_json()))
    with pytest.raises(ValueError, match="quantization_config: got 'gptq'"):
        load_folder(folder)


@pytest.mark.usefixtures("no_allocation")
def test_gguf_of_a_type_we_do_not_read_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_tensors(config_json()), kind="Q5_0")
    with pytest.raises(ValueError, match=r"got ggml type Q5_0, wanted one of F32, F16, BF16, Q8_0"):
        load_gguf(path)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count: got 8, wanted a dense model"),
        ({"split.count": 2}, r"split\.count: got 2 .*, wanted a model in one file"),
        ({"llama.rope.dimension_count": 4}, r"dimension_count: got 4, wanted the head size = 8"),
        ({"llama.rope.scaling.type": "longrope"}, "rope type: got 'longrope'"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1},
            "yarn_log_multiplier: got a setting not supported",
        ),
    ],
)
def test_gguf_settings_we_do_not_honour_are_refused(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "model.gguf", random_tensors(config_json()), metadata=metadata)
    with pytest.raises(ValueError, match=message):
        load_gguf(path)


@pytest.mark.usefixtures("no_allocation")
def test_unknown_gguf_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_tensors(config_json()), arch="mamba")
    with pytest.raises(
        ValueError, match=r"general\.architecture: got 'mamba', wanted one of llama"
    ):
        load_gguf(path)


# --------------------------------------------------------------------------------------------- configuration from GGUF


def test_gguf_configuration_is_that_of_the_folder(tmp_path):
    config = config_json() | {"rope_theta": 5e5}
    path = write_gguf(
        tmp_path / "model.gguf", random_tensors(config), metadata={"llama.rope.freq_base": 5e5}
    )
    assert DecoderConfig.from_hf(GGUFCheckpoint(path).config_json) == DecoderConfig.from_hf(config)


def test_gguf_llama_with_a_window_is_a_mistral(tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf",
        random_tensors(config_json()),
        metadata={"llama.attention.sliding_window": 9},
    )
    config = DecoderConfig.from_hf(GGUFCheckpoint(path).config_json)
    assert (config.architecture, config.windows) == ("mistral", (9,) * L)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_gguf_rope_scaling_reads_as_in_a_folder(tmp_path, kind):
    scaling = {"rope_type": kind, "factor": 4.0}
    metadata = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 16
        metadata["llama.rope.scaling.original_context_length"] = 16
    path = write_gguf(tmp_path / "model.gguf", random_tensors(config_json()), metadata=metadata)
    config = DecoderConfig.from_hf(GGUFCheckpoint(path).config_json)
    assert config.rope == DecoderConfig.from_hf(config_json() | {"rope_scaling": scaling}).rope


def _llama3_divisors(theta, factor):
    """The frequency divisors that conversion stores for a Llama 3 checkpoint, one by one."""
    divisors = []
    for i in range(H // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / H)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_gguf_rope_divisors_give_back_llama3_scaling(tmp_path):
    divisors = _llama3_divisors(3.6e5, 32.0)
    assert len(set(divisors.tolist())) > 2  # kept, blended and divided channels all occur
    write = lambda values: write_gguf(
        tmp_path / "model.gguf",
        random_tensors(config_json()),
        metadata={"llama.rope.freq_base": 3.6e5},
        extra_tensors={"rope_freqs.weight": values},
    )
    checkpoint = GGUFCheckpoint(write(divisors))
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wanted = DecoderConfig.from_hf(config_json() | {"rope_theta": 3.6e5, "rope_scaling": scaling})
    assert DecoderConfig.from_hf(checkpoint.config_json).rope == wanted.rope
    load_gguf(checkpoint)  # the divisors are no unknown tensor

    divisors[1] *= 1.01
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: got divisors up to 32"):
        load_gguf(write(divisors))


# ----------------------------------------------------------------------------------------------------- reading in part


@pytest.mark.parametrize("form", ["safetensors", "gguf-F32", "gguf-Q8_0"])
def test_a_part_read_is_the_part_of_the_whole(tmp_path, form):
    tensors = random_tensors(config_json())
    name = "model.layers.1.self_attn.q_proj.weight"
    if form == "safetensors":
        checkpoint = SafetensorsFolder(write_folder(tmp_path / "m", config_json(), tensors))
    else:
        path = write_gguf(tmp_path / "m.gguf", tensors, kind=form.removeprefix("gguf-"))
        checkpoint = GGUFCheckpoint(path)
    whole = checkpoint.read(name, (slice(None), slice(None)))
    np.testing.assert_allclose(whole, tensors[name], atol=0.02)
    rows, columns = np.array([3, 17, 4]), np.array([31, 0, 5, 6])
    part = checkpoint.read(name, (slice(8, 16), slice(5, 30)))
    np.testing.assert_array_equal(part, whole[8:16, 5:30])
    np.testing.assert_array_equal(checkpoint.read(name, (rows, slice(None))), whole[rows])
    np.testing.assert_array_equal(
        checkpoint.read(name, (slice(2, 3), columns)), whole[2:3, columns]
    )
    np.testing.assert_array_equal(
        checkpoint.read(name, (rows, columns)), whole[np.ix_(rows, columns)]
    )
    assert checkpoint.read(name, (slice(0, 2), slice(7, 7))).shape == (2, 0)


def test_the_parameter_table_covers_every_parameter():
    for name in CONFIGS:
        shapes = param_shapes(DecoderConfig.from_hf(config_json(name)))
        assert shapes.keys() <= params_module._TABLE.keys()
