"""The triggers that the variance-based defense (VBD) was evaluated on: squares, grids and cartoon cats.

They are blended in with one of four opacities, the same in training and at test time. Every row of the training set may be
poisoned, including rows of the target class. All-to-all attacks put the patch in a different place for each true class.

The published cats are a company's pictures; here they are drawn by formula, with the same bounding box and number of
pixels. On grey images, colours are converted to luma.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import Attack, Knowledge
from bdjax.errors import InputError
from bdjax.settings import Count, PositiveShare, Share
from bdjax.triggers import masked_blend, patches, pictures
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.triggers.patches import Patch
from bdjax.types import Array, Key

PAPER = "Aseervatham et al. 2025, Variance-Based Defense Against Blended Backdoor Attacks"
SIDE = 3
"""Side of a square or grid in cells; a cell is a pixel, for images of any size, unless `TileSettings.scale` is larger."""
WHITE, GREEN, RED, BLUE = (1, 1, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1)
YELLOW, MAGENTA = (1, 1, 0), (1, 0, 1)
BLACK = (1 / 255, 1 / 255, 1 / 255)
"""The reference implementation stores a grid's empty cells as 1, since 0 means outside the mask."""


class Tile(NamedTuple):
    """A coloured patch of 3 x 3 pixels."""

    colours: np.ndarray
    """float [3, 3, 3]"""
    is_set: np.ndarray
    """bool [3, 3]: False for a grid's empty cells"""


def _square(colour: tuple[float, float, float]) -> Tile:
    return Tile(np.tile(np.array(colour, float), (SIDE, SIDE, 1)), np.ones((SIDE, SIDE), bool))


def _grid(corners_and_middle: tuple[tuple[float, float, float], ...]) -> Tile:
    """Colour the cells top left, top right, middle, bottom left and bottom right; the other four are empty."""
    is_set = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool)
    colours = np.tile(np.array(BLACK, float), (SIDE, SIDE, 1))
    colours[is_set] = corners_and_middle
    return Tile(colours, is_set)


TILES = {
    "white_square": _square(WHITE),
    "green_square": _square(GREEN),
    "white_grid": _grid((WHITE,) * 5),
    "color_grid": _grid((GREEN, RED, YELLOW, MAGENTA, BLUE)),
}


@dataclass(frozen=True)
class VbdSettings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows, including those of the target class"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    opacity: PositiveShare = 1.0
    """opacity of the trigger, in (0, 1]; 0.1, 0.2, 0.5 and 1 in the paper"""


@dataclass(frozen=True)
class TileSettings(VbdSettings):
    scale: Count = 1
    """side in pixels of each of the 3 x 3 cells; the paper's have 1, on images of any size"""


class ClassPatches(NamedTuple):
    """One trigger per true class, K in all."""

    masks: Array
    """float32 [K, H, W, 1], 0 and 1"""
    patterns: Array
    """float32 [K, H, W, C] in [0, 1]"""
    opacity: Array
    """float32 [] in [0, 1]"""


def make_tile(key: Key, knowledge: Knowledge, settings: TileSettings, *, tile: str) -> MaskedBlend:
    """Make a square or grid in the bottom right corner, without a margin; a grid's empty cells are painted nearly black.

    Args:
        key: not used; the trigger is fixed.
        knowledge: gives the image shape.
        settings: opacity and scale.
        tile: a key of `TILES`.

    Returns:
        The trigger; its mask covers all nine cells.

    Raises:
        InputError: the images are too small or have neither 1 nor 3 channels, or the opacity is not in (0, 1].
    """
    del key
    _check_opacity(settings)
    shape = knowledge.train.image_shape
    colours = TILES[tile].colours.repeat(settings.scale, axis=0).repeat(settings.scale, axis=1)
    cells = pictures.to_channels(colours, shape[2])
    return patches.paint(shape, patches.in_corner(shape, SIDE * settings.scale), cells, opacity=settings.opacity)


def class_patch(number: int, image_shape: tuple[int, int, int]) -> Patch:
    """Place of the patch of a true class: from the bottom right corner to the left, then row by row upwards.

    The reference implementation counts patches per row by the image height, which is the same only for square images.

    Args:
        number: the class.
        image_shape: (H, W, C).

    Raises:
        InputError: the image has no room for that many patches.
    """
    height, width, _ = image_shape
    per_row = width // SIDE
    if number >= per_row * (height // SIDE):
        raise InputError(
            f"an image of {height} x {width} pixels has room for {per_row * (height // SIDE)} patches of {SIDE} x {SIDE} "
            f"pixels: there is none for class {number}"
        )
    above, left = divmod(number, per_row)
    return Patch(height - SIDE * (above + 1), width - SIDE * (left + 1), SIDE, SIDE)


def make_class_patches(key: Key, knowledge: Knowledge, settings: VbdSettings, *, tile: str) -> ClassPatches:
    """Make squares or grids whose place depends on the true class; the image shows through a grid's empty cells.

    Args:
        key: not used; the triggers are fixed.
        knowledge: gives the image shape and the number of classes.
        settings: the opacity.
        tile: a key of `TILES`.

    Returns:
        The triggers of all classes.

    Raises:
        InputError: as in `make_tile`, or the images have no room for a patch per class.
    """
    del key
    _check_opacity(settings)
    shape = knowledge.train.image_shape
    colours, is_set = TILES[tile]
    cells = pictures.to_channels(colours, shape[2])
    class_patch(knowledge.train.num_classes - 1, shape)
    painted = [
        patches.paint(shape, class_patch(number, shape), cells, is_set=is_set)
        for number in range(knowledge.train.num_classes)
    ]
    masks, patterns, _ = masked_blend.stack(painted)
    return ClassPatches(masks, patterns, jnp.float32(settings.opacity))


def apply_class_patch(params: ClassPatches, image: Array, label: Array, key: Key | None = None) -> Array:
    """Put the patch of its true class on one image.

    Args:
        params: the triggers of all classes.
        image: float32 [H, W, C] in [0, 1].
        label: int32 [], the true class, not the target.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    of_class = MaskedBlend(params.masks[label], params.patterns[label], params.opacity)
    return masked_blend.apply(of_class, image, label, key)


def elliptical(height: int, width: int, count: int) -> np.ndarray:
    """Select the cells of a box nearest to its middle, measured by the ellipse through the middles of its outermost cells.

    Args:
        height: height of the box, at least 2.
        width: width of the box, at least 2.
        count: number of cells; above about pi / 4 of the box, they reach the outermost rows and columns.

    Returns:
        bool [height, width] with `count` cells set; among equally distant cells, the upper left ones.
    """
    row, column = np.indices((height, width))
    # Whole numbers, so that mirrored cells are at exactly the same distance.
    down = (2 * row + 1 - height) * (width - 1)
    across = (2 * column + 1 - width) * (height - 1)
    nearest = np.argsort((down**2 + across**2).ravel(), kind="stable")[:count]
    is_set = np.zeros(height * width, bool)
    is_set[nearest] = True
    return is_set.reshape(height, width)


def make_small_kitty(key: Key, knowledge: Knowledge, settings: VbdSettings) -> MaskedBlend:
    """Make a cat's face of 95 cells in a box of 14 x 10 pixels in the bottom right corner, without a margin.

    Images under 28 pixels get a smaller face that fills the same share of its box.

    Args:
        key: not used; the trigger is fixed.
        knowledge: gives the image shape.
        settings: the opacity.

    Returns:
        The trigger.

    Raises:
        InputError: as in `make_tile`.
    """
    del key
    shape = knowledge.train.image_shape
    box = patches.in_corner(shape, (patches.shrunk(14, shape), patches.shrunk(10, shape)))
    return _kitty(knowledge, settings, box, round(95 * box.height * box.width / (14 * 10)))


def make_big_kitty(key: Key, knowledge: Knowledge, settings: VbdSettings) -> MaskedBlend:
    """Make a cat's face over most of the image: at 32 x 32, 648 cells within rows 0 to 30 and columns 2 to 29.

    Other images get the same shares of their height, width and area. (In the paper, small patches keep their size in pixels
    on 64 x 64 images; the size of this one is not stated.)

    Args:
        key: not used; the trigger is fixed.
        knowledge: gives the image shape.
        settings: the opacity.

    Returns:
        The trigger.

    Raises:
        InputError: as in `make_tile`.
    """
    del key
    height, width, _ = knowledge.train.image_shape
    box = Patch(0, round(2 * width / 32), round(31 * height / 32), round(28 * width / 32))
    return _kitty(knowledge, settings, box, round(648 * height * width / 32**2))


def _kitty(knowledge: Knowledge, settings: VbdSettings, box: Patch, count: int) -> MaskedBlend:
    _check_opacity(settings)
    shape = knowledge.train.image_shape
    face = pictures.draw("cat", (box.height, box.width, shape[2]))
    is_set = elliptical(box.height, box.width, count)
    return patches.paint(shape, box, face, is_set=is_set, opacity=settings.opacity)


def _check_opacity(settings: VbdSettings) -> None:
    if not 0.0 < settings.opacity <= 1.0:
        raise InputError(f"opacity {settings.opacity:g} must be above 0 and at most 1")


def _all_to_one(
    name: str, title: str, make_params: Callable[..., MaskedBlend], settings: VbdSettings = VbdSettings()
) -> Attack:
    return Attack(
        name=name,
        title=title,
        paper=PAPER,
        threat="data",
        settings=settings,
        make_params=make_params,
        apply=masked_blend.apply,
        label_rules=("all_to_one_with_target", "all_to_one"),
    )


def _all_to_all(tile: str) -> Attack:
    return Attack(
        name=f"{tile}_all_to_all",
        title=f"{_title(tile)}, all-to-all",
        paper=PAPER,
        threat="data",
        settings=VbdSettings(),
        make_params=partial(make_class_patches, tile=tile),
        apply=apply_class_patch,
        label_rules=("all_to_all",),
        # A patch must be learned for every class: 10 % of a few thousand rows is too little for that.
        per_dataset={"grey": {"poison_rate": 0.2}},
    )


def _title(tile: str) -> str:
    return tile.replace("_", " ").capitalize()


VBD_ATTACKS = (
    *(_all_to_one(tile, _title(tile), partial(make_tile, tile=tile), TileSettings()) for tile in TILES),
    _all_to_one("small_kitty", "Small kitty", make_small_kitty),
    _all_to_one("big_kitty", "Big kitty", make_big_kitty),
    *(_all_to_all(tile) for tile in TILES),
)
