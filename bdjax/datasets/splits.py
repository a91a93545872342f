"""Splits of rows: pure functions of a key, on the host, that return sorted int32 row indices."""

import dataclasses
import math

import numpy as np

from bdjax.errors import InputError
from bdjax.types import Dataset, Key

FIXED_TEST_FRACTION = 0.2


def take(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """Selects rows of a dataset, with all their fields.

    Args:
        dataset: clean or poisoned.
        rows: int [n].
    """
    return dataset[rows]


def fixed_test_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a set without a test set, the same way every time: stratified, 20 % test.

    Args:
        labels: int [N].

    Returns:
        (training rows, test rows).
    """
    import jax  # here and below, since importing it takes longer than --help

    return stratified_split(jax.random.key(0), labels, FIXED_TEST_FRACTION)


def take_part(dataset: Dataset, rows: np.ndarray, part: str) -> Dataset:
    """The rows of one part of `fixed_test_split`, with a `source` that says so.

    Args:
        dataset: clean or poisoned.
        rows: int [n].
        part: "train" or "test".
    """
    return dataclasses.replace(take(dataset, rows), source=f"{dataset.source}, {part} rows of a fixed 80/20 split")


def stratified_split(key: Key, labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Sets a fraction of each class aside.

    Args:
        key: Random key.
        labels: int [N].
        fraction: In [0, 1]: the share of each class to set aside, rounded to the nearest row (halves up).

    Returns:
        (remaining rows, rows set aside): int32, sorted, disjoint, together 0..N-1.

    Raises:
        InputError: If `fraction` is not in [0, 1].
    """
    _check_fraction("fraction", fraction)
    # One permutation of all rows, then the first rows of each class: a permutation per class would be compiled for each
    # class size.
    order = permutation(key, len(labels))
    is_set_aside = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        is_set_aside[rows[: _floor(fraction * len(rows) + 0.5)]] = True
    return _rows_where(~is_set_aside), _rows_where(is_set_aside)


def balanced_rows(key: Key, labels: np.ndarray, count: int) -> np.ndarray:
    """Samples rows so that no class has more of them than another, as far as its rows last.

    Args:
        key: Random key.
        labels: int [N].
        count: How many rows; all N if there are fewer.

    Returns:
        int32, sorted.
    """
    order = permutation(key, len(labels))
    rank = np.zeros(len(labels), int)  # of a row among those of its class
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        rank[rows] = np.arange(len(rows))
    first = order[np.argsort(rank[order], kind="stable")][:count]
    return np.sort(first).astype(np.int32)


def train_validation_rows(key: Key, rows: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows into training and validation rows at random.

    Args:
        key: Random key.
        rows: int [N], without duplicates.
        validation_fraction: In [0, 1]; 0 gives no validation rows.

    Returns:
        (training rows, validation rows): int32, sorted, disjoint, together `rows`; (1 - validation_fraction) N of them,
        rounded down, are training rows.

    Raises:
        InputError: If `validation_fraction` is not in [0, 1].
    """
    _check_fraction("validation_fraction", validation_fraction)
    rows = np.asarray(rows, np.int32)
    num_train = _floor((1 - validation_fraction) * len(rows))
    order = permutation(key, len(rows))
    return np.sort(rows[order[:num_train]]), np.sort(rows[order[num_train:]])


def sample_rows(key: Key, num_rows: int, fraction: float) -> np.ndarray:
    """Samples rows without replacement.

    Args:
        key: Random key.
        num_rows: The number of rows.
        fraction: In [0, 1].

    Returns:
        int32 [fraction * num_rows, rounded down], sorted, each in 0..num_rows-1.

    Raises:
        InputError: If `fraction` is not in [0, 1].
    """
    _check_fraction("fraction", fraction)
    return np.sort(permutation(key, num_rows)[: _floor(fraction * num_rows)])


def provider_rows(key: Key, num_rows: int, num_providers: int, fraction: float) -> np.ndarray:
    """Samples the rows of several providers; providers may share rows, but none has a row twice.

    Args:
        key: Provider i samples with `fold_in(key, i)`, so its rows do not depend on the number of providers.
        num_rows: The number of rows.
        num_providers: At least 1.
        fraction: In [0, 1]: the share of the rows that each provider has.

    Returns:
        int32 [num_providers, fraction * num_rows rounded down], sorted within each provider.

    Raises:
        InputError: If `fraction` is not in [0, 1] or leaves providers without rows, or there is no provider.
    """
    import jax

    if num_providers < 1:
        raise InputError(f"num_providers is {num_providers}; it must be at least 1")
    rows = [sample_rows(jax.random.fold_in(key, provider), num_rows, fraction) for provider in range(num_providers)]
    if len(rows[0]) == 0:
        raise InputError(f"fraction {fraction} of {num_rows} rows leaves each provider without a row")
    return np.stack(rows)


def permutation(key: Key, num_rows: int) -> np.ndarray:
    """Permutes 0..num_rows-1 on the host.

    `jax.random.permutation` would compile a sort for each of the dozens of row counts in a run; here random words are drawn for
    the next power of two, at least 4,096, and sorted by NumPy.

    Args:
        key: Random key.
        num_rows: At least 0.

    Returns:
        int32 [num_rows].
    """
    import jax

    words = jax.random.bits(key, (1 << max(num_rows - 1, 4095).bit_length(),))
    return np.argsort(np.asarray(words)[:num_rows], kind="stable").astype(np.int32)


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value}; it must be in 0..1")


def _floor(count: float) -> int:
    # 0.29 * 100 is 28.999999999999996 in floating point but should count as 29.
    return math.floor(count + 1e-9)


def _rows_where(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(mask).astype(np.int32)
