"""The network of the CIFAR-10 speed runs (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 2).

It trains to a useful accuracy in a few epochs, which makes experiments on all of CIFAR-10 possible without an accelerator: a
2x2 convolution whose fixed kernel whitens patches of the training images, three blocks of two 3x3 convolutions with a 2x2
max-pool between them, a global max-pool and a linear layer on ninths of the pooled features. Activations are GELUs.
Normalisations have a momentum of 0.4 for the new value; the recipe "speedrun" keeps their scales at 1, as published.

The whitening kernel is no parameter. It lies with the running statistics, so it is saved and restored with them. `init` cannot
know the data, so it whitens patches of neighbouring pixels whose correlation is typical of photographs; `whiten`, which
`Model.prepare` calls, replaces that by the whitening of given images.

Widths other than 64 scale the channels of the blocks (64, 256, 256), not the whitening filters: two for each value of a patch,
one with each sign.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.layers import (
    BatchNorm,
    Classifier,
    Convolution,
    Taps,
    along,
    convolve,
    gelu,
    global_max,
    layout_of,
    max_pool,
    parameter,
    scale_channels,
)
from bdjax.types import Array, PyTree

CHANNELS = (64, 256, 256)
"""Channels of the blocks at width 64."""
LEAST_EIGENVALUE = 5e-4
"""Added to the eigenvalues of the patches' covariance, so that directions without variance are not amplified."""
PIXEL_CORRELATION, COLOR_CORRELATION = 0.95, 0.9
"""Between neighbouring pixels and between colours of the images that `init` assumes, whose pixels have mean 0.5."""
PIXEL_DEVIATION = 0.25


def whiten(variables: PyTree, images: Array) -> PyTree:
    """Replaces the kernel of the first layer by the one that whitens 2x2 patches of these images.

    Channels are standardised first, as is usual; the kernel then has the eigenvectors of the patches' second moments over the
    roots of their eigenvalues, and their negatives.

    Args:
        variables: of the network, for one member.
        images: float32 [N, H, W, C] in [0, 1]; a few thousand training images suffice.

    Returns:
        The variables, with other constants in "batch_stats".
    """
    mean = jnp.mean(images, (0, 1, 2))
    deviation = jnp.std(images, (0, 1, 2)) + 1e-4  # images of one colour have none
    standard = (images - mean[None, None, None]) / deviation[None, None, None]
    patches = jnp.concatenate([standard[:, i : i + n, j : j + m] for i, j, n, m in _corners(images)], axis=-1)
    patches = patches.reshape(-1, patches.shape[-1])
    moments = lax.dot_general(patches, patches, (((0,), (0,)), ((), ()))) / len(patches)
    values, vectors = jnp.linalg.eigh(moments)
    # The sign of an eigenvector is arbitrary and may differ between machines; both signs are filters, but in some order.
    vectors = vectors * jnp.where(jnp.sum(vectors, axis=0) < 0, -1.0, 1.0)[None]
    constants = _constants(vectors / jnp.sqrt(values + LEAST_EIGENVALUE)[None], mean, deviation)
    statistics = {**variables["batch_stats"], "whitening": constants}
    return {**variables, "batch_stats": statistics}


def _corners(images: Array) -> list[tuple[int, int, int, int]]:
    height, width = images.shape[1] - 1, images.shape[2] - 1
    return [(i, j, height, width) for i in range(2) for j in range(2)]


def _constants(directions: Array, mean: Array, deviation: Array) -> dict[str, Array]:
    """Filters for standardised patches -> kernel [2, 2, C, 8 C] and offset [8 C] for images.

    Args:
        directions: float32 [4 C, 4 C], a filter in each column, patches ordered by row, column, channel.
        mean: float32 [C].
        deviation: float32 [C], above 0.
    """
    filters = jnp.concatenate([directions, -directions], axis=1)
    kernel = filters.reshape(2, 2, len(mean), -1) / deviation[None, None, :, None]
    return {"kernel": kernel, "offset": -jnp.einsum("ijcf,c->f", kernel, mean)}


def assumed(channels: int) -> dict[str, Array]:
    """Constants without images: the cosines that whiten patches of the assumed correlation."""

    def cosines(size: int) -> np.ndarray:
        place, wave = np.arange(size) + 0.5, np.arange(size)
        basis = np.cos(np.pi / size * place[:, None] * wave[None, :])
        return basis / np.linalg.norm(basis, axis=0)

    def correlation(size: int, neighbours: float) -> np.ndarray:
        return np.full((size, size), neighbours) + (1 - neighbours) * np.eye(size)

    sizes = ((2, PIXEL_CORRELATION), (2, PIXEL_CORRELATION), (channels, COLOR_CORRELATION))
    basis, moments = np.ones((1, 1)), np.ones((1, 1))
    for size, neighbours in sizes:
        basis, moments = np.kron(basis, cosines(size)), np.kron(moments, correlation(size, neighbours))
    values = np.einsum("if,ij,jf->f", basis, moments, basis)
    directions = jnp.asarray(basis / np.sqrt(values + LEAST_EIGENVALUE)[None], jnp.float32)
    return _constants(directions, jnp.full(channels, 0.5), jnp.full(channels, PIXEL_DEVIATION))


def _identity(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """As many filters as there are inputs pass their input on; the others are PyTorch's default, uniform in ±1/sqrt(fan in)."""
    size, _, inputs, features = shape
    bound = (size * size * inputs) ** -0.5
    kernel = jax.random.uniform(key, shape, dtype, -bound, bound)
    passed = min(inputs, features)
    identity = jnp.zeros((size, size, inputs, passed), dtype).at[size // 2, size // 2].set(jnp.eye(inputs, passed))
    return kernel.at[..., :passed].set(identity)


class Whitening(Convolution):
    """A 2x2 convolution without padding, of the constants `kernel` and `offset`, with a trained bias, initially 0."""

    lowering: Lowering

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axis = layout_of(self.lowering).channel_axis
        channels = x.shape[axis]
        kernel = self.variable("batch_stats", "kernel", lambda: assumed(channels)["kernel"])
        offset = self.variable("batch_stats", "offset", lambda: assumed(channels)["offset"])
        bias = parameter(self, "bias", nn.initializers.zeros, (8 * channels,))
        y = convolve(x, kernel.value.astype(x.dtype), stride=1, padding=0, lowering=self.lowering)
        return y + along((offset.value + bias).astype(x.dtype), axis)


class IdentityConv(Convolution):
    """A 3x3 convolution of padding 1 without bias, which initially passes its input on: see `_identity`."""

    features: int
    lowering: Lowering

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[layout_of(self.lowering).channel_axis], self.features)
        kernel = parameter(self, "kernel", _identity, shape)
        return convolve(x, kernel.astype(x.dtype), stride=1, padding=1, lowering=self.lowering)


class SpeedrunNet(nn.Module):
    """Taps: stage1 to stage3 after the blocks ([N, 15, 15, w], [N, 7, 7, 4w] and [N, 3, 3, 4w] for 32x32 pixels), stage4
    [N, 1, 1, 4w] the pooled features over 9.

    Groups: group1 to group3, each with the output of its second convolution, and the same after normalisation, before GELU."""

    channels: tuple[int, int, int]
    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, images: Array, *, train: bool, edits=None):
        taps = Taps(self.lowering, edits)
        layout = layout_of(self.lowering)

        def norm(name: str) -> BatchNorm:
            return BatchNorm(self.lowering, epsilon=1e-12, momentum=0.4, name=name)

        x = layout.from_nhwc(images.astype(self.compute_dtype))
        x = gelu(Whitening(self.lowering, name="whitening")(x))
        for number, features in enumerate(self.channels, start=1):
            block = f"stage{number}"
            x = IdentityConv(features, self.lowering, name=f"{block}_conv1")(x)
            if min(x.shape[axis] for axis in layout.spatial_axes) > 1:
                x = max_pool(x, layout.spatial_axes)
            x = gelu(norm(f"{block}_norm1")(x, train=train))
            x = taps.group(f"group{number}", IdentityConv(features, self.lowering, name=f"{block}_conv2")(x))
            last = norm(f"{block}_norm2")
            x = last(x, train=train)
            taps.before_relu(f"group{number}", x, last)
            x = taps(block, gelu(x))
        pooled = global_max(x.astype(jnp.float32), layout.spatial_axes) / 9
        x = taps("stage4", pooled.astype(x.dtype))
        logits = Classifier(self.num_classes, self.lowering, has_bias=False, name="classifier")(x)
        return logits, taps.finish()


def _speedrun(num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> SpeedrunNet:
    channels = tuple(scale_channels(count, width) for count in CHANNELS)
    return SpeedrunNet(channels, num_classes, lowering, compute_dtype)


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], SpeedrunNet]] = {"speedrun": _speedrun}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
