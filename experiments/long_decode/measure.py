"""From a workload to rows: a model, a cache as if its prompt had been run, and every attention timed on both in turn.

Models that are only a shape have random weights, and caches of random keys and values: what a step costs depends on neither,
save for where the selected keys lie, and random ones lie scattered, which is the harder case.
"""

import dataclasses
import gc
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.kernel_latency.measure import one_line
from experiments.long_decode.config import LongDecodeConfig, Workload
from jaxtopk import load_pretrained
from jaxtopk.attention import FullAttention, IndexerAttention, TopKAttention
from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.decoding import loops
from jaxtopk.decoding.kv_cache import KVCache
from jaxtopk.decoding.timing import Times, time_steps
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM

_SHAPES = {"llama-3.1-8b-shape": DecoderConfig.llama31_8b, "tiny": DecoderConfig.tiny}


class Models(NamedTuple):
    """One model in the forms that a workload needs.

    plain: its layers apart; for attention that reads no index.
    indexed: the same with an indexer in each layer, whose weights are random.
    stacked: the latter with its layers together, to run prompts; None where the cache is to be random.
    """

    plain: DecoderLM
    indexed: DecoderLM
    stacked: DecoderLM | None


def make_models(name: str, config: LongDecodeConfig) -> Models:
    """Loads or draws a model on the device.

    Raises:
      FileNotFoundError, ValueError, ConnectionError: there are no such weights; see `load_pretrained`.
    """
    rngs = nnx.Rngs(params=config.seed)
    if name in _SHAPES:
        plain = DecoderLM(_SHAPES[name](), rngs=rngs, dtype=jnp.dtype(config.dtype), stacked=False)
        return Models(plain=plain, indexed=plain.with_indexer(rngs=rngs), stacked=None)
    loaded, _ = load_pretrained(config.pretrained, dtype=jnp.dtype(config.dtype))
    stacked = loaded.with_indexer(rngs=rngs)
    return Models(plain=loaded.unstacked(), indexed=stacked.unstacked(), stacked=stacked)


def strategies_of(config: LongDecodeConfig) -> dict[str, AttentionStrategy]:
    """Returns what is timed, by name."""
    offered: dict[str, AttentionStrategy] = {
        "full": FullAttention(),
        "topk": TopKAttention(topk=config.topk),
        "indexer": IndexerAttention(topk=config.topk),
    }
    return {name: offered[name] for name in config.attentions}


def rows_of(
    workloads: Sequence[Workload], config: LongDecodeConfig, *, bytes_per_s: float
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of each workload, one an attention, as soon as they are measured; a failure is a row without a time.

    Args:
      workloads: of one model, which is made once and freed at the end.
      config: how they are timed.
      bytes_per_s: at which the device reads memory, for the limit.
    """
    name = workloads[0].model
    models = make_models(name, config)
    jax.block_until_ready(models)
    for workload in workloads:
        try:
            yield _measured(workload, models, config, bytes_per_s)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            # Such as memory: other workloads can still run.
            yield [
                _common(workload, models, config)
                | {"attention": name, "status": "failed", "message": one_line(str(error)), "n": 0}
                for name in config.attentions
            ]
        gc.collect()  # the cache of a failure hangs on its traceback


def _measured(
    workload: Workload, models: Models, config: LongDecodeConfig, bytes_per_s: float
) -> list[dict[str, Any]]:
    strategies = strategies_of(config)
    timed = {
        name: (models.indexed if one.needs_index else models.plain).with_attention(one)
        for name, one in strategies.items()
    }
    times, _ = time_steps(
        timed,
        prefilled(workload, models, config),
        new_tokens=config.new_tokens,
        rounds=config.rounds,
    )
    rows = []
    for name, strategy in strategies.items():
        weights = weight_bytes(timed[name])
        cached = cache_bytes(strategy, timed[name].config, workload, config)
        row = _common(workload, models, config) | {
            "attention": name,
            "strategy": strategy,
            "status": "ok",
            "message": "",
            "weight_bytes": weights,
            "cache_bytes": cached,
            "limit_ms": 1e3 * (weights + cached) / bytes_per_s,
            "limit_weights_ms": 1e3 * weights / bytes_per_s,
            **_rates(times[name], workload, config),
        }
        if "full" in times:
            # Round by round: both ran within moments of each other.
            pairs = zip(times["full"].rounds, times[name].rounds, strict=True)
            row |= _summary("speed_over_full", [full / ours for full, ours in pairs])
        rows.append(row)
    return rows


def _common(workload: Workload, models: Models, config: LongDecodeConfig) -> dict[str, Any]:
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "model": workload.model,
        "context": workload.context,
        "batch": workload.batch,
        "config": models.indexed.config,
        "cache": "random" if models.stacked is None else "prefilled with random tokens",
        "topk": config.topk,
        "new_tokens": config.new_tokens,
        "dtype": config.dtype,
        "n": config.rounds,
        "peak_memory_bytes": memory.get("peak_bytes_in_use"),  # of the process so far
    }


def _rates(times: Times, workload: Workload, config: LongDecodeConfig) -> dict[str, Any]:
    steps = [1e3 * one / config.new_tokens for one in times.rounds]
    return {
        **_summary("ms_per_step", steps),
        **_summary("tokens_per_second", [1e3 * workload.batch / one for one in steps]),
        "ms_per_step_rounds": steps,
        "first_seconds": times.first,
    }


def prefilled(workload: Workload, models: Models, config: LongDecodeConfig) -> loops.Prefilled:
    """Returns a cache to decode from, `new_tokens` short of the context, and logits of the first token."""
    length = workload.context - config.new_tokens
    if models.stacked is not None:
        rng = np.random.default_rng([config.seed, workload.context])
        vocab_size = models.stacked.config.vocab_size
        prompts = rng.integers(0, vocab_size, (workload.batch, length)).tolist()
        dense = models.stacked.with_attention(FullAttention())
        return loops.prefill(dense, prompts, new_tokens=config.new_tokens)
    decoder = models.indexed.config
    cache = random_cache(
        decoder,
        batch=workload.batch,
        length=length,
        capacity=loops.cache_capacity(workload.context),
        dtype=config.dtype,
        seed=config.seed,
    )
    return loops.Prefilled(
        cache=cache,
        logits=jnp.zeros((workload.batch, decoder.vocab_size), jnp.float32),
        forced=jnp.zeros((workload.batch, 0), jnp.int32),
        forced_counts=jnp.zeros((workload.batch,), jnp.int32),
    )


def random_cache(
    config: DecoderConfig, *, batch: int, length: int, capacity: int, dtype: str, seed: int
) -> KVCache:
    """Draws keys, values and index keys of unit scale on the device, an array at a time; never holds two caches."""
    empty = jax.eval_shape(lambda: KVCache.create(config, batch, capacity, jnp.dtype(dtype)))
    layers, tree = jax.tree.flatten(dataclasses.replace(empty, lengths=None))
    # The device's own generator: it fills gigabytes, and compiles, faster than the default one.
    rngs = jax.random.split(jax.random.key(seed, impl="rbg"), len(layers))
    drawn = [
        _normal(rng, layer.shape, layer.dtype) for rng, layer in zip(rngs, layers, strict=True)
    ]
    cache = jax.tree.unflatten(tree, drawn)
    return dataclasses.replace(cache, lengths=jnp.full((batch,), length, jnp.int32))


@jax.jit(static_argnames=("shape", "dtype"))
def _normal(rng, shape, dtype):
    return jax.random.normal(rng, shape, dtype)


def weight_bytes(model: DecoderLM) -> int:
    """Returns the bytes of the parameters that a step reads: all but an embedding that is not the head as well."""
    num_bytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return num_bytes(model) - (0 if model.lm_head is None else num_bytes(model.embed))


def cache_bytes(
    strategy: AttentionStrategy, model: DecoderConfig, workload: Workload, config: LongDecodeConfig
) -> int:
    """Returns the bytes of the cache that a step has to read, a mean over the steps.

    Full attention reads all keys and values; exact Top-k all keys, and the values that each head selects, as if no two
    chose the same; an indexer all of its own keys, and the keys and values that it selects for all heads.
    """
    num_keys = workload.context - (config.new_tokens - 1) / 2
    selected = min(config.topk, num_keys)
    row = model.head_dim * jnp.dtype(config.dtype).itemsize  # of one key or value head
    everything = num_keys * model.num_kv_heads
    if strategy.needs_index:
        assert model.indexer is not None  # or the model would not have decoded
        index_row = model.indexer.head_dim * jnp.dtype(config.dtype).itemsize
        read = num_keys * index_row + 2 * selected * model.num_kv_heads * row
    elif isinstance(strategy, FullAttention):
        read = 2 * everything * row
    else:
        read = (everything + min(everything, selected * model.num_heads)) * row
    return int(model.num_layers * workload.batch * read)


def _summary(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}


__all__ = [
    "Models",
    "cache_bytes",
    "make_models",
    "prefilled",
    "random_cache",
    "rows_of",
    "strategies_of",
    "weight_bytes",
]
