"""Keys of eight bits with a scale a token, and how far each stands from what it was made of."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
DTYPES = tuple(_LARGEST)
# A key whose largest element is below is 0 in its copy: its scale might be subnormal, which devices read as 0.
_TINY = 2.0**-112


class QuantizedKeys(NamedTuple):
    """An eight-bit copy of a key cache: key is about scale * values.

    values: [B, S, K, H] (or a pool of pages [P, page, K, H]), int8 or float8_e4m3fn.
    scale: [B, S, K] (or [P, page, K]), float32, one a token and key/value head, never negative; NaN where the key is not
      finite, so that its copy ranks nowhere.
    error: the same shape, float32: at least the length |key - scale * values| of what is lost, in the L2 norm; inf where the
      key is not finite.
    """

    values: Num[Array, "B S K H"]
    scale: Float[Array, "B S K"]
    error: Float[Array, "B S K"]


def quantize_keys(key: Float[Array, "*rows H"], dtype: str = "int8") -> QuantizedKeys:
    """Returns an eight-bit copy of keys, each scaled so that its largest element is the largest number of `dtype`.

    Works on a whole cache, on a pool of pages and on the one row that a decode step appends. Numbers are rounded to the
    nearest. `error` is computed from the rounded values themselves, and rounded up. Keys below 2^-112 are 0 in the copy.

    Args:
      key: bfloat16, float16 or float32.
      dtype: "int8" or "float8_e4m3fn".

    Raises:
      ValueError: dtype is another.
    """
    if dtype not in _LARGEST:
        raise ValueError(
            f"quantize_keys: dtype got {dtype!r}, wanted one of {', '.join(map(repr, DTYPES))}"
        )
    exact = key.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(exact), axis=-1)
    exact = jnp.where(finite[..., None], exact, 0.0)
    largest = jnp.max(jnp.abs(exact), axis=-1)
    tiny = largest < _TINY
    scale = jnp.where(tiny, 0.0, largest / _LARGEST[dtype])
    # In units of the scale, in which no square underflows or overflows.
    ratio = exact / jnp.where(tiny, 1.0, scale)[..., None]
    if dtype == "int8":
        rounded = jnp.clip(jnp.round(ratio), -127, 127)
    else:
        rounded = _to_e4m3(jnp.clip(ratio, -448.0, 448.0))
    values, lost = rounded.astype(dtype), ratio - rounded
    # Each step above and below rounds by at most 2^-22 of the key; the sum of H squares by H times 2^-24.
    length = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1))
    error = scale * (length(lost) * (1 + 2.0**-12) + length(ratio) * 2.0**-20)
    error = jnp.where(tiny, key.shape[-1] ** 0.5 * _TINY, error)
    return QuantizedKeys(
        values, jnp.where(finite, scale, jnp.nan), jnp.where(finite, error, jnp.inf)
    )


def _to_e4m3(x):
    """Rounds float32 of at most 448 to the nearest float8_e4m3fn.

    Not by a conversion there and back: XLA may leave out such pairs, so that nothing would seem to be lost.
    """
    steps = jnp.round(x * 2.0**9) * 2.0**-9  # below 2^-6 all steps are of one size
    return jnp.where(jnp.abs(x) < 2.0**-6, steps, lax.reduce_precision(x, 5, 3))


def largest(dtype) -> float:
    """Returns the largest number that a copy of this dtype holds."""
    return _LARGEST[jnp.dtype(dtype).name]


def check(op: str, quantized, key) -> QuantizedKeys:
    """Checks that `quantized` can be a copy of `key`; returns it as JAX arrays."""
    if not isinstance(quantized, QuantizedKeys):
        raise ValueError(
            f"{op}: quantized_key got {type(quantized).__name__}, wanted QuantizedKeys"
        )
    quantized = QuantizedKeys(*map(jnp.asarray, quantized))
    if quantized.values.dtype.name not in DTYPES:
        raise ValueError(
            f"{op}: quantized_key.values got dtype {quantized.values.dtype.name}, wanted one of {', '.join(DTYPES)}"
        )
    for name, array, wanted in (
        ("values", quantized.values, key.shape),
        ("scale", quantized.scale, key.shape[:-1]),
        ("error", quantized.error, key.shape[:-1]),
    ):
        if array.shape != wanted:
            raise ValueError(
                f"{op}: quantized_key.{name} got shape {tuple(array.shape)}, wanted {tuple(wanted)} as key has it"
            )
        if name != "values" and array.dtype != jnp.float32:
            raise ValueError(
                f"{op}: quantized_key.{name} got dtype {array.dtype.name}, wanted float32"
            )
    return quantized


def scores(query, quantized: QuantizedKeys, scale: float, *, dtype):
    """Returns scale * <query, key> by the eight-bit copy, [B, N, S]; query [B, N, H], contiguous keys, accumulated in `dtype`."""
    b, n, h = query.shape
    _, s, k, _ = quantized.values.shape
    products = jnp.einsum(
        "bkgh,bskh->bkgs",
        query.reshape(b, k, n // k, h).astype(dtype),
        quantized.values.astype(dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    by_token = jnp.swapaxes(quantized.scale, 1, 2)[:, :, None]
    return (scale * by_token * products).reshape(b, n, s)
