"""The common form of fixed triggers: a pattern, blended into the image through a mask.

A patch has a small binary mask and opacity 1; a blended picture has a mask of ones and a low opacity. Since both are the same
three arrays, different triggers of several providers can be stacked into one `MaskedBlend` and share one compiled call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdjax.types import Array, Key


class MaskedBlend(NamedTuple):
    """One trigger; with a leading axis on every leaf, several."""

    mask: Array
    """float32 [H, W, 1] in [0, 1]: 0 leaves the pixel unchanged"""
    pattern: Array
    """float32 [H, W, C] in [0, 1]"""
    opacity: Array
    """float32 [] in [0, 1]"""


def apply(params: MaskedBlend, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Blend the pattern into one image: x (1 - a m) + a m p.

    No clipping is needed: a weighted mean of two values in [0, 1] stays there in float32 too, since 1 - w and w sum to 1
    after rounding. Where the mask or the opacity is 0, the image stays bit-identical.

    Args:
        params: one trigger; with `jax.vmap` over a leading axis, one image per provider.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the trigger is the same for every class.
        key: not used; the trigger is the same for every image.

    Returns:
        float32 [H, W, C] in [0, 1].

    References:
        Gu et al. 2017, BadNets (opacity 1); Chen et al. 2017, Targeted Backdoor Attacks, section 4 (a mask of ones).
    """
    del label, key
    weight = params.opacity * params.mask
    return image * (1.0 - weight) + weight * params.pattern


@jax.jit
def apply_to_batch(params: MaskedBlend, images: Array) -> Array:
    """Put one trigger on every image of a batch.

    Args:
        params: one trigger.
        images: float32 [N, H, W, C] in [0, 1].

    Returns:
        float32 [N, H, W, C] in [0, 1].
    """
    return jax.vmap(apply, in_axes=(None, 0))(params, images)


def stack(triggers: Sequence[MaskedBlend]) -> MaskedBlend:
    """Stack triggers for one image shape, of any families, into one pytree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *triggers)


def identity(image_shape: tuple[int, int, int]) -> MaskedBlend:
    """Make the trigger that changes nothing, for a provider who does not attack.

    Args:
        image_shape: (H, W, C).

    Returns:
        A trigger with opacity 0, which leaves every image bit-identical.
    """
    height, width, channels = image_shape
    return MaskedBlend(
        mask=jnp.ones((height, width, 1), jnp.float32),
        pattern=jnp.zeros((height, width, channels), jnp.float32),
        opacity=jnp.float32(0.0),
    )
