"""The deliberately simple networks of the variance-based defense (VBD): too small to learn the classes well, large enough to
learn a trigger.

Networks are named by their layers, as in the paper's code: "10-10P" is two convolutions of 10 channels, the second followed by
a 2x2 max-pool. Each layer is a 3x3 convolution without padding or bias, batch normalisation and ReLU; then all pixels are
flattened into one fully connected layer, which therefore depends on positions in the image. The pattern detector is one such
layer without normalisation, with a single logit.

Weights start uniform in ±1/sqrt(fan in), PyTorch's default, as in the paper's code.

Pixels are not standardised: an unpadded convolution without bias followed by normalisation is invariant to a shift of its input
and to a scale that all channels share, and the published constants differ by 7 % between channels.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.facade import as_model
from bdjax.models.layers import (
    BATCH_MINOR,
    BatchNorm,
    Classifier,
    Conv,
    Taps,
    default_lowering,
    larger,
    layout_of,
    max_pool,
    parameter,
    relu,
    uniform_fan_in,
)
from bdjax.types import Model, PyTree

LAYERS = ("64P", "10-10P", "16-16P", "16P", "4-4P", "8-8P")
"""The first three are the paper's ensemble; the rest are for 8x8 pixels."""


def read_layers(text: str) -> tuple[tuple[int, bool], ...]:
    """(channels, whether a max-pool follows) of each layer: "10-10P" -> ((10, False), (10, True)).

    Raises:
        ValueError: if the text does not have this form.
    """
    layers = []
    for part in text.split("-"):
        number = part.removesuffix("P")
        if not number.isdecimal() or not int(number):
            raise ValueError(f"{text!r}: {part!r} is not a number of channels, followed by P for a max-pool")
        layers.append((int(number), part != number))
    return tuple(layers)


# ---- The first layer on a CPU --------------------------------------------------------------------------------------

PIXELS_AT_ONCE = 8 * 32 * 32
"""Of a first layer's input. On a CPU, steps and gradient images of 64P and 10-10P at 32x32 are faster with 4 or 8 images at
once than with 16."""


def images_at_once(count: int, height: int, width: int) -> int:
    """How many of a number of images of this size the first layer computes at a time: a power of two, or all."""
    return min(2 ** int(math.log2(max(1, PIXELS_AT_ONCE // (height * width)))), count)


class ConvKernel(nn.Module):
    """The parameters of a 3x3 `Conv` without the convolution: float32 [3, 3, channels, features]."""

    features: int
    channels: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, "kernel", uniform_fan_in, (3, 3, self.channels, self.features))


class FoldedNorm(nn.Module):
    """`BatchNorm` of maps that are not computed yet: from their statistics to (factor, offset), each float32 [features]."""

    features: int
    epsilon: float = BatchNorm.epsilon
    momentum: float = BatchNorm.momentum

    @nn.compact
    def __call__(self, moments: Callable[[], tuple[jax.Array, jax.Array, int]], *, train: bool):
        """`moments` returns the mean and biased variance of each map and their number of values; only called in training."""
        scale = parameter(self, "scale", nn.initializers.ones, (self.features,))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,), jnp.float32)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, (self.features,), jnp.float32)
        mean, variance = running_mean.value, running_variance.value
        if train:
            mean, variance, count = moments()
            if not self.is_initializing():
                unbiased = lax.stop_gradient(variance) * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (lax.stop_gradient(mean) - running_mean.value)
                running_variance.value += self.momentum * (unbiased - running_variance.value)
        factor = scale * lax.rsqrt(variance + self.epsilon)
        return factor, bias - mean * factor


def first_layer(images: jax.Array, features: int, pool: bool, *, normalise: bool, train: bool) -> jax.Array:
    """A network's first layer: `Conv`, optional `BatchNorm`, ReLU and max-pool fused, for a few images at a time.

    Nearly all the work of a simple network is on the maps of its first layer, which do not fit into any cache. Images are small
    in comparison, and the statistics of the maps follow from theirs: with m the mean of all 3x3 neighbourhoods and S the mean
    of their products, the map of a kernel w has the mean w m and the variance w S w - (w m)^2. So the statistics are known
    before any map is computed, and maps are computed, used and dropped for a few images at a time, and again for the gradient.
    This takes half as long as separate layers.

    Parameters and statistics are those of the separate layers.

    Args:
        images: float32 [N, H, W, C].
        features: of the convolution.
        pool: whether a max-pool follows.
        normalise: whether there is a batch normalisation.
        train: whether to normalise by these images' statistics.

    Returns:
        The activation, float32 [features, h, w, N].
    """
    kernel = ConvKernel(features, images.shape[3], name="stage1_conv")()
    matrix = jnp.transpose(kernel, (3, 0, 1, 2)).reshape(features, -1)
    count, at_once = len(images), images_at_once(*images.shape[:3])
    padding = -count % at_once  # images of zeros, which do not change any sum
    padded = jnp.concatenate([images, jnp.zeros((padding, *images.shape[1:]), images.dtype)])
    groups = padded.reshape(-1, at_once, *images.shape[1:])

    def moments() -> tuple[jax.Array, jax.Array, int]:
        number = count * (images.shape[1] - 2) * (images.shape[2] - 2)
        sums, products = lax.map(_moments, groups)
        mean = matrix @ (sums.sum(axis=0) / number)
        square = jnp.sum((matrix @ (products.sum(axis=0) / number)) * matrix, axis=1)
        return mean, larger(square - jnp.square(mean), jnp.zeros_like(square)), number

    folded, offset = matrix, jnp.zeros(features, jnp.float32)
    if normalise:
        factor, offset = FoldedNorm(features, name="stage1_norm")(moments, train=train)
        folded = matrix * factor[:, None]
    maps = lax.map(lambda group: _maps(folded, offset, group, pool), groups)  # [groups, features, h, w, at once]
    return jnp.moveaxis(maps, 0, 3).reshape(*maps.shape[1:4], -1)[..., :count]


def _neighbourhoods(images: jax.Array) -> jax.Array:
    """[n, H, W, C] -> [9 C, H - 2, W - 2, n], ordered by kernel row, then column, then channel."""
    x = jnp.transpose(images, (3, 1, 2, 0))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)])


def _moments(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over all neighbourhoods, [9 C], and over their products, [9 C, 9 C]."""
    near = _neighbourhoods(images)
    near = near.reshape(near.shape[0], -1)
    return near.sum(axis=1), lax.dot_general(near, near, (((1,), (1,)), ((), ())))


def _quarters(images: jax.Array) -> Iterator[jax.Array]:
    """The neighbourhoods of each of the four pixels that a 2x2 max-pool compares: four arrays [9 C, h, w, n]."""
    x = jnp.transpose(images, (3, 1, 2, 0))
    height, width = x.shape[1] // 2, x.shape[2] // 2
    planes = x[:, : 2 * height, : 2 * width].reshape(x.shape[0], height, 2, width, 2, -1)
    height, width = (images.shape[1] - 2) // 2, (images.shape[2] - 2) // 2
    # The pixels of the 4x4 patch that the four neighbourhoods share, each of them for all places at once.
    patch = [
        [planes[:, i // 2 : i // 2 + height, i % 2, j // 2 : j // 2 + width, j % 2] for j in range(4)] for i in range(4)
    ]
    for top in (0, 1):
        for left in (0, 1):
            yield jnp.concatenate([patch[top + i][left + j] for i in range(3) for j in range(3)])


@partial(jax.checkpoint, static_argnums=3)
def _maps(matrix: jax.Array, offset: jax.Array, images: jax.Array, pool: bool) -> jax.Array:
    """The maps of a few images, [features, h, w, n]."""
    if not pool:
        near = _neighbourhoods(images)
        return relu(_product(matrix, near) + offset[:, None, None, None])
    # Each pixel of the four goes through a product of its own: their maximum then needs no strided access, which takes longer
    # than the products. ReLU and offset do not change which is the largest.
    maps = reduce(larger, [_product(matrix, near) for near in _quarters(images)])
    return relu(maps + offset[:, None, None, None])


def _product(matrix: jax.Array, near: jax.Array) -> jax.Array:
    return lax.dot(matrix, near.reshape(near.shape[0], -1)).reshape(-1, *near.shape[1:])


class SimpleCNN(nn.Module):
    """Taps: stage1, stage2, ... after each layer and its pool, and last all pixels flattened, [N, 1, 1, d] in NHWC order."""

    layers: tuple[tuple[int, bool], ...]
    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"
    normalise: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        taps = Taps(self.lowering, edits)
        layout = layout_of(self.lowering)
        is_folded = self.lowering in BATCH_MINOR and self.compute_dtype == "float32"
        x = None if is_folded else layout.from_nhwc(images.astype(self.compute_dtype))
        for number, (channels, pool) in enumerate(self.layers, start=1):
            if number == 1 and is_folded:
                x = first_layer(images, channels, pool, normalise=self.normalise, train=train)
            else:
                name = f"stage{number}_conv"
                x = Conv(channels, 3, 1, self.lowering, padding=0, start=uniform_fan_in, name=name)(x)
                if self.normalise:
                    x = BatchNorm(self.lowering, name=f"stage{number}_norm")(x, train=train)
                x = relu(x)
                x = max_pool(x, layout.spatial_axes) if pool else x
            x = taps(f"stage{number}", x)
        flat = layout.to_nhwc(x).reshape(x.shape[layout.batch_axis], 1, 1, -1)
        x = taps(f"stage{len(self.layers) + 1}", layout.from_nhwc(flat))
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def make_pattern_detector(lowering: Lowering | None = None) -> Model:
    """The detector of a pattern: "32P" without normalisation, with one logit: `apply` returns logits float32 [N, 1].

    The trainer applies the paper's dropout before the last layer: see `last_layer`.

    Args:
        lowering: how convolutions are computed; None chooses by backend.
    """
    module = SimpleCNN(read_layers("32P"), 1, lowering or default_lowering(), normalise=False)
    return as_model(module, 1, "pattern detector 32P")


def last_layer(params: PyTree, flat: jax.Array) -> jax.Array:
    """Logits, float32 [N, K], of an `embedding`, for callers that modify it.

    Args:
        params: parameters of the network.
        flat: float32 [N, d].
    """
    return flat @ params["classifier"]["kernel"] + params["classifier"]["bias"][None, :]


def _simple(num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype, *, layers: str) -> SimpleCNN:
    del width  # the name gives all channels
    return SimpleCNN(read_layers(layers), num_classes, lowering, compute_dtype)


def network_name(layers: str) -> str:
    """The name of a network in `MODELS`: "10-10P" -> "vbd_10_10p"."""
    return f"vbd_{layers.lower().replace('-', '_')}"


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], SimpleCNN]] = {
    network_name(layers): partial(_simple, layers=layers) for layers in LAYERS
}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
