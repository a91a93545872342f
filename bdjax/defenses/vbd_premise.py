"""What VBD takes for granted: enough poisoned rows among the held-back ones, and networks too simple for the classes.

How many poisoned rows are enough follows from the settings alone. Whether the networks are too simple shows only in training.
"""

import math

import numpy as np

from bdjax.defenses.contract import Facts
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.types import Detection

LEARNED = 0.9
"""Accuracy from which a simple network has learned the classes, so that the rows it is surest of need not be poisoned ones.
Ours: on held-back rows of the digits, where findings are chance, networks have 0.95 to 0.98 (mean of three, one seed); where
planted squares were found, on CIFAR-10 and the textures, 0.40 to 0.50. Nothing in between was measured. Accuracy on training
rows counts only where the other is unknown: from 3,000 rows of CIFAR-10 two networks remembered 0.96 and 0.98 of them, and
found squares all the same."""


def smallest(settings: VBDSettings, facts: Facts) -> int:
    """Poisoned rows of a class from which on its `rows_per_class` most confident held-back rows can all be poisoned.

    Fewer may be found if other rows look similar enough, but that is luck. See `Defense.smallest`.
    """
    del facts
    return math.ceil(settings.rows_per_class / settings.held_back_share - 1e-9)


def doubt(settings: VBDSettings, found: Detection) -> tuple[str, ...]:
    """For each suspect why its result should not be relied on, "" for no reason: see `Defense.doubt`.

    A single network that did not learn the classes is enough for the method, so there must be none.
    """
    del settings
    is_held_back = "held_back_accuracies" in found.evidence
    measured = found.evidence.get("held_back_accuracies", found.evidence.get("accuracies"))
    if measured is None:
        return ("",) * len(found.flags)
    where = "held-back" if is_held_back else "training"
    return tuple(_doubt(np.asarray(of_suspect, float), where) for of_suspect in measured)


def _doubt(accuracies: np.ndarray, where: str) -> str:
    if not (accuracies >= LEARNED).all():
        return ""
    # Without the accuracies themselves, which reports show elsewhere: the same text for many suspects is printed once.
    return (
        f"simple networks learned the classes: they predict {100 * LEARNED:.0f} % or more of the {where} rows as their label, "
        "so the rows that they are surest of need not be poisoned"
    )
