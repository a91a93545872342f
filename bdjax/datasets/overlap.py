"""Rows that two sets have in common, and rows that a set has more than once."""

import hashlib
from typing import NamedTuple

import numpy as np

from bdjax.types import Dataset


def shared_rows(rows: Dataset, others: Dataset) -> np.ndarray:
    """Which rows have the same pixels as a row of another set, whatever their labels.

    Args:
        rows: N rows.
        others: the other set.

    Returns:
        bool [N].
    """
    if rows.image_shape != others.image_shape:
        return np.zeros(len(rows), bool)
    known = set(map(_digest, others.images))
    return np.fromiter((_digest(image) in known for image in rows.images), bool, len(rows))


class Copies(NamedTuple):
    """Rows of one set with the same pixels."""

    is_copy: np.ndarray
    """bool [N]: there is an earlier row with the same pixels"""
    is_contradicted: np.ndarray
    """bool [N]: there is a row with the same pixels and another label"""


def copies(rows: Dataset) -> Copies:
    """Find the rows that a set has more than once.

    Args:
        rows: N rows.
    """
    digests = np.array([_digest(image).hex() for image in rows.images])
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    pairs = np.unique(np.stack([group, rows.labels], axis=1), axis=0)
    labels = np.bincount(pairs[:, 0], minlength=len(first))
    return Copies(first[group] != np.arange(len(rows)), labels[group] > 1)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
