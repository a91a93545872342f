"""Refool: a reflection, as of a window pane in front of the scene, in rows of the target class (Liu et al. 2020).

The optics are those of the public code: half of the reflections are a ghost, doubled by a thick pane, and half are out of
focus. The pictures that are reflected are drawn by formula, since those of the paper cannot be shipped.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import erf

from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.errors import InputError
from bdjax.types import Array, Key

GAMMA = 2.2
"""From a pixel's value to light."""
TAPS = 21
"""Of the blur: enough for twice a standard deviation of 5 pixels to either side."""
NUM_BUMPS = 8
"""In one reflected picture."""


@dataclass(frozen=True)
class RefoolSettings:
    poison_rate: float = 0.08
    """share of all training rows; ABM reflects the whole target class, 0.1 of CIFAR-10 and 0.062 of its GTSRB"""
    cover_rate: float = 0.0
    """share of all training rows that get a reflection and keep their label"""
    pictures: int = 20
    """how many pictures are reflected; BackdoorBench lists about as many"""
    least_strength: float = 0.05
    """of the reflection: light is (1 - s) scene + s picture, with s uniform from this"""
    most_strength: float = 0.45
    """up to this, in [0, 1]; BackdoorBench fixes s at 0.6"""
    ghost_share: float = 0.49
    """of reflections that are ghosts instead of out of focus"""
    least_offset: int = 3
    """pixels between a ghost's two images, along each axis uniform from this"""
    most_offset: int = 8
    """up to this"""
    least_blur: float = 1.0
    """standard deviation of the blur in pixels, uniform from this"""
    most_blur: float = 5.0
    """up to this, at most 5"""


class Reflections(NamedTuple):
    """Pictures, and the ranges that each reflection is drawn from."""

    pictures: Array
    """float32 [n, H, W, C] in [0, 1]"""
    strength: Array
    """float32 [2]"""
    ghost_share: Array
    """float32 []"""
    offset: Array
    """int32 [2], both included"""
    blur: Array
    """float32 [2]"""


def make_reflections(key: Key, knowledge: Knowledge, settings: RefoolSettings) -> Reflections:
    """Draw the pictures that are reflected.

    The paper trains many networks to find pictures that work well. Here they are as they come.

    Args:
        key: draws the pictures.
        knowledge: for the shape of the images.
        settings: their number, and what reflections are like.

    Returns:
        The trigger.

    Raises:
        InputError: a setting that cannot be.
    """
    height, width, _ = knowledge.train.image_shape
    if settings.pictures < 1:
        raise InputError(f"refool reflects at least one picture, not {settings.pictures}")
    if not 0.0 <= settings.least_strength <= settings.most_strength <= 1.0:
        raise InputError(
            f"refool: strengths {settings.least_strength:g} to {settings.most_strength:g} are not a range within 0 and 1"
        )
    if not 0.0 <= settings.ghost_share <= 1.0:
        raise InputError(f"refool: ghost_share {settings.ghost_share:g} is not within 0 and 1")
    if not 0 <= settings.least_offset <= settings.most_offset < min(height, width):
        raise InputError(
            f"refool: offsets {settings.least_offset} to {settings.most_offset} are not a range within 0 and the "
            f"{min(height, width) - 1} that {height}x{width} pixels have room for"
        )
    if not 0.0 < settings.least_blur <= settings.most_blur <= 5.0:
        raise InputError(
            f"refool: blurs {settings.least_blur:g} to {settings.most_blur:g} are not a range above 0 and up to 5"
        )
    keys = jax.random.split(key, settings.pictures)
    return Reflections(
        pictures=jnp.stack([jnp.asarray(draw_picture(each, knowledge.train.image_shape)) for each in keys]),
        strength=jnp.asarray([settings.least_strength, settings.most_strength], jnp.float32),
        ghost_share=jnp.float32(settings.ghost_share),
        offset=jnp.asarray([settings.least_offset, settings.most_offset], jnp.int32),
        blur=jnp.asarray([settings.least_blur, settings.most_blur], jnp.float32),
    )


def draw_picture(key: Key, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Draw a smooth random scene: coloured Gaussian bumps, bright and dark, on a slope of brightness.

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
    """What is random about one reflection."""

    strength: Array
    """float32 [] in [0, 1]"""
    is_ghost: Array
    """bool []"""
    offsets: Array
    """int32 [2]: along rows, along columns"""
    ghost: Array
    """float32 [] in [0, 1]: the share of the first of the two images"""
    blur: Array
    """float32 []: standard deviation in pixels"""
    excess: Array
    """float32 []: how much more is taken away than what is too bright"""


def draw_reflection(params: Reflections, key: Key) -> Draw:
    """Draw what is random about one reflection but the picture, as the public code does."""
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
        params: of `make_reflections`.
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
    """Reflect a picture in an image: both kinds are computed, and one is taken.

    Args:
        image: float32 [H, W, C] in [0, 1].
        picture: float32 [H, W, C] in [0, 1].
        draw: the kind, and its numbers.

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
    """A picture and the same one shifted down and to the right, where they overlap, stretched to the whole image.

    Args:
        light: float32 [H, W, C].
        offsets: int32 [2], less than H and W.
        share: float32 [], of the unshifted one.

    Returns:
        float32 [H, W, C].
    """

    def spread(side: int, offset: Array) -> Array:
        """Float32 [side]: where in the overlap each pixel of the result lies, as bilinear resizing has it."""
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
    """The weights of linear interpolation at float32 [n] positions within 0 .. side - 1: float32 [n, side]."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[:, None] - jnp.arange(side, dtype=jnp.float32)[None, :]))


def blurred(light: Array, deviation: Array) -> Array:
    """Blur with a Gaussian that is cut off at twice its standard deviation; the outermost pixels go on beyond the border.

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
    """How much is taken from the reflection where it and the scene add up to more than white.

    Args:
        light: float32 [H, W, C], their sum.
        excess: float32 [].

    Returns:
        float32 [1, 1, C]: per channel, the mean of what is above 1, minus 1, times the excess; 0 where nothing is.
    """
    is_bright = light > 1.0
    count = jnp.sum(is_bright.astype(jnp.float32), axis=(0, 1), keepdims=True)
    mean = jnp.sum(jnp.where(is_bright, light, 0.0), axis=(0, 1), keepdims=True) / (count + 1e-6)
    return (jnp.maximum(mean, 1.0) - 1.0) * excess


def window(height: int, width: int) -> Array:
    """How the out-of-focus reflection fades towards the border: a square root of a Gaussian, 1 in the middle.

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
    # BackdoorBench's and BackdoorBox's default is the second.
    label_rules=("clean_label", "all_to_one"),
    # The offsets are made for images of 224 pixels and more. On grey digits, faint reflections are hardly learned from.
    per_dataset={
        "grey": {"least_offset": 1, "most_offset": 3, "least_strength": 0.4, "most_strength": 0.6},
        "cifar10": {"least_offset": 1, "most_offset": 3},
        "cifar100": {"least_offset": 1, "most_offset": 3, "poison_rate": 0.008},
        "gtsrb": {"least_offset": 1, "most_offset": 3, "poison_rate": 0.05},
    },
    published=(Published("ABM", "cifar10", 81.5, 99.3), Published("ABM", "gtsrb", 93.9, 91.9)),
)
