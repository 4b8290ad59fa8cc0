"""From logits to the next token: greedy, temperature, top-p and min-p, with a random stream of its own for each sequence."""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn.

    With probabilities p = softmax(logits / temperature), a token stays a candidate if both hold:
    - top-p (arXiv:1904.09751): it belongs to the smallest set of most likely tokens whose mass reaches `top_p`; among equal
      probabilities the lowest id comes first;
    - min-p (arXiv:2407.01082): p is at least `min_p` times the largest probability.
    Both look at the same p, so they have no order, and the most likely token always stays. One candidate is then drawn with
    its renormalised probability.

    Args:
      temperature: 0 is greedy: the most likely token, the lowest id among equals; the other settings then change nothing.
      top_p: in (0, 1]; 1 switches it off.
      min_p: in [0, 1); 0 switches it off.

    Raises:
      ValueError: a setting is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}, wanted a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, wanted a number in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: got {self.min_p}, wanted a number in [0, 1)")

    def arrays(self) -> "Sampler":
        """Returns the settings as `sample` takes them; a changed number then compiles nothing anew."""
        greedy = self.temperature == 0
        number = lambda value, off: None if greedy or value == off else jnp.float32(value)
        return Sampler(
            temperature=number(self.temperature, 0.0),
            top_p=number(self.top_p, 1.0),
            min_p=number(self.min_p, 0.0),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Traced numbers of a `SamplingConfig`; None where a step is switched off, so it costs nothing."""

    temperature: Float32[Array, ""] | None
    top_p: Float32[Array, ""] | None
    min_p: Float32[Array, ""] | None


def sample(
    logits: Float32[Array, "B V"],
    streams: Key[Array, "B"],
    steps: Int32[Array, "B"],
    sampler: Sampler,
) -> Int32[Array, "B"]:
    """Draws one token a sequence.

    Args:
      logits: of the next token.
      streams: one random stream a sequence, from `random_streams`.
      steps: how many tokens each sequence drew before; which draw of its stream is used depends on nothing else.
      sampler: from `SamplingConfig.arrays`.
    """
    if sampler.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = candidates(logits / sampler.temperature, sampler.top_p, sampler.min_p)
    draw = lambda stream, step, row: jax.random.categorical(jax.random.fold_in(stream, step), row)
    return jax.vmap(draw)(streams, steps, scaled).astype(jnp.int32)


def candidates(
    scaled: Float32[Array, "B V"],
    top_p: Float32[Array, ""] | None,
    min_p: Float32[Array, ""] | None,
) -> Float32[Array, "B V"]:
    """Returns the logits, already divided by the temperature, with -inf for every token that is no candidate."""
    kept = jnp.ones(scaled.shape, bool)
    if min_p is not None:
        kept &= scaled >= jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(min_p)
    if top_p is not None:
        kept &= _nucleus(scaled, top_p)
    return jnp.where(kept, scaled, -jnp.inf)


def _nucleus(scaled: Float32[Array, "B V"], top_p: Float32[Array, ""]) -> Array:
    order = jnp.argsort(-scaled, axis=-1, stable=True)  # equals stay in the order of their ids
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    reached = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    before = jnp.pad(
        reached[:, :-1], ((0, 0), (1, 0))
    )  # by the tokens ranked higher; 0 for the first, which stays
    last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    # The set as a threshold and, among equals, the last id: no scatter back to the order of the ids.
    threshold = jnp.take_along_axis(ranked, last, axis=-1)
    tie_cut = jnp.take_along_axis(order, last, axis=-1)
    index = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 1)
    return (scaled > threshold) | ((scaled == threshold) & (index <= tie_cut))


def random_streams(seed: int, prompts: Sequence[Sequence[int]]) -> Key[Array, "B"]:
    """Returns one random stream a sequence, which depends on nothing else in its batch.

    A stream follows from the seed, the prompt's tokens, and how many equal prompts stand before it: a prompt draws the same
    tokens alone as in any batch, different prompts draw independently, and n copies of a prompt give n samples.

    Args:
      seed: any int; taken modulo 2**32.
      prompts: token ids of each sequence.
    """
    earlier: Counter[tuple[int, ...]] = Counter()
    marks = []
    for prompt in map(tuple, prompts):
        marks.append((zlib.crc32(np.asarray(prompt, np.int32).tobytes()), earlier[prompt]))
        earlier[prompt] += 1
    stream = jax.random.key(np.uint32(seed % 2**32))
    derive = lambda mark: jax.random.fold_in(jax.random.fold_in(stream, mark[0]), mark[1])
    return jax.vmap(derive)(jnp.asarray(marks, jnp.uint32))


__all__ = ["Sampler", "SamplingConfig", "candidates", "random_streams", "sample"]
