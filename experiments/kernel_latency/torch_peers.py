"""The peers that are written in torch, and their device time; torch is imported only when one of them runs.

Functions take the workload for its sizes, and tensors. Whatever layout suits a peer best is made before it is timed. No import
of JAX here.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

_TURN_MS = 0.2  # of work that a graph holds at least, so that launching it is hidden


def missing() -> str | None:
    """Returns why the peers cannot run here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def release() -> None:
    """Gives cached device memory back, for whoever shares the card."""
    import torch

    torch.cuda.empty_cache()


def device_time(
    fn: Callable[..., Any], inputs: Sequence[tuple], *, rounds: int, round_ms: float
) -> tuple[list[float], int]:
    """Times `fn`, called on each of `inputs` in turn, by events on the device around replays of a CUDA graph.

    What cannot be captured is launched call by call, many calls between two events.

    Returns:
      The time of one call [ms] in each round, and how many calls a round holds.
    """
    import torch

    def turn(repeats: int) -> None:
        for _ in range(repeats):
            for arguments in inputs:
                fn(*arguments)

    def elapsed(times: int, work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            turn(2)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        once = elapsed(3, lambda: turn(1)) / 3
        repeats = max(1, min(64, math.ceil(_TURN_MS / once)))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                turn(repeats)
            work = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()
            work = lambda: turn(repeats)
        elapsed(1, work)
        times = max(1, math.ceil(round_ms / elapsed(1, work)))
        calls = times * repeats * len(inputs)
        return [elapsed(times, work) / calls for _ in range(rounds)], calls


def topk_prepare(workload: Any, scores, lengths) -> tuple:
    """Scores beyond a row's length are -inf already."""
    return (scores,)


def topk(workload: Any, scores):
    """Returns places [R, k], in no order."""
    import torch

    return torch.topk(scores, workload.topk, dim=-1, sorted=False).indices


def heads_first(workload: Any, query, key, value, lengths) -> tuple:
    """Lays the cache out as [B, K, S, H], and the query heads of a key/value head as rows, so that keys are read once."""
    b, n, h = query.shape
    k = key.shape[2]
    swap = lambda x: x.transpose(1, 2).contiguous()
    return query.reshape(b, k, n // k, h).contiguous(), swap(key), swap(value)


def full_attention(workload: Any, query, key, value):
    """Returns [B, N, V]: scaled dot-product attention to all keys."""
    import torch

    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return out.reshape(out.shape[0], -1, out.shape[-1])


def naive_topk_attention(workload: Any, query, key, value):
    """Returns [B, N, V]: scores in bfloat16, torch.topk a head, gathered values, softmax."""
    import torch

    b, k, g, h = query.shape
    scores = torch.matmul(query, key.transpose(-1, -2)) * h**-0.5
    best, place = torch.topk(scores, workload.topk, dim=-1, sorted=False)
    weights = torch.softmax(best.float(), dim=-1).to(value.dtype)
    place = place.reshape(b, k, -1, 1).expand(-1, -1, -1, h)
    kept = torch.gather(value, 2, place).reshape(b, k, g, -1, h)
    return torch.matmul(weights[..., None, :], kept).reshape(b, k * g, h)


def gather_prepare(workload: Any, query, key, value, indices) -> tuple:
    """As `heads_first`, with the lists as int64 [B, K, k, H]."""
    query, key, value = heads_first(workload, query, key, value, None)
    place = indices[:, 0].long()[..., None].expand(-1, -1, -1, query.shape[-1])
    return query, key, value, place


def gather_attention(workload: Any, query, key, value, place):
    """Returns [B, N, V]: torch.gather of keys and values, then attention to them."""
    import torch

    return full_attention(
        workload, query, torch.gather(key, 2, place), torch.gather(value, 2, place)
    )


def indexer_prepare(workload: Any, index_query, index_key, head_weights, lengths) -> tuple:
    """Queries [B, I, D], keys [B, S, D], weights [B, 1, I] in bfloat16."""
    return index_query[:, 0], index_key, head_weights.to(index_query.dtype)


def indexer_topk(workload: Any, index_query, index_key, head_weights):
    """Returns places [B, k], in no order: scores in bfloat16, as the products come, then torch.topk."""
    import torch

    products = torch.relu(torch.matmul(index_query, index_key.transpose(-1, -2)))
    scores = torch.matmul(head_weights, products)[:, 0]
    return torch.topk(scores.float(), workload.topk, dim=-1, sorted=False).indices
