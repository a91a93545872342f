"""Which triggers work on which models.

Entry [i, j] of a matrix is model i under trigger j. For the teachers, i = j is the intended attack; a high rate elsewhere means
that the triggers of two providers share features, which defeats a vote of the teachers.
"""

from typing import NamedTuple

import numpy as np

from bdjax import metrics


class CrossTrigger(NamedTuple):
    asr: np.ndarray
    """float64 [M, T] in [0, 1]"""
    r_acc: np.ndarray
    """float64 [M, T] in [0, 1]"""


class OffDiagonal(NamedTuple):
    """The ASR of triggers on teachers they were not planted in."""

    mean: float
    """over all i != j"""
    maximum: float
    """over all i != j"""
    model: int
    """row of the maximum; the first in row-major order if there are several"""
    trigger: int
    """column of the maximum"""
    trigger_means: np.ndarray
    """float64 [T]: of each trigger, the mean over the other teachers"""


def cross_trigger_matrices(
    predictions: np.ndarray, labels: np.ndarray, target: int, *, include_target: bool = False
) -> CrossTrigger:
    """Measure every model under every trigger.

    Args:
        predictions: int [M, T, N], the classes that M models predict on the same N images under each of T triggers. For
            `off_diagonal_summary`, the first T models are the teachers, in the order of their triggers.
        labels: int [N], the true labels.
        target: the attacker's target class.
        include_target: count rows of the target class too; see `bdjax.metrics`.

    Raises:
        ValueError: the shapes do not match, or every row is of the target class.

    References:
        Heydari et al. 2025, section 4.7, "Cross-Trigger Generalization", with equations 9 and 10.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 3 or predictions.shape[2:] != labels.shape:
        raise ValueError(
            f"predictions have shape {predictions.shape}; with {len(labels)} labels it should be "
            f"(models, triggers, {len(labels)})"
        )

    def matrix(measure) -> np.ndarray:
        return np.array(
            [[measure(row, labels, target, include_target=include_target) for row in rows] for rows in predictions]
        )

    return CrossTrigger(matrix(metrics.attack_success_rate), matrix(metrics.robust_accuracy))


def off_diagonal_summary(asr: np.ndarray) -> OffDiagonal:
    """Summarise how often triggers work on other teachers.

    Args:
        asr: float [T, T] in [0, 1]: the teachers' rows of the matrix, `asr[:T]`.

    Raises:
        ValueError: it is not square, or there is only one teacher.
    """
    asr = np.asarray(asr, np.float64)
    if asr.ndim != 2 or asr.shape[0] != asr.shape[1]:
        raise ValueError(
            f"asr has shape {asr.shape}; it should be square: a row for each teacher, a column for its trigger"
        )
    if len(asr) < 2:
        raise ValueError("asr has one teacher; the summary needs at least two")
    others = np.where(np.eye(len(asr), dtype=bool), -np.inf, asr)
    model, trigger = (int(index) for index in np.unravel_index(np.argmax(others), asr.shape))
    trigger_means = (asr.sum(axis=0) - np.diag(asr)) / (len(asr) - 1)
    return OffDiagonal(float(trigger_means.mean()), float(asr[model, trigger]), model, trigger, trigger_means)
