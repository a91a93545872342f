"""Pictures of triggers: mask, pattern, and their effect on an image."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array

PICTURES = ("mask", "trigger", "image", "triggered", "difference")
"""The names of the pictures of one trigger, in display order."""


def magnified_difference(image: Array, triggered: Array, magnification: float = 10.0) -> Array:
    """Make a faint trigger visible: min(1, magnification |triggered - image|).

    Args:
        image: float32 [..., C] in [0, 1].
        triggered: the same image with a trigger of any kind.
        magnification: factor of the difference.

    Returns:
        float32 [..., C] in [0, 1]; exactly 0 where the trigger changes nothing.
    """
    return jnp.minimum(magnification * jnp.abs(triggered - image), 1.0)


def trigger_picture(params: MaskedBlend, image: Array) -> dict[str, Array]:
    """Draw the parts of one trigger on one image.

    Args:
        params: one trigger.
        image: float32 [H, W, C] in [0, 1].

    Returns:
        By the names of `PICTURES`, each float32 in [0, 1]: the mask [H, W, 1]; the trigger, which is mask times pattern, at
        full opacity; the clean image; the triggered image; ten times their difference. All but the mask are [H, W, C].

    References:
        Heydari et al. 2025, section 4.2, figure 3.
    """
    triggered = masked_blend.apply(params, image)
    return {
        "mask": params.mask,
        "trigger": params.mask * params.pattern,
        "image": image,
        "triggered": triggered,
        "difference": magnified_difference(image, triggered),
    }


def trigger_pictures(params: MaskedBlend, image: Array) -> dict[str, Array]:
    """Draw the parts of several triggers on the same image.

    Args:
        params: T triggers, stacked.
        image: float32 [H, W, C] in [0, 1].

    Returns:
        As `trigger_picture`, with a leading axis of T.
    """
    pictures = _trigger_pictures(params, image)
    return {name: pictures[name] for name in PICTURES}  # jit returns dicts with sorted keys


def picture_rows(pictures: Mapping[str, Array], names: Sequence[str] = PICTURES) -> list[list[np.ndarray]]:
    """Arrange a row for each trigger and a column for each picture, for `bdjax.reporting.plots.image_grid`.

    Args:
        pictures: from `trigger_pictures`.
        names: which pictures.

    Returns:
        T rows of `len(names)` images [H, W, 1 or C].
    """
    columns = [np.asarray(pictures[name]) for name in names]
    return [list(row) for row in zip(*columns, strict=True)]


_trigger_pictures = jax.jit(jax.vmap(trigger_picture, in_axes=(0, None)))
