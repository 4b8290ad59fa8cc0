"""Argument checks shared by the ops: each error names the argument, what it got and what was wanted."""

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")


def shape(op: str, name: str, array, wanted: str, **sizes: int | None) -> None:
    """Checks `array` against axis letters such as "B T N H"; a letter given in `sizes` must have that size."""
    letters = wanted.split()
    if array.ndim != len(letters):
        raise ValueError(
            f"{op}: {name} got shape {tuple(array.shape)}, wanted {len(letters)} axes [{', '.join(letters)}]"
        )
    for axis, letter in enumerate(letters):
        size = sizes.get(letter)
        if size is not None and array.shape[axis] != size:
            raise ValueError(
                f"{op}: {name} got shape {tuple(array.shape)}, wanted axis {axis} ({letter}) of size {size}"
            )


def floating(op: str, name: str, array) -> None:
    """Checks that `array` holds a floating type that the ops accumulate in float32."""
    if array.dtype.name not in FLOATS:
        raise ValueError(
            f"{op}: {name} got dtype {array.dtype.name}, wanted one of {', '.join(FLOATS)}"
        )


def same_dtype(op: str, **arrays) -> None:
    """Checks that all arrays share one dtype."""
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        got = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{op}: got {got}, wanted one dtype for all of them")


def integer(op: str, name: str, array) -> None:
    """Checks that `array` is int32, the only index type the ops take."""
    if array.dtype != jnp.int32:
        raise ValueError(f"{op}: {name} got dtype {array.dtype.name}, wanted int32")


def heads(op: str, num_query_heads: int, num_kv_heads: int) -> None:
    """Checks that every key/value head serves the same number of query heads."""
    if num_kv_heads < 1 or num_query_heads % num_kv_heads:
        raise ValueError(
            f"{op}: query got {num_query_heads} heads, wanted a multiple of the {num_kv_heads} key/value heads"
        )


def attention(op: str, query, key, value) -> tuple[int, int, int]:
    """Checks query [B, T, N, H], key [B, S, K, H] and value [B, S, K, V] together; returns (B, T, S)."""
    shape(op, "query", query, "B T N H")
    b, t, n, h = query.shape
    shape(op, "key", key, "B S K H", B=b, H=h)
    _, s, k, _ = key.shape
    shape(op, "value", value, "B S K V", B=b, S=s, K=k)
    _attention_arrays(op, query, key, value)
    return b, t, s


def paged_attention(op: str, query, key, value) -> None:
    """Checks query [B, T, N, H] beside pools of pages, key [P, page, K, H] and value [P, page, K, V]."""
    shape(op, "query", query, "B T N H")
    shape(op, "key", key, "P page K H", H=query.shape[3])
    p, page, k, _ = key.shape
    shape(op, "value", value, "P page K V", P=p, page=page, K=k)
    _attention_arrays(op, query, key, value)


def _attention_arrays(op: str, query, key, value) -> None:
    heads(op, query.shape[2], key.shape[2])
    for name, array in (("query", query), ("key", key), ("value", value)):
        if 0 in array.shape:
            raise ValueError(
                f"{op}: {name} got shape {tuple(array.shape)}, wanted every axis of at least 1"
            )
    floating(op, "query", query)
    same_dtype(op, query=query, key=key, value=value)


def optional_integer(op: str, name: str, array, wanted: str, **sizes: int):
    """Checks an int32 array of a given shape, or None; returns it as a JAX array."""
    if array is None:
        return None
    array = jnp.asarray(array)
    integer(op, name, array)
    shape(op, name, array, wanted, **sizes)
    return array


def choice(op: str, name: str, got: object, wanted: tuple[str, ...]) -> None:
    """Checks that `got` is one of a few names."""
    if got not in wanted:
        raise ValueError(f"{op}: {name} got {got!r}, wanted one of {', '.join(map(repr, wanted))}")


def is_static(topk) -> bool:
    """Whether `topk` is a Python number rather than an array of budgets."""
    return isinstance(topk, int | np.integer)


def topk(op: str, value, rows: tuple[int, ...]) -> jax.Array | int:
    """Checks `topk`: an int of at least 1, or an int32 array that broadcasts to `rows`.

    A concrete array is checked for values below 1 as well; a traced one cannot be, and such rows then keep nothing.
    """
    if isinstance(value, bool):
        raise ValueError(f"{op}: topk got {value!r}, wanted an int >= 1 or an int32 array")
    if is_static(value):
        if value < 1:
            raise ValueError(f"{op}: topk got {value}, wanted at least 1")
        return int(value)
    if not isinstance(value, jax.Array | np.ndarray):
        raise ValueError(f"{op}: topk got {value!r}, wanted an int >= 1 or an int32 array")
    integer(op, "topk", value)
    try:
        fits = np.broadcast_shapes(value.shape, rows) == rows
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{op}: topk got shape {tuple(value.shape)}, wanted one that broadcasts to the rows {rows}"
        )
    if not isinstance(value, jax.core.Tracer) and value.size and int(np.min(np.asarray(value))) < 1:
        raise ValueError(
            f"{op}: topk got a row of {int(np.min(np.asarray(value)))}, wanted at least 1"
        )
    return jnp.asarray(value)


def topk_ratio(op: str, ratio: float) -> None:
    """Checks that a share of the visible keys lies in (0, 1]."""
    if not 0 < ratio <= 1:
        raise ValueError(f"{op}: topk_ratio got {ratio}, wanted a number in (0, 1]")


def at_least_one(op: str, name: str, value: int) -> None:
    """Checks a count such as `min_topk` or `window`."""
    if value < 1:
        raise ValueError(f"{op}: {name} got {value}, wanted at least 1")
