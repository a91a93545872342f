"""LfD's claim as a figure and a table: the lower a network's capacity, the further its losses of clean and poisoned rows
are apart (the paper's figures 1, 2 and 6)."""

from collections.abc import Mapping, Sequence

import numpy as np

from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.lfd import above_clean_mean, loss_history
from bdjax.evaluation.suspects import Suspect
from bdjax.metrics import measure_detection
from bdjax.models import count_parameters
from bdjax.reporting import plots
from bdjax.reporting.report import Figure, Section
from bdjax.reporting.tables import Table, mean_and_spread
from bdjax.run.folder import RunFolder

EPOCHS = 8
COUNTED_EPOCH = 5
"""The epoch that the paper's figure 2 counts at, from 1."""


def section(
    folder: RunFolder, givens: Sequence[DefenseInput], groups: Sequence[Sequence[Suspect]], networks: Sequence[str]
) -> tuple[Section, ...]:
    """Train some networks as teachers are trained, and draw what they make of clean and of poisoned rows.

    Args:
        folder: of the run; figures are written into it.
        givens: each group of suspects as defenses get it.
        groups: the same with the truth.
        networks: their names.

    Returns:
        One section; none if no suspect is known to be poisoned.
    """
    figures, rows = [], []
    for given, group in zip(givens, groups, strict=True):
        attacks: dict[str, list[int]] = {}
        for number, suspect in enumerate(group):
            if suspect.is_poisoned is not None and suspect.is_poisoned.any():
                attacks.setdefault(suspect.attack.title, []).append(number)
        if not attacks:
            continue
        sizes = {name: count_parameters(given.make_model(name), given.runner.image_shape) for name in networks}
        histories = {name: loss_history(given, name, EPOCHS) for name in networks}
        for title, numbers in attacks.items():
            truth = [group[number].is_poisoned for number in numbers]
            own = {name: [history[number] for number in numbers] for name, history in histories.items()}
            figures.append(_figure(folder, f"loss-gap-{len(figures) + 1}.png", title, own, truth, sizes))
            rows += [_row(title, name, losses, truth, sizes[name]) for name, losses in own.items()]
    if not figures:
        return ()
    header = ("attack", "network", "parameters", "poisons above the clean mean", "of poisons", "AUC of minus the loss")
    notes = (
        f"In epoch {COUNTED_EPOCH}, as the rows came by, without augmentation. Poisons above the clean mean: those that a "
        "threshold at the clean rows' mean loss would miss (the paper's figure 2). AUC: the chance that a poisoned row's loss "
        "is below a clean one's."
    )
    text = (
        "LfD's claim: the lower a network's capacity, the further its losses of clean and of poisoned rows are apart."
    )
    return (
        Section("The loss gap", text, (Table("What the losses tell", header, tuple(rows), notes),), tuple(figures)),
    )


def gap_by_epoch(losses: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean loss of clean and of poisoned rows in each epoch.

    Args:
        losses: of each seed, float [epochs, n]; NaN for rows that an epoch left out.
        truth: of each seed, bool [n].

    Returns:
        "clean rows" and "poisoned rows" -> float [seeds, epochs].
    """
    kinds = {"clean rows": [~one for one in truth], "poisoned rows": list(truth)}
    return {
        kind: np.stack([np.nanmean(own[:, rows], axis=1) for own, rows in zip(losses, which, strict=True)])
        for kind, which in kinds.items()
    }


def _figure(
    folder: RunFolder,
    file: str,
    title: str,
    own: Mapping[str, Sequence[np.ndarray]],
    truth: Sequence[np.ndarray],
    sizes: Mapping[str, int],
) -> Figure:
    panels = {f"{name}, {sizes[name]:,} parameters": gap_by_epoch(losses, truth) for name, losses in own.items()}
    path = plots.save(plots.training_curves(panels, f"Training loss: {title}", log_scale=True), folder.path / file)
    caption = (
        f"{title}: mean training loss of clean and of poisoned rows; the band is from the lowest to the highest seed."
    )
    return Figure(path, caption, caption)


def _row(title: str, name: str, losses: Sequence[np.ndarray], truth: Sequence[np.ndarray], size: int) -> tuple:
    missed, areas = [], []
    for own, is_poisoned in zip(losses, truth, strict=True):
        at = own[COUNTED_EPOCH - 1]
        seen = np.isfinite(at)
        missed.append(float(above_clean_mean(at[seen], is_poisoned[seen])))
        areas.append(measure_detection(None, -at[seen], is_poisoned[seen]).auc)
    return (title, name, size, mean_and_spread(missed, 1), int(truth[0].sum()), mean_and_spread(areas))
