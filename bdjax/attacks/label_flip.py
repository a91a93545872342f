"""Label flipping: rows get a wrong label, and no image is changed.

There is no trigger, so the success rate on "triggered" images is the rate at which clean images are taken for the target.
"""

from dataclasses import dataclass
from typing import NamedTuple

from bdjax.attacks.contract import Attack, Knowledge
from bdjax.settings import PositiveShare, Share
from bdjax.types import Array, Key


@dataclass(frozen=True)
class LabelFlipSettings:
    poison_rate: PositiveShare = 0.05
    """share of all training rows; under source_to_target all of them are of one class"""
    cover_rate: Share = 0.0
    """share of all training rows that keep image and label; without a trigger they are clean rows"""


class NoTrigger(NamedTuple):
    """The empty parameters of an attack without a trigger."""


def make_nothing(key: Key, knowledge: Knowledge, settings: LabelFlipSettings) -> NoTrigger:
    """Make the empty parameters.

    Args:
        key: not used.
        knowledge: not used.
        settings: not used.

    Returns:
        A pytree without leaves.
    """
    del key, knowledge, settings
    return NoTrigger()


def apply(params: NoTrigger, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Return the image unchanged, float32 [H, W, C] in [0, 1]."""
    del params, label, key
    return image


LABEL_FLIP = Attack(
    name="label_flip",
    title="Label flip",
    paper="Biggio et al. 2011, Support Vector Machines Under Adversarial Label Noise",
    threat="data",
    changes_images=False,
    settings=LabelFlipSettings(),
    make_params=make_nothing,
    apply=apply,
    label_rules=("all_to_one", "source_to_target"),
)
