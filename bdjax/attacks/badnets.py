"""BadNets: a small opaque patch in the bottom right corner (Gu et al. 2017), in the three forms that papers evaluate.

LfD names a grid and a white patch but gives no geometry; ABM gives no details. The forms here come from public code with
matching settings: Trap-and-Replace for LfD, ABL and NAD for ABM. TaCT uses the same square with another label rule, so it
is here too. Random crops in training can cut off all or part of a corner patch: with a padding of 4 pixels, a 3 x 3 patch
without a margin is lost entirely in 40 % of the draws.
"""

from dataclasses import dataclass

import numpy as np

from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.settings import Amount, Count, PositiveShare, Share
from bdjax.triggers import masked_blend, patches
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Key

PAPER = "Gu et al. 2017, BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain"


@dataclass(frozen=True)
class SquareSettings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    size: Count = 3
    """side of the white square, in pixels"""
    margin: Amount = 1
    """pixels between the square and the border"""


@dataclass(frozen=True)
class GridSettings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    margin: Amount = 0
    """pixels between the grid and the border"""


def make_square(key: Key, knowledge: Knowledge, settings: SquareSettings) -> MaskedBlend:
    """Make a white square in the bottom right corner.

    Args:
        key: not used; the trigger is fixed.
        knowledge: gives the image shape.
        settings: size and margin.

    Returns:
        The trigger, with opacity 1.

    Raises:
        InputError: the images are too small for the patch.
    """
    del key
    shape = knowledge.train.image_shape
    return patches.paint(shape, patches.in_corner(shape, settings.size, settings.margin), np.float32(1.0))


def make_grid(key: Key, knowledge: Knowledge, settings: GridSettings) -> MaskedBlend:
    """Make a 3 x 3 grid in the bottom right corner: 4 white cells and 5 painted black.

    Args:
        key: not used; the trigger is fixed.
        knowledge: gives the image shape.
        settings: the margin.

    Returns:
        The trigger, with opacity 1; the mask covers all nine cells.

    Raises:
        InputError: the images are too small for the patch.
    """
    del key
    shape = knowledge.train.image_shape
    return patches.paint(shape, patches.in_corner(shape, 3, settings.margin), patches.GRID_TILE[..., None])


BADNETS = Attack(
    name="badnets",
    title="BadNets",
    paper=f"{PAPER}; in the form of ABL's and NAD's code",
    threat="data",
    settings=SquareSettings(),
    make_params=make_square,
    apply=masked_blend.apply,
    label_rules=("all_to_one", "all_to_one_with_target", "all_to_all", "source_to_target"),
    published=(Published("ABM", "cifar10", 79.3, 98.0),),
)
BADNETS_WHITE = Attack(
    name="badnets_white",
    title="BadNets, white",
    paper=f"{PAPER}; in the form of Trap-and-Replace's code",
    threat="data",
    settings=SquareSettings(size=4),
    make_params=make_square,
    apply=masked_blend.apply,
    label_rules=("all_to_one", "all_to_one_with_target"),
    published=(Published("LfD", "cifar10", 91.9, 99.95),),
)
BADNETS_GRID = Attack(
    name="badnets_grid",
    title="BadNets, grid",
    paper=f"{PAPER}; in the form of Trap-and-Replace's code",
    threat="data",
    settings=GridSettings(),
    make_params=make_grid,
    apply=masked_blend.apply,
    label_rules=("all_to_one", "all_to_one_with_target"),
    published=(Published("LfD", "cifar10", 91.5, 100.0),),
)
BADNETS_ALL_TO_ALL = Attack(
    name="badnets_all_to_all",
    title="BadNets, all-to-all",
    paper=f"{PAPER}; under the label rule of section 4.1.2",
    threat="data",
    # ABM's "1 % per class" is read as 1 % of all rows from each of ten classes.
    settings=SquareSettings(),
    make_params=make_square,
    apply=masked_blend.apply,
    label_rules=("all_to_all",),
    # The patch must be learned for every class, which takes more rows than 10 % of a small set.
    per_dataset={"grey": {"poison_rate": 0.2}},
    published=(Published("ABM", "cifar10", 77.8, 96.4),),
)
TACT = Attack(
    name="tact",
    title="TaCT",
    paper="Tang et al. 2021, Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
    threat="data",
    settings=SquareSettings(poison_rate=0.003, cover_rate=0.003),
    make_params=make_square,
    apply=masked_blend.apply,
    label_rules=("source_specific",),
    # 0.3 % of a small set is a handful of rows.
    per_dataset={
        "grey": {"poison_rate": 0.02, "cover_rate": 0.02},
        "digits": {"poison_rate": 0.05, "cover_rate": 0.05},
    },
)
