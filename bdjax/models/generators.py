"""Encoder-decoders from an image to another image of the same size: the generators of Input-Aware Dynamic.

The encoder has stages of two 3x3 convolutions and a max-pool, the decoder as many stages of an upsampling and two
convolutions, without skip connections. Batch normalisation follows every convolution; the last one has a tanh instead of ReLU.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from bdjax.choices import Lowering
from bdjax.models.layers import BatchNorm, Conv, layout_of, max_pool, relu
from bdjax.types import Array, Key, PyTree

MOMENTUM = 0.05
"""Momentum of the running statistics, as in the code released with Input-Aware Dynamic."""


@dataclass(frozen=True)
class Generator:
    """The architecture of a generator. Hashable, so it can be a static argument."""

    channels: int
    """channels of the output image"""
    width: int
    """channels of the first stage, doubled in each further stage: 16 in the paper for MNIST, 32 for colour"""
    stages: int
    """number of halvings of the image size, at least 1: 2 in the paper for MNIST, 3 for colour"""
    lowering: Lowering
    """how convolutions are computed"""


def init(generator: Generator, key: Key, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
    """Initialise the variables.

    Args:
        generator: the architecture.
        key: random key.
        image_shape: (H, W, C) of the input.

    Returns:
        A dict with "params" and "batch_stats".
    """
    return _EncoderDecoder(generator).init(key, jnp.zeros((1, *image_shape), jnp.float32), train=False)


def generate(generator: Generator, variables: PyTree, images: Array, *, train: bool) -> tuple[Array, PyTree]:
    """Generate an image from each image.

    Args:
        generator: the architecture.
        variables: from `init`.
        images: float32 [N, H, W, C] in [0, 1].
        train: whether to normalise by the statistics of the batch and update the running statistics.

    Returns:
        (float32 [N, H, W, channels] in (0, 1), the variables after the call).
    """
    module = _EncoderDecoder(generator)
    if not train:
        return module.apply(variables, images, train=False), variables
    generated, updated = module.apply(variables, images, train=True, mutable=["batch_stats"])
    return generated, {**variables, **updated}


class _EncoderDecoder(nn.Module):
    generator: Generator

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        generator = self.generator
        lowering = generator.lowering

        def convolve(x: jax.Array, features: int) -> jax.Array:
            return BatchNorm(lowering, momentum=MOMENTUM)(Conv(features, 3, 1, lowering)(x), train=train)

        layout = layout_of(lowering)
        x = layout.from_nhwc(images)
        sizes, widths = [], [generator.width * 2**stage for stage in range(generator.stages)]
        for width in widths:
            x = relu(convolve(relu(convolve(x, width)), width))
            sizes.append(x.shape[1:3])
            x = max_pool(x, layout.spatial_axes)
        x = relu(convolve(x, widths[-1]))
        for stage in reversed(range(generator.stages)):
            x = _upsample(x, sizes[stage], layout.spatial_axes)
            x = relu(convolve(x, widths[stage]))
            x = convolve(x, widths[stage - 1] if stage else generator.channels)
            x = relu(x) if stage else x
        # Slightly narrower than [0, 1], so that 0 and 1 are not reached where tanh rounds to 1.
        return 0.5 + 0.5 * jnp.tanh(layout.to_nhwc(x)) / (1 + 1e-6)


def _upsample(x: jax.Array, size: tuple[int, int], axes: tuple[int, int]) -> jax.Array:
    """Bilinear with aligned pixel edges, PyTorch's default."""
    for axis, length in zip(axes, size, strict=True):
        if length != 2 * x.shape[axis]:
            x = jax.image.resize(x, (*x.shape[:axis], length, *x.shape[axis + 1 :]), "linear", antialias=False)
            continue
        first, last = (jax.lax.slice_in_dim(x, start, start + 1, axis=axis) for start in (0, x.shape[axis] - 1))
        before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, x.shape[axis], axis=axis), last], axis)
        doubled = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = doubled.reshape(*x.shape[:axis], length, *x.shape[axis + 1 :])
    return x
