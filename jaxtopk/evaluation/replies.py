"""One batch: prefilled once, then decoded under every attention setting from the same cache."""

import contextlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtopk.attention import AttentionStrategy
from jaxtopk.attention.over_mesh import OverMesh
from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.decoding import loops
from jaxtopk.decoding.generate import Completion, continue_prefilled
from jaxtopk.evaluation.settings import Setting, group_settings
from jaxtopk.evaluation.tasks.base import TokenSample
from jaxtopk.models.decoder_lm.modeling import DecoderLM
from jaxtopk.sharding import ShardingConfig, fit, model_shardings

type Phase = Callable[[str], contextlib.AbstractContextManager[None]]


class Decoder:
    """A model that answers batches under several settings.

    A group of settings that cache the same shares one prefill. Settings of a group that differ only in their budget are
    decoded by one compiled loop, which carries one copy of the cache for each.
    """

    def __init__(
        self,
        model: DecoderLM,
        tokenizer: Tokenizer,
        settings: Sequence[Setting],
        *,
        mesh: Mesh | None = None,
        sharding: ShardingConfig | None = None,
        phase: Phase | None = None,
    ):
        """Places the model.

        Args:
          model: as loaded, its layers stacked; a copy with separate layers is made for the decoding.
          mesh: axes as `jaxtopk.sharding.make_mesh` names them; sequences are split over data and fsdp. None: one device.
          sharding: where parameters go on the mesh; None is the usual layout, whole on every device of a pure data mesh.
          phase: counts time for "prefill" and "decode"; see `jaxtopk.evaluation.clock.Clock.phase`.
        """
        self._mesh = mesh
        self._sharding = ShardingConfig() if sharding is None else sharding
        if mesh is not None:
            model = jax.device_put(model, model_shardings(model, mesh, self._sharding))
        self._model, self._unstacked = model, model.unstacked()
        self._tokenizer = tokenizer
        self._settings = tuple(settings)
        self._groups = group_settings(settings)
        self._phase = phase or (lambda name: contextlib.nullcontext())

    def replies(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        length: int,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        room: int = 0,
        counted: int | None = None,
    ) -> list[list[Completion]]:
        """Decodes greedily until a stop string, an end token or `max_new_tokens`.

        Args:
          prompts: token ids.
          length: most tokens of prompt and reply; few different ones mean few compilations.
          room: new tokens to make room for, if more than `max_new_tokens`: as above.
          counted: only so many first prompts count, the others fill the batch up. None: all.

        Returns:
          By setting, then by prompt that counts.
        """
        counted = len(prompts) if counted is None else counted
        found: list[list[Completion]] = [[] for _ in self._settings]
        padded_to = _shape(max(map(len, prompts)) + max_new_tokens, length)
        with self._on_mesh():
            for group in self._groups:
                with self._phase("prefill"):
                    model = self._model.with_attention(self._placed(group.strategy))
                    prefilled = loops.prefill(
                        model, prompts, new_tokens=max_new_tokens, padded_to=padded_to
                    )
                    prefilled = jax.block_until_ready(self._split(prefilled))
                for program in group.programs:
                    copies = len(program.settings)
                    with self._phase("decode"):
                        rows = prefilled
                        if copies > 1 or program is not group.programs[-1]:
                            rows = self._split(loops.repeat_prefilled(prefilled, copies))
                        completions = continue_prefilled(
                            self._unstacked.with_attention(self._placed(program.strategy)),
                            self._tokenizer,
                            rows,
                            streams=jax.random.split(jax.random.key(0), len(prompts) * copies),
                            max_new_tokens=max_new_tokens,
                            stop=stop,
                            room=room,
                            counted=counted * copies,
                        )
                        del rows
                    for row, completion in enumerate(completions):
                        found[program.settings[row % copies]].append(completion)
        return found

    def predictions(
        self, samples: Sequence[TokenSample], *, counted: int | None = None
    ) -> list[list[list[int]]]:
        """Feeds given tokens: what stands before a sample's first label in one prefill, the rest one by one.

        Returns:
          By setting, then by sample that counts: the most likely next token at each position, -1 before the first label.
        """
        counted = len(samples) if counted is None else counted
        firsts = [sample.first_label for sample in samples]
        if min(firsts) < 1:
            raise ValueError(
                "labels: got one at the first token, wanted at least one token before it"
            )
        steps = loops.padded_size(
            max(len(sample.tokens) - first for sample, first in zip(samples, firsts, strict=True))
        )
        forced = np.zeros((len(samples), steps), np.int32)
        for row, (sample, first) in enumerate(zip(samples, firsts, strict=True)):
            forced[row, : len(sample.tokens) - first] = sample.tokens[first:]
        found: list[list[list[int]]] = [[] for _ in self._settings]
        with self._on_mesh():
            for group in self._groups:
                with self._phase("prefill"):
                    # All before the first label is cached: no token of it is left to be decoded.
                    strategy = self._placed(group.strategy.prefill_strategy())
                    prompts = [sample.tokens[: sample.first_label] for sample in samples]
                    model = self._model.with_attention(strategy)
                    cache = loops.prefill(model, prompts, new_tokens=steps).cache
                    cache = jax.block_until_ready(self._split(cache))
                for program in group.programs:
                    copies = len(program.settings)
                    with self._phase("decode"):
                        tokens = jnp.repeat(jnp.asarray(forced), copies, axis=0)
                        done = loops.decode_forced(
                            self._unstacked.with_attention(self._placed(program.strategy)),
                            tokens,
                            self._split(loops.repeat_cache(cache, copies)),
                        )
                        likeliest = np.asarray(done.likeliest)
                        del done
                    for row in range(counted * copies):
                        sample = samples[row // copies]
                        after = likeliest[row, : len(sample.tokens) - sample.first_label]
                        found[program.settings[row % copies]].append(
                            [-1] * sample.first_label + after.tolist()
                        )
        return found

    def sequence_bytes(self, length: int) -> int:
        """Estimates the device memory that a sequence of a batch needs, in bytes; see `choose_batch`."""
        config = self._model.config
        itemsize = self._model.embed[...].dtype.itemsize
        copies = max(len(program.settings) for group in self._groups for program in group.programs)
        cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
        # Twice at the end of a prefill (stacked by the scan, then a layer each), then once beside its copies; and the widest
        # activations of one layer.
        activations = 3 * config.mlp_dim * itemsize + 4 * config.embed_dim * 4
        return loops.cache_capacity(length) * ((2 + copies) * cache + activations)

    def _placed(self, strategy: AttentionStrategy) -> AttentionStrategy:
        return strategy if self._mesh is None else OverMesh(strategy=strategy)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _split[Tree](self, tree: Tree) -> Tree:
        """Splits everything by sequence, and caches by head too; what is so already stays where it is."""
        if self._mesh is None:
            return tree
        mesh, sharding = self._mesh, self._sharding

        def place(leaf: jax.Array) -> jax.Array:
            spec = sharding.cache_bskh if leaf.ndim == 4 else sharding.batch_bt[:1]
            return jax.device_put(leaf, NamedSharding(mesh, fit(spec, leaf.shape, mesh)))

        return jax.tree.map(place, tree)


def choose_batch(
    decoder: Decoder, length: int, *, multiple: int = 1, memory: int | None = None, most: int = 64
) -> int:
    """Returns how many sequences of a length to run at a time, where nobody said: a power of two that fits.

    Two thirds of the device's memory may go to caches, their copies (one for each setting that is decoded together) and the
    activations of a prefill. Where a device does not tell its memory (a CPU), the answer is 4.

    Args:
      multiple: devices that share a batch.
      memory: of one device, bytes; None asks the device.
      most: upper bound, on a device.
    """
    if memory is None:
        statistics = jax.local_devices()[0].memory_stats() or {}
        memory = statistics.get("bytes_limit")
    if memory is None:
        return 4 * multiple
    fitting = int(memory * 2 / 3) // decoder.sequence_bytes(length)
    return multiple * 2 ** (max(1, min(fitting, most)).bit_length() - 1)


def _shape(needed: int, length: int) -> int:
    """Returns the smallest of length, length / 2, length / 4 ... that holds `needed` tokens; they compile few shapes."""
    if needed > length:
        return loops.padded_size(needed)
    while length // 2 >= needed and length > 64:
        length //= 2
    return length


__all__ = ["Decoder", "choose_batch"]
