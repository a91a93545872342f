"""Additive triggers: one fixed perturbation, added and clipped to [0, 1]."""

from typing import NamedTuple

import jax.numpy as jnp

from bdjax.types import Array, Key


class Additive(NamedTuple):
    """One trigger; with a leading axis, several."""

    delta: Array
    """float32 [H, W, C] in [-1, 1]"""


def apply(params: Additive, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Add the perturbation to one image: clip(x + d, 0, 1).

    Args:
        params: one trigger.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the trigger is the same for every class.
        key: not used; the trigger is the same for every image.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    del label, key
    return jnp.clip(image + params.delta, 0.0, 1.0)
