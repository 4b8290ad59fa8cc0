"""Measured rows on the host: gathered from sequences of several lengths, and summed up by head, by layer and in all.

The mean of a model is over tokens, then heads, then layers. A set of k keys says something about a row only where the row
sees more than k: the others keep everything, and are left out of means of mass.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtopk.analysis.analyze import TokenAnalysis
from pallas_kernels import budget_from_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredRows:
    """Rows of all layers and heads; L layers, N heads, R rows, J sizes of sets, I shares of the visible keys.

    Args:
      topks: the sizes of sets.
      visible: keys each row may see, [L, R].
      entropy, normalised: of the full softmax, [nats] and as a share of ln visible, [L, N, R].
      mass, set_entropy: of the best `topks` keys, [J, L, N, R].
      ratio_mass: of the best `ratios` of the visible keys, [I, L, N, R].
      attended_mass, attended_entropy: of the keys that the strategy attends to, [L, N, R]; NaN where not known.
      attended_count: how many these are, [L, N, R]; -1 where not known.
      output_entropy: of the next token [nats], [R].
    """

    topks: tuple[int, ...]
    visible: np.ndarray
    entropy: np.ndarray
    normalised: np.ndarray
    mass: np.ndarray
    set_entropy: np.ndarray
    attended_mass: np.ndarray
    attended_entropy: np.ndarray
    attended_count: np.ndarray
    output_entropy: np.ndarray
    ratios: tuple[float, ...]
    ratio_mass: np.ndarray

    @classmethod
    def of(
        cls,
        found: TokenAnalysis,
        measured: np.ndarray,
        topks: Sequence[int],
        ratios: Sequence[float] = (),
    ) -> "MeasuredRows":
        """Fetches from the device what was found, and keeps the rows that are `measured`, bool [B, T].

        Raises:
          ValueError: no strategy's set was measured, or not for these `topks` and `ratios`.
        """
        rows = found.rows
        if rows.attended is None or len(rows.topk) != len(topks):
            raise ValueError(
                f"found: got {len(rows.topk)} sets, wanted those of topks {tuple(topks)} and the strategy's"
            )
        if len(rows.ratio) != len(ratios):
            raise ValueError(
                f"found: got {len(rows.ratio)} shares, wanted those of ratios {tuple(ratios)}"
            )
        fetched = jax.device_get((rows, rows.normalised, found.output_entropy))
        rows, normalised, output = fetched
        # [L, B, N, T] -> [L, N, B, T] -> [L, N, R]
        pick = lambda x: np.swapaxes(x, 1, 2)[:, :, measured]
        none = np.zeros((0, *pick(rows.entropy).shape), np.float32)
        stack = lambda parts, name: (
            np.stack([pick(getattr(part, name)) for part in parts]) if parts else none
        )
        return cls(
            topks=tuple(topks),
            visible=rows.visible[:, measured],
            entropy=pick(rows.entropy),
            normalised=pick(normalised),
            mass=stack(rows.topk, "mass"),
            set_entropy=stack(rows.topk, "entropy"),
            attended_mass=pick(rows.attended.mass),
            attended_entropy=pick(rows.attended.entropy),
            attended_count=pick(rows.attended_count),
            output_entropy=output[measured],
            ratios=tuple(ratios),
            ratio_mass=stack(rows.ratio, "mass"),
        )

    @classmethod
    def join(cls, parts: Sequence["MeasuredRows"]) -> "MeasuredRows":
        """Returns the rows of all parts, in order."""
        sizes = ("topks", "ratios")
        fields = [field.name for field in dataclasses.fields(cls) if field.name not in sizes]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts], axis=-1)
            for name in fields
        }
        return cls(topks=parts[0].topks, ratios=parts[0].ratios, **joined)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.output_entropy.size

    def head(self, layer: int, head: int) -> "MeasuredRows":
        """Returns the rows of one head."""
        return self._part(slice(layer, layer + 1), slice(head, head + 1))

    def layer(self, layer: int) -> "MeasuredRows":
        """Returns the rows of one layer."""
        return self._part(slice(layer, layer + 1), slice(None))

    def _part(self, layers: slice, heads: slice) -> "MeasuredRows":
        of_heads = ("entropy", "normalised", "attended_mass", "attended_entropy", "attended_count")
        return dataclasses.replace(
            self,
            visible=self.visible[layers],
            mass=self.mass[:, layers, heads],
            set_entropy=self.set_entropy[:, layers, heads],
            ratio_mass=self.ratio_mass[:, layers, heads],
            **{name: getattr(self, name)[layers, heads] for name in of_heads},
        )

    def kept(self, size: int | float) -> tuple[np.ndarray, np.ndarray]:
        """Returns how many keys a set has at each row, int [L, R], and their mass, [L, N, R].

        Args:
          size: one of `topks` or, a float, one of `ratios`.
        """
        if isinstance(size, float):
            budget = np.asarray(budget_from_ratio(jnp.asarray(self.visible), size))
            return budget, self.ratio_mass[self.ratios.index(size)]
        return np.full_like(self.visible, size), self.mass[self.topks.index(size)]

    def beyond(self, size: int | float) -> np.ndarray:
        """Returns which rows see more keys than a set has, bool [L, N, R]; `size` as in `kept`."""
        told = self.visible > self.kept(size)[0]
        return np.broadcast_to(told[:, None], self.entropy.shape)

    def head_mass(self, size: int | float) -> np.ndarray:
        """Returns each head's mean mass of its best keys over rows that see more, [L, N]; NaN where none does."""
        told = self.beyond(size)
        mass = np.where(told, self.kept(size)[1], 0).sum(axis=-1, dtype=np.float64)
        rows = told.sum(axis=-1)
        return np.where(rows, mass / np.maximum(rows, 1), np.nan)

    def summary(self) -> dict[str, Any]:
        """Returns what a result row says of these rows; None where no row can tell."""
        known = self.attended_count >= 0
        sets = []
        for j, topk in enumerate(self.topks):
            told = self.beyond(topk)
            sets.append(
                {
                    "topk": topk,
                    "rows": int(told.sum()),
                    "mass": _mean(self.mass[j], told),
                    "entropy": _mean(self.set_entropy[j], told),
                }
            )
        return {
            "visible": float(self.visible.mean(dtype=np.float64)),
            "entropy": _spread(self.entropy),
            "normalised": _spread(self.normalised),
            "support": float(np.exp(self.entropy.astype(np.float64)).mean()),
            "topk": sets,
            "attended": {
                "mass": _mean(self.attended_mass, known),
                "entropy": _mean(self.attended_entropy, known),
                "keys": _mean(self.attended_count, known),
            },
        }

    def bound(self, size: int | float, *, tolerance: float = 1e-4) -> dict[str, Any] | None:
        """Checks mass >= 1 - H / ln k on every row that sees more than k keys, k >= 2; None where there is none.

        Args:
          size: as in `kept`; k is what the set has at the row.

        Returns:
          How many rows, how many of them break it by more than `tolerance` (rounding), and the least of mass - bound.
        """
        keys, mass = self.kept(size)
        keys = np.broadcast_to(keys[:, None], mass.shape)
        told = self.beyond(size) & (keys >= 2)
        if not told.any():
            return None
        slack = mass[told] - (1 - self.entropy[told] / np.log(keys[told]))
        return {
            "ratio" if isinstance(size, float) else "topk": size,
            "rows": int(told.sum()),
            "broken": int((slack < -tolerance).sum()),
            "least_slack": float(slack.min()),
        }


def summaries(rows: MeasuredRows) -> Iterator[dict[str, Any]]:
    """Yields one summary for each head, each layer, and all together, each saying its level."""
    layers, heads, _ = rows.entropy.shape
    for layer in range(layers):
        for head in range(heads):
            yield {
                "level": "head",
                "layer": layer,
                "head": head,
                **rows.head(layer, head).summary(),
            }
    for layer in range(layers):
        yield {"level": "layer", "layer": layer, **rows.layer(layer).summary()}
    bounds = [found for topk in rows.topks if (found := rows.bound(topk)) is not None]
    yield {
        "level": "total",
        **rows.summary(),
        "output_entropy": _spread(rows.output_entropy),
        "bound": bounds,
    }


def _mean(values: np.ndarray, where: np.ndarray) -> float | None:
    return float(values[where].mean(dtype=np.float64)) if where.any() else None


def _spread(values: np.ndarray) -> dict[str, float]:
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    names = ("quarter", "median", "three_quarters")
    return {
        "mean": float(values.mean(dtype=np.float64)),
        **dict(zip(names, map(float, quartiles), strict=True)),
    }


__all__ = ["MeasuredRows", "summaries"]
