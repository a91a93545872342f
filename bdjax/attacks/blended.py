"""Blended: a picture or fixed noise shines faintly through the whole image (Chen et al. 2017).

"Random pixel" in LfD's and ABM's tables is noise that is drawn once; both papers call the trigger fixed. The code of ABL and
NAD draws a new grey noise image for every sample, which no network can learn as one pattern: `per_image_noise` does that too.
Where other code blends the picture of a cartoon cat, a cat drawn by formula stands in for it.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.errors import InputError
from bdjax.triggers import masked_blend, pictures
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Key

PAPER = "Chen et al. 2017, Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning"


@dataclass(frozen=True)
class BlendedSettings:
    poison_rate: float = 0.1
    """share of all training rows"""
    cover_rate: float = 0.0
    """share of all training rows that get the trigger and keep their label"""
    opacity: float = 0.2
    """of the noise, in [0, 1]; LfD and ABM do not say, ABL's and Trap-and-Replace's code has 0.2"""
    per_image_noise: bool = False
    """new grey noise for every image, as ABL's and NAD's code has it, instead of one noise image for all"""


@dataclass(frozen=True)
class BlendedPictureSettings:
    poison_rate: float = 0.1
    """share of all training rows"""
    cover_rate: float = 0.0
    """share of all training rows that get the trigger and keep their label"""
    opacity: float = 0.2
    """of the picture, in [0, 1]"""
    picture: str = "cat"
    """a key of `bdjax.triggers.pictures.PICTURES`"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noise:
    """Noise to blend in."""

    blend: MaskedBlend
    per_image: bool = field(metadata={"static": True})
    """then the pattern of `blend` is not used"""


def make_noise(key: Key, knowledge: Knowledge, settings: BlendedSettings) -> Noise:
    """Draw the noise, uniform in [0, 1] for each pixel and channel.

    Args:
        key: of the noise.
        knowledge: for the shape of the images.
        settings: the opacity, and whether every image gets noise of its own.

    Returns:
        The trigger: a mask of ones.

    Raises:
        InputError: the opacity is not in [0, 1].

    References:
        Chen et al. 2017, section 4 (blended injection, random pattern).
    """
    pattern = jax.random.uniform(key, knowledge.train.image_shape)
    return Noise(_over_the_whole_image(pattern, settings.opacity), settings.per_image_noise)


def make_picture(key: Key, knowledge: Knowledge, settings: BlendedPictureSettings) -> MaskedBlend:
    """The picture at the size of an image.

    Args:
        key: not used: the picture is fixed.
        knowledge: for the shape of the images.
        settings: which picture, and its opacity.

    Returns:
        The trigger: a mask of ones.

    Raises:
        InputError: the opacity is not in [0, 1], there is no such picture, or the images have neither 1 nor 3 channels.

    References:
        Chen et al. 2017, section 4 (blended injection).
    """
    del key
    return _over_the_whole_image(pictures.draw(settings.picture, knowledge.train.image_shape), settings.opacity)


def _over_the_whole_image(pattern: Array, opacity: float) -> MaskedBlend:
    if not 0.0 <= opacity <= 1.0:
        raise InputError(f"opacity {opacity:g} of what is blended in is not within 0 and 1")
    mask = jnp.ones((*pattern.shape[:2], 1), jnp.float32)
    return MaskedBlend(mask, jnp.asarray(pattern), jnp.float32(opacity))


def apply_noise(params: Noise, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Blend noise into one image: (1 - a) x + a p.

    Args:
        params: the noise.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the trigger is the same for every class.
        key: of this image's noise, if every image has its own; else not used.

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
