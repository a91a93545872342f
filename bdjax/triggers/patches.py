"""Small opaque patches near the border of the image: given pixels in a given place; or one colour, a checkerboard or noise.

The last three are sampled as in the code released with TA-KD. For an image of H x W:

- each side of the patch is uniform in {3 .. floor(0.2 W)}, rows and columns independently;
- on each axis independently, the patch lies near the low or the high border, with probability 1/2 each:
  U{1 .. b-1} or U{W-s-b+1 .. W-s-1}, with b = max(2, floor(0.2 min(H, W))). The outermost pixels stay free.

Below 15 pixels, {3 .. floor(0.2 W)} is empty, so the side is always max(2, floor(0.2 W)): 2 on 8 x 8 digits.

That code seeds the global generator with 42 whenever it draws noise, so that all noise patches of one size are equal;
here every draw has its own key.

References:
    Heydari et al. 2025, section 4.2 (the trigger types, one random instance per provider).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Key, TriggerFamily

NUM_LEVELS = 64
"""Number of grey levels of a checkerboard: a/63 for a in 0..63."""

GRID_TILE = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)
"""The 3 x 3 tile of BadNets' grid and of the clean-label attack's corners: 4 white cells and 5 painted black."""

ImageShape = tuple[int, int, int]


class Patch(NamedTuple):
    """Place and size of a patch in pixels. Host integers: no compiled shape depends on them."""

    row: int
    column: int
    height: int
    width: int


def draw_patch(key: Key, image_shape: ImageShape, *, size: int | tuple[int, int] | None = None) -> Patch:
    """Draw the size and the place of a patch as described at the top of this file.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C), H and W at least 4.
        size: a fixed (height, width), or one number for both; by default drawn at random.

    Returns:
        A patch with 1 <= row and row + height <= H - 1, and the same for columns.

    Raises:
        InputError: the image has no room for the patch inside the one-pixel margin.
    """
    height, width, _ = image_shape
    size_key, place_key = jax.random.split(key)
    if min(height, width) < 4:
        raise InputError(f"image shape {tuple(image_shape)}: a patch with a margin needs at least 4 x 4 pixels")
    if size is None:
        row_key, column_key = jax.random.split(size_key)
        size = (_draw_side(row_key, height), _draw_side(column_key, width))
    elif isinstance(size, int):
        size = (size, size)
    if not (1 <= size[0] <= height - 2 and 1 <= size[1] <= width - 2):
        raise InputError(
            f"patch size {tuple(size)}: an image of {height} x {width} pixels has room for 1 to {height - 2} rows "
            f"and 1 to {width - 2} columns inside the one-pixel margin"
        )
    band = max(2, min(height, width) // 5)
    row_key, column_key = jax.random.split(place_key)
    return Patch(
        row=_draw_offset(row_key, height, size[0], band),
        column=_draw_offset(column_key, width, size[1], band),
        height=size[0],
        width=size[1],
    )


def draw_colour(key: Key, channels: int, *, minimum_contrast: float = 0.0) -> np.ndarray:
    """Draw a solid patch's colour: each channel uniform in (minimum_contrast, 1).

    Args:
        key: a key of `jax.random.key`.
        channels: the number of channels of the image.
        minimum_contrast: the least brightness of a channel, in [0, 1]; at 0, as published, a patch on dark images can be
          nearly invisible.

    Returns:
        float32 [channels].
    """
    _check_contrast(minimum_contrast)
    return np.asarray(jax.random.uniform(key, (channels,), minval=minimum_contrast, maxval=1.0))


def draw_levels(key: Key, *, minimum_contrast: float = 0.0) -> np.ndarray:
    """Draw a checkerboard's two greys, uniformly among the ordered pairs (a/63, b/63) that differ enough.

    Args:
        key: a key of `jax.random.key`.
        minimum_contrast: the least difference of the two, in [0, 1]; at 0, as published, any two distinct levels.

    Returns:
        float32 [2]; the first is the grey of the patch's top left cell.
    """
    _check_contrast(minimum_contrast)
    return _choose_levels(key, _grey_pairs(), minimum_contrast)


def in_corner(
    image_shape: ImageShape, size: int | tuple[int, int], margin: int = 0, *, top: bool = False, left: bool = False
) -> Patch:
    """Place a patch in a corner of the image, by default the bottom right one.

    Args:
        image_shape: (H, W, C).
        size: (height, width), or one number for both, in pixels.
        margin: pixels between the patch and the two borders.
        top: at the top border instead of the bottom.
        left: at the left border instead of the right.

    Returns:
        The place.

    Raises:
        InputError: the image is too small.
    """
    height, width = (size, size) if isinstance(size, int) else size
    last_row, last_column = image_shape[0] - height - margin, image_shape[1] - width - margin
    if min(height, width) < 1 or margin < 0 or min(last_row, last_column) < 0:
        raise InputError(
            f"a patch of {height} x {width} pixels with a margin of {margin} does not fit into an image of "
            f"{image_shape[0]} x {image_shape[1]} pixels"
        )
    return Patch(margin if top else last_row, margin if left else last_column, height, width)


def shrunk(pixels: int, image_shape: ImageShape) -> int:
    """Scale a length for images of 28 pixels and more down to smaller images, rounded up.

    Args:
        pixels: the length.
        image_shape: (H, W, C); the shorter side is used.
    """
    return math.ceil(pixels * min(1.0, min(image_shape[:2]) / 28) - 1e-9)


def paint(
    image_shape: ImageShape, patch: Patch, cells: np.ndarray, *, is_set: np.ndarray | None = None, opacity: float = 1.0
) -> MaskedBlend:
    """Make a trigger from given pixels in a given place.

    Args:
        image_shape: (H, W, C).
        patch: the place, inside the image.
        cells: float in [0, 1], the patch's pixels, [h, w, C] or broadcastable to it.
        is_set: bool [h, w], the cells that are painted, by default all; the image shows through the others.
        opacity: opacity of the painted cells, in [0, 1].

    Returns:
        The trigger; its mask is 0 or 1.
    """
    inside = np.s_[patch.row : patch.row + patch.height, patch.column : patch.column + patch.width]
    mask = np.zeros((*image_shape[:2], 1), np.float32)
    pattern = np.zeros(image_shape, np.float32)
    mask[inside] = 1.0 if is_set is None else is_set[..., None]
    pattern[inside] = cells
    return MaskedBlend(jnp.asarray(mask), jnp.asarray(pattern), jnp.float32(opacity))


def overlay(triggers: Sequence[MaskedBlend]) -> MaskedBlend:
    """Combine opaque triggers into one; where they overlap, the last is visible.

    Args:
        triggers: with masks of 0 and 1 and opacity 1, as from `paint`.

    Returns:
        One trigger with the effect of applying them in order.
    """
    mask, pattern, opacity = triggers[0]
    for upper in triggers[1:]:
        mask = jnp.maximum(mask, upper.mask)
        pattern = masked_blend.apply(upper, pattern)
    return MaskedBlend(mask, pattern, opacity)


def paint_solid(image_shape: ImageShape, patch: Patch, colour: np.ndarray) -> MaskedBlend:
    """Make a trigger from a patch of one colour, float32 [C]."""
    cells = np.broadcast_to(colour, (patch.height, patch.width, image_shape[2]))
    return paint(image_shape, patch, cells)


def paint_checkerboard(image_shape: ImageShape, patch: Patch, levels: np.ndarray) -> MaskedBlend:
    """Make a trigger from a patch whose cell (i, j) is `levels[(i + j) mod 2]`, float32 [2], in every channel."""
    rows, columns = np.indices((patch.height, patch.width))
    cells = np.broadcast_to(levels[(rows + columns) % 2][..., None], (patch.height, patch.width, image_shape[2]))
    return paint(image_shape, patch, cells)


def init_solid(
    key: Key, image_shape: ImageShape, *, size: int | tuple[int, int] | None = None, minimum_contrast: float = 0.0
) -> MaskedBlend:
    """Draw a patch of one colour.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C).
        size: see `draw_patch`.
        minimum_contrast: see `draw_colour`.

    Returns:
        The trigger.

    References:
        Heydari et al. 2025, section 4.2, "SOLID".
    """
    patch_key, colour_key = jax.random.split(key)
    colour = draw_colour(colour_key, image_shape[2], minimum_contrast=minimum_contrast)
    return paint_solid(image_shape, draw_patch(patch_key, image_shape, size=size), colour)


def init_checkerboard(
    key: Key, image_shape: ImageShape, *, size: int | tuple[int, int] | None = None, minimum_contrast: float = 0.0
) -> MaskedBlend:
    """Draw a patch of two alternating greys, one pixel per cell.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C).
        size: see `draw_patch`.
        minimum_contrast: see `draw_levels`.

    Returns:
        The trigger.

    References:
        Heydari et al. 2025, section 4.2, "Checkerboard".
    """
    patch_key, level_key = jax.random.split(key)
    levels = draw_levels(level_key, minimum_contrast=minimum_contrast)
    return paint_checkerboard(image_shape, draw_patch(patch_key, image_shape, size=size), levels)


def init_noise(key: Key, image_shape: ImageShape, *, size: int | tuple[int, int] | None = None) -> MaskedBlend:
    """Draw a patch of noise, uniform in (0.2, 1) for each pixel and channel, drawn once and then fixed.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C).
        size: see `draw_patch`.

    Returns:
        The trigger.

    References:
        Heydari et al. 2025, section 4.2, "Noise".
    """
    patch_key, noise_key = jax.random.split(key)
    patch = draw_patch(patch_key, image_shape, size=size)
    cells = jax.random.uniform(noise_key, (patch.height, patch.width, image_shape[2]), minval=0.2, maxval=1.0)
    return paint(image_shape, patch, np.asarray(cells))


SOLID = TriggerFamily(init_solid, masked_blend.apply)
CHECKERBOARD = TriggerFamily(init_checkerboard, masked_blend.apply)
NOISE = TriggerFamily(init_noise, masked_blend.apply)


def perturb_patch(key: Key, patch: Patch, image_shape: ImageShape, similarity: float) -> Patch:
    """Draw a patch that is similar to another one in size and place.

    With r the similarity, a side s becomes floor(r s + (1 - r) s_random); a place moves by (1 - r) times a whole number
    uniform in -(s_new + s) .. (s_new + s), rounded away from zero, and is clipped so that the outermost pixels stay free, as
    for the other patch. The code released with TA-KD clips it to the image, 0 .. W - s_new: there a look-alike can touch the
    border.

    Args:
        key: a key of `jax.random.key`.
        patch: the other patch.
        image_shape: (H, W, C).
        similarity: r in [0, 1]; 1 returns the same patch.

    Returns:
        A patch inside the margin.
    """
    row_key, column_key = jax.random.split(key)
    row, height = _perturb_axis(row_key, patch.row, patch.height, image_shape[0], similarity)
    column, width = _perturb_axis(column_key, patch.column, patch.width, image_shape[1], similarity)
    return Patch(row, column, height, width)


def draw_similar_patches(
    key: Key,
    family: str,
    image_shape: ImageShape,
    count: int,
    *,
    similarity: float = 0.75,
    minimum_contrast: float = 0.0,
) -> list[MaskedBlend]:
    """Draw one patch and copies that resemble it, for providers whose triggers are similar by chance or design.

    Size and place of a copy follow `perturb_patch`; its colours are r c + (1 - r) c_random. A checkerboard's random greys are
    drawn among those that give the copy two different greys, at least `minimum_contrast` apart.

    Args:
        key: a key of `jax.random.key`.
        family: "solid" or "checkerboard".
        image_shape: (H, W, C).
        count: number of triggers in all; the others resemble the first.
        similarity: r in [0, 1].
        minimum_contrast: see `draw_colour` and `draw_levels`; it applies to the copies too.

    Returns:
        `count` triggers.

    References:
        Heydari et al. 2025, section 4.2: three of CIFAR-10's seven triggers are about 75 % similar. The
        formulas are those of the released code.
    """
    if not 0.0 <= similarity <= 1.0:
        raise InputError(f"similarity {similarity:g} must be from 0 (unrelated) to 1 (equal)")
    if family not in ("solid", "checkerboard"):
        raise InputError(f'similar triggers of type "{family}": the type must be solid or checkerboard')
    base_key, *copy_keys = jax.random.split(key, count)
    place_key, colour_key = jax.random.split(base_key)
    base = draw_patch(place_key, image_shape)
    if family == "solid":
        paint, colours = paint_solid, draw_colour(colour_key, image_shape[2], minimum_contrast=minimum_contrast)
    else:
        paint, colours = paint_checkerboard, draw_levels(colour_key, minimum_contrast=minimum_contrast)
    triggers = [paint(image_shape, base, colours)]
    for copy_key in copy_keys:
        place_key, colour_key = jax.random.split(copy_key)
        patch = perturb_patch(place_key, base, image_shape, similarity)
        if family == "solid":
            random_colour = draw_colour(colour_key, image_shape[2], minimum_contrast=minimum_contrast)
            copied = similarity * colours + (1.0 - similarity) * random_colour
        else:
            mixtures = similarity * colours + (1.0 - similarity) * _grey_pairs()
            copied = _choose_levels(colour_key, mixtures, minimum_contrast)
        triggers.append(paint(image_shape, patch, copied))
    return triggers


def _draw_integer(key: Key, low: int, high: int) -> int:
    """Draw uniformly from {low .. high}, both ends included."""
    return int(jax.random.randint(key, (), low, high + 1))


def _draw_side(key: Key, side: int) -> int:
    high = max(2, side // 5)
    return _draw_integer(key, min(3, high), high)


def _draw_offset(key: Key, side: int, size: int, band: int) -> int:
    """Draw where the patch starts on one axis; a `size` above the usual range narrows the two ranges to what fits."""
    border_key, offset_key = jax.random.split(key)
    last = side - size - 1
    if bool(jax.random.bernoulli(border_key)):
        return _draw_integer(offset_key, 1, min(band - 1, last))
    return _draw_integer(offset_key, max(1, side - size - band + 1), last)


def _perturb_axis(key: Key, offset: int, size: int, side: int, similarity: float) -> tuple[int, int]:
    size_key, drift_key = jax.random.split(key)
    # In floating point, products such as 0.3 * 10 may be slightly off a whole number; 1e-9 corrects for that.
    new_size = math.floor(similarity * size + (1.0 - similarity) * _draw_side(size_key, side) + 1e-9)
    step = _draw_integer(drift_key, -(new_size + size), new_size + size)
    drift = math.ceil((1.0 - similarity) * abs(step) - 1e-9) * (1 if step > 0 else -1)
    return min(max(offset + drift, 1), side - new_size - 1), new_size


def _grey_pairs() -> np.ndarray:
    """List all ordered pairs of distinct grey levels, float32 [64 * 63, 2]."""
    first, second = np.indices((NUM_LEVELS, NUM_LEVELS)).reshape(2, -1)
    pairs = np.stack([first, second], axis=-1)[first != second]
    return (pairs / (NUM_LEVELS - 1)).astype(np.float32)


def _choose_levels(key: Key, pairs: np.ndarray, minimum_contrast: float) -> np.ndarray:
    """Choose uniformly among the pairs that differ enough, without rejection sampling."""
    # Tolerance for levels that should be equal, or exactly `minimum_contrast` apart, in float32.
    rounding = 1e-6
    allowed = pairs[np.abs(pairs[:, 0] - pairs[:, 1]) >= max(minimum_contrast - rounding, rounding)]
    return allowed[_draw_integer(key, 0, len(allowed) - 1)]


def _check_contrast(minimum_contrast: float) -> None:
    if not 0.0 <= minimum_contrast <= 1.0:
        raise InputError(f"minimum contrast {minimum_contrast:g} must be from 0 to 1")
