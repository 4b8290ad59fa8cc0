"""What block sizes are tuned on: each op at named sizes, with inputs to time, inputs to check, and the choices there are."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
    gather_attention,
    indexer_scores,
    indexer_select,
    knn_indices,
    topk_attention,
    topk_decode_attention,
    topk_select,
)
from pallas_kernels.ops.gather_attention.block_sizes import GatherAttentionBlockSizes
from pallas_kernels.ops.knn_attention.block_sizes import KnnBlockSizes
from pallas_kernels.ops.lightning_indexer.block_sizes import LightningIndexerBlockSizes
from pallas_kernels.ops.topk_attention.block_sizes import TopKAttentionBlockSizes
from pallas_kernels.ops.topk_decode_attention.block_sizes import TopKDecodeBlockSizes
from pallas_kernels.ops.topk_select.block_sizes import TopKSelectBlockSizes
from pallas_kernels.tuning.shapes import CacheSizes, IndexSizes, Shape, normal

type Arrays = tuple[jax.Array, ...]
type Draw = Callable[[jax.Array, bool], Arrays]  # of a random key; True: whole numbers

GROUPS = ("decode", "select", "prefill", "motion", "tiny")

_POWERS = tuple(2**i for i in range(10))

# The choices an implementation has, in the order in which they are searched. What it refuses at a size is left out there.
CHOICES: Mapping[tuple[str, str], Mapping[str, Sequence[Any]]] = {
    ("topk_select", "mosaic_gpu"): {"num_splits": _POWERS, "block_s": (512, 1024, 2048, 4096)},
    ("topk_decode_attention", "mosaic_gpu"): {"num_splits": _POWERS, "list_splits": _POWERS[:6]},
    ("gather_attention", "mosaic_gpu"): {"num_splits": _POWERS[:6]},
    ("indexer_scores", "mosaic_gpu"): {"num_splits": _POWERS, "block_q": (1, 2, 4)},
    ("indexer_select", "mosaic_gpu"): {"num_splits": _POWERS, "block_q": (1, 2, 4)},
    ("topk_select", "mosaic_tpu"): {
        "block_rows": (8, 16, 32, 64),
        "block_s": (2048, 4096, 8192, 16384),
    },
    ("topk_decode_attention", "mosaic_tpu"): {"block_kv": (128, 256, 512, 1024, 2048)},
    ("gather_attention", "mosaic_tpu"): {"block_slots": (64, 128, 256, 512)},
    ("indexer_scores", "mosaic_tpu"): {
        "block_q": (8, 16, 32, 64),
        "block_kv": (512, 1024, 2048),
    },
    ("indexer_select", "mosaic_tpu"): {
        "block_q": (8, 16, 32, 64),
        "block_kv": (512, 1024, 2048),
    },
    ("knn_indices", "mosaic_tpu"): {"block_q": (8, 16, 32, 64), "block_kv": (512, 1024, 2048)},
    ("topk_attention", "xla"): {"block_q": (8, 32, 128, 512, 2048)},
    ("gather_attention", "xla"): {"block_q": (1, 8, 32, 128, 512)},
    ("indexer_scores", "xla"): {"block_q": (1, 8, 32, 128, 512)},
    ("indexer_select", "xla"): {"block_q": (1, 8, 32, 128, 512)},
    ("knn_indices", "xla"): {"block_q": (8, 32, 128, 512, 2048)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One op at one size.

    Args:
      op: its public name.
      group: one of `GROUPS`.
      sizes: by the letters of the op's docstring, for the name.
      dtype: of the inputs that are not indices.
      cls: the op's block sizes.
      draw: arguments of a call: drawn at random, or whole numbers, whose scores are exact in any order of summation.
      run: the op as a function of those arguments, an implementation and block sizes.
    """

    op: str
    group: str
    sizes: Mapping[str, int]
    dtype: str
    cls: type
    draw: Draw
    run: Callable[..., Any]

    @property
    def name(self) -> str:
        """Group, op, sizes and dtype: what `--workloads` matches."""
        sizes = ", ".join(f"{letter} {size}" for letter, size in self.sizes.items())
        return f"{self.group}: {self.op}, {sizes}, {self.dtype}"

    def choices(self, implementation: str) -> Mapping[str, Sequence[Any]]:
        """Returns the values of each size that this implementation can be given, none if it has no choice."""
        return CHOICES.get((self.op, implementation), {})

    def call(self, implementation: str, sizes: Mapping[str, Any]) -> Callable[..., Any]:
        """Returns the op with these block sizes, a function of `draw`'s arguments; unnamed ones are the heuristic's."""
        return functools.partial(
            self.run, implementation=implementation, block_sizes=self.cls(**sizes)
        )


def _numbers(rng: jax.Array, whole: bool, shapes: Iterable[Shape], dtype: str) -> Arrays:
    """Draws an array of each shape, small whole numbers or normal ones."""
    if not whole:
        return normal(rng, shapes, dtype)
    shapes = tuple(shapes)
    return tuple(
        jax.random.randint(key, shape, -2, 3, jnp.int8).astype(dtype)
        for key, shape in zip(jax.random.split(rng, len(shapes)), shapes, strict=True)
    )


def select(
    group: str, *, rows: int, keys: int, topk: int, spread: int = 1_000_000, dtype: str = "float32"
) -> Workload:
    """`topk_select` with lists; to check, `spread` different whole numbers, so that there are ties but no plateau."""

    def draw(rng, whole):
        if whole:
            scores = jax.random.randint(rng, (rows, keys), 0, spread).astype(dtype)
        else:
            (scores,) = normal(rng, [(rows, keys)], dtype)
        return scores, jnp.full((rows,), keys, jnp.int32)

    def run(scores, lengths, **options):
        return topk_select(scores, topk, lengths=lengths, **options)

    return Workload(
        op="topk_select",
        group=group,
        sizes={"R": rows, "S": keys, "k": topk},
        dtype=dtype,
        cls=TopKSelectBlockSizes,
        draw=draw,
        run=run,
    )


def decode(group: str, cache: CacheSizes, *, topk: int, dtype: str = "bfloat16") -> Workload:
    """`topk_decode_attention`, scope "head"."""
    return Workload(
        op="topk_decode_attention",
        group=group,
        sizes={"B": cache.batch, "S": cache.keys, **cache.cache_letters, "k": topk},
        dtype=dtype,
        cls=TopKDecodeBlockSizes,
        draw=lambda rng, whole: _numbers(rng, whole, cache.cache_shapes(), dtype),
        run=functools.partial(topk_decode_attention, topk=topk),
    )


def attention(group: str, prompt: CacheSizes, *, topk: int, dtype: str = "bfloat16") -> Workload:
    """`topk_attention` of whole prompts, causal: as many rows as keys."""
    shapes = prompt.cache_shapes(prompt.keys)
    return Workload(
        op="topk_attention",
        group=group,
        sizes={"B": prompt.batch, "T": prompt.keys, **prompt.cache_letters, "k": topk},
        dtype=dtype,
        cls=TopKAttentionBlockSizes,
        draw=lambda rng, whole: _numbers(rng, whole, shapes, dtype),
        run=functools.partial(topk_attention, topk=topk),
    )


def gather(
    group: str, cache: CacheSizes, *, rows: int, slots: int, dtype: str = "bfloat16"
) -> Workload:
    """`gather_attention` with full lists, one for each key/value head."""

    def draw(rng, whole):
        # Ascending and without repeats: a random place in each of `slots` equal parts.
        part = cache.keys // slots
        places = jax.random.randint(rng, (cache.batch, rows, cache.kv_heads, slots), 0, part)
        lists = places + jnp.broadcast_to(part * jnp.arange(slots, dtype=jnp.int32), places.shape)
        return *_numbers(rng, whole, cache.cache_shapes(rows), dtype), lists

    return Workload(
        op="gather_attention",
        group=group,
        sizes={"B": cache.batch, "T": rows, "S": cache.keys, **cache.cache_letters, "k": slots},
        dtype=dtype,
        cls=GatherAttentionBlockSizes,
        draw=draw,
        run=gather_attention,
    )


def indexer(
    op: str, group: str, index: IndexSizes, *, rows: int, topk: int = 0, dtype: str = "bfloat16"
) -> Workload:
    """`indexer_scores` or `indexer_select`, causal."""
    query, key, weights = index.index_shapes(rows)

    def draw(rng, whole):
        return (
            *_numbers(rng, whole, (query, key), dtype),
            *_numbers(jax.random.fold_in(rng, 1), whole, (weights,), "float32"),
        )

    select = op == "indexer_select"
    sizes = {"B": index.batch, "T": rows, "S": index.keys, **index.index_letters}
    return Workload(
        op=op,
        group=group,
        sizes=sizes | ({"k": topk} if select else {}),
        dtype=dtype,
        cls=LightningIndexerBlockSizes,
        draw=draw,
        run=functools.partial(indexer_select, topk=topk) if select else indexer_scores,
    )


def neighbours(group: str, *, batch: int, rows: int, keys: int, wanted: int) -> Workload:
    """`knn_indices` in the plane."""

    def draw(rng, whole):
        drawn = normal(rng, [(batch, rows, 2), (batch, keys, 2)], "float32")
        places = [100 * x for x in drawn]  # [m]
        return tuple(jnp.round(x) if whole else x for x in places)

    return Workload(
        op="knn_indices",
        group=group,
        sizes={"B": batch, "T": rows, "S": keys, "k": wanted},
        dtype="float32",
        cls=KnnBlockSizes,
        draw=draw,
        run=functools.partial(knn_indices, neighbours=wanted),
    )


_TINY = {"heads": 4, "kv_heads": 2, "head_size": 16}
_TINY_INDEX = IndexSizes(batch=1, keys=40, index_heads=3, index_size=8)

WORKLOADS: tuple[Workload, ...] = (
    *(
        decode("decode", CacheSizes(batch=batch, keys=keys), topk=2048)
        for batch, keys in ((8, 131_072), (1, 131_072), (1, 1_048_576), (8, 32_768), (32, 8192))
    ),
    *(
        gather("decode", CacheSizes(batch=batch, keys=131_072), rows=1, slots=2048)
        for batch in (8, 1)
    ),
    *(
        indexer(
            "indexer_select", "decode", IndexSizes(batch=batch, keys=131_072), rows=1, topk=2048
        )
        for batch in (8, 1)
    ),
    *(
        select("select", rows=rows, keys=keys, topk=topk)
        for rows, keys, topk in (
            (32, 131_072, 2048),
            (1024, 131_072, 2048),
            (64, 1_048_576, 2048),
            (4096, 8192, 512),
            (256, 131_072, 2048),
            (8, 131_072, 2048),
        )
    ),
    indexer("indexer_select", "prefill", IndexSizes(batch=1, keys=4096), rows=4096, topk=2048),
    indexer("indexer_scores", "prefill", IndexSizes(batch=1, keys=4096), rows=4096),
    gather("prefill", CacheSizes(batch=1, keys=32_768), rows=512, slots=2048),
    attention("prefill", CacheSizes(batch=1, keys=4096), topk=512),
    neighbours("motion", batch=8, rows=768, keys=768, wanted=16),
    select("tiny", rows=3, keys=1500, topk=7),
    decode("tiny", CacheSizes(batch=2, keys=200, **_TINY), topk=5, dtype="float32"),
    attention("tiny", CacheSizes(batch=2, keys=40, **_TINY), topk=5, dtype="float32"),
    gather("tiny", CacheSizes(batch=1, keys=40, **_TINY), rows=9, slots=5, dtype="float32"),
    indexer("indexer_scores", "tiny", _TINY_INDEX, rows=9, dtype="float32"),
    indexer("indexer_select", "tiny", _TINY_INDEX, rows=9, topk=4, dtype="float32"),
    neighbours("tiny", batch=2, rows=9, keys=40, wanted=4),
)


def chosen(*, ops: Sequence[str] = (), workloads: Sequence[str] = ()) -> tuple[Workload, ...]:
    """Returns the workloads of these ops that one of the expressions matches; without any, all but the tiny ones.

    Raises:
      ValueError: an op or an expression matches nothing.
    """
    known = tuple(dict.fromkeys(workload.op for workload in WORKLOADS))
    for op in ops:
        if op not in known:
            raise ValueError(f"ops: got {op!r}, wanted one of {', '.join(known)}")
    found = tuple(
        workload
        for workload in WORKLOADS
        if (not ops or workload.op in ops)
        and (
            any(re.search(expression, workload.name) for expression in workloads)
            if workloads
            else workload.group != "tiny"
        )
    )
    if not found:
        raise ValueError(
            f"workloads: got {' '.join(workloads) or 'none'}, wanted expressions that match one of --list"
        )
    return found
