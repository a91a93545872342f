"""Poisoning inside the training step where poisoned rows are added: some rows of a batch appear a second time, triggered.

`batch_poisoning.py` is for attackers whose poisoned rows take the place of the clean ones.
"""

import jax.numpy as jnp

from bdjax.attacks.batch_poisoning import change_rows, shares
from bdjax.attacks.contract import Apply
from bdjax.errors import InputError
from bdjax.types import Array, Key, PyTree


def trigger_first_rows(apply: Apply, params: PyTree, images: Array, labels: Array, key: Key, rate: float) -> Array:
    """The first floor(rate N) rows of a batch, and at least one, with the trigger on them.

    Args:
        apply: the trigger.
        params: its parameters.
        images: float32 [N, H, W, C] in [0, 1].
        labels: int32 [N], the original ones.
        key: every copy gets one of its own from it.
        rate: share of the rows, above 0 and up to 1.

    Returns:
        float32 [n, H, W, C], copy i being of row i.

    Raises:
        InputError: the rate is no such share.
    """
    if not 0.0 < rate <= 1.0:
        raise InputError(f"poison rate {rate:g}: it is a share of the rows, above 0 and up to 1")
    count = shares(images.shape[0], rate, 0.0).poisoned
    return change_rows(apply, params, images[:count], labels[:count], key)


def add_to_own_rows(losses: Array, of_copies: Array) -> Array:
    """Add each copy's loss to that of the row it is a copy of, so that there are still as many as rows.

    The mean over the batch then is the sum over rows and copies divided by N: a copy counts as much as a row.

    Args:
        losses: float32 [N].
        of_copies: float32 [n], n up to N.

    Returns:
        float32 [N].
    """
    return losses.at[: of_copies.shape[0]].add(of_copies)


def weigh_as_mean(of_copies: Array, num_rows: int) -> Array:
    """Scale a term of the n copies such that, added to their rows, it enters the mean over N rows as its own mean.

    That is for terms that come with a weight in a paper's formula: it then does not depend on the poison rate.

    Args:
        of_copies: float32 [n].
        num_rows: N.

    Returns:
        float32 [n], N / n as large.
    """
    return of_copies * jnp.float32(num_rows / of_copies.shape[0])
