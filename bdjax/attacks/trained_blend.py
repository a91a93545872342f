"""Triggers trained by gradient descent through a frozen network: a pattern, and optionally its mask."""

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
"""(context, images float32 [B, H, W, C], the same images triggered) -> float32 []. The context is any pytree the loss needs."""


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Descent:
    """How a trigger is trained. Only changes of the static fields cause a new compilation."""

    steps: int
    learning_rate: float
    mask_bound: float
    """upper bound of the mask, whose lower bound is 0"""
    batch_size: int = _static()
    mask_is_trained: bool = _static()
    betas: tuple[float, float] = _static((0.9, 0.999))
    """decay rates of Adam's moments"""


class _Free(NamedTuple):
    """The trained variables."""

    mask: Array
    """float32 [H, W, 1], clipped to its range after each step"""
    logits: Array
    """float32 [H, W, C]: the pattern is their sigmoid, which cannot leave [0, 1]"""


def random_soft_blend(key: Key, image_shape: tuple[int, int, int], mask_bound: float) -> MaskedBlend:
    """Draw a pattern uniform in [0, 1], and a mask over the whole image, uniform in [0, 1] and clipped at the bound.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C).
        mask_bound: c in [0, 1]; the mask's mean is c - c^2 / 2.

    Returns:
        A trigger with opacity 1.

    Raises:
        InputError: the bound is not in [0, 1].

    References:
        The public code of CKD and RobustKD, `create_patch.py`: c is 0.5 and 0.2.
    """
    if not 0.0 <= mask_bound <= 1.0:
        raise InputError(f"mask bound {mask_bound:g} must be from 0 to 1")
    height, width, _ = image_shape
    mask_key, pattern_key = jax.random.split(key)
    return MaskedBlend(
        mask=jnp.minimum(jax.random.uniform(mask_key, (height, width, 1)), jnp.float32(mask_bound)),
        pattern=jax.random.uniform(pattern_key, image_shape),
        opacity=jnp.float32(1.0),
    )


def train_blend(
    key: Key, images: np.ndarray, start: MaskedBlend, loss: TriggerLoss, context: PyTree, descent: Descent
) -> MaskedBlend:
    """Train a trigger with Adam to minimise a loss of triggered images, on random batches.

    Args:
        key: draws each batch by its step number, so a longer training starts with the batches of a shorter one.
        images: uint8 [N, H, W, C], the images that the trigger is put on.
        start: the initial trigger, with opacity 1.
        loss: the loss; calls with the same function object share a compilation.
        context: its first argument, for instance a network's variables.
        descent: the training settings.

    Returns:
        The trigger after the last step.

    Raises:
        InputError: there are no images, or a training setting is out of range.
    """
    if len(images) == 0:
        raise InputError("there are no images to train the trigger on")
    if descent.steps < 0 or descent.batch_size < 1 or descent.learning_rate <= 0:
        raise InputError(
            f"training the trigger: steps {descent.steps} must be at least 0, batch size {descent.batch_size} at "
            f"least 1 and learning rate {descent.learning_rate:g} above 0"
        )
    if descent.steps == 0:
        return start
    return _descend(key, jnp.asarray(images), start, context, descent, loss)


@partial(jax.jit, static_argnames="loss")
def _descend(key, images, start: MaskedBlend, context, descent: Descent, loss: TriggerLoss) -> MaskedBlend:
    optimiser = optax.adam(descent.learning_rate, *descent.betas)
    batch_size = min(descent.batch_size, images.shape[0])
    # A pattern that starts at 0 or 1 would have no gradient.
    free = _Free(start.mask, jax.scipy.special.logit(jnp.clip(start.pattern, 0.01, 0.99)))

    def trigger(free: _Free) -> MaskedBlend:
        mask = free.mask if descent.mask_is_trained else start.mask
        return MaskedBlend(mask, jax.nn.sigmoid(free.logits), start.opacity)

    def batch_loss(free: _Free, batch: Array) -> Array:
        return loss(context, batch, masked_blend.apply_to_batch(trigger(free), batch))

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
