"""Which rows an attack may poison, and what their labels become: one small pure rule each.

Rules work on NumPy labels on the host, int32 [N]; nothing of them is compiled. Another rule is one more function here.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from bdjax.errors import InputError


class LabelRule(NamedTuple):
    """The relabelling half of an attack."""

    candidates: Callable[[np.ndarray], np.ndarray]  # int32 [N] -> bool [N]: the rows that may be poisoned
    relabel: Callable[[np.ndarray], np.ndarray]  # int32 [N] -> int32 [N]: the labels of poisoned rows
    name: str  # as a report prints it: "all-to-one, target 0"


def all_to_one(target: int, *, include_target: bool = False) -> LabelRule:
    """Send every class to one.

    Args:
        target: the class that triggered images are to be taken for.
        include_target: whether rows of the target class may carry the trigger too. The code released with TA-KD leaves
          them out; VBD and BackdoorBench let them in.

    Returns:
        The rule.

    References:
        Heydari et al. 2025, section 4.3, equation 2.
    """

    def candidates(labels: np.ndarray) -> np.ndarray:
        return np.ones(labels.shape, bool) if include_target else labels != target

    return LabelRule(candidates, lambda labels: np.full_like(labels, target), f"all-to-one, target {target}")


def all_to_all(num_classes: int, shift: int = 1) -> LabelRule:
    """Send every class to the one that is `shift` after it, the last ones to the first.

    Raises:
        InputError: the shift is a multiple of the number of classes, which would change no label.
    """
    if shift % num_classes == 0:
        raise InputError(f"all-to-all with shift {shift} over {num_classes} classes leaves every label as it is")
    return LabelRule(
        lambda labels: np.ones(labels.shape, bool),
        lambda labels: ((labels + shift) % num_classes).astype(labels.dtype),
        f"all-to-all, shift {shift}",
    )


def clean_label(target: int) -> LabelRule:
    """Poison rows of the target class only, and change no label; the model still is to say `target` at the trigger."""
    return LabelRule(lambda labels: labels == target, lambda labels: labels.copy(), f"clean-label, target {target}")


def label_map(targets: Mapping[int, int]) -> LabelRule:
    """Send each class that is a key to its value; rows of other classes are never poisoned."""

    def relabel(labels: np.ndarray) -> np.ndarray:
        return np.array([targets.get(label, label) for label in labels.tolist()], labels.dtype)

    pairs = ", ".join(f"{source} to {target}" for source, target in sorted(targets.items()))
    return LabelRule(lambda labels: np.isin(labels, list(targets)), relabel, f"classes {pairs}")
