"""Over which mesh axes of a surrounding `shard_map` the arguments of a custom gradient vary.

JAX tracks these axes and wants an argument and its cotangent to vary over the same ones. Keys that all devices share do not
vary, while the part of their gradient that comes from a device's own queries does. Outside `shard_map`, and under
`check_vma=False`, nothing varies and nothing here does anything.
"""

import jax
from jax import lax


def align(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Makes arrays vary over the union of their axes; differentiation adds up the cotangent of one that did not."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*varying)

    def vary(x, axes):
        missing = tuple(sorted(union - axes))
        return lax.pcast(x, missing, to="varying") if missing else x

    return tuple(map(vary, arrays, varying))
