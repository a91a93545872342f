"""What VBD takes for granted: enough poisoned rows among the held-back ones, and networks too simple for the classes.

How many poisoned rows are enough follows from the settings alone. Whether the networks are too simple shows only in training.
"""

import math

import numpy as np

from bdjax.defenses.vbd_patterns import VBDSettings

LEARNED = 0.9
"""Accuracy from which a simple network has learned the classes, so that the rows it is surest of need not be poisoned ones.
Ours: on held-back rows of the digits, where findings are chance, networks have 0.95 to 0.98 (mean of three, one seed); where
planted squares were found, on CIFAR-10 and the textures, 0.40 to 0.63. Nothing in between was measured. Accuracy on training
rows does not count: from 3,000 rows of CIFAR-10 two networks remembered 0.96 and 0.98 of them, and found squares all the
same."""


def smallest(settings: VBDSettings) -> int:
    """Poisoned rows of a class from which on its `rows_per_class` most confident held-back rows can all be poisoned.

    Fewer may be found if other rows look similar enough, but that is luck. See `Defense.smallest`.
    """
    return math.ceil(settings.rows_per_class / settings.held_back_share - 1e-9)


def has_learned(held_back_accuracies: np.ndarray) -> np.ndarray:
    """Suspects of which all simple networks learned the classes: bool [M] from float [M, J]."""
    return (held_back_accuracies >= LEARNED).all(axis=1)


def doubt(held_back_accuracies: np.ndarray) -> tuple[str, ...]:
    """For each suspect why its result should not be relied on, "" for no reason; () if there is none for any of them.

    A single network that did not learn the classes is enough for the method, so there must be none.

    Args:
        held_back_accuracies: float [M, J], of the simple networks; NaN, of one that diverged, is below every bound.
    """
    learned = has_learned(held_back_accuracies)
    # Without the accuracies themselves, which reports show elsewhere: the same text for many suspects is printed once.
    text = (
        f"simple networks learned the classes: they predict {100 * LEARNED:.0f} % or more of the held-back rows as their "
        "label, so the rows that they are surest of need not be poisoned"
    )
    return tuple(text if of_suspect else "" for of_suspect in learned) if learned.any() else ()
