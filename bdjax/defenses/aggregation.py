"""Combine the logits of several classifiers: averages, some of them robust to a few malicious classifiers, and votes.

Shapes: `logits` is float [N, B, K], of N classifiers for B rows and K classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.choices import Aggregation, Tie, VoteSpace
from bdjax.types import Array


def aggregate_logits(logits: Array, aggregation: Aggregation = "mean", trim: int = 1) -> Array:
    """Aggregate the classifiers' logits to one logit for each row and class.

    Args:
        logits: float [N, B, K].
        aggregation: "mean" is the paper's (section 3, stage 4.1). "median" and "trimmed_mean" work class by class, on logits
            shifted to mean zero over the classes: the shift does not change the softmax, and without it a classifier with
            large offsets would determine the middle.
        trim: how many of the lowest and of the highest values "trimmed_mean" leaves out.

    Returns:
        float [B, K].

    Raises:
        ValueError: `aggregation` is not a value of `Aggregation`, or trimming would leave no classifier.
    """
    if aggregation == "mean":
        return jnp.mean(logits, axis=0)
    centred = logits - jnp.mean(logits, axis=2, keepdims=True)
    if aggregation == "median":
        return jnp.median(centred, axis=0)
    if aggregation == "trimmed_mean":
        if not 0 <= 2 * trim < logits.shape[0]:
            raise ValueError(f"trimming {trim} on each side leaves none of {logits.shape[0]} classifiers")
        return jnp.mean(jnp.sort(centred, axis=0)[trim : logits.shape[0] - trim], axis=0)
    raise ValueError(f"aggregation {aggregation!r} is not one of 'mean', 'median', 'trimmed_mean'")


class Votes(NamedTuple):
    """The result of a majority vote."""

    predictions: np.ndarray
    """int [B]"""
    is_tie: np.ndarray
    """bool [B]: more than one class had the most votes"""


def soft_vote(logits: np.ndarray, space: VoteSpace = "logits") -> np.ndarray:
    """The class with the highest average.

    Args:
        logits: float [N, B, K].
        space: what is averaged: raw logits, as in the paper's code, or softmax probabilities.

    Returns:
        int [B].
    """
    values = jnp.asarray(logits)
    if space == "probabilities":
        values = jax.nn.softmax(values, axis=2)
    elif space != "logits":
        raise ValueError(f"space {space!r} is not one of 'logits', 'probabilities'")
    return np.asarray(jnp.argmax(jnp.mean(values, axis=0), axis=1))


def hard_vote(logits: np.ndarray, tie: Tie = "lowest") -> Votes:
    """The class that most classifiers predict.

    Args:
        logits: float [N, B, K].
        tie: which of the tied classes wins: "lowest", the lowest class, like argmax in the paper's code, so that every tie
            favours an attack whose target is class 0; "soft", the class with the highest average logit.

    Returns:
        The predictions, and which rows were ties.
    """
    num_classes = logits.shape[2]
    counts = (np.argmax(logits, axis=2)[:, :, None] == np.arange(num_classes)).sum(axis=0)  # [B, K]
    is_leading = counts == counts.max(axis=1, keepdims=True)
    is_tie = is_leading.sum(axis=1) > 1
    if tie == "lowest":
        return Votes(np.argmax(counts, axis=1), is_tie)
    if tie == "soft":
        return Votes(np.argmax(np.where(is_leading, np.mean(logits, axis=0), -np.inf), axis=1), is_tie)
    raise ValueError(f"tie {tie!r} is not one of 'lowest', 'soft'")
