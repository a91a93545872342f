"""VBD's rows: which are trained on and which are held back, in proportion within each class."""

import numpy as np

from bdjax.datasets import splits
from bdjax.types import Key


def split_rows(key: Key, labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Split one set into two, stratified by class.

    Args:
        key: of the order within the classes.
        labels: int32 [n].
        share: of the second part.

    Returns:
        Row numbers, int32 [n1] and [n2]. The sizes depend on n alone, so that sets with other labels fit into the same
        call. The first rows of the second part are again stratified by class.
    """
    order = _interleaved(splits.permutation(key, len(labels)), labels)
    count = round(share * len(labels))
    return np.sort(order[count:]), order[:count]


def fold_rows(key: Key, labels: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Split one set into two in several ways, stratified by class: every row is held back once.

    Args:
        key: of the order within the classes.
        labels: int32 [n].
        folds: k, at least 2; up to k - 1 rows are never held back, so that all parts are of the same size.

    Returns:
        Row numbers of training, int32 [k, n - n // k], and held back, int32 [k, n // k], as in `split_rows`.
    """
    order = splits.permutation(key, len(labels))
    by_label = order[np.argsort(labels[order], kind="stable")]
    # Every k-th of rows that are sorted by class: as many of each class as of all rows.
    held_back = [_interleaved(rows, labels) for rows in by_label[: len(labels) // folds * folds].reshape(-1, folds).T]
    training = [np.setdiff1d(order, of_fold) for of_fold in held_back]  # sorted
    return np.stack(training), np.stack(held_back)


def _interleaved(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rows in an order in which each class is spread evenly, and otherwise unchanged."""
    given, rank = labels[rows], np.empty(len(rows))
    for label in np.unique(given):
        in_class = np.flatnonzero(given == label)
        rank[in_class] = (np.arange(len(in_class)) + 0.5) / len(in_class)
    return rows[np.argsort(rank, kind="stable")]
