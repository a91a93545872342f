"""Examples of attacked images: training rows before and after poisoning, and test rows without and with the trigger."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from bdjax.attacks.victims import Trial
from bdjax.inspection.trigger_pictures import magnified_difference
from bdjax.types import Dataset, TrainTest

COLUMNS = ("training row", "poisoned", "difference × 10", "test row", "triggered", "difference × 10")
ROWS_PER_PICTURE, ROWS_OF_SINGLE_ATTACK = 12, 6
"""The largest number of rows in a picture, and the number of rows if there is a single attack."""


def gallery(trials: Sequence[Sequence[Trial]], data: TrainTest) -> list[tuple[list[list[np.ndarray]], list[str]]]:
    """Rows of images for each attack, of the first seed: examples of its training and test rows.

    Args:
        trials: for each plan, all seeds of its first part, then of the next.
        data: the clean images.

    Returns:
        Pictures of at most `ROWS_PER_PICTURE` rows each: (images [rows, 6, H, W, C] in [0, 1], names of the rows).
    """
    shown = [trial for plan in trials for trial in plan if trial.victim.prepared.seed == 0]
    count = ROWS_OF_SINGLE_ATTACK if len(shown) == 1 else 1
    blank = np.ones((*data.train.image_shape[:2], 1), np.float32)
    rows, names = [], []
    for trial in shown:
        plan = trial.victim.prepared.plan
        name = trial.part.attack.title + ("" if len(plan.parts) == 1 else f"\n(in {plan.title})")
        pairs = zip(_poisoned_pairs(trial, data.train, count), _test_pairs(trial, data.test, count), strict=True)
        for pair in pairs:
            images = []
            for before, after in pair:
                difference = None
                if before is not None:
                    difference = np.asarray(magnified_difference(jnp.asarray(before), jnp.asarray(after)))
                images += [blank if image is None else image for image in (before, after, difference)]
            rows.append(images)
            names.append(name)
    blocks = range(0, len(rows), ROWS_PER_PICTURE)
    return [(rows[i : i + ROWS_PER_PICTURE], names[i : i + ROWS_PER_PICTURE]) for i in blocks]


def _poisoned_pairs(trial: Trial, train: Dataset, count: int) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """Training rows before and after poisoning; None if there is no such row."""
    prepared = trial.victim.prepared
    if prepared.poisoned is None:
        return [(None, None)] * count
    rows = np.resize(prepared.poisoned_by[prepared.plan.parts.index(trial.part)], count)
    after = as_float(prepared.poisoned.images[rows])
    before = [None] * count if trial.part.attack.adds_rows else as_float(train.images[rows])
    return list(zip(before, after, strict=True))


def _test_pairs(trial: Trial, test: Dataset, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = np.flatnonzero(trial.part.rule.victims(test.labels))
    changed = rows[np.any(trial.triggered[rows] != test.images[rows], axis=(1, 2, 3))]
    rows = np.resize(changed if len(changed) else rows, count)
    return list(zip(as_float(test.images[rows]), as_float(trial.triggered[rows]), strict=True))


def as_float(images: np.ndarray) -> np.ndarray:
    """8-bit images of any shape as float32 in [0, 1]."""
    return images.astype(np.float32) / 255
