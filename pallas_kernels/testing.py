"""How results are judged: accuracy against an oracle, equality of selections, determinism, and the scores that break selectors.

One policy for every op and backend; a test picks the oracle, never the tolerance.

  float64   max error <= 1e-12 x max |oracle|
  float32   max error <= 2e-5 x max |oracle|, matmul precision highest
  bfloat16, float16
            the oracle is the float32 reference on the *rounded* inputs, `naive` the reference in the narrow type itself:
            RMS(got - oracle) <= 1.5 x RMS(naive - oracle), max <= 2 x, with a floor of one ulp of the output
  selection equal indices where scores are integers (ties included); otherwise the same multiset of selected scores, up to
            one ulp at the threshold
  NaN and infinities are where the oracle has them
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.selection import TopKSelection

_RELATIVE = {"float64": 1e-12, "float32": 2e-5}
_RMS_RATIO, _MAX_RATIO = 1.5, 2.0


def assert_accurate(got, oracle, *, naive=None, name: str = "result", dtype=None) -> None:
    """Checks an array against its oracle under the policy of this module.

    Args:
      got: what is judged; its dtype chooses the rule.
      oracle: float32 or float64 values of the same shape.
      naive: the reference computed in the narrow dtype; wanted for bfloat16 and float16 only.
      name: for the message.
      dtype: judge as this dtype instead: gradients of a float32 loss, or an lse made from bfloat16 inputs.

    Raises:
      AssertionError: says which bound was missed, the got and the wanted.
    """
    dtype = np.dtype(got.dtype if dtype is None else dtype).name
    exact, value = np.asarray(oracle, np.float64), np.asarray(got, np.float64)
    assert value.shape == exact.shape, f"{name}: got shape {value.shape}, wanted {exact.shape}"
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(
        np.where(finite, 0, exact),
        np.where(np.isfinite(value), 0, value),
        err_msg=f"{name}: non-finite positions",
    )
    if not finite.any():
        return
    error, largest = np.abs(value[finite] - exact[finite]), np.abs(exact[finite]).max()
    if dtype in _RELATIVE:
        bound = _RELATIVE[dtype] * largest
        assert error.max() <= bound, (
            f"{name}: max error {error.max():.3g}, wanted at most {bound:.3g} ({dtype})"
        )
        return
    assert naive is not None, f"{name}: a result in {dtype} is judged beside a naive one; got None"
    ulp = float(jnp.finfo(dtype).eps) * largest
    other = np.abs(np.asarray(naive, np.float64)[finite] - exact[finite])
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    for measure, ratio, label in ((rms, _RMS_RATIO, "RMS"), (np.max, _MAX_RATIO, "max")):
        bound = max(ratio * float(measure(other)), ulp)
        found = float(measure(error))
        assert found <= bound, (
            f"{name}: {label} error {found:.3g}, wanted at most {bound:.3g} ({dtype})"
        )


def assert_same_selection(
    got: TopKSelection, want: TopKSelection, scores=None, *, name: str = "selection"
) -> None:
    """Checks that two selections of the same rows agree.

    Args:
      got, want: over rows [...]; index lists are compared where both have one.
      scores: [..., S], the scores behind the selections, if they are not integers: then counts and the multiset of selected
        scores must agree, up to one ulp at the threshold. None demands equal sets, thresholds and tie cuts.

    Raises:
      AssertionError: names the field or the row.
    """
    np.testing.assert_array_equal(got.count, want.count, err_msg=f"{name}: count")
    assert_well_formed(got, name=name)
    if scores is None:
        np.testing.assert_array_equal(got.threshold, want.threshold, err_msg=f"{name}: threshold")
        np.testing.assert_array_equal(got.tie_cut, want.tie_cut, err_msg=f"{name}: tie_cut")
        if got.indices is not None and want.indices is not None:
            np.testing.assert_array_equal(got.indices, want.indices, err_msg=f"{name}: indices")
        return
    np.testing.assert_array_max_ulp(np.asarray(got.threshold), np.asarray(want.threshold), maxulp=1)
    if got.indices is None or want.indices is None:
        return
    rows = np.asarray(scores, np.float32).reshape(-1, np.shape(scores)[-1])
    lists = (np.asarray(x.indices).reshape(len(rows), -1) for x in (got, want))
    for row, (score, mine, theirs) in enumerate(zip(rows, *lists, strict=True)):
        mine, theirs = (np.sort(score[x[x >= 0]]) for x in (mine, theirs))
        if mine.size:
            np.testing.assert_array_max_ulp(mine, theirs, maxulp=1)
        assert mine.size == theirs.size, (
            f"{name}: row {row} lists {mine.size} keys, wanted {theirs.size}"
        )


def assert_well_formed(selection: TopKSelection, *, name: str = "selection") -> None:
    """Checks what holds for every selection: ascending lists with -1 only at the tail, and the marks of empty rows."""
    count = np.asarray(selection.count)
    empty = count == 0
    assert (np.asarray(selection.threshold)[empty] == np.inf).all(), (
        f"{name}: an empty row's threshold is not +inf"
    )
    assert (np.asarray(selection.tie_cut)[empty] == -1).all(), (
        f"{name}: an empty row's tie_cut is not -1"
    )
    if selection.indices is None:
        return
    indices = np.asarray(selection.indices)
    place = np.arange(indices.shape[-1])
    listed = place < count[..., None]
    assert ((indices >= 0) == listed).all(), (
        f"{name}: -1 is not exactly the tail after `count` entries"
    )
    rising = np.diff(indices, axis=-1) > 0
    assert (rising | ~listed[..., 1:]).all(), f"{name}: a list does not ascend"


def assert_deterministic(run: Callable[..., Any], *args) -> None:
    """Checks that two runs of a function agree to the bit, NaN included."""
    first, second = (jax.tree.map(np.asarray, jax.block_until_ready(run(*args))) for _ in range(2))
    for (path, x), (_, y) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (first, second)), strict=True
    ):
        assert x.tobytes() == y.tobytes(), f"two runs differ at {jax.tree_util.keystr(path)}"


def adversarial_scores(num_keys: int, topk: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns float32 score rows [S] by name, each one a way in which a selector has been seen to fail."""
    rng = np.random.default_rng(seed)
    index = np.arange(num_keys)
    normal = rng.normal(size=num_keys).astype(np.float32)
    rows = {
        "constant": np.ones(num_keys),
        "zeros of both signs": np.where(index % 2, 0.0, -0.0),
        "relu plateau": np.where(rng.random(num_keys) < 0.05, np.abs(normal), 0.0),
        "negative plateau": np.where(rng.random(num_keys) < 0.05, -np.abs(normal), -0.0),
        "subnormals": np.float32(1e-40) * rng.integers(-9, 10, num_keys).astype(np.float32),
        "infinities": np.where(index % 5 == 0, np.inf, np.where(index % 7 == 0, -np.inf, normal)),
        "only minus infinity": np.full(num_keys, -np.inf),
        "nan": np.where(index % 3 == 0, np.nan, normal),
        "only nan": np.full(num_keys, np.nan),
        "ascending": index - num_keys / 2,
        "descending": num_keys / 2 - index,
        "one hot": index == num_keys // 2,
        "duplicates across the last place": np.where(
            index % max(num_keys // max(topk, 1), 1) < 2, 1.0, normal / 8
        ),
        "few values": rng.integers(-2, 3, num_keys),
        "periodic": np.sin(index % 128),
        "all large in one tile": np.where(index // 128 == num_keys // 256, 10 + normal, normal),
        "huge range": normal * np.float32(10.0) ** rng.integers(-30, 31, num_keys),
        "adjacent floats": np.float32(1)
        + np.float32(2**-23) * rng.integers(0, 4, num_keys).astype(np.float32),
    }
    return {name: np.asarray(row, np.float32) for name, row in rows.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to call an op.

    shapes: what `OpCase.inputs` needs to know to draw arguments.
    options: the static keyword arguments of the call.
    arrays: keyword arguments that are arrays, drawn from a generator and the shapes.
    tags: words by which `OpCase.refused` recognises what an implementation cannot do.
    """

    shapes: Mapping[str, int]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Callable[[np.random.Generator, Mapping[str, int]], Mapping[str, Any]] | None = None
    tags: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCase:
    """What the conformance suite knows of an op; a new op joins by adding one.

    op: the public function.
    inputs: draws the positional float arguments, float32, from a generator and a variant's shapes.
    variants: calls to make, by name; the first is also run twice, and in every dtype.
    implementations: those that exist besides "reference".
    dtypes: those that some implementation takes; `refused` says which does not.
    differentiable: whether gradients in the positional arguments are compared too.
    refused: implementation -> tags (of variants, or dtype names) that it refuses with NotImplementedError. Exactly these: a
      refusal that is not listed fails, and so does a listed one that runs.
    outputs: takes the op's result apart into {name: float array} and, for the name "selection", a TopKSelection.
    """

    op: Callable[..., Any]
    inputs: Callable[[np.random.Generator, Mapping[str, int]], Sequence[np.ndarray]]
    variants: Mapping[str, Variant]
    implementations: Sequence[str]
    outputs: Callable[[Any], Mapping[str, Any]]
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16")
    differentiable: bool = False
    refused: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)

    def refuses(self, implementation: str, variant: Variant, dtype: str) -> bool:
        """Whether the implementation says no to this call."""
        return bool(self.refused.get(implementation, frozenset()) & (variant.tags | {dtype}))
