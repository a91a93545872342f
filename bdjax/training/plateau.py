"""The rule of PyTorch's `ReduceLROnPlateau` (mode "min", threshold relative) as a pure function of its state.

Optax's `reduce_on_plateau` differs: it cuts when the number of bad epochs *equals* the patience, whereas PyTorch waits until it
*exceeds* it; and it counts updates, not epochs.
"""

from typing import NamedTuple

import jax.numpy as jnp

from bdjax.types import Array

MINIMUM_CHANGE = 1e-8
"""PyTorch's `eps`: smaller cuts of the learning rate are not made."""


class PlateauState(NamedTuple):
    learning_rate: Array
    """float32 []"""
    best: Array
    """float32 []: the lowest value so far"""
    bad_epochs: Array
    """int32 []: epochs since the lowest value, or since the last cut"""


def init_plateau(learning_rate: float) -> PlateauState:
    """The state before the first epoch."""
    return PlateauState(
        jnp.asarray(learning_rate, jnp.float32), jnp.asarray(jnp.inf, jnp.float32), jnp.asarray(0, jnp.int32)
    )


def plateau_step(state: PlateauState, value: Array, *, factor: float, patience: int, threshold: float) -> PlateauState:
    """Update the learning rate after one epoch.

    Args:
        state: before the epoch.
        value: float32 [], the epoch's validation loss; NaN counts as a bad epoch.
        factor: what the learning rate is multiplied by.
        patience: number of bad epochs without a cut; the next bad epoch causes it.
        threshold: an epoch is good if `value < best * (1 - threshold)`.

    Returns:
        The state after it.
    """
    is_better = value < state.best * (1 - threshold)
    bad_epochs = jnp.where(is_better, 0, state.bad_epochs + 1)
    is_cut = bad_epochs > patience
    reduced = state.learning_rate * factor
    changes_enough = state.learning_rate - reduced > MINIMUM_CHANGE
    return PlateauState(
        learning_rate=jnp.where(is_cut & changes_enough, reduced, state.learning_rate),
        best=jnp.where(is_better, value, state.best),
        bad_epochs=jnp.where(is_cut, 0, bad_epochs),
    )
