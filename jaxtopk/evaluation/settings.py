"""The attention settings that an evaluation compares, and which of them share a prefill and a compiled loop."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtopk.attention import AttentionStrategy, FullAttention, TopKAttention
from jaxtopk.models.decoder_lm.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to attend.

    Args:
      name: for tables and results, such as "full", "top-k 5%" or "top-k 64".
      strategy: with one budget, not a tuple of them.
    """

    name: str
    strategy: AttentionStrategy

    def __post_init__(self) -> None:
        if isinstance(self.strategy, TopKAttention):
            for name in ("topk", "topk_ratio"):
                if isinstance(budget := getattr(self.strategy, name), tuple):
                    raise ValueError(f"setting {self.name}: {name} got {budget}, wanted one budget")

    @property
    def ratio(self) -> float | None:
        """The share of keys that a row keeps, where the setting is given as one."""
        return getattr(self.strategy, "topk_ratio", None)

    @property
    def topk(self) -> int | None:
        """The number of keys that a row keeps, where the setting is given as one."""
        return getattr(self.strategy, "topk", None)


def make_settings(
    *,
    attention: Sequence[Literal["full", "topk"]] | None = None,
    ratios: Sequence[float] = (),
    topks: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
) -> tuple[Setting, ...]:
    """Returns full attention, one setting a ratio, and one a number of keys, in this order.

    Args:
      attention: which kinds; None is full, and Top-k where there are budgets.
      ratios: each a `topk_ratio`.
      topks: each a `topk`.
      options: fields that all Top-k settings share, as `TopKAttention` takes them.

    Raises:
      ValueError: a budget is given twice or without its kind, a kind without a budget, or a value is out of its range.
    """
    options = {} if options is None else options
    budgets = bool(ratios or topks)
    kinds = (("full", "topk") if budgets else ("full",)) if attention is None else tuple(attention)
    if not kinds:
        raise ValueError("attention: got none, wanted full, topk or both")
    if "topk" in kinds and not budgets:
        raise ValueError("attention: got topk without a budget, wanted ratios or topk too")
    if "topk" not in kinds and (budgets or options):
        given = [*(["ratios"] if ratios else []), *(["topk"] if topks else []), *options]
        raise ValueError(f"{', '.join(given)}: got a value for full attention, wanted topk too")
    settings = [Setting(name="full", strategy=FullAttention())] if "full" in kinds else []
    settings += [
        Setting(name=f"top-k {100 * ratio:g}%", strategy=TopKAttention(topk_ratio=ratio, **options))
        for ratio in ratios
    ]
    settings += [
        Setting(name=f"top-k {topk}", strategy=TopKAttention(topk=topk, **options))
        for topk in topks
    ]
    check_settings(settings)
    return tuple(settings)


def check_settings(settings: Sequence[Setting]) -> None:
    """Refuses none, two of one name, and two that attend alike.

    Raises:
      ValueError: names the setting.
    """
    if not settings:
        raise ValueError("settings: got none, wanted at least one")
    names, strategies = set(), set()
    for setting in settings:
        if setting.name in names or setting.strategy in strategies:
            raise ValueError(f"settings: got {setting.name} twice, wanted each once")
        names.add(setting.name)
        strategies.add(setting.strategy)


class Program(NamedTuple):
    """Settings that one compiled loop decodes, side by side.

    strategy: with one budget for each of them.
    settings: their indices; copy r of a sequence runs the r-th of them.
    """

    strategy: AttentionStrategy
    settings: tuple[int, ...]


class Group(NamedTuple):
    """Settings that share a prefill.

    strategy: of the prefill, with its `suffix_tokens`.
    programs: the one that needs least copies of the cache comes last, as it may take the cache itself.
    """

    strategy: AttentionStrategy
    programs: tuple[Program, ...]


def group_settings(settings: Sequence[Setting]) -> tuple[Group, ...]:
    """Gathers settings so that as few prefills and loops as possible serve all of them.

    What is cached depends on the prefill's attention and on how many last tokens are left out of it. Full attention leaves
    out none of its own accord, but its decode rows equal its prefill rows, so it joins any full prefill.
    """
    found: dict[tuple[AttentionStrategy, int], list[int]] = {}
    undecided = []
    for index, setting in enumerate(settings):
        if isinstance(setting.strategy, FullAttention):
            undecided.append(index)
            continue
        key = setting.strategy.prefill_strategy(), setting.strategy.suffix_tokens
        found.setdefault(key, []).append(index)
    for index in undecided:
        full = settings[index].strategy
        key = next((key for key in found if key[0] == full), (full, 0))
        found.setdefault(key, []).append(index)
    groups = []
    for indices in found.values():
        first = settings[indices[0]].strategy
        programs = _programs(settings, sorted(indices))
        groups.append(Group(strategy=first, programs=programs))
    return tuple(groups)


def _programs(settings: Sequence[Setting], indices: Sequence[int]) -> tuple[Program, ...]:
    alike: dict[Any, list[int]] = {}
    for index in indices:
        strategy = settings[index].strategy
        key: Any = strategy
        if isinstance(strategy, TopKAttention):
            name = "topk" if strategy.topk_ratio is None else "topk_ratio"
            rest = {"topk": 1, "topk_ratio": None}
            key = name, strategy.replace(**rest)
        alike.setdefault(key, []).append(index)
    programs = []
    for members in alike.values():
        strategy = settings[members[0]].strategy
        if len(members) > 1:
            name = "topk" if settings[members[0]].topk is not None else "topk_ratio"
            budgets = tuple(getattr(settings[index].strategy, name) for index in members)
            strategy = strategy.replace(**{name: budgets})
        programs.append(Program(strategy=strategy, settings=tuple(members)))
    return tuple(sorted(programs, key=lambda program: -len(program.settings)))


def keys_attended(
    strategy: AttentionStrategy, config: DecoderConfig, visible: Sequence[int]
) -> list[float]:
    """Returns how many keys are in the softmax of a decode row that could see `visible` ones, as a mean over layers.

    Exact Top-k scores all visible keys to find these.
    """
    seen = np.asarray(visible, np.int32)
    of_layers = []
    known: dict[Any, np.ndarray] = {}
    for index in range(config.num_layers):
        of_layer, window = strategy.layer(index, config.num_layers), config.window(index)
        if (of_layer, window) not in known:
            keys = seen if window is None else np.minimum(seen, window)
            if isinstance(of_layer, TopKAttention):
                keys = np.asarray(of_layer.budget(jnp.asarray(keys)[:, None]))[:, 0]
            known[of_layer, window] = keys
        of_layers.append(known[of_layer, window])
    return np.mean(np.asarray(of_layers, np.float64), axis=0).tolist()


__all__ = [
    "Group",
    "Program",
    "Setting",
    "check_settings",
    "group_settings",
    "keys_attended",
    "make_settings",
]
