"""Rotary position embeddings: frequencies of each scaling variant, and the rotation itself.

Channel i of a head pairs with channel i + H/2 (the "half split" layout of Llama checkpoints in Hugging Face form), so the
two halves are the real and imaginary parts of H/2 complex numbers, and position p multiplies number i by
exp(1j * p * frequency[i]). Frequencies are computed once in float64 on the host and rounded to float32.

Sources: RoFormer arXiv:2104.09864; linear scaling arXiv:2306.15595; YaRN arXiv:2309.00071; Llama 3.1 arXiv:2407.21783.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefaultRope:
    """Frequencies theta ** (-2i / H), as trained, without any context extension."""

    theta: float = 10000.0

    def __post_init__(self) -> None:
        if not self.theta > 1.0:
            raise ValueError(f"rope theta: got {self.theta}, wanted a number above 1")

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin, hence scores by its square."""
        return 1.0

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per token of each channel pair, float64 [H/2]."""
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim: got {head_dim}, wanted a positive even number")
        return self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope(DefaultRope):
    """Position interpolation: every frequency is divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor(self.factor)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per token of each channel pair, float64 [H/2]."""
        return super().frequencies(head_dim) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(DefaultRope):
    """Slow channels are divided by `factor`, fast ones kept, and those between blended.

    A channel that turns more than `high_freq_factor` times over the original context is fast, one that turns less than
    `low_freq_factor` times is slow; the blend is linear in the number of turns.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int  # tokens, context before the extension

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor(self.factor)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor, high_freq_factor: got {self.low_freq_factor}, "
                f"{self.high_freq_factor}, wanted 0 < low < high"
            )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per token of each channel pair, float64 [H/2]."""
        kept = super().frequencies(head_dim)
        turns = self.original_max_positions * kept / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((turns - self.low_freq_factor) / width, 0.0, 1.0)
        return keep * kept + (1.0 - keep) * kept / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope(DefaultRope):
    """YaRN: as `Llama3Rope`, but blended linearly in the channel index, and with warmer scores.

    Channels before the one that turns `beta_fast` times over the original context are kept, those after the one that turns
    `beta_slow` times are divided by `factor`. Where `scores_factor` is None, cos and sin are scaled by 1 + 0.1 ln(factor),
    or by the ratio of that expression with `mscale` and with `mscale_all_dim` where both are given and not zero.
    """

    factor: float
    original_max_positions: int  # tokens, context before the extension
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    scores_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # round the two boundary channels outwards to integers

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor(self.factor)

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin, hence scores by its square."""
        if self.scores_factor is not None:
            return self.scores_factor

        def warmth(mscale: float) -> float:
            return 1.0 + 0.1 * mscale * math.log(self.factor) if self.factor > 1.0 else 1.0

        if self.mscale and self.mscale_all_dim:
            return warmth(self.mscale) / warmth(self.mscale_all_dim)
        return warmth(1.0)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns radians per token of each channel pair, float64 [H/2]."""
        kept = super().frequencies(head_dim)

        def channel(
            turns: float,
        ) -> float:  # the (fractional) pair that turns so often over the context
            wavelength = self.original_max_positions / (turns * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        first, last = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The upper bound is H - 1, not H/2 - 1, in the checkpoints' own code: it is part of how they were trained.
        first, last = max(first, 0), min(last, head_dim - 1)
        width = max(last - first, 1e-3)
        slow = np.clip((np.arange(head_dim // 2) - first) / width, 0.0, 1.0)
        return (1.0 - slow) * kept + slow * kept / self.factor


type RopeConfig = DefaultRope | LinearRope | Llama3Rope | YarnRope


def rope_tables(
    rope: RopeConfig, positions: Int[Array, "*batch"], head_dim: int
) -> tuple[Float[Array, "*batch {head_dim//2}"], Float[Array, "*batch {head_dim//2}"]]:
    """Returns float32 cos and sin of every position, with the attention factor folded in.

    Args:
      rope: static; which frequencies.
      positions: tokens from the start of the sequence (of the document, where documents are packed).
      head_dim: static; H.
    """
    frequencies = jnp.asarray(rope.frequencies(head_dim), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies.reshape(
        (1,) * positions.ndim + (-1,)
    )
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "*batch heads H"],
    cos: Float[Array, "*batch H/2"],
    sin: Float[Array, "*batch H/2"],
) -> Float[Array, "*batch heads H"]:
    """Rotates each head of `x` by its position's angles, in float32, and returns x's dtype."""
    real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = (real * cos - imaginary * sin, imaginary * cos + real * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _check_factor(factor: float) -> None:
    if not factor >= 1.0:
        raise ValueError(f"rope factor: got {factor}, wanted a number of at least 1")


__all__ = [
    "DefaultRope",
    "LinearRope",
    "Llama3Rope",
    "RopeConfig",
    "YarnRope",
    "rope_tables",
    "rotate",
]
