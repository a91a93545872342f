"""Triggers: pure transforms of one image, x -> x'. Their parameters are arrays.

To add a family, write a new file here and add it to `TRIGGERS`; the contract test runs on every entry.
"""

from bdjax.triggers.blend import BLEND
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.triggers.patches import CHECKERBOARD, NOISE, SOLID
from bdjax.triggers.pictures import PICTURES
from bdjax.types import TriggerFamily

TRIGGERS: dict[str, TriggerFamily] = {
    "solid": SOLID,
    "checkerboard": CHECKERBOARD,
    "blend": BLEND,
    "noise": NOISE,
}

__all__ = ["BLEND", "CHECKERBOARD", "NOISE", "PICTURES", "SOLID", "TRIGGERS", "MaskedBlend"]
