"""One mesh, and which of its axes each array of a model is split over.

The mesh has four axes: `data` and `fsdp` split the batch, `fsdp` also splits parameters (gathered where they are used),
`tensor` splits heads, the MLP's width and the vocabulary, `context` is reserved for operations that split sequences. Axes are
automatic (GSPMD): place the parameters by `model_shardings`, enter the mesh with `jax.set_mesh`, and jitted code partitions
itself. State the shardings of a jitted function's outputs too: on automatic axes gradients do not reliably keep theirs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXES = ("data", "fsdp", "tensor", "context")

type Spec = tuple[str | tuple[str, ...] | None, ...]

_BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Mesh axes of every array, one entry a dimension, named role_dims; dims as the models' docstrings use them.

    Where a dimension is not a multiple of its mesh axes, the array is whole along it: see `fit`.
    """

    embed_vd: Spec = ("tensor", "fsdp")
    lm_head_dv: Spec = ("fsdp", "tensor")
    qkv_weight_ldnh: Spec = (None, "fsdp", "tensor", None)
    qkv_bias_lnh: Spec = (None, "tensor", None)
    out_weight_lnhd: Spec = (None, "tensor", None, "fsdp")
    up_weight_ldf: Spec = (None, "fsdp", "tensor")  # the gate too
    up_bias_lf: Spec = (None, "tensor")
    down_weight_lfd: Spec = (None, "tensor", "fsdp")
    index_query_weight_ldij: Spec = (None, "fsdp", None, None)  # one choice for all heads: whole
    index_weight_ldj: Spec = (None, "fsdp", None)  # of the indexer's key, and of its head weights
    batch_bt: Spec = (_BATCH, None)  # tokens, segment ids, positions, masks
    act_btd: Spec = (_BATCH, None, None)
    cache_bskh: Spec = (_BATCH, None, "tensor", None)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            spec = getattr(self, field.name)
            rank = len(field.name.rsplit("_", 1)[1])
            if len(spec) != rank:
                raise ValueError(f"{field.name}: got {len(spec)} entries, wanted {rank}")
            for axis in (axis for entry in spec for axis in _axes(entry) if axis not in AXES):
                raise ValueError(
                    f"{field.name}: got axis {axis!r}, wanted one of {', '.join(AXES)}"
                )

    def param_spec(self, name: str) -> Spec:
        """Returns the axes of the decoder parameter with this dotted name; norms and output biases are whole."""
        match name.rsplit(".", 1)[-1]:
            case "embed":
                return self.embed_vd
            case "lm_head":
                return self.lm_head_dv
            case "q_weight" | "k_weight" | "v_weight":
                return self.qkv_weight_ldnh
            case "q_bias" | "k_bias" | "v_bias":
                return self.qkv_bias_lnh
            case "out_weight":
                return self.out_weight_lnhd
            case "gate_weight" | "up_weight":
                return self.up_weight_ldf
            case "gate_bias" | "up_bias":
                return self.up_bias_lf
            case "down_weight":
                return self.down_weight_lfd
            case "query_weight":
                return self.index_query_weight_ldij
            case "key_weight" | "head_weight":
                return self.index_weight_ldj
        return ()


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns the mesh; one size may be -1, which takes the devices that are left.

    Args:
      data, fsdp, tensor, context: devices along each axis.
      devices: None means all, of all hosts.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and known > 0 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        got = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh: got {got}, wanted sizes (at most one -1) that multiply to {len(devices)} devices"
        )
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES), AXES, (AxisType.Auto,) * len(AXES), devices=devices
    )


def fit(spec: Spec, shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """Returns the spec for an array of `shape`, leaving whole what the mesh axes do not divide."""

    def fits(entry: str | tuple[str, ...] | None, size: int) -> bool:
        return size % math.prod(mesh.shape[axis] for axis in _axes(entry)) == 0

    return PartitionSpec(
        *(entry if fits(entry, size) else None for entry, size in zip(spec, shape, strict=False))
    )


def param_shardings(
    mesh: Mesh, shapes: Mapping[str, tuple[int, ...]], config: ShardingConfig | None = None
) -> dict[str, NamedSharding]:
    """Returns where each parameter goes, by dotted name, as `jaxtopk.models.decoder_lm.modeling.param_shapes` lists them."""
    config = ShardingConfig() if config is None else config
    return {
        name: NamedSharding(mesh, fit(config.param_spec(name), shape, mesh))
        for name, shape in shapes.items()
    }


def model_shardings[Model: PyTree](
    model: Model, mesh: Mesh, config: ShardingConfig | None = None
) -> Model:
    """Returns the tree of `model` (arrays or shapes) with a `NamedSharding` at each leaf, for `device_put` and `jit`."""
    config = ShardingConfig() if config is None else config

    def place(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, fit(config.param_spec(param_name(path)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, model)


def constrain(x: jax.Array, spec: Spec) -> jax.Array:
    """Asks for `x` to be split so, in the mesh entered with `jax.set_mesh`; outside of any, returns it as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, fit(spec, x.shape, mesh))


def param_name(path: tuple) -> str:
    """Returns the dotted name, such as layers.q_weight, of a parameter's path in a model's tree."""
    # The last entry is the value inside an nnx.Param.
    return ".".join(
        str(getattr(entry, "name", getattr(entry, "key", entry))) for entry in path[:-1]
    )


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


__all__ = [
    "AXES",
    "ShardingConfig",
    "Spec",
    "constrain",
    "fit",
    "make_mesh",
    "model_shardings",
    "param_name",
    "param_shardings",
]
