"""Blended: a picture or fixed noise, blended faintly into the whole image (Chen et al. 2017).

"Random pixel" in LfD's and ABM's tables is noise that is drawn once; both papers call the trigger fixed. The code of ABL and
NAD draws a new grey noise image for every sample, which no network can learn as one pattern: `per_image_noise` does that too.
Other code blends in a picture of a cartoon cat; here a cat drawn by formula replaces it.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.errors import InputError
from bdjax.settings import PositiveShare, Share
from bdjax.triggers import masked_blend, pictures
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Key

PAPER = "Chen et al. 2017, Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"


@dataclass(frozen=True)
class BlendedSettings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    opacity: Share = 0.2
    """opacity of the noise, in [0, 1]; not stated by LfD and ABM, 0.2 in ABL's and Trap-and-Replace's code"""
    per_image_noise: bool = False
    """draw new grey noise for every image, as in ABL's and NAD's code, instead of one noise image for all"""


@dataclass(frozen=True)
class BlendedPictureSettings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    opacity: Share = 0.2
    """opacity of the picture, in [0, 1]"""
    picture: str = "cat"
    """a key of `bdjax.triggers.pictures.PICTURES`"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noise:
    """The noise that is blended in."""

    blend: MaskedBlend
    per_image: bool = field(metadata={"static": True})
    """whether each image gets new noise; if so, the pattern of `blend` is not used"""


def make_noise(key: Key, knowledge: Knowledge, settings: BlendedSettings) -> Noise:
    """Draw the noise, uniform in [0, 1] for each pixel and channel.

    Args:
        key: draws the noise.
        knowledge: gives the image shape.
        settings: the opacity, and whether every image gets new noise.

    Returns:
        The trigger, with a mask of ones.

    Raises:
        InputError: the opacity is not in [0, 1].

    References:
        Chen et al. 2017, section 4 (blended injection, random pattern).
    """
    pattern = jax.random.uniform(key, knowledge.train.image_shape)
    return Noise(_over_the_whole_image(pattern, settings.opacity), settings.per_image_noise)


def make_picture(key: Key, knowledge: Knowledge, settings: BlendedPictureSettings) -> MaskedBlend:
    """Draw the picture at the size of an image.

    Args:
        key: not used; the picture is fixed.
        knowledge: gives the image shape.
        settings: which picture, and its opacity.

    Returns:
        The trigger, with a mask of ones.

    Raises:
        InputError: the opacity is not in [0, 1], there is no such picture, or the images have neither 1 nor 3 channels.

    References:
        Chen et al. 2017, section 4 (blended injection).
    """
    del key
    return _over_the_whole_image(pictures.draw(settings.picture, knowledge.train.image_shape), settings.opacity)


def _over_the_whole_image(pattern: Array, opacity: float) -> MaskedBlend:
    if not 0.0 <= opacity <= 1.0:
        raise InputError(f"opacity {opacity:g} must be from 0 to 1")
    mask = jnp.ones((*pattern.shape[:2], 1), jnp.float32)
    return MaskedBlend(mask, jnp.asarray(pattern), jnp.float32(opacity))


def apply_noise(params: Noise, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Blend noise into one image: (1 - a) x + a p.

    Args:
        params: the noise.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the trigger is the same for every class.
        key: draws this image's noise if `per_image` is set; otherwise not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    blend = params.blend
    if params.per_image:
        grey = jax.random.uniform(key, (*image.shape[:2], 1))
        blend = blend._replace(pattern=jnp.broadcast_to(grey, image.shape))
    return masked_blend.apply(blend, image, label, key)


BLENDED = Attack(
    name="blended",
    title="Blended, random pixels",
    paper=PAPER,
    threat="data",
    settings=BlendedSettings(),
    make_params=make_noise,
    apply=apply_noise,
    label_rules=("all_to_one", "all_to_one_with_target", "all_to_all", "source_specific", "source_to_target"),
    published=(Published("LfD", "cifar10", 92.0, 99.98), Published("ABM", "cifar10", 80.6, 99.9)),
)
BLENDED_PICTURE = Attack(
    name="blended_picture",
    title="Blended, picture",
    paper=PAPER,
    threat="data",
    settings=BlendedPictureSettings(),
    make_params=make_picture,
    apply=masked_blend.apply,
    label_rules=("all_to_one", "all_to_one_with_target", "all_to_all", "source_specific", "source_to_target"),
)
