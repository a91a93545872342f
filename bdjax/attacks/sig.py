"""SIG: a sinusoid over the columns, in rows of the target class that keep their labels (Barni et al. 2019).

Two forms are in use. The paper's form adds the signal. The code of NAD, ABL and Trap-and-Replace, probably the source of
LfD's and ABM's numbers, blends in a stripe picture: a sinusoid whose negative half wrapped around when stored in 8 bits.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.settings import Positive, PositiveShare, Share
from bdjax.triggers import additive, masked_blend
from bdjax.triggers.additive import Additive
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Key

PAPER = "Barni et al. 2019, A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning"


@dataclass(frozen=True)
class SigSettings:
    poison_rate: PositiveShare = 0.08
    """share of all training rows; all of them are of the target class"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    amplitude: PositiveShare = 40 / 255
    """D, amplitude of the signal, in [0, 1]; 20/255 in ABL's and NAD's code"""
    frequency: Positive = 6.0
    """f, cycles across the width of an image"""


@dataclass(frozen=True)
class StripedSigSettings:
    poison_rate: PositiveShare = 0.08
    """share of all training rows; all of them are of the target class"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    opacity: Share = 0.2
    """opacity of the stripe picture, in [0, 1]"""


def make_sinusoid(key: Key, knowledge: Knowledge, settings: SigSettings) -> Additive:
    """Make the signal D sin(2 pi f j / W) of column j, the same in every row and channel.

    Args:
        key: not used; the signal is fixed.
        knowledge: gives the image shape.
        settings: D and f.

    Returns:
        An additive trigger, float32 [H, W, C] in [-D, D].

    References:
        Barni et al. 2019, section 3.
    """
    del key
    width = knowledge.train.image_shape[1]
    signal = settings.amplitude * np.sin(2.0 * math.pi * settings.frequency * np.arange(width) / width)
    return Additive(_columns(signal, knowledge))


def wrapped_stripes(width: int) -> np.ndarray:
    """A row of the stripe picture: 20 sin(0.8 j), truncated to whole numbers and wrapped around at 256.

    Negative halves become 236..255, so these are nearly black and white stripes with a period of about 7.85 pixels.

    Args:
        width: W.

    Returns:
        uint8 [W].
    """
    return np.trunc(20.0 * np.sin(0.8 * np.arange(width))).astype(np.int64).astype(np.uint8)


def make_stripes(key: Key, knowledge: Knowledge, settings: StripedSigSettings) -> MaskedBlend:
    """Make the stripe picture over the whole image: 0.8 x + 0.2 s.

    Args:
        key: not used; the picture is fixed.
        knowledge: gives the image shape.
        settings: the opacity.

    Returns:
        The trigger, with a mask of ones.
    """
    del key
    height, width, _ = knowledge.train.image_shape
    return MaskedBlend(
        mask=jnp.ones((height, width, 1), jnp.float32),
        pattern=_columns(wrapped_stripes(width) / 255.0, knowledge),
        opacity=jnp.float32(settings.opacity),
    )


def _columns(values: np.ndarray, knowledge: Knowledge) -> jnp.ndarray:
    return jnp.asarray(np.broadcast_to(values[None, :, None], knowledge.train.image_shape), jnp.float32)


SIG = Attack(
    name="sig",
    title="SIG",
    paper=PAPER,
    threat="data",
    settings=SigSettings(),
    make_params=make_sinusoid,
    apply=additive.apply,
    label_rules=("clean_label", "all_to_one", "all_to_all"),
    # On black backgrounds the negative half is clipped, and a few hundred rows need a strong signal.
    per_dataset={"grey": {"amplitude": 100 / 255, "poison_rate": 0.09}, "gtsrb": {"poison_rate": 0.05}},
    published=(Published("LfD", "cifar10", 93.2, 92.2), Published("ABM", "cifar10", 79.5, 99.96)),
)
SIG_STRIPED = Attack(
    name="sig_striped",
    title="SIG, striped",
    paper=f"{PAPER}; in the form of NAD's and ABL's code",
    threat="data",
    settings=StripedSigSettings(),
    make_params=make_stripes,
    apply=masked_blend.apply,
    label_rules=("clean_label", "all_to_one", "all_to_all"),
    per_dataset={"grey": {"poison_rate": 0.09}, "gtsrb": {"poison_rate": 0.05}},
)
