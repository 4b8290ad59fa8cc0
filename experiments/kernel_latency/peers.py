"""What each op is compared with: the same work by other libraries, and full attention, on the same inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.kernel_latency import torch_peers
from experiments.kernel_latency.workloads import (
    Arrays,
    Decode,
    Gather,
    IndexerDecode,
    IndexerThenGather,
    Select,
    Workload,
)

_ROUNDED_SLACK = 0.05  # standard deviations, of scores rounded to bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """Another way to do a workload.

    Args:
      fn: of the workload and the prepared arguments.
      prepare: of the workload and its arguments, outside of what is timed; torch peers get tensors.
      check: of the workload, its arguments and the result; raises AssertionError.
      ragged: whether it can do batches of different lengths.
      library: "jax", "cudnn" (through JAX) or "torch".
    """

    name: str
    library: str
    fn: Callable[..., Any]
    prepare: Callable[..., tuple]
    check: Callable[[Any, Arrays, Any], None]
    ragged: bool = False

    def missing(self) -> str | None:
        """Returns why it cannot run here, or None."""
        if self.library == "torch":
            return torch_peers.missing()
        if self.library == "cudnn" and jax.default_backend() != "gpu":
            return "cuDNN needs an NVIDIA GPU"
        return None


def peers_of(workload: Workload) -> tuple[Peer, ...]:
    """Returns the peers that can do the workload's batch."""
    found = _PEERS.get(type(workload), ())
    return tuple(peer for peer in found if peer.ragged or workload.pattern != "ragged")


def _cudnn(workload, query, key, value, lengths=None):
    # The query heads of a key/value head become rows, so that keys are read once.
    b, n, h = query.shape
    k = key.shape[2]
    rows = query.reshape(b, k, n // k, h).transpose(0, 2, 1, 3)
    out = jax.nn.dot_product_attention(
        rows, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out.transpose(0, 2, 1, 3).reshape(b, n, -1)


def _take(workload, key, value, indices):
    b, k = key.shape[0], key.shape[2]
    sequence = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(k, dtype=jnp.int32)[None, :, None]
    return tuple(x[sequence, indices[:, 0], head] for x in (key, value))


def _check_taken(workload, arguments, result) -> None:
    _, key, value, indices = arguments
    for taken, whole in zip(result, (key, value), strict=True):
        want = np.asarray(whole[0, :, 0].astype(jnp.float32))[np.asarray(indices[0, 0, 0])]
        got = np.asarray(taken[0, 0].astype(jnp.float32))
        if not np.array_equal(got, want):
            raise AssertionError("x[idx]: got other rows than those listed")


def _indexer_top_k(workload, index_query, index_key, head_weights, lengths):
    products = jnp.einsum(
        "bid,bsd->bis", index_query[:, 0], index_key, preferred_element_type=jnp.float32
    )
    scores = jnp.einsum("bi,bis->bs", head_weights[:, 0], jnp.maximum(products, 0))
    visible = jnp.arange(index_key.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return lax.top_k(jnp.where(visible, scores, -jnp.inf), workload.topk)[1]


def _check_indexer(workload, arguments, places) -> None:
    lengths = arguments[-1]
    places = jnp.where(places < lengths[:, None], places, -1)  # rows shorter than k
    workload.check_list(arguments, places, slack=_ROUNDED_SLACK)


_SAME = lambda workload, *arguments: arguments
_ATTENTION_ONLY = lambda workload, *arguments: arguments[3:]
_FULL_NAMES = "cuDNN, all keys", "torch SDPA, all keys"


def _full(workload_arguments: Callable[..., tuple]) -> tuple[Peer, Peer]:
    """Full attention by cuDNN and by torch, given what picks (query, key, value, lengths) of the arguments."""
    check = lambda workload, arguments, out: workload.check_full(arguments, out)
    return (
        Peer(
            name=_FULL_NAMES[0],
            library="cudnn",
            fn=_cudnn,
            # Without lengths where all are the same: a plainer call.
            prepare=lambda workload, *arguments: workload_arguments(workload, *arguments)[
                : 4 if workload.pattern == "ragged" else 3
            ],
            check=check,
            ragged=True,
        ),
        Peer(
            name=_FULL_NAMES[1],
            library="torch",
            fn=torch_peers.full_attention,
            prepare=lambda workload, *arguments: torch_peers.heads_first(
                workload, *workload_arguments(workload, *arguments)
            ),
            check=check,
        ),
    )


_PEERS: dict[type[Workload], tuple[Peer, ...]] = {
    Select: (
        Peer(
            name="torch.topk",
            library="torch",
            fn=torch_peers.topk,
            prepare=torch_peers.topk_prepare,
            check=lambda workload, arguments, places: workload.check_list(arguments, places),
            ragged=True,
        ),
        Peer(
            name="lax.top_k",
            library="jax",
            fn=lambda workload, scores: lax.top_k(scores, workload.topk),
            prepare=lambda workload, scores, lengths: (scores,),
            check=lambda workload, arguments, found: workload.check_list(arguments, found[1]),
            ragged=True,
        ),
    ),
    Decode: (
        *_full(_SAME),
        Peer(
            name="torch naive top-k",
            library="torch",
            fn=torch_peers.naive_topk_attention,
            prepare=torch_peers.heads_first,
            check=lambda workload, arguments, out: workload.check_naive(arguments, out),
        ),
    ),
    Gather: (
        Peer(
            name="torch.gather + SDPA",
            library="torch",
            fn=torch_peers.gather_attention,
            prepare=torch_peers.gather_prepare,
            check=lambda workload, arguments, out: workload.check(arguments, out),
        ),
        Peer(
            name="x[idx] alone",
            library="jax",
            fn=_take,
            prepare=lambda workload, query, key, value, indices: (key, value, indices),
            check=_check_taken,
        ),
    ),
    IndexerDecode: (
        Peer(
            name="torch matmul + topk",
            library="torch",
            fn=torch_peers.indexer_topk,
            prepare=torch_peers.indexer_prepare,
            check=_check_indexer,
        ),
        Peer(
            name="einsum + lax.top_k",
            library="jax",
            fn=_indexer_top_k,
            prepare=_SAME,
            check=_check_indexer,
            ragged=True,
        ),
    ),
    IndexerThenGather: _full(_ATTENTION_ONLY),
}
