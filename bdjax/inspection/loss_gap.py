"""The gap between a network's losses on clean and on poisoned rows during training (LfD, figures 1, 2 and 6)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.lfd import above_clean_mean, loss_history
from bdjax.metrics import measure_detection
from bdjax.models import count_parameters

EPOCHS = 5
COUNTED_EPOCH = 5
"""The epoch of the paper's figure 2, from 1."""


class LossGap(NamedTuple):
    """The losses of one network on the training sets of one attack, of S seeds."""

    network: str
    parameters: int
    by_epoch: Mapping[str, np.ndarray]
    """as `gap_by_epoch` returns them"""
    missed: tuple[int, ...]
    """of each seed: poisoned rows whose loss is above the clean rows' mean in `COUNTED_EPOCH`"""
    num_poisoned: int
    """of the first seed"""
    aucs: tuple[float, ...]
    """of each seed: the probability that a poisoned row's loss is below a clean row's, in `COUNTED_EPOCH`"""


def loss_gaps(
    inputs: DefenseInput,
    attacks: Sequence[str],
    is_poisoned: Sequence[np.ndarray | None],
    networks: Sequence[str | None],
) -> list[tuple[str, list[LossGap]]]:
    """Train networks on each training set as LfD trains its teachers, for `EPOCHS` epochs, and measure their losses.

    Args:
        inputs: M suspect training sets.
        attacks: of each set, the attack's title; sets of the same title are the seeds of one attack.
        is_poisoned: of each set, bool [n]; None if the ground truth is unknown. Sets without a poisoned row are left out.
        networks: names of the architectures; None is that of the undefended network.

    Returns:
        Each attack's title with the losses of every network. Empty, without training, if no set is known to be poisoned.
    """
    numbers: dict[str, list[int]] = {}
    for number, (attack, truth) in enumerate(zip(attacks, is_poisoned, strict=True)):
        if truth is not None and truth.any():
            numbers.setdefault(attack, []).append(number)
    if not numbers:
        return []
    models = {name: inputs.make_model(name) for name in networks}
    sizes = {name: count_parameters(model, inputs.runner.image_shape) for name, model in models.items()}
    titles = {name: name or model.description for name, model in models.items()}
    histories = {name: loss_history(inputs, name, EPOCHS) for name in networks}
    return [
        (attack, [_measure(titles[name], sizes[name], history[which], [is_poisoned[i] for i in which])
                  for name, history in histories.items()])
        for attack, which in numbers.items()
    ]  # fmt: skip


def gap_by_epoch(losses: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean loss of clean and of poisoned rows in each epoch.

    Args:
        losses: of each seed, float [epochs, n]; NaN for rows that an epoch left out.
        truth: of each seed, bool [n]: which rows are poisoned.

    Returns:
        "clean rows" and "poisoned rows" -> float [seeds, epochs].
    """
    kinds = {"clean rows": [~rows for rows in truth], "poisoned rows": list(truth)}
    return {
        kind: np.stack([np.nanmean(values[:, rows], axis=1) for values, rows in zip(losses, which, strict=True)])
        for kind, which in kinds.items()
    }


def _measure(name: str, parameters: int, losses: np.ndarray, truth: Sequence[np.ndarray]) -> LossGap:
    """Summarise the losses of all seeds, float32 [S, epochs, n]."""
    missed, aucs = [], []
    for values, is_poisoned in zip(losses[:, COUNTED_EPOCH - 1], truth, strict=True):
        seen = np.isfinite(values)
        missed.append(above_clean_mean(values[seen], is_poisoned[seen]))
        aucs.append(measure_detection(None, -values[seen], is_poisoned[seen]).auc)
    return LossGap(name, parameters, gap_by_epoch(losses, truth), tuple(missed), int(truth[0].sum()), tuple(aucs))
