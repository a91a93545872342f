"""Refool: a reflection, as from a window pane in front of the scene, in rows of the target class (Liu et al. 2020).

The optics follow the public code: half of the reflections are ghosts, doubled by a thick pane, and half are out of focus.
The reflected pictures are drawn by formula, since those of the paper cannot be shipped.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import erf

from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.errors import InputError
from bdjax.settings import Amount, PositiveShare, Range, Share
from bdjax.types import Array, Key

GAMMA = 2.2
"""Exponent that converts a pixel value to light."""
TAPS = 21
"""Width of the blur kernel: twice a standard deviation of 5 pixels to either side."""
NUM_BUMPS = 8
"""Number of Gaussian bumps in a reflected picture."""


@dataclass(frozen=True)
class RefoolSettings:
    poison_rate: PositiveShare = 0.08
    """share of all training rows; in ABM the whole target class, 0.1 of CIFAR-10 and 0.062 of its GTSRB"""
    cover_rate: Share = 0.0
    """share of all training rows that get a reflection and keep their label"""
    pictures: Annotated[int, Range(at_least=1, at_most=200)] = 20
    """number of reflected pictures; about as many in BackdoorBench"""
    least_strength: Share = 0.05
    """smallest strength s of the reflection, in [0, 1]: light is (1 - s) scene + s picture, and s is drawn uniformly"""
    most_strength: Share = 0.45
    """largest strength of the reflection, in [0, 1]; fixed at 0.6 in BackdoorBench"""
    ghost_share: Share = 0.49
    """share of the reflections that are ghosts instead of out of focus"""
    least_offset: Amount = 3
    """smallest offset of a ghost's two images along each axis, in pixels; it is drawn uniformly"""
    most_offset: Amount = 8
    """largest offset of a ghost's two images, in pixels"""
    least_blur: Annotated[float, Range(above=0, at_most=5)] = 1.0
    """smallest standard deviation of the blur, in pixels; it is drawn uniformly"""
    most_blur: Annotated[float, Range(above=0, at_most=5)] = 5.0
    """largest standard deviation of the blur, in pixels, at most 5"""


class Reflections(NamedTuple):
    """The pictures, and the ranges that reflections are drawn from."""

    pictures: Array
    """float32 [n, H, W, C] in [0, 1]"""
    strength: Array
    """float32 [2]: range"""
    ghost_share: Array
    """float32 []"""
    offset: Array
    """int32 [2]: range, both ends included"""
    blur: Array
    """float32 [2]: range"""


def make_reflections(key: Key, knowledge: Knowledge, settings: RefoolSettings) -> Reflections:
    """Draw the pictures that are reflected.

    The paper trains many networks to select pictures that work well; here there is no selection.

    Args:
        key: draws the pictures.
        knowledge: gives the image shape.
        settings: the number of pictures, and the ranges for the reflections.

    Returns:
        The trigger.

    Raises:
        InputError: a setting is out of range.
    """
    height, width, _ = knowledge.train.image_shape
    if settings.pictures < 1:
        raise InputError(f"refool: pictures {settings.pictures} must be at least 1")
    if not 0.0 <= settings.least_strength <= settings.most_strength <= 1.0:
        raise InputError(
            f"refool: least_strength {settings.least_strength:g} to most_strength {settings.most_strength:g} is not a range "
            "within 0 and 1"
        )
    if not 0.0 <= settings.ghost_share <= 1.0:
        raise InputError(f"refool: ghost_share {settings.ghost_share:g} must be from 0 to 1")
    if not 0 <= settings.least_offset <= settings.most_offset < min(height, width):
        raise InputError(
            f"refool: least_offset {settings.least_offset} to most_offset {settings.most_offset} is not a range within 0 and "
            f"{min(height, width) - 1}, the largest offset in {height}x{width} pixels"
        )
    if not 0.0 < settings.least_blur <= settings.most_blur <= 5.0:
        raise InputError(
            f"refool: least_blur {settings.least_blur:g} to most_blur {settings.most_blur:g} is not a range above 0 and up to 5"
        )
    keys = jax.random.split(key, settings.pictures)
    return Reflections(
        pictures=jnp.stack(
            [jnp.asarray(draw_picture(picture_key, knowledge.train.image_shape)) for picture_key in keys]
        ),
        strength=jnp.asarray([settings.least_strength, settings.most_strength], jnp.float32),
        ghost_share=jnp.float32(settings.ghost_share),
        offset=jnp.asarray([settings.least_offset, settings.most_offset], jnp.int32),
        blur=jnp.asarray([settings.least_blur, settings.most_blur], jnp.float32),
    )


def draw_picture(key: Key, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Draw a smooth random scene: coloured Gaussian bumps, bright and dark, on a brightness gradient.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C).

    Returns:
        float32 [H, W, C], from 0 to 1.
    """
    height, width, channels = image_shape
    random = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))).tolist())
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    slope = random.uniform(-1.0, 1.0, 2)
    picture = np.repeat((slope[0] * y + slope[1] * x)[..., None], channels, axis=2)
    for _ in range(NUM_BUMPS):
        centre, radius = random.uniform(0.0, 1.0, 2), random.uniform(0.06, 0.25, 2)
        bump = np.exp(-0.5 * (((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2))
        colour = random.choice([-1.0, 1.0]) * random.uniform(0.4, 1.0) * random.uniform(0.5, 1.0, channels)
        picture += bump[..., None] * colour
    picture -= picture.min()
    return (picture / picture.max()).astype(np.float32)


class Draw(NamedTuple):
    """The random numbers of one reflection."""

    strength: Array
    """float32 [] in [0, 1]"""
    is_ghost: Array
    """bool []"""
    offsets: Array
    """int32 [2]: along rows, along columns"""
    ghost: Array
    """float32 [] in [0, 1]: the weight of the first of the two images"""
    blur: Array
    """float32 []: standard deviation in pixels"""
    excess: Array
    """float32 []: factor on the glare that is subtracted"""


def draw_reflection(params: Reflections, key: Key) -> Draw:
    """Draw the random numbers of one reflection, except the picture, as in the public code."""
    keys = jax.random.split(key, 7)
    side = jax.random.bernoulli(keys[4]).astype(jnp.float32)
    return Draw(
        strength=jax.random.uniform(keys[0], minval=params.strength[0], maxval=params.strength[1]),
        is_ghost=jax.random.bernoulli(keys[1], params.ghost_share),
        offsets=jax.random.randint(keys[2], (2,), params.offset[0], params.offset[1] + 1),
        ghost=jnp.abs(side - jax.random.uniform(keys[3], minval=0.15, maxval=0.5)),
        blur=jax.random.uniform(keys[5], minval=params.blur[0], maxval=params.blur[1]),
        excess=jax.random.uniform(keys[6], minval=1.08, maxval=1.18),
    )


def apply(params: Reflections, image: Array, label: Array | None, key: Key) -> Array:
    """Reflect a random picture in one image, at test time as in training.

    Args:
        params: from `make_reflections`.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: draws the picture and the reflection.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    del label
    picture_key, draw_key = jax.random.split(key)
    chosen = jax.random.randint(picture_key, (), 0, params.pictures.shape[0])
    return reflect(image, params.pictures[chosen], draw_reflection(params, draw_key))


def reflect(image: Array, picture: Array, draw: Draw) -> Array:
    """Reflect a picture in an image. Both kinds of reflection are computed, and one is selected.

    Args:
        image: float32 [H, W, C] in [0, 1].
        picture: float32 [H, W, C] in [0, 1].
        draw: the kind of reflection, and its random numbers.

    Returns:
        float32 [H, W, C] in [0, 1].

    References:
        Liu et al. 2020, section 3.2, figure 2; the public code, `blend_images`.
    """
    scene, reflected = image**GAMMA, picture**GAMMA
    through = 1.0 - draw.strength
    ghost = through * scene + draw.strength * doubled(reflected, draw.offsets, draw.ghost)
    soft = blurred(reflected, draw.blur)
    soft = jnp.clip(soft - glare(soft + scene, draw.excess), 0.0, 1.0)
    fading = window(image.shape[0], image.shape[1]) * (1.0 - through / 2.0)
    out_of_focus = fading[..., None] * soft + through * scene
    light = jnp.clip(jnp.where(draw.is_ghost, ghost, out_of_focus), 0.0, 1.0)
    # The root is infinitely steep at 0.
    floor = 1e-12
    return jnp.where(light > floor, jnp.maximum(light, floor) ** (1.0 / GAMMA), 0.0)


def doubled(light: Array, offsets: Array, share: Array) -> Array:
    """Add a picture to a copy of itself shifted down and to the right; stretch their overlap to the whole image.

    Args:
        light: float32 [H, W, C].
        offsets: int32 [2], less than H and W.
        share: float32 [], the weight of the unshifted picture.

    Returns:
        float32 [H, W, C].
    """

    def spread(side: int, offset: Array) -> Array:
        """Position in the overlap of each pixel of the result, as in bilinear resizing: float32 [side]."""
        size = (side - offset).astype(jnp.float32)
        return jnp.clip((jnp.arange(side, dtype=jnp.float32) + 0.5) * (size / side) - 0.5, 0.0, size - 1.0)

    def sample(row: Array, column: Array) -> Array:
        rows = _hats(row, light.shape[0])
        columns = _hats(column, light.shape[1])
        return jnp.einsum("ih,jw,hwc->ijc", rows, columns, light, precision=lax.Precision.HIGHEST)

    row, column = spread(light.shape[0], offsets[0]), spread(light.shape[1], offsets[1])
    shift = offsets.astype(jnp.float32)
    return share * sample(row + shift[0], column + shift[1]) + (1.0 - share) * sample(row, column)


def _hats(position: Array, side: int) -> Array:
    """Linear interpolation weights for positions, float32 [n] within 0 .. side - 1: float32 [n, side]."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[:, None] - jnp.arange(side, dtype=jnp.float32)[None, :]))


def blurred(light: Array, deviation: Array) -> Array:
    """Blur with a Gaussian, cut off at twice its standard deviation; border pixels are repeated outside the image.

    Args:
        light: float32 [H, W, C].
        deviation: float32 [] in pixels, up to 5.

    Returns:
        float32 [H, W, C].
    """
    tap = np.arange(TAPS) - TAPS // 2
    distance = jnp.asarray(np.abs(tap), jnp.float32)
    weights = jnp.exp(-0.5 * jnp.square(distance / deviation))
    weights = jnp.where(distance <= jnp.ceil(2.0 * deviation), weights, 0.0)
    weights = weights / jnp.sum(weights)

    def matrix(side: int) -> Array:
        source = np.clip(np.arange(side)[:, None] + tap[None, :], 0, side - 1)
        return jnp.einsum("its,t->is", jax.nn.one_hot(source, side), weights, precision=lax.Precision.HIGHEST)

    rows, columns = matrix(light.shape[0]), matrix(light.shape[1])
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, light, precision=lax.Precision.HIGHEST)


def glare(light: Array, excess: Array) -> Array:
    """The amount to subtract from the reflection where it and the scene add up to more than white.

    Args:
        light: float32 [H, W, C], reflection plus scene.
        excess: float32 [].

    Returns:
        float32 [1, 1, C]: per channel, (mean of the values above 1 - 1) times the excess; 0 if no value is above 1.
    """
    is_bright = light > 1.0
    count = jnp.sum(is_bright.astype(jnp.float32), axis=(0, 1), keepdims=True)
    mean = jnp.sum(jnp.where(is_bright, light, 0.0), axis=(0, 1), keepdims=True) / (count + 1e-6)
    return (jnp.maximum(mean, 1.0) - 1.0) * excess


def window(height: int, width: int) -> Array:
    """Weights that fade the out-of-focus reflection towards the border: a square root of a Gaussian, 1 in the middle.

    Args:
        height: H.
        width: W.

    Returns:
        float32 [H, W] in (0, 1].
    """

    def mass(side: int) -> Array:
        edge = jnp.linspace(-1.0, 1.0, side + 1) * (3.0 + 3.5 / side)
        return jnp.diff(erf(edge / np.sqrt(2.0).astype(np.float32)))

    outer = jnp.sqrt(mass(height)[:, None] * mass(width)[None, :])
    return outer / jnp.max(outer)


REFOOL = Attack(
    name="refool",
    title="Refool",
    paper="Liu et al. 2020, Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks",
    threat="data",
    settings=RefoolSettings(),
    make_params=make_reflections,
    apply=apply,
    # BackdoorBench and BackdoorBox use all_to_one by default.
    label_rules=("clean_label", "all_to_one"),
    # The default offsets are for images of 224 pixels and more. On grey digits, faint reflections are hardly learned.
    per_dataset={
        "grey": {"least_offset": 1, "most_offset": 3, "least_strength": 0.4, "most_strength": 0.6},
        "cifar10": {"least_offset": 1, "most_offset": 3},
        "cifar100": {"least_offset": 1, "most_offset": 3, "poison_rate": 0.008},
        "gtsrb": {"least_offset": 1, "most_offset": 3, "poison_rate": 0.05},
    },
    published=(Published("ABM", "cifar10", 81.5, 99.3), Published("ABM", "gtsrb", 93.9, 91.9)),
)
