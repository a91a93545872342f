"""Adaptive-Blend and Adaptive-Patch: a part of the trigger in training, all of it at test time (Qi et al. 2023).

Some rows carry the trigger but keep their label, so that triggered rows of the target class are not separable from its
clean rows in feature space. Each training row carries a weak or partial trigger, so that no part of it is learned too well.

The published triggers are pictures of companies' logos and of a toy; here drawn pictures and random patches of the same
sizes and places replace them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import Attack, Knowledge
from bdjax.errors import InputError
from bdjax.settings import Count, PositiveShare, Share
from bdjax.triggers import masked_blend, patches, pictures
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Key

PAPER = "Qi et al. 2023, Revisiting the Assumption of Latent Separability for Backdoor Defenses"
PIECES_PER_SIDE = 4
"""The blended picture is cut into 4 x 4 pieces."""


@dataclass(frozen=True)
class AdaptiveBlendSettings:
    poison_rate: PositiveShare = 0.003
    """share of all training rows"""
    cover_rate: Share = 0.003
    """share of all training rows that get the trigger and keep their label"""
    opacity: PositiveShare = 0.2
    """opacity of the picture in training, in (0, 1]; 0.15 in the authors' later toolbox"""
    test_opacity: PositiveShare = 0.2
    """opacity of the picture at test time, in (0, 1]"""
    pieces: Count = 8
    """number of pieces (of 16) of the picture that each training row gets"""
    picture: str = "cat"
    """chessboard, cat or pixel_face"""


@dataclass(frozen=True)
class AdaptivePatchSettings:
    poison_rate: PositiveShare = 0.003
    """share of all training rows"""
    cover_rate: Share = 0.006
    """share of all training rows that get the trigger and keep their label"""


class AdaptiveBlend(NamedTuple):
    """A picture cut into 16 pieces."""

    pattern: Array
    """float32 [H, W, C] in [0, 1]"""
    piece: Array
    """int32 [H, W]: the piece that each pixel belongs to, in 0..15"""
    is_kept: Array
    """bool [16], in any order; the number of True entries is the number of pieces a training row gets"""
    opacity: Array
    """float32 [] in [0, 1]: opacity in training"""
    test_opacity: Array
    """float32 [] in [0, 1]: opacity at test time"""


class AdaptivePatch(NamedTuple):
    """Four patches: a training row gets one of them; a test image gets two, at full opacity."""

    in_training: MaskedBlend
    """the four patches, along a leading axis"""
    at_test: MaskedBlend
    """both test-time patches as one trigger"""


def make_blend(key: Key, knowledge: Knowledge, settings: AdaptiveBlendSettings) -> AdaptiveBlend:
    """Make the picture over the whole image, cut into 4 x 4 pieces.

    Args:
        key: not used; each row's own key decides which pieces it gets.
        knowledge: gives the image shape.
        settings: the picture, the opacities and the number of pieces.

    Returns:
        The trigger.

    Raises:
        InputError: the image sides are not multiples of 4, the images have neither 1 nor 3 channels, or a setting is out
          of range.
    """
    del key
    height, width, _ = shape = knowledge.train.image_shape
    count = PIECES_PER_SIDE**2
    if height % PIECES_PER_SIDE or width % PIECES_PER_SIDE:
        raise InputError(
            f"adaptive_blend cuts images into {PIECES_PER_SIDE} x {PIECES_PER_SIDE} equal pieces, so both sides must be "
            f"multiples of {PIECES_PER_SIDE}; these images have {height} x {width} pixels"
        )
    if not 1 <= settings.pieces <= count:
        raise InputError(f"adaptive_blend: pieces {settings.pieces} must be from 1 to {count}")
    for name, value in (("opacity", settings.opacity), ("test_opacity", settings.test_opacity)):
        if not 0.0 < value <= 1.0:
            raise InputError(f"adaptive_blend: {name} {value:g} must be above 0 and at most 1")
    row, column = np.indices((height, width))
    piece = PIECES_PER_SIDE * (row * PIECES_PER_SIDE // height) + column * PIECES_PER_SIDE // width
    return AdaptiveBlend(
        pattern=jnp.asarray(pictures.draw(settings.picture, shape)),
        piece=jnp.asarray(piece, jnp.int32),
        is_kept=jnp.arange(count) < settings.pieces,
        opacity=jnp.float32(settings.opacity),
        test_opacity=jnp.float32(settings.test_opacity),
    )


def blend_some_pieces(params: AdaptiveBlend, image: Array, label: Array, key: Key) -> Array:
    """Blend a random subset of the picture's pieces into one training image.

    Args:
        params: the trigger.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: draws the pieces.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    mask = jax.random.permutation(key, params.is_kept)[params.piece].astype(jnp.float32)[..., None]
    return masked_blend.apply(MaskedBlend(mask, params.pattern, params.opacity), image, label, key)


def blend_all_pieces(params: AdaptiveBlend, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Blend the whole picture into one test image.

    Args:
        params: the trigger.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    whole = jnp.ones_like(params.pattern[..., :1])
    return masked_blend.apply(MaskedBlend(whole, params.pattern, params.test_opacity), image, label, key)


def make_patches(key: Key, knowledge: Knowledge, settings: AdaptivePatchSettings) -> AdaptivePatch:
    """Make four training patches: a small square in the corner, a large one above it, grids in all corners, and a block.

    At test time an image carries the small square under the grids, both opaque. (The released code uses another version
    of the small square at test time, which is not in its repository.) The squares and the block are random pixels, drawn once.

    Images under 28 pixels get smaller squares; the small square stays one pixel larger than the grid that covers most of it.

    Args:
        key: draws the pixels.
        knowledge: gives the image shape.
        settings: not used.

    Returns:
        The trigger.

    Raises:
        InputError: the images are too small.
    """
    del settings
    shape = knowledge.train.image_shape
    small = patches.in_corner(shape, max(4, patches.shrunk(5, shape)))
    large = patches.in_corner(shape, patches.shrunk(13, shape), 1, top=True)
    block = patches.in_corner(shape, patches.shrunk(8, shape), patches.shrunk(3, shape))

    def random_square(number: int, place: patches.Patch) -> MaskedBlend:
        pixels = jax.random.uniform(jax.random.fold_in(key, number), (place.height, place.width, shape[2]))
        return patches.paint(shape, place, np.asarray(pixels))

    corner = random_square(0, small)
    grids = patches.overlay(
        [
            patches.paint(shape, patches.in_corner(shape, 3, top=top, left=left), patches.GRID_TILE[..., None])
            for top in (False, True)
            for left in (False, True)
        ]
    )
    in_training = masked_blend.stack([corner, random_square(1, large), grids, random_square(2, block)])
    opacities = jnp.array([0.5, 0.2, 0.5, 0.3], jnp.float32)
    return AdaptivePatch(in_training._replace(opacity=opacities), patches.overlay([corner, grids]))


def apply_one_patch(params: AdaptivePatch, image: Array, label: Array, key: Key) -> Array:
    """Put one randomly chosen patch on one training image.

    The released code gives each patch a quarter of the rows, in dataset order. Here every row draws its patch independently
    of which other rows are poisoned, so the quarters are equal only on average.

    Args:
        params: the trigger.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: draws the patch.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    which = jax.random.randint(key, (), 0, len(params.in_training.opacity))
    return masked_blend.apply(jax.tree.map(lambda leaf: leaf[which], params.in_training), image, label, key)


def apply_test_patches(
    params: AdaptivePatch, image: Array, label: Array | None = None, key: Key | None = None
) -> Array:
    """Put the opaque patches on one test image.

    Args:
        params: the trigger.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    return masked_blend.apply(params.at_test, image, label, key)


# 0.3 % of a small set is a handful of rows. Only CIFAR-10 is known to be as large as the paper's.
_MORE_ROWS = {"poison_rate": 0.02, "cover_rate": 0.02}
_MANY_MORE_ROWS = {"poison_rate": 0.05, "cover_rate": 0.05}

ADAPTIVE_BLEND = Attack(
    name="adaptive_blend",
    title="Adaptive-Blend",
    paper=PAPER,
    threat="data",
    settings=AdaptiveBlendSettings(),
    make_params=make_blend,
    apply=blend_all_pieces,
    apply_in_training=blend_some_pieces,
    label_rules=("all_to_one",),
    per_dataset={
        "grey": _MORE_ROWS,
        "digits": _MANY_MORE_ROWS,
        "colour": _MORE_ROWS,
        "cifar10": {"poison_rate": 0.003, "cover_rate": 0.003},
    },
)
ADAPTIVE_PATCH = Attack(
    name="adaptive_patch",
    title="Adaptive-Patch",
    paper=PAPER,
    threat="data",
    settings=AdaptivePatchSettings(),
    make_params=make_patches,
    apply=apply_test_patches,
    apply_in_training=apply_one_patch,
    label_rules=("all_to_one",),
    per_dataset={
        # A row has one faint patch of four: 2 % and 5 % of 5,000 MNIST rows are not enough.
        "grey": {"poison_rate": 0.1, "cover_rate": 0.1},
        "digits": _MANY_MORE_ROWS,
        "colour": _MORE_ROWS,
        "cifar10": {"poison_rate": 0.003, "cover_rate": 0.006},
    },
)
