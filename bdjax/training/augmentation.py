"""Random augmentation of training images on the device, with a key for each image."""

import jax
import jax.numpy as jnp
from jax import lax

from bdjax.choices import Augmentation
from bdjax.types import Array, Key


def pad_crop(key: Key, image: Array, padding: int, *, mirror: bool = False) -> Array:
    """Shift an image by up to `padding` pixels in each direction, filling with zeros or with the mirrored border.

    Args:
        key: for this image.
        image: [H, W, C], any dtype.
        padding: at least 0, and below H and W if mirrored.
        mirror: whether to fill with the mirrored border, without repeating the edge.

    Returns:
        [H, W, C], the same dtype.
    """
    around = ((padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(image, around, mode="reflect" if mirror else "constant")
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)


def random_flip(key: Key, image: Array) -> Array:
    """Mirror an image left to right with probability one half."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def augment(key: Key, images: Array, kind: Augmentation) -> Array:
    """Augment a batch.

    Args:
        key: for the batch; each image gets its own key from it.
        images: [N, H, W, C], or [N, V, H, W, C]: the V views of an image are augmented alike.
        kind: "none"; "crop", shifts of up to an eighth of the height (4 pixels of 32) with black borders; "crop_flip", also
            mirrored at random; "reflect" and "reflect_flip", shifts of up to a sixteenth with mirrored borders.

    Returns:
        The same shape and dtype.
    """
    if kind == "none":
        return images
    mirror = kind.startswith("reflect")
    padding = max(1, images.shape[-3] // (16 if mirror else 8))

    def augment_image(key: Key, image: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        image = pad_crop(crop_key, image, padding, mirror=mirror)
        return random_flip(flip_key, image) if kind.endswith("flip") else image

    function = augment_image if images.ndim == 4 else jax.vmap(augment_image, in_axes=(None, 0))
    return jax.vmap(function)(jax.random.split(key, images.shape[0]), images)
