"""Over which mesh axes of a surrounding `shard_map` arrays vary: what scans and custom gradients need to agree on.

JAX tracks these axes and wants a scan's carry and result, and an argument and its cotangent, to vary over the same ones.
Outside `shard_map`, and under `check_vma=False`, there are none and nothing here does anything.
"""

import jax
from jax import lax


def align(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Makes arrays vary over the union of their axes; differentiation sums the cotangent of one that did not, as it must."""
    axes = frozenset().union(*(_axes(x) for x in arrays))
    return tuple(_vary(x, axes) for x in arrays)


def like(tree, array: jax.Array):
    """Makes the arrays of a pytree vary over the axes that `array` varies over."""
    return jax.tree.map(lambda x: _vary(x, _axes(array)), tree)


def _axes(x) -> frozenset:
    return getattr(jax.typeof(x), "vma", frozenset())


def _vary(x, axes: frozenset):
    missing = tuple(sorted(axes - _axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x
