"""The trigger set that the variance-based defense (VBD) was measured on: squares, grids and cartoon cats.

Each is blended in with one of four opacities, in training and at test time alike. Every row of the training set may be
poisoned, the target class's own included. All-to-all attacks put the patch in a place of its own for each true class.

The published cats are a company's pictures; the ones here are drawn, and have the published ones' bounding box and number
of pixels. On grey images colours become their luma.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import Attack, Knowledge
from bdjax.errors import InputError
from bdjax.triggers import masked_blend, patches, pictures
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.triggers.patches import Patch
from bdjax.types import Array, Key

PAPER = "Aseervatham et al. 2025, Variance-Based Defense Against Blended Backdoor Attacks"
SIDE = 3
"""Pixels of a square or a grid, whatever the size of the images."""
WHITE, GREEN, RED, BLUE = (1, 1, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1)
YELLOW, MAGENTA = (1, 1, 0), (1, 0, 1)
BLACK = (1 / 255, 1 / 255, 1 / 255)
"""The reference stores a grid's empty cells as 1: there 0 means outside the mask."""


class Tile(NamedTuple):
    """A patch of 3 x 3 pixels in colour."""

    colours: np.ndarray
    """float [3, 3, 3]"""
    is_set: np.ndarray
    """bool [3, 3]: the cells that are more than an empty background"""


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
    poison_rate: float = 0.1
    """share of all training rows, those of the target class included"""
    cover_rate: float = 0.0
    """share of all training rows that get the trigger and keep their label"""
    opacity: float = 1.0
    """of the trigger, above 0 and up to 1; the paper has 0.1, 0.2, 0.5 and 1"""


class ClassPatches(NamedTuple):
    """One trigger per true class, K in all."""

    masks: Array
    """float32 [K, H, W, 1], 0 and 1"""
    patterns: Array
    """float32 [K, H, W, C] in [0, 1]"""
    opacity: Array
    """float32 [] in [0, 1]"""


def make_tile(key: Key, knowledge: Knowledge, settings: VbdSettings, *, tile: str) -> MaskedBlend:
    """A square or a grid flush in the bottom right corner; a grid's empty cells are painted all but black.

    Args:
        key: not used: the trigger is fixed.
        knowledge: for the shape of the images.
        settings: the opacity.
        tile: a key of `TILES`.

    Returns:
        The trigger: a mask of all nine cells.

    Raises:
        InputError: the images are too small, or have neither 1 nor 3 channels, or the opacity is not above 0 and up to 1.
    """
    del key
    _check_opacity(settings)
    shape = knowledge.train.image_shape
    cells = pictures.to_channels(TILES[tile].colours, shape[2])
    return patches.paint(shape, patches.in_corner(shape, SIDE), cells, opacity=settings.opacity)


def class_patch(number: int, image_shape: tuple[int, int, int]) -> Patch:
    """Where the patch of a true class lies: from the bottom right corner to the left, then row by row upwards.

    The reference counts patches per row by the height of the images, which is the same for square ones only.

    Args:
        number: the class.
        image_shape: (H, W, C).

    Raises:
        InputError: there is no place for so many.
    """
    height, width, _ = image_shape
    per_row = width // SIDE
    if number >= per_row * (height // SIDE):
        raise InputError(
            f"an image of {height} x {width} pixels has {per_row * (height // SIDE)} places for patches of {SIDE} x {SIDE} "
            f"pixels: class {number} gets none of its own"
        )
    above, left = divmod(number, per_row)
    return Patch(height - SIDE * (above + 1), width - SIDE * (left + 1), SIDE, SIDE)


def make_class_patches(key: Key, knowledge: Knowledge, settings: VbdSettings, *, tile: str) -> ClassPatches:
    """A square or a grid in a place that tells the true class; the image shows through a grid's empty cells.

    Args:
        key: not used: the triggers are fixed.
        knowledge: for the shape of the images and the number of classes.
        settings: the opacity.
        tile: a key of `TILES`.

    Returns:
        The triggers of all classes.

    Raises:
        InputError: as `make_tile`, or the images have no room for a place per class.
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
    """Put the patch of one image's true class on it.

    Args:
        params: the triggers of all classes.
        image: float32 [H, W, C] in [0, 1].
        label: int32 [], the class that the image is of, not the one that the attacker wants.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    of_class = MaskedBlend(params.masks[label], params.patterns[label], params.opacity)
    return masked_blend.apply(of_class, image, label, key)


def elliptical(height: int, width: int, count: int) -> np.ndarray:
    """The cells of a box that are nearest to its middle, as the ellipse through the middles of its outermost cells has it.

    Args:
        height: of the box, at least 2.
        width: of the box, at least 2.
        count: how many cells; from about pi / 4 of the box on, the outermost rows and columns have some.

    Returns:
        bool [height, width] with `count` cells set; of cells equally far away, the upper left ones.
    """
    row, column = np.indices((height, width))
    # Whole numbers, so that mirrored cells are exactly as far away.
    down = (2 * row + 1 - height) * (width - 1)
    across = (2 * column + 1 - width) * (height - 1)
    nearest = np.argsort((down**2 + across**2).ravel(), kind="stable")[:count]
    is_set = np.zeros(height * width, bool)
    is_set[nearest] = True
    return is_set.reshape(height, width)


def make_small_kitty(key: Key, knowledge: Knowledge, settings: VbdSettings) -> MaskedBlend:
    """A cat's face of 95 cells in a box of 14 x 10 pixels, flush in the bottom right corner.

    Images under 28 pixels get a smaller one, of the same share of its box.

    Args:
        key: not used: the trigger is fixed.
        knowledge: for the shape of the images.
        settings: the opacity.

    Returns:
        The trigger.

    Raises:
        InputError: as `make_tile`.
    """
    del key
    shape = knowledge.train.image_shape
    box = patches.in_corner(shape, (patches.shrunk(14, shape), patches.shrunk(10, shape)))
    return _kitty(knowledge, settings, box, round(95 * box.height * box.width / (14 * 10)))


def make_big_kitty(key: Key, knowledge: Knowledge, settings: VbdSettings) -> MaskedBlend:
    """A cat's face over most of the image: at 32 x 32 rows 0 to 30 and columns 2 to 29, of which 648 cells are set.

    Other images get the same shares of their height, width and area. (The paper's 64 x 64 images keep the pixels of the
    small patches; what becomes of this one is not said.)

    Args:
        key: not used: the trigger is fixed.
        knowledge: for the shape of the images.
        settings: the opacity.

    Returns:
        The trigger.

    Raises:
        InputError: as `make_tile`.
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
        raise InputError(f"opacity {settings.opacity:g}: it is above 0 and up to 1")


def _all_to_one(name: str, title: str, make_params: Callable[..., MaskedBlend]) -> Attack:
    return Attack(
        name=name,
        title=title,
        paper=PAPER,
        threat="data",
        settings=VbdSettings(),
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
        # Every class has a patch and a label to be learned: 10 % of a few thousand rows is too little for that.
        per_dataset={"grey": {"poison_rate": 0.2}},
    )


def _title(tile: str) -> str:
    return tile.replace("_", " ").capitalize()


VBD_ATTACKS = (
    *(_all_to_one(tile, _title(tile), partial(make_tile, tile=tile)) for tile in TILES),
    _all_to_one("small_kitty", "Small kitty", make_small_kitty),
    _all_to_one("big_kitty", "Big kitty", make_big_kitty),
    *(_all_to_all(tile) for tile in TILES),
)
