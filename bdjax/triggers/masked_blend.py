"""The one form of every fixed trigger: a pattern, blended into the image where a mask says so.

A patch is a small binary mask at opacity 1, a blended picture is a mask of ones at a low opacity. Because both are the
same three arrays, the different triggers of several providers are rows of one `MaskedBlend` and go through one compiled
call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdjax.types import Array, Key


class MaskedBlend(NamedTuple):
    """One trigger; with a leading axis on every leaf, several."""

    mask: Array
    """float32 [H, W, 1] in [0, 1]: 0 leaves the pixel alone"""
    pattern: Array
    """float32 [H, W, C] in [0, 1]"""
    opacity: Array
    """float32 [] in [0, 1]"""


def apply(params: MaskedBlend, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Blend the pattern into one image: x (1 - a m) + a m p.

    Nothing has to be clipped: a mean of two values in [0, 1] stays there in float32 too, 1 - w and w adding up to 1
    after rounding. Where the mask or the opacity is 0 the image comes back bit-identical.

    Args:
        params: one trigger; `jax.vmap` over a leading axis of it gives one image per provider.
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
    """Gather triggers of one image shape into one tree with a leading axis, of any mixture of families."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *triggers)


def identity(image_shape: tuple[int, int, int]) -> MaskedBlend:
    """Make the trigger that changes nothing: the row of a provider who does not attack.

    Args:
        image_shape: (H, W, C).

    Returns:
        A trigger of opacity 0, under which every image is bit-identical.
    """
    height, width, channels = image_shape
    return MaskedBlend(
        mask=jnp.ones((height, width, 1), jnp.float32),
        pattern=jnp.zeros((height, width, channels), jnp.float32),
        opacity=jnp.float32(0.0),
    )
