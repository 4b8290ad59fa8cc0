"""The workloads of the study: those of an accelerator, and those of a test."""

import dataclasses
from collections.abc import Iterable

from experiments.kernel_latency.workloads.attention import (
    CopiedDecode,
    Decode,
    Gather,
    PagedDecode,
    PagedGather,
)
from experiments.kernel_latency.workloads.base import Workload
from experiments.kernel_latency.workloads.indexer import (
    IndexerDecode,
    IndexerPrefill,
    IndexerThenGather,
)
from experiments.kernel_latency.workloads.select import Select

_BUDGETS = (64, 512, 4096)
_COPIES = ("int8 keys", "certified", "float8 keys", "float8 certified")


def full() -> list[Workload]:
    """Returns the workloads of an accelerator, the most important ones first."""
    select = [
        Select(rows=1024, keys=131072, topk=2048, target_ms=0.40),
        Select(rows=32, keys=131072, topk=2048, target_ms=0.040),
        Select(rows=64, keys=1048576, topk=2048, target_ms=0.20),
        Select(rows=4096, keys=8192, topk=512, target_ms=0.10),
    ]
    decode = [
        Decode(batch=8, keys=131072, topk=2048, target_ms=0.68),
        Decode(batch=1, keys=131072, topk=2048, target_ms=0.11),
        Decode(batch=1, keys=1048576, topk=2048, target_ms=0.66),
        Decode(batch=16, keys=32768, topk=2048),
    ]
    gather = [Gather(batch=8, keys=131072, topk=2048, target_ms=0.06)]
    indexer = [IndexerDecode(batch=8, keys=131072, topk=2048, target_ms=0.12)]
    whole = [IndexerThenGather(batch=8, keys=131072, topk=2048, target_ms=0.18)]
    prefill = [IndexerPrefill(keys=32768, topk=2048, target_ms=20.0)]
    pages: list[Workload] = [
        paged(batch=8, keys=131072, topk=2048, page=page, group="pages")
        for paged in (PagedDecode, PagedGather)
        for page in (64, 16)
    ]
    copied: list[Workload] = [
        CopiedDecode(batch=batch, keys=keys, topk=2048, pattern=pattern, group="quantized")
        for batch, keys in ((8, 131072), (1, 131072), (1, 1048576))
        for pattern in (_COPIES if (batch, keys) == (8, 131072) else _COPIES[:2])
    ]
    main: list[Workload] = [*select, *decode, *gather, *indexer, *whole, *prefill]
    # The prefill has no lengths: one prompt.
    batched: list[Workload] = [*select, *decode, *gather, *indexer, *whole]
    return [
        *main,
        *_with(batched, "ragged", (2048,), ("ragged",)),
        *pages,
        *copied,
        *_with([*batched, *prefill], "budget", _BUDGETS, ("random",)),
        *_with(select, "adversarial", (2048,), ("relu plateau", "recent span")),
        *_with(gather, "adversarial", (2048,), ("clustered",)),
        *(Select(rows=64, keys=s, topk=2048, group="length") for s in (8192, 32768, 131072)),
        *(Decode(batch=8, keys=s, topk=2048, group="length") for s in (8192, 32768)),
        *(IndexerDecode(batch=8, keys=s, topk=2048, group="length") for s in (8192, 32768)),
    ]


def tiny() -> list[Workload]:
    """Returns one workload of each op in shapes of a test, and a hard one of some."""
    heads = dict(heads=4, kv_heads=2, head_size=16)
    index = dict(index_heads=4, index_size=16)
    main: list[Workload] = [
        Select(rows=4, keys=512, topk=16),
        Decode(batch=2, keys=256, topk=16, **heads),
        Gather(batch=2, keys=256, topk=16, **heads),
        IndexerDecode(batch=2, keys=256, topk=16, **index),
        IndexerThenGather(batch=2, keys=256, topk=16, **heads, **index),
        IndexerPrefill(keys=128, topk=16, **index),
    ]
    paged = dict(batch=2, keys=256, topk=16, page=16, group="pages")
    return [
        *main,
        PagedDecode(**heads, **paged),
        PagedGather(**heads, **paged),
        *(
            CopiedDecode(batch=2, keys=256, topk=16, pattern=pattern, group="quantized", **heads)
            for pattern in (_COPIES[0], _COPIES[-1])
        ),
        *_with(main[:1], "ragged", (16,), ("ragged",)),
        *_with(main[:1], "adversarial", (16,), ("relu plateau", "recent span")),
    ]


def _with(
    workloads: Iterable[Workload], group: str, budgets: Iterable[int], patterns: Iterable[str]
) -> list[Workload]:
    """Returns variants of workloads: `budgets` where the group is "budget", else each one's own."""
    return [
        dataclasses.replace(
            workload,
            topk=budget if group == "budget" else workload.topk,
            pattern=pattern,
            group=group,
            target_ms=None,
        )
        for workload in workloads
        for budget in budgets
        for pattern in patterns
        if group != "budget" or budget != workload.topk
    ]
