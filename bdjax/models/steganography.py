"""A network that writes a string of bits into an image, and one that reads it: StegaStamp's pair, as ISSBA uses it.

The encoder is a U-net: it sees the image beside the bits and gives what to add. The decoder is a stack of convolutions.
Both halve the image several times: four times at 32x32 and twice at 28x28 in the public ports of ISSBA.

Two differences from those. The decoder has no spatial transformer in front: that one straightens photographs of printed
images, and nothing is bent here. And 3x3 convolutions stand behind each upsampling in the place of 2x2 ones: they can do
all that those can, and have a fast form on every backend.

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

from bdjax.models.layers import Conv, Lowering, layout_of, relu
from bdjax.types import Array, Key, PyTree


@dataclass(frozen=True)
class BitNetworks:
    """Which pair: everything that shapes depend on. Equal values make equal networks, so it can be a static argument."""

    num_bits: int
    """length of the string"""
    width: int
    """channels at full resolution; 32 in the papers"""
    stages: int
    """of stride 2, at least 1; an image has room for k of them if its sides are at least 2^k pixels"""
    lowering: Lowering
    """how convolutions are computed"""


def init(networks: BitNetworks, key: Key, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
    """Fresh parameters of both: kernels normal with the variance of He et al. 2015 (fan in), biases 0.

    Args:
        networks: which pair.
        key: a key of `jax.random.key`.
        image_shape: (H, W, C).

    Returns:
        A dict with "encoder" and "decoder".
    """
    # Drawn at once, since to compile a call of the generator for each of thirty arrays takes longer than to train.
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
    """What to add to each image so that it carries its bits.

    Args:
        networks: which pair.
        params: the encoder's.
        images: float32 [N, H, W, C] in [0, 1].
        bits: float32 [N, b], zeros and ones.

    Returns:
        float32 [N, H, W, C], residuals without bounds.
    """
    return _Encoder(networks).apply({"params": params}, images, bits)


def decode(networks: BitNetworks, params: PyTree, images: Array) -> Array:
    """The bits of each image: float32 [N, H, W, C] in [0, 1] -> logits float32 [N, b], positive for a one.

    Args:
        networks: which pair.
        params: the decoder's.
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
        entering = layout.from_nhwc(jnp.concatenate([plane, images - 0.5], axis=3))
        x = block(entering, networks.width)
        before = [x]
        for stage in range(networks.stages):
            x = block(x, networks.width * 2**stage, stride=2)
            before.append(x)
        before.pop()
        for stage, skipped in reversed(list(enumerate(before))):
            features = networks.width * 2 ** max(stage - 1, 0)
            x = block(_upsample(x, skipped, layout.spatial_axes), features)
            beside = [skipped, x] if stage else [skipped, x, entering]
            x = block(jnp.concatenate(beside, layout.channel_axis), features)
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
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        shape = tuple(self.features if axis == layout_of(self.lowering).channel_axis else 1 for axis in range(4))
        return x + bias.reshape(shape)


def _upsample(x: Array, like: Array, spatial_axes: tuple[int, int]) -> Array:
    """Every pixel twice in both directions, cut to the size of `like`, which may be odd."""
    for axis in spatial_axes:
        x = jax.lax.slice_in_dim(jnp.repeat(x, 2, axis), 0, like.shape[axis], axis=axis)
    return x
