"""The model and the text of a run: a pretrained one and Shakespeare's plays, or random weights and made-up text."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from experiments.quickstart.config import QuickstartConfig
from jaxtopk import load_pretrained
from jaxtopk.data.corpora import shakespeare_plays
from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.evaluation.words import ADJECTIVES, NOUNS
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM


class Sources(NamedTuple):
    """What is measured, and on what.

    documents: texts that windows are cut from, as (title, text).
    """

    model: DecoderLM
    tokenizer: Tokenizer
    documents: tuple[tuple[str, str], ...]


def load(config: QuickstartConfig) -> Sources:
    """Loads, downloading on first use, what the configuration names.

    Raises:
      ValueError: a context and what is decoded after it exceed the model's own.
    """
    if config.model == "random":
        sources = _made_up(config.seed)
    else:
        model, tokenizer = load_pretrained(config.model, dtype=jnp.dtype(config.dtype))
        sources = Sources(
            model, tokenizer, tuple((play.title, play.text) for play in shakespeare_plays())
        )
    longest, limit = max(config.contexts) + config.room, sources.model.config.max_positions
    if longest > limit:
        raise ValueError(
            f"contexts: got {max(config.contexts)} and {config.room} more, wanted at most the model's {limit}"
        )
    return sources


def _made_up(seed: int) -> Sources:
    """Random weights over bytes, and documents of random words: for tests that need no download."""
    model = DecoderLM(DecoderConfig.tiny(), rngs=nnx.Rngs(params=seed))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={letter: i for i, letter in enumerate(sorted(alphabet))}, merges=[]
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    rng = np.random.default_rng(seed)
    text = lambda: " ".join(f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(500))
    documents = tuple((f"text {i}", text()) for i in range(4))
    return Sources(model, Tokenizer(backend), documents)


def cast(model: DecoderLM, dtype: str) -> DecoderLM:
    """Returns the model with its parameters in another dtype; the same arrays where it is theirs already."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


__all__ = ["Sources", "cast", "load"]
