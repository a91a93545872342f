"""Stretching of arrays to the range 0..1, for the eye."""

import jax.numpy as jnp

from bdjax.types import Array

_ROUNDING = 1e-6
"""A spread below this share of the largest value is what float32 leaves of a constant."""


def min_max(values: Array, axes: tuple[int, ...]) -> Array:
    """Stretch each slice over `axes` so that its least value is 0 and its greatest 1, up to rounding.

    A slice that is constant, up to rounding, becomes 0: stretching it would show noise. So does one that is not finite,
    because the network behind it has diverged.

    Args:
        values: float32.
        axes: the axes of one slice; the others number the slices.

    Returns:
        float32 in [0, 1], of the same shape.
    """
    lowest = jnp.min(values, axes, keepdims=True)
    spread = jnp.max(values, axes, keepdims=True) - lowest
    # False also where NaN or infinity is compared.
    varies = spread > _ROUNDING * jnp.max(jnp.abs(values), axes, keepdims=True)
    # The division may be compiled to a product with the reciprocal, which can end a rounding beyond 1.
    return jnp.where(varies, jnp.minimum((values - lowest) / jnp.where(varies, spread, 1.0), 1.0), 0.0)
