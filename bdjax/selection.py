"""Maxima, minima and clips whose derivative does not depend on how they are rounded.

The derivative of `jnp.maximum`, and so of `jnp.clip`, compares each argument with the maximum. Where a compiler computes an
argument twice and rounds it differently, none of them equals it and the gradient is lost; here only the arguments are compared.
"""

import jax
import jax.numpy as jnp
from jax import lax

from bdjax.types import Array


@jax.custom_jvp
def larger(first: Array, second: Array) -> Array:
    """The elementwise maximum of two floating arrays of one shape; equal elements share the gradient."""
    return lax.max(first, second)


@larger.defjvp
def _larger_jvp(arguments, tangents):
    (first, second), (of_first, of_second) = arguments, tangents
    one, half, none = (lax.full(first.shape, share, first.dtype) for share in (1, 0.5, 0))
    share = lax.select(first > second, one, lax.select(first == second, half, none))
    return larger(first, second), share * of_first + (one - share) * of_second


def clip(values: Array, low: Array | float, high: Array | float) -> Array:
    """`jnp.clip`: the gradient is that of the values, half of it at a bound, and none beyond.

    Args:
        values: floating, of any shape.
        low, high: numbers.
    """
    low, high = (jnp.full(values.shape, bound, values.dtype) for bound in (low, high))
    return -larger(-larger(values, low), -high)
