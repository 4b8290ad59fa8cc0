"""Text in, text out: encodes prompts, runs the decoding loop in slices, and turns tokens into text as they come."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.decoding import loops
from jaxtopk.decoding.sampling import SamplingConfig, random_streams
from jaxtopk.models.decoder_lm.modeling import DecoderLM

type Message = Mapping[str, Any]
type Prompt = str | Sequence[Message]

# Columns a slice of the loop decodes before the host looks at them: one where someone reads along, more where only stop
# strings are searched for or a bar moves, as each slice ends in a wait for the device.
_SLICE_SHOWN = 1
_SLICE_SEARCHED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What followed one prompt."""

    text: str  # without the end token or the stop string
    tokens: tuple[
        int, ...
    ]  # drawn, without the end token; up to the one that completed a stop string
    prompt_tokens: int
    finish: Literal["end_token", "stop", "length"]


def generate(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    on_token: Callable[[str], None] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> str | list[str]:
    """Continues one prompt, or a batch of prompts of any lengths.

    The prompt runs under the strategy's `prefill_strategy()`; its last `suffix_tokens` tokens and everything drawn after
    them are decode rows of the strategy. A sequence ends with one of the tokenizer's end tokens, a stop string, or
    `max_new_tokens`; the loop ends when all sequences have.

    Compiles once for each padded prompt length, cache capacity (`loops.cache_capacity`) and batch size. `decode` wants the
    layers apart (`DecoderLM.unstacked`, a copy of them): for many calls, pass such a model.

    Args:
      model: its `attention` says how; see `DecoderLM.with_attention`.
      tokenizer: the model's own.
      prompts: a text, or a list of texts. With `chat`, a text is the user's message; a list of messages (mappings with
        role and content) is a conversation.
      max_new_tokens: most tokens to draw, at least 1.
      temperature, top_p, min_p: see `SamplingConfig`; temperature 0 is greedy.
      seed: with a prompt it fixes what is drawn, whatever else is in the batch; equal prompts in a batch differ.
      stop: texts that end a sequence, found in the text whatever its tokens; what is returned ends before the first one.
      chat: render the prompts by the model's chat template.
      on_token: called with each piece of new text as soon as it is certain (whole characters, and not the beginning of a
        stop string); the pieces joined are the result. For a single prompt.
      cache_dtype: of the cached keys and values; None means the model's dtype.

    Returns:
      The new text, or a list of one text a prompt.

    Raises:
      ValueError: a prompt is empty, or with `max_new_tokens` longer than the model's context; a setting is out of its
        range; the model has no chat template. Raised before any work.
    """
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    batch = cast(list[Prompt], [prompts] if single else list(prompts))
    if on_token is not None and len(batch) != 1:
        raise ValueError(
            f"on_token: got {len(batch)} prompts, wanted one (complete() tells them apart)"
        )
    completions = complete(
        model,
        tokenizer,
        batch,
        max_new_tokens=max_new_tokens,
        sampling=SamplingConfig(temperature=temperature, top_p=top_p, min_p=min_p),
        seed=seed,
        stop=stop,
        chat=chat,
        on_text=None if on_token is None else lambda index, piece: on_token(piece),
        cache_dtype=cache_dtype,
    )
    texts = [completion.text for completion in completions]
    return texts[0] if single else texts


def complete(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> list[Completion]:
    """Does what `generate` does for a batch, and says more about it.

    Args:
      sampling: how tokens are drawn.
      on_text: called with the index of a prompt and a piece of its new text.
      on_progress: called with the number of tokens drawn so far by the longest sequence, first with 0 after the prefill.
      model, tokenizer, prompts, max_new_tokens, seed, stop, chat, cache_dtype: see `generate`.

    Raises:
      ValueError: see `generate`.
    """
    loops.check_new_tokens(max_new_tokens)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise ValueError(f"stop: got {stops}, wanted texts of at least one character")
    encoded = encode_prompts(tokenizer, prompts, chat=chat)
    _check_context(model, encoded, max_new_tokens)

    prefilled = loops.prefill(model, encoded, new_tokens=max_new_tokens, cache_dtype=cache_dtype)
    if on_text is not None:
        columns = _SLICE_SHOWN
    elif stops or on_progress is not None:
        columns = _SLICE_SEARCHED
    else:
        columns = None
    return continue_prefilled(
        model,
        tokenizer,
        prefilled,
        streams=random_streams(seed, encoded),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stops,
        slice_columns=columns,
        on_text=on_text,
        on_progress=on_progress,
    )


def continue_prefilled(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prefilled: loops.Prefilled,
    *,
    streams: Key[Array, "B"],
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    stop: Sequence[str] = (),
    slice_columns: int | None = _SLICE_SEARCHED,
    room: int = 0,
    counted: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Decodes prompts that `loops.prefill` has run, until each has ended; what `complete` does after its prefill.

    Args:
      model: its rows decode; best in the form of `DecoderLM.unstacked`. Its strategy need not be that of the prefill.
      prefilled: its cache is consumed: see `loops.repeat_prefilled`.
      streams: random streams of the sequences, see `random_streams`.
      slice_columns: columns the device decodes between two looks of the host for stop strings; None: all.
      room: as `columns` of `loops.start`.
      counted: only so many first sequences count; the others fill the batch up, and are done from the start. None: all.
      tokenizer, max_new_tokens, sampling, stop, on_text, on_progress: see `complete`.

    Returns:
      One completion for each sequence that counts.
    """
    batch, forced = prefilled.forced.shape
    counted = batch if counted is None else counted
    prompt_tokens = np.asarray(prefilled.cache.lengths) + np.asarray(prefilled.forced_counts)
    settings = {
        "streams": streams,
        "sampler": sampling.arrays(),
        "end_tokens": tokenizer.eos_ids,
        "max_new_tokens": max_new_tokens,
    }
    state = loops.start(prefilled, **settings, columns=room)
    del prefilled  # its cache belongs to the loop now
    writers = [
        _Writer(tokenizer, stop, functools.partial(_show, on_text, row)) for row in range(counted)
    ]
    if on_progress is not None:
        on_progress(0)
    columns = forced + max_new_tokens if slice_columns is None else slice_columns
    unstacked = model.unstacked()
    until = max(forced, 1)
    while True:
        tokens, counts = loops.drawn(state, tokenizer.eos_ids)
        for writer, row, count in zip(writers, tokens, counts, strict=False):
            writer.take(row[:count])
        stopped = np.ones((batch,), bool)
        stopped[:counted] = [writer.stopped for writer in writers]
        if on_progress is not None and until > forced:
            on_progress(int(np.max(np.asarray(state.drawn))))
        if (np.asarray(state.done) | stopped).all():
            break
        state = dataclasses.replace(state, done=state.done | jnp.asarray(stopped))
        until += columns
        state = loops.advance(unstacked, state, until=until, **settings)

    ended = np.asarray(state.drawn) > counts
    return [
        Completion(
            text=writer.finish(),
            tokens=tuple(row[: writer.taken].tolist()),
            prompt_tokens=int(length),
            finish="stop" if writer.stopped else "end_token" if end else "length",
        )
        for writer, row, length, end in zip(writers, tokens, prompt_tokens, ended, strict=False)
    ]


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], *, chat: bool
) -> list[list[int]]:
    """Turns prompts into tokens.

    A plain text begins with the token that the tokenizer itself puts before a text, if any. A chat is what the template
    renders, which holds such tokens already.

    Raises:
      ValueError: there is no prompt, a prompt is empty, or no chat template; names the prompt by its index.
    """
    if not prompts:
        raise ValueError("prompts: got an empty list, wanted at least one prompt")
    encoded = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index}: got an empty one, wanted at least one token")
        if chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = tokenizer.encode(
                tokenizer.apply_chat_template(messages), add_special_tokens=False
            )
        elif isinstance(prompt, str):
            ids = tokenizer.encode(prompt, add_special_tokens=True)
        else:
            raise ValueError(f"prompt {index}: got messages, wanted text (or chat=True)")
        if not ids:
            raise ValueError(f"prompt {index}: got no tokens, wanted at least one")
        encoded.append(ids)
    return encoded


def _check_context(model: DecoderLM, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    context = model.config.max_positions
    for index, prompt in enumerate(encoded):
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index}: got {len(prompt)} tokens + {max_new_tokens} new ones = "
                f"{len(prompt) + max_new_tokens}, wanted at most the model's context of {context}"
            )


def _show(on_text: Callable[[int, str], None] | None, index: int, piece: str) -> None:
    if on_text is not None:
        on_text(index, piece)


class _Writer:
    """Text of one sequence: released once it is certain, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], show: Callable[[str], None]):
        self._stream = tokenizer.stream()
        self._stops = stops
        self._show = show
        self._text = ""  # decoded so far
        self._shown = 0  # characters
        self.taken = 0  # tokens
        self.stopped = False

    def take(self, tokens: np.ndarray) -> None:
        """Takes all tokens so far, looks at those that are new; a token after a stop string is ignored."""
        for token in tokens[self.taken :].tolist():
            if self.stopped:
                return
            self.taken += 1
            self._extend(self._stream.push(token))

    def finish(self) -> str:
        """Releases what was held back, and returns the whole text."""
        if not self.stopped:
            self._extend(self._stream.finish())
        if not self.stopped:
            self._release(len(self._text))
        return self._text

    def _extend(self, piece: str) -> None:
        self._text += piece
        # A stop string that was not there before ends in the new piece.
        hits = [at for stop in self._stops if (at := self._text.find(stop, self._shown)) >= 0]
        if hits:
            self.stopped = True
            self._text = self._text[: min(hits)]
            self._release(len(self._text))
        else:
            self._release(len(self._text) - self._held())

    def _held(self) -> int:
        """Characters at the end that may turn out to be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return size
        return 0

    def _release(self, end: int) -> None:
        if end > self._shown:
            self._show(self._text[self._shown : end])
            self._shown = end


__all__ = [
    "Completion",
    "Message",
    "Prompt",
    "complete",
    "continue_prefilled",
    "encode_prompts",
    "generate",
]
