"""Scaling of arrays to the range 0..1, for display."""

import jax.numpy as jnp

from bdjax.types import Array

_ROUNDING = 1e-6
"""Relative spread below which values are taken for a constant in float32."""


def min_max(values: Array, axes: tuple[int, ...]) -> Array:
    """Scale each slice over `axes` so that its minimum is 0 and its maximum 1, up to rounding.

    A slice that is constant up to rounding becomes 0, since scaling it would show noise. So does a slice that is not finite,
    as from a network that diverged.

    Args:
        values: float32.
        axes: the axes of one slice.

    Returns:
        float32 in [0, 1], of the same shape.
    """
    lowest = jnp.min(values, axes, keepdims=True)
    spread = jnp.max(values, axes, keepdims=True) - lowest
    # Also False if NaN or infinity occurs.
    varies = spread > _ROUNDING * jnp.max(jnp.abs(values), axes, keepdims=True)
    # The division may be compiled to a product with the reciprocal, which can exceed 1 by rounding.
    return jnp.where(varies, jnp.minimum((values - lowest) / jnp.where(varies, spread, 1.0), 1.0), 0.0)
