"""Flags that several subcommands share, and what they build; imports JAX only once something is built."""

import dataclasses
import typing
from typing import Annotated, Any, Literal

import tyro

if typing.TYPE_CHECKING:
    from jaxtopk.attention import AttentionStrategy
    from jaxtopk.data.tokenizer import Tokenizer
    from jaxtopk.models.decoder_lm.modeling import DecoderLM

_JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: str = "smollm2-135m"
    """A preset (smollm2-135m), a folder with safetensors, a .gguf file, or a Hugging Face id."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """Where to run; the default is the best that JAX finds."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of parameters and cache; the default is float32 on a CPU, bfloat16 on accelerators."""

    def select_device(self) -> None:
        """Tells JAX which platform to use; has to come before anything runs on it.

        Raises:
          ValueError: JAX finds no such device.
        """
        import jax

        if self.device is None:
            return
        jax.config.update("jax_platforms", _JAX_PLATFORMS[self.device])
        try:
            jax.devices()
        except RuntimeError as error:
            raise ValueError(
                f"device: got {self.device}, which JAX cannot use here ({error})"
            ) from None

    def load(self, attention: "AttentionStrategy") -> "tuple[DecoderLM, Tokenizer]":
        """Loads the model, with this strategy, and its tokenizer."""
        from jaxtopk.pretrained import load_pretrained

        return load_pretrained(self.model, attention=attention, dtype=self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """What all Top-k rows have in common, whatever they keep; see `jaxtopk.attention.TopKAttention`."""

    min_topk: int | None = None
    """The least that a ratio keeps; the default is 1."""
    scope: Literal["head", "group", "layer"] | None = None
    """Which heads share one set of keys; the default is head: none do."""
    pooling: Literal["prob_sum", "prob_max", "score_mean", "score_max"] | None = None
    """How a shared set ranks its keys; the default is prob_sum."""
    prefill: Literal["full", "topk"] | None = None
    """Attention of the prompt's rows; the default is full."""
    sparse_suffix: int | None = None
    """How many last prompt tokens are Top-k rows although the prefill is full; the default is 1."""
    layers: tuple[int, ...] | None = None
    """The layers that are sparse; the default is all."""
    implementation: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]")] = (
        None
    )
    """reference, xla, mosaic_tpu or mosaic_gpu, or several in order of preference; the default is the device's own order."""

    def given(self) -> dict[str, Any]:
        """Returns the fields that have a value, as `TopKAttention` takes them."""
        given: dict[str, Any] = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "attention" and (value := getattr(self, field.name)) is not None
        }
        names = given.get("implementation")
        if names is not None and len(names) == 1:
            given["implementation"] = names[0]  # a single name fails fast, a sequence falls back
        return given


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions(SparseOptions):
    """What the model's rows attend to; see `jaxtopk.attention.TopKAttention`."""

    attention: Literal["full", "topk"] | None = None
    """The default is topk where a budget is given, else full."""
    topk: int | None = None
    """Keys a row keeps."""
    topk_ratio: float | None = None
    """Share of its visible keys that a row keeps, in (0, 1]."""

    def build(self) -> "AttentionStrategy":
        """Returns the strategy.

        Raises:
          ValueError: a flag of Top-k attention is given for full attention, or a value is out of its range.
        """
        from jaxtopk.attention import FullAttention, TopKAttention

        given = self.given()
        budget = "topk" in given or "topk_ratio" in given
        if self.attention == "full" or (self.attention is None and not budget):
            if given:
                raise ValueError(
                    f"{', '.join(given)}: got a value for full attention, wanted --topk or --topk-ratio too"
                )
            return FullAttention()
        return TopKAttention(**given)
