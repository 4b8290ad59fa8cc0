"""Compiled decoding on tokens: prefill, teacher-forced steps, and one `lax.while_loop` that samples until all are done.

All three take a cache and return one. Which attention the rows run is the model's strategy: a prompt of n tokens goes
through `prefill` except for its last `suffix_tokens`, which are fed to the loop as forced tokens, so that they, and every
token drawn after them, are rows of `AttentionStrategy.decode`.

Shapes are rounded up (`padded_size`), so that prompts of similar length share one compilation.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int, Int32, Key

from jaxtopk.decoding.kv_cache import KVCache
from jaxtopk.decoding.sampling import Sampler, SamplingConfig, random_streams, sample
from jaxtopk.models.decoder_lm.modeling import DecoderLM

_GRANULE = 64  # tokens
_TILE = 128  # tokens


def padded_size(size: int) -> int:
    """Rounds a length up: to a multiple of 64 below 1024, then of an eighth of the power of two below it (at most 12.5 %)."""
    granule = max(_GRANULE, 2 ** (max(size, 1).bit_length() - 1) // 8)
    return max(1, -(-size // granule)) * granule


def cache_capacity(size: int) -> int:
    """Rounds the tokens a cache must hold up: as `padded_size`, and to a whole tile of 128, which a TPU reads uncopied."""
    return -(-padded_size(size) // _TILE) * _TILE


class ForcedDecode(typing.NamedTuple):
    """What `decode_forced` returns.

    log_probs: float32 [B, T - 1], natural logarithm of the probability of token t + 1 given all before it.
    logits: float32 [B, V] after the last token; [B, T, V], after each, with `keep_logits`.
    cache: with T more tokens.
    likeliest: int32 [B, T], the most likely next token after each, the lowest id among equals.
    """

    log_probs: Float32[Array, "B T-1"]
    logits: Float32[Array, "B *T V"]
    cache: KVCache
    likeliest: Int32[Array, "B T"]


def decode_forced(
    model: DecoderLM, tokens: Int[Array, "B T"], cache: KVCache, *, keep_logits: bool = False
) -> ForcedDecode:
    """Feeds given tokens one at a time through `model.decode`, in one compiled scan.

    Unlike a forward pass over the whole text, every one of these rows is a decode row of the strategy over the cache: with a
    dense prefill before it this scores exactly what generation would do.

    Args:
      model: any strategy; `repeat_cache` and a strategy with a tuple of budgets score many settings in one batch.
      tokens: the same number in each sequence.
      cache: what precedes them; it is not consumed, so one prefill serves many calls.
      keep_logits: return the logits after every token, V x T float32 a sequence.

    Raises:
      ValueError: the tokens do not fit the cache, or their shape is wrong.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens: got shape {list(tokens.shape)}, wanted [B, T] with T >= 1")
    _check_room(cache, tokens.shape[1])
    return _decode_forced(
        model.unstacked(), jnp.asarray(tokens, jnp.int32), cache, keep_logits=keep_logits
    )


@functools.partial(jax.jit, static_argnames="keep_logits")
def _decode_forced(model, tokens, cache, *, keep_logits):
    def step(carry, xs):
        token, target = xs
        logits, cache = model.decode(token, carry[0])
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (cache, logits), (log_prob, likeliest, logits if keep_logits else None)

    # The last token has no successor; its own id stands in and is cut off.
    targets = jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    logits = jnp.zeros((tokens.shape[0], model.config.vocab_size), jnp.float32)
    (cache, last), (log_probs, likeliest, kept) = jax.lax.scan(
        step, (cache, logits), (tokens.T, targets.T)
    )
    logits = last if kept is None else jnp.swapaxes(kept, 0, 1)
    return ForcedDecode(
        log_probs=log_probs.T[:, :-1], logits=logits, cache=cache, likeliest=likeliest.T
    )


def repeat_cache(cache: KVCache, repeats: int) -> KVCache:
    """Copies each sequence `repeats` times in a row, so that one prefill serves many settings.

    Sequence b * repeats + r is a copy of b; a strategy with `repeats` budgets gives it budget r.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, wanted at least 1")
    return _repeat(cache, repeats=repeats)


@functools.partial(jax.jit, static_argnames="repeats")
def _repeat(cache, *, repeats):
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, repeats, axis=0), cache)


def repeat_prefilled(prefilled: "Prefilled", repeats: int) -> "Prefilled":
    """Does to all that `prefill` returned what `repeat_cache` does to its cache."""
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, wanted at least 1")
    return _repeat(prefilled, repeats=repeats)


class Prefilled(typing.NamedTuple):
    """What `prefill` returns.

    cache: holds the prompts but for the tokens in `forced`.
    logits: float32 [B, V], of the token after each cached prompt (meaningless where nothing of it is cached).
    forced: int32 [B, s], the last tokens of each prompt that are to be decoded, padded at the tail; s may be 0.
    forced_counts: int32 [B], how many of them there are.
    """

    cache: KVCache
    logits: Float32[Array, "B V"]
    forced: Int32[Array, "B s"]
    forced_counts: Int32[Array, "B"]


def prefill(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    cache_dtype: DTypeLike | None = None,
    padded_to: int = 0,
) -> Prefilled:
    """Runs ragged prompts through the model, except for the tokens that its strategy wants decoded.

    Args:
      model: its strategy says which attention prompt rows get, and how many last tokens are decoded instead.
      prompts: token ids, at least one a prompt.
      new_tokens: room to leave in the cache after the longest prompt; its capacity is `cache_capacity` of both together.
      cache_dtype: of keys and values; None means the model's own.
      padded_to: pad shorter prompts to this length, so that batches of any lengths up to it share one compilation.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or lengths.min() < 1:
        raise ValueError(
            f"prompts: got lengths {lengths.tolist()}, wanted at least one prompt, of at least one token"
        )
    suffix = min(model.attention.suffix_tokens, int(lengths.max()))
    forced_counts = np.minimum(lengths, suffix)
    cached = lengths - forced_counts
    width = padded_size(max(int(cached.max()), padded_to)) if cached.any() else 0
    capacity = cache_capacity(max(width, int(lengths.max()) + new_tokens))
    tokens = np.zeros((len(prompts), width), np.int32)
    forced = np.zeros((len(prompts), suffix), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : cached[row]] = prompt[: cached[row]]
        forced[row, : forced_counts[row]] = prompt[cached[row] :]
    dtype = model.embed[...].dtype if cache_dtype is None else jnp.dtype(cache_dtype)
    cache, logits = _prefill(
        model, jnp.asarray(tokens), jnp.asarray(cached), capacity=capacity, dtype=dtype
    )
    return Prefilled(
        cache=cache,
        logits=logits,
        forced=jnp.asarray(forced),
        forced_counts=jnp.asarray(forced_counts),
    )


@functools.partial(jax.jit, static_argnames=("capacity", "dtype"))
def _prefill(model, tokens, lengths, *, capacity, dtype):
    cache = KVCache.create(model.config, tokens.shape[0], capacity, dtype)
    if not tokens.shape[1]:
        return cache, jnp.zeros((tokens.shape[0], model.config.vocab_size), jnp.float32)
    # A prompt of which nothing is cached runs one padding token, so that no row is without a key.
    hidden, cache = model.prefill(tokens, lengths=jnp.maximum(lengths, 1), cache=cache)
    cache = dataclasses.replace(cache, lengths=lengths)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return cache, model.head(jnp.take_along_axis(hidden, last, axis=1)[:, 0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # JAX rebuilds this class with specs and shapes as leaves
class Decoding:
    """Sequences on their way: what the loop carries.

    A sequence's row of `tokens` holds its forced tokens, then those it drew (an end token included), then -1.
    """

    cache: KVCache | None  # None only until `start` returns
    tokens: Int32[Array, "B M"]
    forced_counts: Int32[Array, "B"]
    drawn: Int32[Array, "B"]  # tokens drawn, an end token included
    done: Bool[Array, "B"]
    step: Int32[Array, ""]  # columns of `tokens` that are settled


def start(
    prefilled: Prefilled,
    *,
    streams: Key[Array, "B"],
    sampler: Sampler,
    end_tokens: Sequence[int] = (),
    max_new_tokens: int,
    columns: int = 0,
) -> Decoding:
    """Returns the loop's first state, which takes over the cache.

    Where no token of a sequence is forced, its first one is drawn here, from the prefill's logits.

    Args:
      columns: make room for this many tokens where `max_new_tokens` is less, so that different ones share a compilation.
    """
    cache, logits, forced, forced_counts = prefilled
    _check_room(cache, forced.shape[1] + max_new_tokens - 1)
    state = _start(
        logits,
        forced,
        forced_counts,
        streams,
        sampler,
        _ends(end_tokens),
        jnp.int32(max_new_tokens),
        width=padded_size(forced.shape[1] + max(max_new_tokens, columns)),
    )
    return dataclasses.replace(state, cache=cache)


@functools.partial(jax.jit, static_argnames="width")
def _start(logits, forced, forced_counts, streams, sampler, ends, max_new_tokens, *, width):
    batch, suffix = forced.shape
    state = Decoding(
        cache=None,
        tokens=jnp.pad(forced, ((0, 0), (0, width - suffix)), constant_values=-1),
        forced_counts=forced_counts,
        drawn=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        step=jnp.int32(0),
    )
    return _settle(state, logits, None, streams, sampler, ends, max_new_tokens)


def advance(
    model: DecoderLM,
    state: Decoding,
    *,
    streams: Key[Array, "B"],
    sampler: Sampler,
    end_tokens: Sequence[int] = (),
    max_new_tokens: int,
    until: int | None = None,
) -> Decoding:
    """Decodes and draws until every sequence has ended or holds `max_new_tokens`, in one compiled `lax.while_loop`.

    Args:
      model: best in the form of `DecoderLM.unstacked`.
      state: consumed: its buffers are reused.
      streams, sampler, end_tokens, max_new_tokens: as given to `start`.
      until: stop earlier, after so many columns of `state.tokens`, to be called again; costs no compilation.
    """
    until = state.tokens.shape[1] if until is None else until
    return _advance(
        model,
        state,
        streams,
        sampler,
        _ends(end_tokens),
        jnp.int32(max_new_tokens),
        jnp.int32(until),
    )


@functools.partial(jax.jit, donate_argnames="state")
def _advance(model, state, streams, sampler, ends, max_new_tokens, until):
    def unfinished(state):
        return (state.step < until) & ~jnp.all(state.done)

    def step(state):
        # A sequence that is done decodes along with the others, but its cache does not grow: the row is overwritten.
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1, keepdims=False)
        logits, cache = model.decode(jnp.maximum(last, 0), state.cache)
        lengths = jnp.where(state.done, state.cache.lengths, cache.lengths)
        cache = dataclasses.replace(cache, lengths=lengths)
        return _settle(state, logits, cache, streams, sampler, ends, max_new_tokens)

    return jax.lax.while_loop(unfinished, step, state)


def _settle(state, logits, cache, streams, sampler, ends, max_new_tokens) -> Decoding:
    """Fills column `step` of the tokens: a forced token stays, a sequence on its way draws, one that is done gets -1."""
    token = sample(logits, streams, state.drawn, sampler)
    draws = (state.step >= state.forced_counts) & ~state.done
    given = jax.lax.dynamic_index_in_dim(state.tokens, state.step, axis=1, keepdims=False)
    column = jnp.where(draws, token, jnp.where(state.done, -1, given))
    drawn = state.drawn + draws.astype(jnp.int32)
    ended = draws & jnp.any(token[:, None] == ends[None, :], axis=1)
    return dataclasses.replace(
        state,
        cache=cache,
        tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, column, state.step, axis=1),
        drawn=drawn,
        done=state.done | ended | (drawn >= max_new_tokens),
        step=state.step + 1,
    )


class Continuation(typing.NamedTuple):
    """Tokens drawn for each sequence.

    tokens: int32 [B, max_new_tokens], -1 at the tail; where an end token was drawn, it is the last.
    counts: int32 [B], tokens drawn without that end token.
    """

    tokens: np.ndarray
    counts: np.ndarray


def continue_tokens(
    model: DecoderLM,
    cache: KVCache,
    last_tokens: Int[Array, "B s"],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    end_tokens: Sequence[int] = (),
) -> Continuation:
    """Draws what follows a cached text and the tokens after it, for studies that share one prefill.

    Args:
      model: any strategy; all rows here are its decode rows.
      cache: consumed by nothing: one prefill serves many calls.
      last_tokens: the end of the prompts, not in the cache yet; at least one token.
      max_new_tokens: most tokens to draw a sequence.
      sampling, seed, end_tokens: as in `generate`; the random stream of a sequence follows from `last_tokens`.

    Raises:
      ValueError: the tokens do not fit the cache, or an argument is out of its range.
    """
    if last_tokens.ndim != 2 or last_tokens.shape[1] < 1:
        raise ValueError(
            f"last_tokens: got shape {list(last_tokens.shape)}, wanted [B, s] with s >= 1"
        )
    check_new_tokens(max_new_tokens)
    batch, suffix = last_tokens.shape
    prefilled = Prefilled(
        cache=jax.tree.map(jnp.copy, cache),  # the loop consumes its state
        logits=jnp.zeros((batch, model.config.vocab_size), jnp.float32),
        forced=jnp.asarray(last_tokens, jnp.int32),
        forced_counts=jnp.full((batch,), suffix, jnp.int32),
    )
    settings = {
        "streams": random_streams(seed, np.asarray(last_tokens).tolist()),
        "sampler": sampling.arrays(),
        "end_tokens": end_tokens,
        "max_new_tokens": max_new_tokens,
    }
    state = advance(model.unstacked(), start(prefilled, **settings), **settings)
    drawn_tokens, counts = drawn(state, end_tokens)
    return Continuation(tokens=drawn_tokens[:, :max_new_tokens], counts=counts)


def drawn(state: Decoding, end_tokens: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Returns, on the host, the tokens drawn so far [B, M], -1 at the tail, and their number without end tokens [B]."""
    tokens, forced, numbers = (
        np.asarray(x) for x in (state.tokens, state.forced_counts, state.drawn)
    )
    moved = np.full_like(tokens, -1)
    for row, (begin, number) in enumerate(zip(forced, numbers, strict=True)):
        moved[row, :number] = tokens[row, begin : begin + number]
    last = moved[np.arange(len(moved)), np.maximum(numbers - 1, 0)]
    ended = np.isin(last, np.asarray(end_tokens, np.int32)) & (numbers > 0)
    return moved, numbers - ended


def check_new_tokens(max_new_tokens: int) -> None:
    """Refuses a number of tokens below one."""
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, wanted an int of at least 1")


def _check_room(cache: KVCache, new_tokens: int) -> None:
    if isinstance(cache.lengths, jax.core.Tracer):
        return  # under jit the lengths are not known; rows past the capacity are dropped by the cache
    longest = int(jnp.max(cache.lengths))
    if longest + new_tokens > cache.capacity:
        raise ValueError(
            f"cache: got {longest} tokens and {new_tokens} more to write, wanted at most its capacity = {cache.capacity}"
        )


def _ends(end_tokens: Sequence[int]) -> Int32[Array, "E"]:
    return jnp.asarray(tuple(end_tokens), jnp.int32)


__all__ = [
    "Continuation",
    "Decoding",
    "ForcedDecode",
    "Prefilled",
    "advance",
    "cache_capacity",
    "check_new_tokens",
    "continue_tokens",
    "decode_forced",
    "drawn",
    "padded_size",
    "prefill",
    "repeat_cache",
    "repeat_prefilled",
    "start",
]
