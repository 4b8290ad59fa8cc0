"""Shape and variants of a decoder language model, and how a Hugging Face config.json states them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxtopk.attention.rope import DefaultRope, LinearRope, Llama3Rope, RopeConfig, YarnRope

type Activation = Literal["silu", "gelu", "gelu_tanh"]

SUPPORTED_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# Names a config.json may use for `hidden_act`; "gelu" is the exact one, the tanh form has several names.
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# What a config.json means when it leaves a key out, where that differs from one architecture to another.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """The lightning indexer of each layer: small heads that share one key, and say which keys attention is to read.

    Source: DeepSeek Sparse Attention, arXiv:2512.02556.

    Raises:
      ValueError: a number is out of its range, or the rotated channels are not an even number.
    """

    num_heads: int  # I
    head_dim: int  # J
    rope_share: float = 0.5  # of the channels, the first ones, that the decoder's own rope rotates
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"indexer {name}: got {getattr(self, name)}, wanted at least 1")
        if not 0 < self.rope_share <= 1:
            raise ValueError(
                f"indexer rope_share: got {self.rope_share}, wanted a number in (0, 1]"
            )
        if self.rotated * 1.0 != self.rope_share * self.head_dim or self.rotated % 2:
            raise ValueError(
                f"indexer rope_share: got {self.rope_share} of head_dim {self.head_dim}, wanted an even number of channels"
            )

    @property
    def rotated(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.rope_share * self.head_dim)

    @classmethod
    def for_decoder(cls, config: "DecoderConfig") -> "IndexerConfig":
        """A quarter of the heads, half their size: scores at about an eighth of what attention's own cost, 8 x 64 for 32 x 128."""
        return cls(num_heads=max(1, round(config.num_heads / 4)), head_dim=config.head_dim // 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder-only transformer: RMSNorm, rotary attention with grouped key/value heads, gated MLP.

    Covers Llama 2 and 3.x, SmolLM2, Mistral, Qwen2 and Qwen3; what sets these apart are the optional parts below.

    Raises:
      ValueError: a size is not positive, `num_heads` is not a multiple of `num_kv_heads`, `head_dim` is odd, or `windows`
        does not state one entry a layer.
    """

    vocab_size: int  # V
    num_layers: int  # L
    embed_dim: int  # D
    mlp_dim: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    max_positions: int  # tokens, longest context the model was made for
    rope: RopeConfig = dataclasses.field(default_factory=DefaultRope)
    norm_epsilon: float = 1e-6
    activation: Activation = "silu"
    tied_embeddings: bool = False  # the head is the transposed embedding
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k before the rotation
    windows: tuple[int | None, ...] | None = (
        None  # keys a row of layer i sees, itself included; None: all
    )
    architecture: str = "llama"  # how checkpoints name the tensors
    indexer: IndexerConfig | None = None  # None: no layer has one

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "mlp_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}, wanted a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, wanted an even number")
        if self.architecture not in SUPPORTED_ARCHITECTURES:
            raise ValueError(
                f"architecture: got {self.architecture!r}, wanted one of {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        if self.activation not in _ACTIVATIONS.values():
            raise ValueError(f"activation: got {self.activation!r}, wanted silu, gelu or gelu_tanh")
        if self.windows is not None:
            if len(self.windows) != self.num_layers:
                raise ValueError(
                    f"windows: got {len(self.windows)} entries, wanted num_layers = {self.num_layers}"
                )
            for window in self.windows:
                if window is not None and window < 1:
                    raise ValueError(f"windows: got {window}, wanted None or at least 1")

    def window(self, index: int) -> int | None:
        """Returns how many keys, itself included, a row of layer `index` may see; None: all."""
        return None if self.windows is None else self.windows[index]

    @classmethod
    def tiny(cls) -> "DecoderConfig":
        """Two layers of width 64, small enough for tests and for training from scratch on a CPU."""
        return cls(
            vocab_size=1024,
            num_layers=2,
            embed_dim=64,
            mlp_dim=192,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            max_positions=4096,
            tied_embeddings=True,
        )

    @classmethod
    def smollm2_135m(cls) -> "DecoderConfig":
        """SmolLM2-135M and its instruct version (arXiv:2502.02737)."""
        return cls(
            vocab_size=49152,
            num_layers=30,
            embed_dim=576,
            mlp_dim=1536,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            max_positions=8192,
            rope=DefaultRope(theta=100000.0),
            norm_epsilon=1e-5,
            tied_embeddings=True,
        )

    @classmethod
    def llama31_8b(cls) -> "DecoderConfig":
        """Llama 3.1 8B (arXiv:2407.21783); Llama 3 8B has the same shape, and a context of 8,192 without the scaled rope."""
        return cls(
            vocab_size=128256,
            num_layers=32,
            embed_dim=4096,
            mlp_dim=14336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_positions=131072,
            rope=Llama3Rope(
                theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=8192,
            ),
            norm_epsilon=1e-5,
        )

    @classmethod
    def from_hf(cls, config_json: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the parsed config.json of a Hugging Face folder.

        A key that is absent takes the default of its architecture's own config class. Rope settings are read from
        `rope_parameters` (the newer layout) or from `rope_scaling` and `rope_theta`.

        Raises:
          ValueError: architecture, rope type, activation or another setting is not supported, or a size is missing; one
            line that names the key, the got and the wanted.
        """
        architecture = _architecture(config_json)
        defaults = _DEFAULTS[architecture]

        def get(name: str, fallback: Any = None) -> Any:
            value = config_json[name] if name in config_json else defaults.get(name)
            return fallback if value is None else value

        embed_dim = _required_int(config_json, "hidden_size")
        num_layers = _required_int(config_json, "num_hidden_layers")
        num_heads = _required_int(config_json, "num_attention_heads")
        head_dim = get("head_dim")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"hidden_size: got {embed_dim}, wanted a multiple of num_attention_heads = {num_heads} "
                    "or an explicit head_dim"
                )
            head_dim = embed_dim // num_heads
        hidden_act = get("hidden_act", "silu")
        if hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"hidden_act: got {hidden_act!r}, wanted one of {', '.join(_ACTIVATIONS)}"
            )
        max_positions = get("max_position_embeddings", defaults["max_position_embeddings"])
        attention_bias = bool(get("attention_bias", False)) and architecture in ("llama", "qwen3")
        return cls(
            architecture=architecture,
            vocab_size=_required_int(config_json, "vocab_size"),
            num_layers=num_layers,
            embed_dim=embed_dim,
            mlp_dim=_required_int(config_json, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=get("num_key_value_heads", num_heads),
            head_dim=head_dim,
            max_positions=max_positions,
            rope=_rope(config_json, max_positions),
            norm_epsilon=get("rms_norm_eps", 1e-6),
            activation=_ACTIVATIONS[hidden_act],
            tied_embeddings=bool(get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or architecture == "qwen2",
            out_bias=attention_bias,
            mlp_bias=bool(get("mlp_bias", False)) and architecture == "llama",
            qk_norm=architecture == "qwen3",
            windows=_windows(config_json, architecture, num_layers, get("sliding_window")),
        )


def _architecture(config_json: Mapping[str, Any]) -> str:
    wanted = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM"
    named = config_json.get("architectures") or []
    by_class = {f"{name}forcausallm": name for name in SUPPORTED_ARCHITECTURES}
    if named:
        architecture = by_class.get(str(named[0]).lower())
        got = named[0]
    else:
        got = config_json.get("model_type")
        architecture = got if got in SUPPORTED_ARCHITECTURES else None
    if architecture is None:
        raise ValueError(f"config.json architectures: got {got!r}, wanted {wanted}")
    return architecture


def _required_int(config_json: Mapping[str, Any], name: str) -> int:
    value = config_json.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"config.json {name}: got {value!r}, wanted an integer")
    return value


def _rope(config_json: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # Some configs carry an empty or null entry for "no scaling", so fall through on anything false.
    settings = dict(config_json.get("rope_parameters") or config_json.get("rope_scaling") or {})
    # "type" is the older spelling; some folders carry both, and then "rope_type" is the one in force.
    kind = settings.get("rope_type", settings.get("type", "default"))
    theta = settings.get("rope_theta")
    if theta is None:
        theta = config_json.get("rope_theta")
    theta = 10000.0 if theta is None else float(theta)
    partial = settings.get("partial_rotary_factor", config_json.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor: got {partial}, wanted 1.0")

    def number(name: str) -> float:
        value = settings.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"rope {name}: got {value!r}, wanted a number for rope type {kind!r}")
        return float(value)

    original = config_json.get("original_max_position_embeddings")
    if original is None:
        original = settings.get("original_max_position_embeddings")
    original = max_positions if original is None else int(original)
    match kind:
        case "default":
            return DefaultRope(theta=theta)
        case "linear":
            return LinearRope(theta=theta, factor=number("factor"))
        case "llama3":
            return Llama3Rope(
                theta=theta,
                factor=number("factor"),
                low_freq_factor=number("low_freq_factor"),
                high_freq_factor=number("high_freq_factor"),
                original_max_positions=original,
            )
        case "yarn":
            factor = settings.get("factor")
            return YarnRope(
                theta=theta,
                factor=max_positions / original if factor is None else number("factor"),
                original_max_positions=original,
                beta_fast=float(settings.get("beta_fast") or 32.0),
                beta_slow=float(settings.get("beta_slow") or 1.0),
                scores_factor=settings.get("attention_factor"),
                mscale=settings.get("mscale"),
                mscale_all_dim=settings.get("mscale_all_dim"),
                truncate=bool(settings.get("truncate", True)),
            )
    raise ValueError(f"rope type: got {kind!r}, wanted default, linear, llama3 or yarn")


def _windows(
    config_json: Mapping[str, Any], architecture: str, num_layers: int, window: int | None
) -> tuple[int | None, ...] | None:
    if architecture == "llama":
        return None
    if architecture == "mistral":
        return None if window is None else (window,) * num_layers
    if not config_json.get("use_sliding_window", False):
        window = None
    layer_types = config_json.get("layer_types")
    if layer_types is None:
        first = config_json.get("max_window_layers", 28)
        layer_types = [
            "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
        ]
    if len(layer_types) != num_layers:
        raise ValueError(
            f"layer_types: got {len(layer_types)} entries, wanted num_hidden_layers = {num_layers}"
        )
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer_types: got {layer_type!r}, wanted full_attention or sliding_attention"
            )
    windows = tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    return windows if any(windows) else None
