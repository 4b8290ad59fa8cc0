"""What is measured at one context: each prompt is prefilled once, then decoded under all settings together.

A batch of prompts is prefilled with full attention, except for its last `sparse_suffix` tokens. Its cache is copied once
a ratio, and one compiled loop advances all copies side by side, each with a budget of its own: given tokens are scored,
tokens not given are drawn greedily. The same prompts go through the same loop under full attention, one row each.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from experiments.quickstart.config import QuickstartConfig
from experiments.quickstart.sources import Sources, cast
from jaxtopk.analysis.capture import attend_with_statistics
from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.decoding.kv_cache import KVCache
from jaxtopk.decoding.loops import prefill, repeat_cache
from jaxtopk.evaluation.tasks import Sample, Task
from jaxtopk.models.decoder_lm.modeling import DecoderLM

FULL = "full"
type Setting = str | float  # FULL, or a ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt and what follows it.

    Args:
      prompt: token ids.
      targets: tokens to decode and score; empty to draw greedily.
      steps: tokens that follow the prompt.
    """

    prompt: tuple[int, ...]
    targets: tuple[int, ...] = ()
    steps: int


class Followed(NamedTuple):
    """What followed a prompt under one setting, one entry a token; JAX arrays inside the loop, NumPy once fetched.

    tokens: given or drawn.
    log_probs: of those tokens, natural logarithm.
    mass: softmax mass of the attended keys, mean over layers and heads.
    attended: keys in the softmax, mean over layers and heads.
    """

    tokens: np.ndarray | jax.Array
    log_probs: np.ndarray | jax.Array
    mass: np.ndarray | jax.Array
    attended: np.ndarray | jax.Array


def windows(sources: Sources, config: QuickstartConfig, context: int) -> list[Job]:
    """Cuts seeded pieces out of the documents, in turn, each with the tokens that follow it.

    Raises:
      ValueError: the documents are too short for so many.
    """
    rng = np.random.default_rng([config.seed, context])
    needed = context + config.scored_tokens
    encoded: list[list[int]] = []
    for index in rng.permutation(len(sources.documents)):
        if len(encoded) == config.windows:
            break
        tokens = sources.tokenizer.encode(sources.documents[index][1])
        if len(tokens) >= needed:
            encoded.append(tokens)
    if not encoded:
        raise ValueError(
            f"contexts: got {context}, wanted a length that some document exceeds by {config.scored_tokens}"
        )
    jobs = []
    for number in range(config.windows):
        tokens = encoded[number % len(encoded)]
        begin = int(rng.integers(0, len(tokens) - needed + 1))
        piece = tuple(tokens[begin : begin + needed])
        jobs.append(
            Job(prompt=piece[:context], targets=piece[context:], steps=config.scored_tokens)
        )
    return jobs


def task_samples(
    task: Task, tokenizer: Tokenizer, config: QuickstartConfig, context: int
) -> list[tuple[Sample, Job]]:
    """Draws the samples of a task, as plain text for the model to continue.

    A chat template would be the instruct model's habit, but small ones look up better without: SmolLM2-135M finds all
    values in a JSON object of 20 entries as text, and half of them as a chat (full attention, six samples).
    """
    encode = lambda sample: tokenizer.encode(sample.text)
    length = lambda sample: len(encode(sample))
    samples = [
        task.sample(index, seed=config.seed, target_tokens=context, count_tokens=length)
        for index in range(config.samples)
    ]
    return [
        (sample, Job(prompt=tuple(encode(sample)), steps=config.reply_tokens)) for sample in samples
    ]


def follow(
    model: DecoderLM, jobs: Sequence[Job], config: QuickstartConfig, *, done: Callable[[int], Any]
) -> Iterator[dict[Setting, Followed]]:
    """Decodes every job under every setting; yields one result a job, in order.

    Args:
      model: as loaded, its layers stacked; a copy with separate layers is made for the decoding.
      done: called with the number of jobs just finished.
    """
    strategy = TopKAttention(topk_ratio=config.ratios, sparse_suffix=config.sparse_suffix)
    unstacked = model.unstacked()
    full_model, sparse_model = (
        unstacked.with_attention(one) for one in (FullAttention(), strategy)
    )
    each = len(config.ratios)
    repeated = lambda x: jnp.repeat(x, each, axis=0)
    for start in range(0, len(jobs), config.batch):
        batch = jobs[start : start + config.batch]
        # A last batch that is short is filled up, so that it needs no compilation of its own.
        rows = [*batch, *[batch[-1]] * (config.batch - len(batch))]
        cache, forced = prefilled(model.with_attention(strategy), rows, config)
        steps = config.sparse_suffix - 1 + max(job.steps for job in batch)
        targets = np.full((len(rows), config.sparse_suffix - 1 + config.room), -1, np.int32)
        targets[:, : config.sparse_suffix - 1] = forced[:, 1:]
        for row, job in enumerate(rows):
            targets[row, config.sparse_suffix - 1 :][: len(job.targets)] = job.targets
        first, targets = jnp.asarray(forced[:, 0]), jnp.asarray(targets)
        steps = jnp.int32(steps)
        copies = repeat_cache(cache, each)
        topk, _ = _decode(sparse_model, repeated(first), repeated(targets), copies, steps)
        full, _ = _decode(full_model, first, targets, cache, steps)
        topk, full = jax.device_get((topk, full))
        for row, job in enumerate(batch):
            part = slice(config.sparse_suffix - 1, config.sparse_suffix - 1 + job.steps)
            of_row = lambda decoded, index, part=part: Followed(*(x[index, part] for x in decoded))
            results: dict[Setting, Followed] = {FULL: of_row(full, row)}
            for index, ratio in enumerate(config.ratios):
                results[ratio] = of_row(topk, row * each + index)
            yield results
        done(len(batch))


def prefilled(
    model: DecoderLM, jobs: Sequence[Job], config: QuickstartConfig
) -> tuple[KVCache, np.ndarray]:
    """Returns the cache of all but the last tokens of each prompt, and those last tokens [B, sparse_suffix]."""
    done = prefill(model, [job.prompt for job in jobs], new_tokens=config.room)
    return done.cache, np.asarray(done.forced)


@functools.partial(jax.jit, donate_argnames="cache")
def _decode(model, first, targets, cache, steps) -> tuple[Followed, KVCache]:
    """Feeds `first` [R], then what follows, to the model; targets [R, M] of -1 are drawn; the first `steps` columns count.

    The cache is returned only so that its buffers are reused.
    """
    rows, size = targets.shape
    nothing = jnp.zeros((rows, size), jnp.float32)
    write = lambda array, column, step: jax.lax.dynamic_update_index_in_dim(
        array, column, step, axis=1
    )

    def body(step, state):
        token, cache, found = state
        logits, cache, seen = model.decode_captured(token, cache, attend_with_statistics)
        target = jax.lax.dynamic_index_in_dim(targets, step, axis=1, keepdims=False)
        token = jnp.where(target >= 0, target, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        log_prob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(
            logits, axis=-1
        )
        mean = lambda x: jnp.mean(x.astype(jnp.float32), axis=(0, 2))  # over layers and heads
        columns = Followed(token, log_prob, mean(seen.mass), mean(seen.attended))
        return (
            token,
            cache,
            Followed(
                *(write(array, column, step) for array, column in zip(found, columns, strict=True))
            ),
        )

    found = Followed(jnp.full((rows, size), -1, jnp.int32), nothing, nothing, nothing)
    _, cache, found = jax.lax.fori_loop(0, steps, body, (first, cache, found))
    return found, cache


def step_milliseconds(
    model: DecoderLM, job: Job, config: QuickstartConfig, *, done: Callable[[int], Any]
) -> dict[Setting, list[float]]:
    """Times greedy decoding of one sequence after its prompt, per token, under every setting in turn, several rounds.

    Every setting runs `timed_steps` steps in one compiled loop, from the same cache. Budgets are arguments of the loop, so
    all ratios run one program, the one that `topk_ratio` runs; each program runs once before the clock does.

    Args:
      model: as loaded; a copy in `timing_dtype`, with separate layers, is timed.
      done: called with the number of runs just finished.

    Returns:
      The time of each round [ms], by setting.
    """
    model = cast(model, config.timing_dtype)
    cache, forced = prefilled(model.with_attention(TopKAttention(topk_ratio=1.0)), [job], config)
    model = model.unstacked()
    token = jnp.asarray(forced[:, 0])
    budgets = {
        ratio: pallas_kernels.budget_from_ratio(cache.lengths + 1, ratio)[:, None]
        for ratio in config.ratios
    }
    programs = {FULL: (_timed_full, jnp.ones((1, 1), jnp.int32))} | {
        ratio: (_timed_topk, budget) for ratio, budget in budgets.items()
    }
    steps = config.timed_steps
    for program, budget in (programs[FULL], programs[config.ratios[0]]):
        cache = jax.block_until_ready(program(model, token, cache, budget, steps=steps))
    times: dict[Setting, list[float]] = {setting: [] for setting in programs}
    for _ in range(config.timed_rounds):
        for setting, (program, budget) in programs.items():
            begin = time.perf_counter()
            cache = jax.block_until_ready(program(model, token, cache, budget, steps=steps))
            times[setting].append(1e3 * (time.perf_counter() - begin) / steps)
            done(1)
    return times


def median(times: Sequence[float]) -> float:
    """Returns the median of some rounds."""
    return float(statistics.median(times))


def _attend_fully(strategy, query, key, value, **visible):
    del strategy
    return FullAttention().decode(query, key, value, **visible), None


def _timed_loop(model, token, cache, attend, steps):
    """Decodes greedily for `steps` steps; returns the cache with its first lengths, ready for another run."""

    def body(_, state):
        token, cache = state
        logits, cache, _ = model.decode_captured(token, cache, attend)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    _, after = jax.lax.fori_loop(0, steps, body, (token, cache))
    return dataclasses.replace(after, lengths=cache.lengths)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="steps")
def _timed_full(model, token, cache, budget, *, steps):
    del budget
    return _timed_loop(model, token, cache, _attend_fully, steps)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="steps")
def _timed_topk(model, token, cache, budget, *, steps):
    def attend(strategy, query, key, value, *, lengths, window):
        del strategy
        return pallas_kernels.topk_decode_attention(
            query, key, value, topk=budget, lengths=lengths, window=window
        ), None

    return _timed_loop(model, token, cache, attend, steps)


__all__ = [
    "FULL",
    "Followed",
    "Job",
    "Setting",
    "follow",
    "median",
    "step_milliseconds",
    "task_samples",
    "windows",
]
