"""The 8x8 handwritten digits that come with scikit-learn, so no files or downloads are needed."""

import gzip
import importlib.util
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
    table = _table()
    labels = table[:, -1].astype(np.int64)
    images = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / _BRIGHTEST)).astype(np.uint8)
    parts = [
        make_dataset(
            images[rows],
            labels[rows],
            10,
            "digits",
            f"scikit-learn, {part} rows of a fixed 80/20 split",
            tuple(str(digit) for digit in range(10)),
            where="scikit-learn's digits",
        )
        for part, rows in zip(("train", "test"), fixed_test_split(labels), strict=True)
    ]
    return TrainTest(*parts)


def _table() -> np.ndarray:
    """Pixels and label of each row, float64 [1797, 65], as scikit-learn has them."""
    # From its file, since importing scikit-learn takes longer than reading a data set of a thousand rows.
    found = importlib.util.find_spec("sklearn")
    for folder in found.submodule_search_locations if found else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                return np.loadtxt(lines, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])
