"""How long a prompt takes, and each token after it, under several attention strategies: what is timed is what generation runs.

Every strategy decodes from one cache, which passes from run to run, so only one is held. Strategies take turns, round by
round, so that whatever else the machine does falls on all alike.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.decoding import loops
from jaxtopk.decoding.kv_cache import KVCache
from jaxtopk.decoding.sampling import SamplingConfig, random_streams
from jaxtopk.models.decoder_lm.modeling import DecoderLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Wall-clock seconds of the same work, done again and again.

    Args:
      first: the run before the rounds, which compiles; it counts for nothing else.
      rounds: each round, in order.
    """

    first: float
    rounds: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingTimes:
    """What `time_decoding` found.

    Args:
      prefill: of whole prompts, until the logits of the first new token are there; by name.
      decode: of `new_tokens` steps, each a token of every sequence; by name.
      tokens: int [B, new_tokens + 1], drawn by the prefill and by those steps; by name.
      capacity: of the cache, tokens a sequence.
    """

    prefill: Mapping[str, Times]
    decode: Mapping[str, Times]
    tokens: Mapping[str, np.ndarray]
    capacity: int


def time_decoding(
    model: DecoderLM,
    unstacked: DecoderLM,
    prompts: np.ndarray,
    *,
    prefills: Mapping[str, AttentionStrategy],
    strategies: Mapping[str, AttentionStrategy],
    new_tokens: int,
    rounds: int,
    done: Callable[[], Any] = lambda: None,
) -> DecodingTimes:
    """Times prompts under each of `prefills`, then greedy decoding under each of `strategies`, several rounds.

    Args:
      model: runs the prompts; its own strategy does not matter.
      unstacked: the same model as `DecoderLM.unstacked` returns it; decodes.
      prompts: int [B, T], token ids.
      prefills: strategies whose `prefill_strategy` is itself, by name; decoding goes on from the cache of the first.
      strategies: of the decoded rows, by name.
      new_tokens: decode steps a run.
      rounds: runs that count, of each.
      done: called after each run; there are (rounds + 1) x (prefills + strategies) of them.

    Raises:
      ValueError: nothing to time, or `new_tokens` or `rounds` is below 1.
    """
    loops.check_new_tokens(new_tokens)
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, wanted at least 1")
    for name, given in (("prefills", prefills), ("strategies", strategies)):
        if not given:
            raise ValueError(f"{name}: got none, wanted at least one")
    prompt_ids = prompts.tolist()
    seconds: dict[tuple[str, str], list[float]] = {}

    def timed(key: tuple[str, str], work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = jax.block_until_ready(work())
        seconds.setdefault(key, []).append(time.perf_counter() - begin)
        done()
        return result

    prefilled = None
    for _ in range(rounds + 1):
        for name in reversed(tuple(prefills)):  # the first comes last: its cache stays
            prefilled = None  # frees the cache before the next one is made
            one = model.with_attention(prefills[name])
            prefilled = timed(
                ("prefill", name),
                lambda one=one: loops.prefill(one, prompt_ids, new_tokens=new_tokens),
            )
    assert prefilled is not None  # there is a round, and a strategy in it
    logits, cache = prefilled.logits, prefilled.cache
    lengths = np.asarray(cache.lengths)
    capacity = cache.capacity
    del prefilled

    # The first token is drawn from the prefill's logits, before the clock starts; no token ends a sequence.
    settings = {
        "streams": random_streams(0, prompt_ids),
        "sampler": SamplingConfig().arrays(),
        "max_new_tokens": new_tokens + 1,
    }
    drawn: dict[str, np.ndarray] = {}
    for _ in range(rounds + 1):
        for name, strategy in strategies.items():
            one = unstacked.with_attention(strategy)
            state = loops.start(_again(cache, logits, lengths), **settings)
            jax.block_until_ready(state)
            state = timed(
                ("decode", name),
                lambda one=one, state=state: loops.advance(one, state, **settings),
            )
            drawn[name] = loops.drawn(state)[0][:, : new_tokens + 1]
            cache = state.cache  # the one before was consumed
    of = lambda kind: {
        name: Times(first=found[0], rounds=tuple(found[1:]))
        for (of_kind, name), found in seconds.items()
        if of_kind == kind
    }
    decode, prefill = of("decode"), of("prefill")
    return DecodingTimes(
        prefill={name: prefill[name] for name in prefills},
        decode=decode,
        tokens=drawn,
        capacity=capacity,
    )


def _again(cache: KVCache, logits: jax.Array, lengths: np.ndarray) -> loops.Prefilled:
    """Returns what the prefill did: a later run writes the rows behind the prompts anew.

    The small arrays are made each time, since the loop reuses the buffers of all it is given.
    """
    batch = len(lengths)
    return loops.Prefilled(
        cache=dataclasses.replace(cache, lengths=jnp.array(lengths)),
        logits=logits,
        forced=jnp.zeros((batch, 0), jnp.int32),
        forced_counts=jnp.zeros((batch,), jnp.int32),
    )


__all__ = ["DecodingTimes", "Times", "time_decoding"]
