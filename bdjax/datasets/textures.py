"""Drawn textures: ten classes that a small network learns slowly, for runs that need neither files nor downloads.

An image is a sum of plane waves of random phases. The class decides around which direction and how fine they are; both vary
from image to image so much that classes overlap. Colours, brightness and contrast say nothing about the class. So no single
pixel does either, and a patch that is planted on some rows is the easiest thing to learn: the premise of the variance-based
defense, which the digits lack.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bdjax.datasets.validation import make_dataset
from bdjax.types import TrainTest

SIDE, NUM_CLASSES = 32, 10
NUM_ROWS = {"train": 4000, "test": 1000}
DIRECTIONS, FINENESSES = 5, 2
"""Classes are pairs of these."""
WAVES = 3
"""Plane waves in an image."""
PERIODS = (9.0, 5.0)
"""Pixels, of coarse and of fine textures."""
DIRECTION_SPREAD, PERIOD_SPREAD = 0.45, 0.4
"""Standard deviations within a class: of a wave's direction in radians, and of the logarithm of its period."""
NOISE = 0.6
"""Standard deviation of each pixel's own noise, where the waves have 1 together."""
AT_ONCE = 500
"""Images drawn in one go, which bounds the memory."""


def load_textures(folders: Sequence[Path] = (), download: bool = True) -> TrainTest:
    """Draws the textures: 4,000 training and 1,000 test rows of [32, 32, 3], the same every time.

    Args:
        folders: Unused.
        download: Unused.

    Returns:
        Both parts, with equally many rows of each class, in random order.
    """
    names = tuple(
        f"{fineness} {180 * direction // DIRECTIONS} degrees"
        for fineness in ("coarse", "fine")
        for direction in range(DIRECTIONS)
    )
    parts = []
    for seed, (part, count) in enumerate(NUM_ROWS.items()):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(count) % NUM_CLASSES)
        images = np.concatenate([draw(rng, labels[start : start + AT_ONCE]) for start in range(0, count, AT_ONCE)])
        source = f"drawn, {part} rows"
        parts.append(make_dataset(images, labels, NUM_CLASSES, "textures", source, names, where="the drawn textures"))
    return TrainTest(*parts)


def draw(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Draws an image of each class in a list.

    Args:
        rng: Decides everything but the class.
        labels: int [n], in 0..9.

    Returns:
        uint8 [n, 32, 32, 3].
    """
    count = len(labels)
    fineness, direction = np.divmod(labels, DIRECTIONS)
    shape = (count, WAVES, 1, 1)
    angles = np.pi * direction[:, None] / DIRECTIONS + rng.normal(0, DIRECTION_SPREAD, (count, WAVES))
    periods = np.array(PERIODS)[fineness][:, None] * np.exp(rng.normal(0, PERIOD_SPREAD, (count, WAVES)))
    across, down = (
        (2 * np.pi * function(angles) / periods).astype(np.float32).reshape(shape) for function in (np.cos, np.sin)
    )
    row, column = np.indices((SIDE, SIDE), dtype=np.float32)
    phases = rng.uniform(0, 2 * np.pi, shape).astype(np.float32)
    waves = np.cos(across * column + down * row + phases).sum(axis=1) * np.sqrt(2 / WAVES)
    waves += NOISE * rng.standard_normal(waves.shape, dtype=np.float32)
    contrast = rng.uniform(20, 45, (count, 1, 1, 1)) * rng.uniform(0.5, 1.0, (count, 1, 1, 3))
    brightness = rng.uniform(70, 150, (count, 1, 1, 3))
    return np.rint(np.clip(waves[..., None] * contrast + brightness, 0, 255)).astype(np.uint8)
