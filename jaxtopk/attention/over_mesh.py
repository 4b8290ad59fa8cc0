"""Any strategy on a mesh: each device attends to its own sequences and heads, inside `shard_map`."""

import dataclasses
import functools
import math

import jax
from jax.sharding import PartitionSpec

from jaxtopk.attention.base import AttentionStrategy
from jaxtopk.sharding import AXES

_BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverMesh(AttentionStrategy):
    """Attends as `strategy` does, with the batch split over `data` and `fsdp`, and heads over `tensor`.

    Compilers cannot split a hand-written kernel by themselves; here each device runs it on what it holds, and nothing is
    sent. The mesh is the one entered with `jax.set_mesh`; outside of any this is `strategy` itself. Heads that share one
    selection over all of them (scope "layer"), or do not divide, stay whole. What an indexer selects all heads share too, but
    it reads little: each device selects for its own heads.

    Args:
      strategy: any; one budget a sequence goes by the order within a device, so a device must hold a multiple of them.

    Raises:
      ValueError: the batch is not a multiple of the devices that share it.
    """

    strategy: AttentionStrategy

    def attend(
        self,
        query,
        key,
        value,
        *,
        scale=None,
        window=None,
        lengths=None,
        segment_ids=None,
        sparse_rows=None,
        index=None,
    ):
        """See `AttentionStrategy.attend`."""
        attend = functools.partial(self.strategy.attend, scale=scale, window=window)
        rows = {
            "lengths": lengths,
            "segment_ids": segment_ids,
            "sparse_rows": sparse_rows,
            "index": index,
        }
        return self._split(attend, query, key, value, rows, query_rank=4)

    def decode(self, query, key, value, *, lengths, scale=None, window=None, index=None):
        """See `AttentionStrategy.decode`."""
        decode = functools.partial(self.strategy.decode, scale=scale, window=window)
        rows = {"lengths": lengths, "index": index}
        return self._split(decode, query, key, value, rows, query_rank=3)

    def layer(self, index, num_layers):
        """See `AttentionStrategy.layer`."""
        return OverMesh(strategy=self.strategy.layer(index, num_layers))

    def prefill_strategy(self):
        """See `AttentionStrategy.prefill_strategy`."""
        return OverMesh(strategy=self.strategy.prefill_strategy())

    @property
    def needs_index(self):
        """See `AttentionStrategy.needs_index`."""
        return self.strategy.needs_index

    @property
    def suffix_tokens(self):
        """See `AttentionStrategy.suffix_tokens`."""
        return self.strategy.suffix_tokens

    def _split(self, attend, query, key, value, rows, *, query_rank):
        mesh = jax.sharding.get_abstract_mesh()
        rows = {name: arrays for name, arrays in rows.items() if arrays is not None}
        if mesh.empty or not set(AXES) <= set(mesh.axis_names):
            return attend(query, key, value, **rows)
        devices = math.prod(mesh.shape[axis] for axis in _BATCH)
        if query.shape[0] % devices:
            raise ValueError(
                f"batch: got {query.shape[0]} sequences, wanted a multiple of the {devices} devices that share it"
            )
        whole = (
            getattr(self.strategy, "scope", None) == "layer" or key.shape[2] % mesh.shape["tensor"]
        )
        heads = None if whole else "tensor"
        of_query = PartitionSpec(_BATCH, *[None] * (query_rank - 3), heads, None)
        of_key = PartitionSpec(_BATCH, None, heads, None)
        split = jax.shard_map(
            lambda query, key, value, rows: attend(query, key, value, **rows),
            in_specs=(of_query, of_key, of_key, {name: PartitionSpec(_BATCH) for name in rows}),
            out_specs=of_query,
        )
        return split(query, key, value, rows)
