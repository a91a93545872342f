"""The triggers of TA-KD's providers, each as a separate attack on a whole training set (Heydari et al. 2025).

The paper poisons 1 % of each provider's rows. In a set of a few thousand rows that is too few to be learned reliably, so
small sets get 10 %. The published sampling can draw a nearly invisible patch, say dark grey on black: `minimum_contrast`
excludes those.
"""

from dataclasses import dataclass

from bdjax.attacks.contract import Attack, Knowledge
from bdjax.settings import PositiveShare, Share
from bdjax.triggers import TRIGGERS, masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Key

PAPER = "Heydari et al. 2025, section 4.2 (TA-KD)"


@dataclass(frozen=True)
class NoiseSettings:
    poison_rate: PositiveShare = 0.01
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""


@dataclass(frozen=True)
class ContrastSettings:
    poison_rate: PositiveShare = 0.01
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    minimum_contrast: Share = 0.0
    """least brightness of a solid patch, or least difference of a checkerboard's two greys, in [0, 1]; 0 as published"""


@dataclass(frozen=True)
class BlendSettings:
    poison_rate: PositiveShare = 0.01
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    picture: str = ""
    """chessboard, cat or pixel_face; empty to draw one at random"""
    least_opacity: Share = 0.15
    """smallest opacity of the picture, in [0, 1]; the opacity is drawn uniformly"""
    most_opacity: Share = 0.2
    """largest opacity of the picture, in [0, 1]"""


def make_solid(key: Key, knowledge: Knowledge, settings: ContrastSettings) -> MaskedBlend:
    """Draw a patch of one colour, with random size, place and colour.

    Args:
        key: for all random choices.
        knowledge: gives the image shape.
        settings: the minimum contrast.

    Returns:
        The trigger.

    Raises:
        InputError: the images are too small, or the contrast is not in [0, 1].
    """
    return TRIGGERS["solid"].init(key, knowledge.train.image_shape, minimum_contrast=settings.minimum_contrast)


def make_checkerboard(key: Key, knowledge: Knowledge, settings: ContrastSettings) -> MaskedBlend:
    """Draw a patch of two alternating greys, with random size, place and greys.

    Args:
        key: for all random choices.
        knowledge: gives the image shape.
        settings: the minimum contrast.

    Returns:
        The trigger.

    Raises:
        InputError: the images are too small, or the contrast is not in [0, 1].
    """
    return TRIGGERS["checkerboard"].init(key, knowledge.train.image_shape, minimum_contrast=settings.minimum_contrast)


def make_noise(key: Key, knowledge: Knowledge, settings: NoiseSettings) -> MaskedBlend:
    """Draw a patch of noise, the same on every image, with random size and place.

    Args:
        key: for all random choices.
        knowledge: gives the image shape.
        settings: not used.

    Returns:
        The trigger.

    Raises:
        InputError: the images are too small.
    """
    del settings
    return TRIGGERS["noise"].init(key, knowledge.train.image_shape)


def make_blend(key: Key, knowledge: Knowledge, settings: BlendSettings) -> MaskedBlend:
    """Draw the opacity of a picture blended into the whole image, and the picture unless it is named.

    Args:
        key: for all random choices.
        knowledge: gives the image shape.
        settings: the picture and the range of opacities.

    Returns:
        The trigger.

    Raises:
        InputError: there is no such picture, the range is invalid, or the images have neither 1 nor 3 channels.
    """
    return TRIGGERS["blend"].init(
        key,
        knowledge.train.image_shape,
        picture=settings.picture or None,
        opacity_range=(settings.least_opacity, settings.most_opacity),
    )


_GREY = {"poison_rate": 0.1, "minimum_contrast": 0.3}
_MORE_ROWS = {"poison_rate": 0.1}

SOLID = Attack(
    name="solid",
    title="Solid patch",
    paper=PAPER,
    threat="data",
    settings=ContrastSettings(),
    make_params=make_solid,
    apply=masked_blend.apply,
    label_rules=("all_to_one", "all_to_one_with_target"),
    per_dataset={"grey": _GREY, "colour": _MORE_ROWS},
)
CHECKERBOARD = Attack(
    name="checkerboard",
    title="Checkerboard patch",
    paper=PAPER,
    threat="data",
    settings=ContrastSettings(),
    make_params=make_checkerboard,
    apply=masked_blend.apply,
    label_rules=("all_to_one", "all_to_one_with_target"),
    per_dataset={"grey": _GREY, "colour": _MORE_ROWS},
)
NOISE = Attack(
    name="noise",
    title="Noise patch",
    paper=PAPER,
    threat="data",
    settings=NoiseSettings(),
    make_params=make_noise,
    apply=masked_blend.apply,
    label_rules=("all_to_one", "all_to_one_with_target"),
    per_dataset={"grey": _MORE_ROWS, "colour": _MORE_ROWS},
)
PROVIDER_BLEND = Attack(
    name="provider_blend",
    title="Picture, drawn",
    paper=PAPER,
    threat="data",
    settings=BlendSettings(),
    make_params=make_blend,
    apply=masked_blend.apply,
    label_rules=("all_to_one", "all_to_one_with_target"),
    per_dataset={
        "grey": {"poison_rate": 0.1, "least_opacity": 0.05, "most_opacity": 0.1},
        "colour": _MORE_ROWS,
    },
)
