"""BppAttack: images quantised to fewer levels of brightness, optionally with dithering (Wang et al. 2022).

The attacker trains the model, on quantised rows with its own label and on cover rows: these get the quantisation error of
*another* image and keep their label, so that the model learns the quantisation itself and not its noise. `bpp_offline` is a
data attack: both kinds of row are made once, before training. That is the Bpp of ABM, where the defender trains.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.attacks import batch_poisoning
from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.datasets.splits import permutation
from bdjax.errors import InputError
from bdjax.settings import Count, PositiveShare, Range, Share
from bdjax.types import Array, Key


@dataclass(frozen=True)
class BppSettings:
    poison_rate: PositiveShare = 0.1
    """share of the rows that are quantised and get the attacker's label, as in ABM and BackdoorBench; 0.2 in the authors'
    code; a share of each batch where the attacker trains"""
    cover_rate: Share = 0.1
    """share of the rows that get another image's quantisation error and keep their label; 0.2 in the authors' code"""
    levels: Annotated[int, Range(at_least=2, at_most=256)] = 8
    """m, number of levels per channel: 8 in the authors' configuration, 32 in their command for CIFAR-10"""
    dither: bool = False
    """spread each pixel's error over its neighbours (Floyd & Steinberg); in the paper, but off in the authors' code"""
    bank: Count = 512
    """number of training images, at most, whose quantisation errors are used for cover rows"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bpp:
    """The quantisation."""

    levels: Array
    """float32 [], m"""
    residuals: Array
    """float32 [n, H, W, C] in [-1, 1]: q(x) - x of some training images"""
    dither: bool = field(metadata={"static": True})


def quantise(image: Array, levels: Array | float) -> Array:
    """Round each value to the nearest of m evenly spaced levels: round(x (m - 1)) / (m - 1), halves to the even level.

    Args:
        image: float32, any shape, in [0, 1].
        levels: m, at least 2.

    Returns:
        float32, same shape, in [0, 1].

    References:
        Wang et al. 2022, section 4.1.
    """
    return jnp.round(image * (levels - 1)) / (levels - 1)


def dither(image: Array, levels: Array | float) -> Array:
    """Quantise in reading order, passing each pixel's error on to pixels that are not quantised yet.

    7/16 of it goes right, 3/16, 5/16 and 1/16 to the three below; errors that leave the image are dropped.

    Args:
        image: float32 [H, W, C] in [0, 1].
        levels: m, at least 2.

    Returns:
        float32 [H, W, C] in [0, 1].

    References:
        Floyd & Steinberg 1976, An Adaptive Algorithm for Spatial Greyscale; Wang et al. 2022, section 4.1.
    """
    _, width, channels = image.shape

    def run_row(above: Array, row: Array) -> tuple[Array, Array]:
        # above: the errors of the row above, padded with a 0 on either side
        from_above = (above[:-2] + 5 * above[1:-1] + 3 * above[2:]) / 16

        def run_pixel(left: Array, pixel: Array) -> tuple[Array, tuple[Array, Array]]:
            value = pixel + 7 / 16 * left
            # Accumulated errors may lead beyond black or white.
            level = jnp.clip(quantise(value, levels), 0.0, 1.0)
            return value - level, (level, value - level)

        _, (quantised, errors) = lax.scan(run_pixel, jnp.zeros(channels, image.dtype), row + from_above)
        return jnp.pad(errors, ((1, 1), (0, 0))), quantised

    return lax.scan(run_row, jnp.zeros((width + 2, channels), image.dtype), image)[1]


def make_quantisation(key: Key, knowledge: Knowledge, settings: BppSettings) -> Bpp:
    """Compute the quantisation errors of some training images.

    The authors' code collects them over five augmented passes over the training set.

    Args:
        key: draws the images.
        knowledge: the training images.
        settings: m, dithering and the number of images.

    Returns:
        The quantisation.

    Raises:
        InputError: fewer than 2 levels, or no image for the bank.

    References:
        Wang et al. 2022, section 4.2.
    """
    if settings.levels < 2 or settings.bank < 1:
        raise InputError(f"bpp: levels {settings.levels} must be at least 2 and bank {settings.bank} at least 1")
    rows = np.sort(permutation(key, len(knowledge.train))[: settings.bank])
    images = jnp.asarray(knowledge.train.images[rows], jnp.float32) / 255.0
    levels = jnp.float32(settings.levels)
    quantise_all = jax.jit(jax.vmap(dither if settings.dither else quantise, in_axes=(0, None)))
    return Bpp(levels, quantise_all(images, levels) - images, settings.dither)


def apply(params: Bpp, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Quantise one image.

    Args:
        params: the quantisation.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the trigger is the same for every class.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1], with at most m different values.
    """
    del label, key
    return dither(image, params.levels) if params.dither else quantise(image, params.levels)


def apply_negative(params: Bpp, image: Array, label: Array | None, key: Key) -> Array:
    """Add the quantisation error of another image: clip(x + q(x_k) - x_k).

    Args:
        params: the quantisation.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: draws the other image.

    Returns:
        float32 [H, W, C] in [0, 1].

    References:
        Wang et al. 2022, section 4.2; as in the authors' code, without a contrastive loss.
    """
    del label
    which = jax.random.randint(key, (), 0, params.residuals.shape[0])
    return jnp.clip(image + params.residuals[which], 0.0, 1.0)


BPP = Attack(
    name="bpp",
    title="Bpp",
    paper="Wang et al. 2022, BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image "
    "Quantization and Contrastive Adversarial Learning",
    threat="training",
    settings=BppSettings(),
    make_params=make_quantisation,
    apply=apply,
    apply_to_cover=apply_negative,
    label_rules=("all_to_one", "all_to_all"),
    control=batch_poisoning.fixed_trigger(apply, apply_negative),
    check=batch_poisoning.check_shares,
    # Digits are nearly black and white already: only the greys at their edges can show the quantisation.
    per_dataset={"grey": {"levels": 2}},
)
BPP_OFFLINE = dataclasses.replace(
    BPP,
    name="bpp_offline",
    title="Bpp, offline",
    paper=f"{BPP.paper}; with all rows quantised once, before the training, as in ABM",
    threat="data",
    control=None,
    published=(Published("ABM", "cifar10", 79.2, 99.9), Published("ABM", "gtsrb", 80.5, 99.9)),
)
