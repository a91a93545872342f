"""Writes a network as StableHLO by `jax.export`: weights and preprocessing inside, any number of images at a time."""

import pathlib

import jax
import jax.numpy as jnp
from jax import export

from bdjax import atomic
from bdjax.types import Model, PyTree

PLATFORMS = ("cpu", "cuda", "tpu")
"""What the program is compiled for where it runs."""


def to_stablehlo(model: Model, variables: PyTree, image_shape: tuple[int, int, int]) -> bytes:
    """Export a network as a serialised StableHLO program, from images to logits.

    `jax.export.deserialize(data).call(images)` runs it, without bdjax and without Flax.

    Args:
        model: with the native lowering, whose program is the same for every number of images.
        variables: of a single network.
        image_shape: (H, W, C).

    Returns:
        The program: float32 [N, H, W, C] in [0, 1] -> float32 [N, K], for any N.
    """

    def logits(images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False).logits

    shape = export.symbolic_shape("rows, {}, {}, {}".format(*image_shape))
    program = export.export(jax.jit(logits), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.float32))
    return bytes(program.serialize())


def write(path: pathlib.Path, model: Model, variables: PyTree, image_shape: tuple[int, int, int]) -> None:
    """Write `to_stablehlo`'s program to a file; arguments as there."""
    atomic.write_bytes(path, to_stablehlo(model, variables, image_shape))
