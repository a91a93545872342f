"""Rows with a planted trigger, and the flags of runs that are small but find it: for tests of experiments/vbd.py."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from bdjax.commands import vbd
from bdjax.run.log import StageLog

CLASSES, PER_CLASS, SIDE = 4, 125, 12
TARGET = 3
"""The class that the planted trigger is on."""
VBD = (
    "vbd:networks=4-4P:batch_size=32:epochs=6:rows_per_class=10:least_rows=4:detect_share=0.3:p_value=0.4:least_success=0.9"
    ":detector_batch_size=32:detector_epochs=6:detector_learning_rate=0.2:dropout=0.0:least_opacity=0.9:own_rows=0.5"
    ":first_labelling=1:last_labelling=6:least_accuracy=0.6:least_steps=0:least_detector_steps=0:least_sure=0"
)
"""Lenient with patterns, so that a planted one is found in 500 rows."""
ENGINE = ("--layout=map", "--lowering=shifted", "--width=4", "--batch-size=32", "--epochs=1", "--model=lenet")


def quiet() -> StageLog:
    return StageLog(Console(file=io.StringIO()))


def run(arguments: Sequence[str], log: StageLog | None = None) -> dict[str, Any]:
    return vbd.main(list(arguments), log or quiet())


def make_rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dim noise, uint8 [n, 12, 12, 3], with one quarter a little brighter, which depends on the class: int [n]."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(CLASSES), PER_CLASS)
    images = rng.integers(60, 120, (len(labels), SIDE, SIDE, 3))
    half = SIDE // 2
    for image, label in zip(images, labels, strict=True):
        above, left = np.array(divmod(int(label), 2)) * half
        image[above : above + half, left : left + half] += rng.integers(0, 16)
    return images.astype(np.uint8), labels


def poisoned_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same with a white square on every fifth row, labelled as the target: images, labels, truth, original labels."""
    images, original = make_rows()
    rows = np.arange(0, len(images), 5)
    images[rows, -3:, -3:] = 255
    labels = original.copy()
    labels[rows] = TARGET
    return images, labels, np.isin(np.arange(len(images)), rows), original
