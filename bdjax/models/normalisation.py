"""Normalisation of pixels as a part of the network, so that every caller passes images in [0, 1]."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from bdjax.errors import InputError
from bdjax.types import Model, ModelOutput, PyTree


def normalised(model: Model, mean: Sequence[float], std: Sequence[float]) -> Model:
    """A network whose images are first normalised: (x - mean) / std. Taps, groups and variables stay the same.

    Args:
        model: takes normalised images.
        mean: of every channel, in units of [0, 1].
        std: of every channel, positive.

    Returns:
        A network that takes images in [0, 1].

    Raises:
        InputError: numbers of different count, that are not finite, or a deviation that is not positive; or the network has a
            normalisation already.
    """
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if len(mean) != len(std) or not mean:
        raise InputError(
            f"normalisation: {len(mean)} means and {len(std)} deviations; one of each is needed for every channel"
        )
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise InputError(f"normalisation: mean {mean} and std {std} must be finite, and std positive")
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
