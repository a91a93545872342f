"""Triggers found by gradient descent through a frozen network: a pattern, and its mask if that is to be trained too."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bdjax.errors import InputError
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Key, PyTree

TriggerLoss = Callable[[PyTree, Array, Array], Array]
"""(whatever it needs, images float32 [B, H, W, C], the same ones triggered) -> float32 []."""


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Descent:
    """How a trigger is trained. Searches that differ in numbers only share a compilation."""

    steps: int
    learning_rate: float
    mask_bound: float
    """the mask stays in [0, this]"""
    batch_size: int = _static()
    mask_is_trained: bool = _static()
    betas: tuple[float, float] = _static((0.9, 0.999))
    """of Adam"""


class _Free(NamedTuple):
    mask: Array
    """float32 [H, W, 1], clipped to its range after each step"""
    logits: Array
    """float32 [H, W, C]: the pattern is their logistic function, which cannot leave [0, 1]"""


def random_soft_blend(key: Key, image_shape: tuple[int, int, int], mask_bound: float) -> MaskedBlend:
    """Draw a pattern uniform in [0, 1] under a mask over the whole image, uniform in [0, 1] and cut off at the bound.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C).
        mask_bound: c in [0, 1]; the mask's mean is c - c^2 / 2.

    Returns:
        A trigger of opacity 1.

    Raises:
        InputError: the bound is not in [0, 1].

    References:
        The public code of CKD and RobustKD, `create_patch.py`: c is 0.5 and 0.2.
    """
    if not 0.0 <= mask_bound <= 1.0:
        raise InputError(f"mask bound {mask_bound:g}: it is a share of the pattern in the image, from 0 to 1")
    height, width, _ = image_shape
    mask_key, pattern_key = jax.random.split(key)
    return MaskedBlend(
        mask=jnp.minimum(jax.random.uniform(mask_key, (height, width, 1)), jnp.float32(mask_bound)),
        pattern=jax.random.uniform(pattern_key, image_shape),
        opacity=jnp.float32(1.0),
    )


def train_blend(
    key: Key, images: np.ndarray, start: MaskedBlend, loss: TriggerLoss, given: PyTree, descent: Descent
) -> MaskedBlend:
    """Minimise a loss of triggered images over the trigger, with Adam, on random batches.

    Args:
        key: draws the batches, each by its number: more steps go on from where fewer end.
        images: uint8 [N, H, W, C], what the trigger is put on.
        start: where the search begins, of opacity 1.
        loss: what is minimised; a function that was made once, since calls with the same one share a compilation.
        given: its first argument: a network's variables, for instance.
        descent: how.

    Returns:
        The trigger after the last step.

    Raises:
        InputError: there are no images, or a number of steps, a batch size or a learning rate that cannot be.
    """
    if len(images) == 0:
        raise InputError("a trigger is to be trained, but there are no images to train it on")
    if descent.steps < 0 or descent.batch_size < 1 or descent.learning_rate <= 0:
        raise InputError(
            f"training of the trigger: steps {descent.steps} must be at least 0, batch size {descent.batch_size} at "
            f"least 1 and learning rate {descent.learning_rate:g} above 0"
        )
    if descent.steps == 0:
        return start
    return _descend(key, jnp.asarray(images), start, given, descent, loss)


@partial(jax.jit, static_argnames="loss")
def _descend(key, images, start: MaskedBlend, given, descent: Descent, loss: TriggerLoss) -> MaskedBlend:
    optimiser = optax.adam(descent.learning_rate, *descent.betas)
    batch_size = min(descent.batch_size, images.shape[0])
    # A pattern that begins at 0 or 1 would have no gradient.
    free = _Free(start.mask, jax.scipy.special.logit(jnp.clip(start.pattern, 0.01, 0.99)))

    def trigger(free: _Free) -> MaskedBlend:
        mask = free.mask if descent.mask_is_trained else start.mask
        return MaskedBlend(mask, jax.nn.sigmoid(free.logits), start.opacity)

    def batch_loss(free: _Free, batch: Array) -> Array:
        return loss(given, batch, masked_blend.apply_to_batch(trigger(free), batch))

    def step(number, carry):
        free, optimiser_state = carry
        rows = jax.random.randint(jax.random.fold_in(key, number), (batch_size,), 0, images.shape[0])
        gradient = jax.grad(batch_loss)(free, images[rows].astype(jnp.float32) / 255.0)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
            change, optimiser_state = optimiser.update(gradient, optimiser_state)
        moved = jax.tree.map(jnp.add, free, change)
        return moved._replace(mask=jnp.clip(moved.mask, 0.0, descent.mask_bound)), optimiser_state

    free, _ = lax.fori_loop(0, descent.steps, step, (free, optimiser.init(free)))
    return trigger(free)
