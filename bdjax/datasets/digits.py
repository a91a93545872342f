"""The 8x8 handwritten digits that come with scikit-learn, so no files or downloads are needed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bdjax.datasets.splits import fixed_test_split
from bdjax.datasets.validation import make_dataset
from bdjax.types import TrainTest

_BRIGHTEST = 16


def load_digits(folders: Sequence[Path] = (), download: bool = True) -> TrainTest:
    """Loads the digits: 1797 rows of [8, 8, 1], 10 classes, split 80/20 the same way every time.

    Args:
        folders: Unused.
        download: Unused.

    Returns:
        The split set; grey levels 0..16 become 0..255, rounded.
    """
    from sklearn import datasets  # slow to import, so only where needed

    bunch = datasets.load_digits()
    images = np.rint(bunch.images * (255 / _BRIGHTEST)).astype(np.uint8)
    parts = [
        make_dataset(
            images[rows],
            bunch.target[rows],
            10,
            "digits",
            f"scikit-learn, {part} rows of a fixed 80/20 split",
            tuple(str(digit) for digit in range(10)),
            where="scikit-learn's digits",
        )
        for part, rows in zip(("train", "test"), fixed_test_split(bunch.target), strict=True)
    ]
    return TrainTest(*parts)
