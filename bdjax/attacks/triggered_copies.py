"""Poisoning inside the training step, by adding rows: some rows of a batch appear a second time, with the trigger.

`batch_poisoning.py` is for attackers whose poisoned rows replace clean rows.
"""

import jax.numpy as jnp

from bdjax.attacks.batch_poisoning import change_rows, shares
from bdjax.attacks.contract import Apply
from bdjax.errors import InputError
from bdjax.types import Array, Key, PyTree


def trigger_first_rows(apply: Apply, params: PyTree, images: Array, labels: Array, key: Key, rate: float) -> Array:
    """Put the trigger on copies of the first floor(rate N) rows of a batch, at least one.

    Args:
        apply: the trigger.
        params: its parameters.
        images: float32 [N, H, W, C] in [0, 1].
        labels: int32 [N], the original labels.
        key: split over the copies.
        rate: share of the rows, in (0, 1].

    Returns:
        float32 [n, H, W, C]; copy i is of row i.

    Raises:
        InputError: the rate is out of range.
    """
    if not 0.0 < rate <= 1.0:
        raise InputError(f"poison rate {rate:g} must be above 0 and at most 1")
    count = shares(images.shape[0], rate, 0.0).poisoned
    return change_rows(apply, params, images[:count], labels[:count], key)


def add_to_source_rows(losses: Array, of_copies: Array) -> Array:
    """Add each copy's loss to the loss of the row it was copied from.

    The mean over the batch is then the sum over rows and copies divided by N: a copy counts as much as a row.

    Args:
        losses: float32 [N].
        of_copies: float32 [n], n up to N.

    Returns:
        float32 [N].
    """
    return losses.at[: of_copies.shape[0]].add(of_copies)


def weigh_as_mean(of_copies: Array, num_rows: int) -> Array:
    """Scale a term of the n copies so that, added to their rows, it enters the mean over N rows as its mean over the copies.

    A weight from a paper's formula then does not depend on the poison rate.

    Args:
        of_copies: float32 [n].
        num_rows: N.

    Returns:
        float32 [n], N / n times as large.
    """
    return of_copies * jnp.float32(num_rows / of_copies.shape[0])
