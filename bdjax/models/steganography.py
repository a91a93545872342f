"""The encoder and decoder of StegaStamp, which hide a string of bits in an image and read it, as used by ISSBA.

The encoder is a U-net from the image and the bits to a residual. The decoder is a stack of convolutions. Both halve the image
several times: four times at 32x32 and twice at 28x28 in the public ports of ISSBA.

There are two differences from those. The decoder has no spatial transformer in front, which straightens photographs of printed
images and is not needed here. And each upsampling is followed by 3x3 instead of 2x2 convolutions, which are more general and
fast on every backend.

References:
    Tancik et al. 2020, StegaStamp: Invisible Hyperlinks in Physical Photographs, section 3.
    Li et al. 2021, Invisible Backdoor Attack with Sample-Specific Triggers, section 4.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bdjax.choices import Lowering
from bdjax.models.layers import Conv, layout_of, parameter, relu
from bdjax.types import Array, Key, PyTree


@dataclass(frozen=True)
class BitNetworks:
    """The architecture of an encoder and decoder. Hashable, so it can be a static argument."""

    num_bits: int
    """length of the string of bits"""
    width: int
    """channels at full resolution; 32 in the papers"""
    stages: int
    """number of convolutions of stride 2, at least 1; k stages need image sides of at least 2^k pixels"""
    lowering: Lowering
    """how convolutions are computed"""


def init(networks: BitNetworks, key: Key, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
    """Initialise the parameters of both: kernels normal with the variance of He et al. 2015 (fan in), biases 0.

    Args:
        networks: the architecture.
        key: random key.
        image_shape: (H, W, C).

    Returns:
        A dict with "encoder" and "decoder".
    """
    # One draw for all arrays: compiling a draw for each of thirty shapes takes longer than the training.
    shapes = jax.eval_shape(lambda: _init_by_flax(networks, image_shape))
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    pieces = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
    scaled = [
        piece.reshape(leaf.shape) * math.sqrt(2.0 / math.prod(leaf.shape[:-1]))
        if len(leaf.shape) > 1
        else jnp.zeros(leaf.shape, leaf.dtype)
        for piece, leaf in zip(pieces, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, scaled)


def _init_by_flax(networks: BitNetworks, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
    key = jax.random.key(0)
    images = jnp.zeros((1, *image_shape), jnp.float32)
    bits = jnp.zeros((1, networks.num_bits), jnp.float32)
    return {
        "encoder": _Encoder(networks).init(key, images, bits)["params"],
        "decoder": _Decoder(networks).init(key, images)["params"],
    }


def encode(networks: BitNetworks, params: PyTree, images: Array, bits: Array) -> Array:
    """The residuals to add to the images so that they carry the bits.

    Args:
        networks: the architecture.
        params: parameters of the encoder.
        images: float32 [N, H, W, C] in [0, 1].
        bits: float32 [N, b], zeros and ones.

    Returns:
        float32 [N, H, W, C], unbounded.
    """
    return _Encoder(networks).apply({"params": params}, images, bits)


def decode(networks: BitNetworks, params: PyTree, images: Array) -> Array:
    """The bits of each image, as logits float32 [N, b], positive for a one.

    Args:
        networks: the architecture.
        params: parameters of the decoder.
        images: float32 [N, H, W, C] in [0, 1].
    """
    return _Decoder(networks).apply({"params": params}, images)


class _Encoder(nn.Module):
    networks: BitNetworks

    @nn.compact
    def __call__(self, images: Array, bits: Array) -> Array:
        networks = self.networks
        layout = layout_of(networks.lowering)

        def block(x: Array, features: int, stride: int = 1) -> Array:
            return relu(_BiasedConv(features, 3, stride, networks.lowering)(x))

        plane = relu(nn.Dense(images[0].size)(bits - 0.5)).reshape(images.shape)
        inputs = layout.from_nhwc(jnp.concatenate([plane, images - 0.5], axis=3))
        x = block(inputs, networks.width)
        skips = [x]
        for stage in range(networks.stages):
            x = block(x, networks.width * 2**stage, stride=2)
            skips.append(x)
        skips.pop()
        for stage, skip in reversed(list(enumerate(skips))):
            features = networks.width * 2 ** max(stage - 1, 0)
            x = block(_upsample(x, skip, layout.spatial_axes), features)
            joined = [skip, x] if stage else [skip, x, inputs]
            x = block(jnp.concatenate(joined, layout.channel_axis), features)
        return layout.to_nhwc(_BiasedConv(images.shape[3], 1, 1, networks.lowering)(x))


class _Decoder(nn.Module):
    networks: BitNetworks

    @nn.compact
    def __call__(self, images: Array) -> Array:
        networks = self.networks
        layout = layout_of(networks.lowering)
        x = layout.from_nhwc(images - 0.5)
        for stage in range(networks.stages):
            features = networks.width * (1, 2, 2, 4)[min(stage, 3)]
            x = relu(_BiasedConv(features, 3, 2, networks.lowering)(x))
            if stage < 2:
                x = relu(_BiasedConv(features, 3, 1, networks.lowering)(x))
        x = layout.to_nhwc(x)
        x = relu(nn.Dense(16 * networks.width)(x.reshape(len(images), -1)))
        return nn.Dense(networks.num_bits)(x)


class _BiasedConv(nn.Module):
    features: int
    size: int
    stride: int
    lowering: Lowering

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, self.size, self.stride, self.lowering)(x)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        shape = tuple(self.features if axis == layout_of(self.lowering).channel_axis else 1 for axis in range(4))
        return x + bias.reshape(shape)


def _upsample(x: Array, like: Array, spatial_axes: tuple[int, int]) -> Array:
    """Repeat every pixel in both directions and crop to the size of `like`, which may be odd."""
    for axis in spatial_axes:
        x = jax.lax.slice_in_dim(jnp.repeat(x, 2, axis), 0, like.shape[axis], axis=axis)
    return x
