"""A picture blended faintly into the whole image."""

import jax
import jax.numpy as jnp

from bdjax.errors import InputError
from bdjax.triggers import masked_blend, pictures
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Key, TriggerFamily

DEFAULT_OPACITY_RANGE = {1: (0.05, 0.1), 3: (0.15, 0.2)}
"""Per number of channels: the range that the code released with TA-KD uses on MNIST, and the range that a comment in it
recommends on CIFAR-10, where a fainter picture is often not learned from 1 % of the rows."""


def init(
    key: Key,
    image_shape: tuple[int, int, int],
    *,
    picture: str | None = None,
    opacity_range: tuple[float, float] | None = None,
) -> MaskedBlend:
    """Draw a picture and its opacity.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C), C being 1 or 3.
        picture: a key of `bdjax.triggers.pictures.PICTURES`; by default drawn at random.
        opacity_range: the opacity is uniform between these two, each in [0, 1]; by default `DEFAULT_OPACITY_RANGE`.

    Returns:
        The trigger, with a mask of ones.

    Raises:
        InputError: there is no picture of that name, the channels are neither 1 nor 3, or the range is invalid.

    References:
        Chen et al. 2017, Targeted Backdoor Attacks, section 4; Heydari et al. 2025, section 4.2, "Blend".
    """
    opacity_key, picture_key = jax.random.split(key)
    if picture is None:
        names = sorted(pictures.PICTURES)
        picture = names[int(jax.random.randint(picture_key, (), 0, len(names)))]
    pattern = pictures.draw(picture, image_shape)  # checks the channels too
    low, high = DEFAULT_OPACITY_RANGE[image_shape[2]] if opacity_range is None else opacity_range
    if not 0.0 <= low <= high <= 1.0:
        raise InputError(f"opacity range ({low:g}, {high:g}): both ends must be from 0 to 1, the lower one first")
    return MaskedBlend(
        mask=jnp.ones((*image_shape[:2], 1), jnp.float32),
        pattern=jnp.asarray(pattern),
        opacity=jax.random.uniform(opacity_key, minval=low, maxval=high),
    )


BLEND = TriggerFamily(init, masked_blend.apply)
