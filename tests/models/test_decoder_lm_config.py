"""What a config.json means: every architecture, rope variant and window layout, and what is refused."""

import json
import math
import pathlib

import numpy as np
import pytest

from jaxtopk.attention.rope import DefaultRope, LinearRope, Llama3Rope, YarnRope
from jaxtopk.models.decoder_lm.config import DecoderConfig

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def config_json(architecture: str = "LlamaForCausalLM", **changes) -> dict:
    return {
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **changes,
    }


def read(architecture: str = "LlamaForCausalLM", **changes) -> DecoderConfig:
    return DecoderConfig.from_hf(config_json(architecture, **changes))


def test_llama_keys_map_to_fields():
    config = read(
        rms_norm_eps=1e-5,
        hidden_act="gelu_new",
        tie_word_embeddings=True,
        head_dim=16,
        mlp_bias=True,
    )
    assert config == DecoderConfig(
        architecture="llama",
        vocab_size=100,
        num_layers=4,
        embed_dim=32,
        mlp_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=128,
        norm_epsilon=1e-5,
        activation="gelu_tanh",
        tied_embeddings=True,
        mlp_bias=True,
    )


def test_absent_and_null_keys_take_the_architectures_defaults():
    bare = {
        k: v
        for k, v in config_json().items()
        if k not in ("num_key_value_heads", "max_position_embeddings")
    }
    config = DecoderConfig.from_hf({**bare, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (4, 8, 2048)
    assert config.rope == DefaultRope(theta=10000.0)
    assert read("Qwen3ForCausalLM").head_dim == 128
    assert read("MistralForCausalLM").windows == (4096,) * 4
    assert (
        DecoderConfig.from_hf(
            {**config_json(), "architectures": None, "model_type": "qwen2"}
        ).architecture
        == "qwen2"
    )


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [
        pytest.param("LlamaForCausalLM", (True, True), id="llama"),
        pytest.param("MistralForCausalLM", (False, False), id="mistral"),
        pytest.param("Qwen2ForCausalLM", (True, False), id="qwen2"),
        pytest.param("Qwen3ForCausalLM", (True, True), id="qwen3"),
    ],
)
def test_attention_biases_are_the_architectures_own(architecture, biases):
    config = read(architecture, attention_bias=True)
    assert (config.qkv_bias, config.out_bias) == biases
    assert config.qk_norm == (architecture == "Qwen3ForCausalLM")
    without = read(architecture)
    assert (without.qkv_bias, without.out_bias) == (architecture == "Qwen2ForCausalLM", False)


def test_windows_follow_each_architectures_rule():
    assert read("MistralForCausalLM", sliding_window=None).windows is None
    assert read("LlamaForCausalLM", sliding_window=5).windows is None
    qwen = dict(sliding_window=5, max_window_layers=3)
    assert read("Qwen2ForCausalLM", **qwen).windows is None
    assert read("Qwen2ForCausalLM", use_sliding_window=True, **qwen).windows == (
        None,
        None,
        None,
        5,
    )
    mixed = ["sliding_attention", "full_attention"] * 2
    by_layer = read("Qwen3ForCausalLM", use_sliding_window=True, layer_types=mixed, **qwen)
    assert by_layer.windows == (5, None, 5, None)
    assert by_layer.window(0) == 5
    assert by_layer.window(1) is None


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        pytest.param({"rope_theta": 5e5}, DefaultRope(theta=5e5), id="theta"),
        pytest.param({"rope_scaling": None, "rope_theta": 7.0}, DefaultRope(theta=7.0), id="null"),
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 2}},
            LinearRope(factor=2.0),
            id="older-type-key",
        ),
        pytest.param(
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 9.0},
                "rope_theta": 8.0,
            },
            LinearRope(theta=9.0, factor=2.5),
            id="newer-layout",
        ),
        pytest.param(
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            Llama3Rope(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
            ),
            id="llama3",
        ),
        pytest.param(
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "beta_slow": None,
                    "attention_factor": 1.5,
                }
            },
            YarnRope(factor=4.0, original_max_positions=128, scores_factor=1.5),
            id="yarn",
        ),
        pytest.param(
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": None,
                    "original_max_position_embeddings": 32,
                }
            },
            YarnRope(factor=4.0, original_max_positions=32),
            id="yarn-factor-from-lengths",
        ),
    ],
)
def test_rope_is_read_from_both_layouts(settings, wanted):
    assert read(**settings).rope == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"architectures": ["GPT2LMHeadModel"]}, "architectures: got 'GPT2LMHeadModel', wanted Llama", id="arch"),
        pytest.param({"architectures": [], "model_type": "phi3"}, "got 'phi3', wanted LlamaForCausalLM", id="type"),
        pytest.param({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type: got 'dynamic', wanted default, linear, llama3 or yarn", id="dynamic"),
        pytest.param({"rope_scaling": {"type": "linear"}}, "rope factor: got None, wanted a number", id="factor"),
        pytest.param({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, wanted 1.0", id="partial"),
        pytest.param({"hidden_act": "relu2"}, "hidden_act: got 'relu2', wanted one of silu", id="act"),
        pytest.param({"hidden_size": None}, "hidden_size: got None, wanted an integer", id="missing"),
        pytest.param({"num_key_value_heads": 3}, "num_heads: got 4, wanted a multiple of num_kv_heads = 3", id="heads"),
        pytest.param({"hidden_size": 33}, "hidden_size: got 33, wanted a multiple of num_attention_heads = 4", id="width"),
        pytest.param({"head_dim": 7}, "head_dim: got 7, wanted an even number", id="odd"),
        pytest.param({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["chunked"] * 4}, "layer_types: got 'chunked', wanted full_attention", id="layers"),
        pytest.param({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types: got 1 entries, wanted num_hidden_layers = 4", id="count"),
        pytest.param({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "windows: got 0, wanted None or at least 1", id="window"),
        pytest.param({"vocab_size": 0}, "vocab_size: got 0, wanted at least 1", id="size"),
    ],
)  # fmt: skip
def test_what_is_not_supported_raises_one_line_that_names_it(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(**changes)
    assert "\n" not in str(raised.value)


def test_presets_have_the_released_sizes():
    config = json.loads((GOLDENS / "smollm2" / "config.json").read_text())
    config |= dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        head_dim=64,
    )
    assert DecoderConfig.from_hf(config) == DecoderConfig.smollm2_135m()


# ------------------------------------------------------------------------------------------------- frequencies


def test_default_frequencies_are_powers_of_theta():
    np.testing.assert_allclose(DefaultRope(theta=16.0).frequencies(8), [1.0, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(
        LinearRope(theta=16.0, factor=2.0).frequencies(8), [0.5, 0.25, 0.125, 0.0625]
    )


def test_llama3_keeps_fast_channels_divides_slow_ones_and_blends_between():
    # Channel i turns 1024 * 16 ** (-i / 4) / (2 pi) times: 163, 81, 41, 20.
    rope = Llama3Rope(
        theta=16.0,
        factor=8.0,
        low_freq_factor=30.0,
        high_freq_factor=100.0,
        original_max_positions=1024,
    )
    turns = 1024 / (2 * math.pi) * np.array([1.0, 0.5, 0.25, 0.125])
    keep = (turns - 30.0) / 70.0
    wanted = [
        1.0,
        0.5 * (keep[1] + (1 - keep[1]) / 8),
        0.25 * (keep[2] + (1 - keep[2]) / 8),
        0.125 / 8,
    ]
    np.testing.assert_allclose(rope.frequencies(8), wanted)


def test_yarn_blends_between_the_channels_of_its_two_turn_counts():
    # With theta 16, H 8 and context 2 pi * 64, channel i turns 64 * 2 ** -i times: 32 times at i = 1, 8 times at i = 3.
    rope = YarnRope(
        theta=16.0,
        factor=4.0,
        original_max_positions=int(2 * math.pi * 64),
        beta_fast=32.0,
        beta_slow=8.0,
        truncate=True,
    )
    # 402 tokens, not 402.12: the fast end lies at 0.9996 and is floored to 0, the slow one at 2.9996 is ceiled to 3.
    np.testing.assert_allclose(
        rope.frequencies(8), [1.0, 0.5 * (1 - 0.75 / 3), 0.25 * (1 - 0.75 * 2 / 3), 0.125 / 4]
    )


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        pytest.param({}, 1 + 0.1 * math.log(4), id="factor"),
        pytest.param({"scores_factor": 1.5}, 1.5, id="given"),
        pytest.param({"mscale": 0.7, "mscale_all_dim": 0.3}, (1 + 0.07 * math.log(4)) / (1 + 0.03 * math.log(4)), id="ratio"),
        pytest.param({"mscale": 0.7}, 1 + 0.1 * math.log(4), id="one-alone-is-ignored"),
    ],
)  # fmt: skip
def test_yarn_attention_factor(settings, wanted):
    assert YarnRope(
        factor=4.0, original_max_positions=16, **settings
    ).attention_factor == pytest.approx(wanted)


def test_rope_settings_out_of_range_raise():
    with pytest.raises(ValueError, match=r"rope factor: got 0.5, wanted a number of at least 1"):
        LinearRope(factor=0.5)
    with pytest.raises(ValueError, match="wanted 0 < low < high"):
        Llama3Rope(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_positions=16)
