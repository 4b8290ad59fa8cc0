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
    for name, given in (("prefills", prefills), ("strategies", strategies)):
        if not given:
            raise ValueError(f"{name}: got none, wanted at least one")
    _check_numbers(new_tokens, rounds)
    prompt_ids = prompts.tolist()
    clock = _Clock(done)
    prefilled = None
    for _ in range(rounds + 1):
        for name in reversed(tuple(prefills)):  # the first comes last: its cache stays
            prefilled = None  # frees the cache before the next one is made
            one = model.with_attention(prefills[name])
            prefilled = clock.timed(
                name, lambda one=one: loops.prefill(one, prompt_ids, new_tokens=new_tokens)
            )
    assert prefilled is not None  # there is a round, and a strategy in it
    capacity = prefilled.cache.capacity
    models = {name: unstacked.with_attention(strategy) for name, strategy in strategies.items()}
    decode, drawn = time_steps(models, prefilled, new_tokens=new_tokens, rounds=rounds, done=done)
    prefill = clock.times()
    return DecodingTimes(
        prefill={name: prefill[name] for name in prefills},
        decode=decode,
        tokens=drawn,
        capacity=capacity,
    )


def time_steps(
    models: Mapping[str, DecoderLM],
    prefilled: loops.Prefilled,
    *,
    new_tokens: int,
    rounds: int,
    done: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Times], dict[str, np.ndarray]]:
    """Times greedy decoding after one prefill by each of `models` in turn, several rounds.

    Models without an indexer decode from the cache without its index keys.

    Args:
      models: of one shape but for the indexer, in the form of `DecoderLM.unstacked`, by name.
      prefilled: no token of it is forced; its cache is consumed.
      new_tokens: decode steps a run.
      rounds: runs that count, of each model, after one that does not.
      done: called after each run.

    Returns:
      The times, and the tokens drawn, int [B, new_tokens + 1], by name.

    Raises:
      ValueError: `new_tokens` or `rounds` is below 1, or the cache has no room for the tokens.
    """
    _check_numbers(new_tokens, rounds)
    logits, cache = prefilled.logits, prefilled.cache
    lengths = np.asarray(cache.lengths)
    clock = _Clock(done)
    # The first token is drawn from the prefill's logits, before the clock starts; no token ends a sequence.
    settings = {
        "streams": random_streams(0, [()] * len(lengths)),  # a greedy draw reads none
        "sampler": SamplingConfig().arrays(),
        "max_new_tokens": new_tokens + 1,
    }
    drawn: dict[str, np.ndarray] = {}
    for _ in range(rounds + 1):
        for name, model in models.items():
            index_key = cache.index_key
            if model.config.indexer is None:
                cache = dataclasses.replace(cache, index_key=None)
            state = loops.start(_again(cache, logits, lengths), **settings)
            jax.block_until_ready(state)
            state = clock.timed(
                name, lambda model=model, state=state: loops.advance(model, state, **settings)
            )
            drawn[name] = loops.drawn(state)[0][:, : new_tokens + 1]
            cache = state.cache  # the one before was consumed
            if model.config.indexer is None:
                cache = dataclasses.replace(cache, index_key=index_key)
    return clock.times(), drawn


class _Clock:
    """Seconds of each run, by name."""

    def __init__(self, done: Callable[[], Any]):
        self._done = done
        self._seconds: dict[str, list[float]] = {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Does the work, waits for its result, and returns it."""
        begin = time.perf_counter()
        result = jax.block_until_ready(work())
        self._seconds.setdefault(name, []).append(time.perf_counter() - begin)
        self._done()
        return result

    def times(self) -> dict[str, Times]:
        """Returns what was timed so far."""
        return {
            name: Times(first=found[0], rounds=tuple(found[1:]))
            for name, found in self._seconds.items()
        }


def _check_numbers(new_tokens: int, rounds: int) -> None:
    loops.check_new_tokens(new_tokens)
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, wanted at least 1")


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


__all__ = ["DecodingTimes", "Times", "time_decoding", "time_steps"]
