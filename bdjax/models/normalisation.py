"""Normalisation of pixels as a part of the network, so that every caller passes images in [0, 1]."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.types import Model, ModelOutput, PyTree


def per_channel(
    mean: Sequence[float] | float, std: Sequence[float] | float, channels: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the deviation of every channel, checked.

    Args:
        mean: numbers.
        std: numbers.
        channels: C of the images, which a single number stands for; None if `mean` and `std` have a number for every channel.

    Returns:
        C means and C deviations.

    Raises:
        InputError: numbers of another count, that are not finite, or a deviation that is not positive.
    """
    try:
        mean, std = (tuple(map(float, np.atleast_1d(values))) for values in (mean, std))
    except (TypeError, ValueError):
        raise InputError(f"normalisation: mean {mean} and std {std} must be numbers") from None
    if channels is not None:
        mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    if not len(mean) == len(std) == (channels or len(mean)) or not mean:
        needed = "every channel needs both" if channels is None else f"images have {channels} channels"
        raise InputError(f"normalisation: {len(mean)} means and {len(std)} deviations; {needed}")
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise InputError(f"normalisation: mean {mean} and std {std} must be finite, and std positive")
    return mean, std


def normalised(model: Model, mean: Sequence[float], std: Sequence[float]) -> Model:
    """A network whose images are first normalised: (x - mean) / std. Taps, groups and variables stay the same.

    Args:
        model: takes normalised images.
        mean: of every channel, in units of [0, 1].
        std: of every channel, positive.

    Returns:
        A network that takes images in [0, 1].

    Raises:
        InputError: numbers that are no normalisation; or the network has a normalisation already.
    """
    mean, std = per_channel(mean, std)
    if model.architecture and model.architecture.mean:
        raise InputError(f"{model.description}: has a normalisation already")

    def normalise(images: jax.Array) -> jax.Array:
        factor = 1 / jnp.asarray(std, jnp.float32)
        return (images - jnp.asarray(mean, jnp.float32)[None, None, None]) * factor[None, None, None]

    def apply(variables: PyTree, images: jax.Array, *, train: bool, edits=None) -> ModelOutput:
        return model.apply(variables, normalise(images), train=train, edits=edits)

    def convolutions(variables: PyTree, images: jax.Array, offsets: Mapping[str, jax.Array] = {}):
        return model.convolutions(variables, normalise(images), offsets)

    def prepare(variables: PyTree, images: jax.Array) -> PyTree:
        return model.prepare(variables, normalise(images))

    return model._replace(
        apply=apply,
        description=f"{model.description}, pixels normalised by mean {mean} and std {std}",
        prepare=prepare if model.prepare else None,
        convolutions=convolutions if model.convolutions else None,
        architecture=model.architecture and model.architecture._replace(mean=mean, std=std),
    )
