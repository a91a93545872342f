"""WaNet: a slight, smooth warp of the image (Nguyen & Tran 2021).

The attacker trains the model, on warped rows with its own label and on cover rows: these are warped with additional
per-pixel noise and keep their label, so that the model learns exactly this warp. `wanet_offline` is a data attack: both
kinds of row are made once, before training.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from bdjax.attacks import batch_poisoning
from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.errors import InputError
from bdjax.settings import Number, PositiveShare, Range, Share
from bdjax.types import Array, Key


@dataclass(frozen=True)
class WaNetSettings:
    poison_rate: PositiveShare = 0.1
    """share of the rows that are warped and get the attacker's label; a share of each batch where the attacker trains"""
    cover_rate: Share = 0.2
    """share of the rows that are warped with noise and keep their label; cross ratio of 2 in the paper"""
    control_points: Annotated[int, Range(at_least=2, at_most=100)] = 4
    """k: the warp is drawn on a k x k grid"""
    strength: Number = 0.5
    """s: strength of the warp; 0.5 moves a pixel by about 0.2 pixels on average, for any image size"""


class WaNet(NamedTuple):
    """The warp."""

    field: Array
    """float32 [H, W, 2]: displacement of each pixel's lookup, in rows and columns"""


def bicubic_matrix(length: int, control_points: int) -> np.ndarray:
    """Interpolate k values to `length` by cubic convolution, with aligned end points.

    This is PyTorch's bicubic upsampling with aligned corners: coefficient -0.75, the border repeated. `jax.image.resize` uses
    another coefficient and aligns the pixel edges, which gives a different field.

    Args:
        length: of the output, at least 2.
        control_points: k, at least 2.

    Returns:
        float64 [length, k]; each row sums to 1.

    References:
        Keys 1981, Cubic Convolution Interpolation for Digital Image Processing.
    """
    a = -0.75
    matrix = np.zeros((length, control_points))
    for row, position in enumerate(np.arange(length) * (control_points - 1) / (length - 1)):
        start = int(np.floor(position))
        for point in range(start - 1, start + 3):
            t = abs(position - point)
            if t <= 1:
                weight = (a + 2) * t**3 - (a + 3) * t**2 + 1
            elif t < 2:
                weight = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            else:
                weight = 0.0
            matrix[row, min(max(point, 0), control_points - 1)] += weight
    return matrix


def make_warp(key: Key, knowledge: Knowledge, settings: WaNetSettings) -> WaNet:
    """Draw control points uniformly, scale them to a mean absolute value of 1, and interpolate them.

    The paper's field is in half-images over H; here it is in pixels, so s F / H becomes s F (H - 1) / (2 H).

    Args:
        key: draws the warp.
        knowledge: gives the image shape.
        settings: k and s.

    Returns:
        The warp.

    Raises:
        InputError: fewer than 2 control points.

    References:
        Nguyen & Tran 2021, section 3.2, equations 3-5.
    """
    height, width, _ = knowledge.train.image_shape
    count = settings.control_points
    if count < 2:
        raise InputError(f"WaNet: control_points {count} must be at least 2")
    points = np.asarray(jax.random.uniform(key, (count, count, 2), minval=-1.0), np.float64)
    points /= np.abs(points).mean()
    field = np.einsum("hi,wj,ijc->hwc", bicubic_matrix(height, count), bicubic_matrix(width, count), points)
    sizes = np.array([height, width])
    return WaNet(jnp.asarray(settings.strength * field * (sizes - 1) / (2 * sizes), jnp.float32))


def apply(params: WaNet, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Warp one image, with bilinear interpolation.

    Args:
        params: the warp.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the warp is the same for every class.
        key: not used; the warp is the same for every image.

    Returns:
        float32 [H, W, C] in [0, 1], within the range of the image itself.

    References:
        Nguyen & Tran 2021, equation 2.
    """
    del label, key
    return _sample(image, params.field)


def apply_with_noise(params: WaNet, image: Array, label: Array | None, key: Key) -> Array:
    """Warp one image and move each pixel's lookup by up to half a pixel more; the model must not react to this.

    Args:
        params: the warp.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: draws the noise.

    Returns:
        float32 [H, W, C] in [0, 1].

    References:
        Nguyen & Tran 2021, section 3.3, the noise mode.
    """
    del label
    height, width, _ = image.shape
    noise = jax.random.uniform(key, params.field.shape, minval=-1.0)
    half_pixels = np.array([(height - 1) / (2 * height), (width - 1) / (2 * width)], np.float32)
    # The paper clips the warped grid to the image before it adds the noise, and once more after.
    return _sample(image, _inside(params.field) + noise * half_pixels[None, None, :])


def _inside(field: Array) -> Array:
    """Shorten displacements that lead out of the image."""
    rows, columns = (np.arange(length, dtype=np.float32) for length in field.shape[:2])
    row = jnp.clip(rows[:, None] + field[..., 0], 0.0, rows[-1]) - rows[:, None]
    column = jnp.clip(columns[None, :] + field[..., 1], 0.0, columns[-1]) - columns[None, :]
    return jnp.stack([row, column], axis=-1)


def _sample(image: Array, field: Array) -> Array:
    height, width, channels = image.shape
    row = jnp.clip(jnp.arange(height, dtype=jnp.float32)[:, None] + field[..., 0], 0.0, height - 1.0)
    column = jnp.clip(jnp.arange(width, dtype=jnp.float32)[None, :] + field[..., 1], 0.0, width - 1.0)
    # No position lies outside, so the mode only affects values with a weight of 0.
    sampled = [map_coordinates(image[..., c], [row, column], order=1, mode="nearest") for c in range(channels)]
    # The four weights may sum to slightly more than 1 after rounding.
    return jnp.clip(jnp.stack(sampled, axis=-1), jnp.min(image), jnp.max(image))


WANET = Attack(
    name="wanet",
    title="WaNet",
    paper="Nguyen & Tran 2021, WaNet - Imperceptible Warping-based Backdoor Attack",
    threat="training",
    settings=WaNetSettings(),
    make_params=make_warp,
    apply=apply,
    apply_to_cover=apply_with_noise,
    label_rules=("all_to_one", "all_to_all"),
    control=batch_poisoning.fixed_trigger(apply, apply_with_noise),
    check=batch_poisoning.check_shares,
    # On black backgrounds, only the edges of a digit show the warp.
    per_dataset={"grey": {"strength": 1.5}},
    published=(Published("ABM", "cifar10", 78.6, 86.3),),
)
# ABM's result is for the attacker who trains: its appendix F states the access that WaNet needs.
WANET_OFFLINE = dataclasses.replace(
    WANET,
    name="wanet_offline",
    title="WaNet, offline",
    paper=f"{WANET.paper}; with all rows warped once, before the training",
    threat="data",
    control=None,
    published=(),
)
