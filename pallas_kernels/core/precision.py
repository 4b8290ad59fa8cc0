"""In which type the ops accumulate: float32, or float64 where the inputs are."""

import jax.numpy as jnp


def accumulator(dtype) -> jnp.dtype:
    """Returns the type of scores, sums and log-sum-exps for inputs of `dtype`."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
