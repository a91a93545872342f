"""PyramidNets for small images (Han et al. 2017, Deep Pyramidal Residual Networks): the width grows with every block.

A 3x3 stem of 16 channels with normalisation, three groups of n blocks, a final normalisation with ReLU. Block k of the 3n has
16 + alpha k / (3n) channels, rounded (equation 3; the stem is k = 0); a bottleneck block outputs four times as many.
PyramidNet-d-alpha is d layers deep: d = 6n + 2 with basic blocks, 9n + 2 with bottlenecks.

A block starts and ends with a normalisation and has ReLUs only between its convolutions (figure 6d). Its shortcut has no
parameters: missing channels are zeros, and with stride 2 it averages 2x2 pixels, or those that exist at the edge of an odd
size.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.layers import BatchNorm, Classifier, Conv, Taps, layout_of, relu, scale_channels

SIZES = {
    "pyramidnet_20_12": ("basic", 20, 12),  # the first two are in no paper: for CPUs and tests
    "pyramidnet_11_24": ("bottleneck", 11, 24),
    "pyramidnet_110_84": ("basic", 110, 84),
    "pyramidnet_200_240": ("bottleneck", 200, 240),
}
"""Name -> block type, depth and alpha."""

OnNorm = Callable[[jax.Array, BatchNorm], None]
"""Called with the output of a normalisation in the block, and the normalisation."""


class PyramidBlock(nn.Module):
    """Normalisation, 3x3, normalisation, ReLU, 3x3, normalisation. `on_norm` is called for the first normalisation."""

    width: int
    stride: int
    lowering: Lowering

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, on_norm: OnNorm | None = None) -> jax.Array:
        norm = BatchNorm(self.lowering)
        y = norm(x, train=train)
        if on_norm:
            on_norm(y, norm)
        y = Conv(self.width, 3, self.stride, self.lowering)(y)
        y = relu(BatchNorm(self.lowering)(y, train=train))
        y = Conv(self.width, 3, 1, self.lowering)(y)
        y = BatchNorm(self.lowering)(y, train=train)
        return y + _shortcut(x, self.width, self.stride, self.lowering)


class PyramidBottleneck(nn.Module):
    """Normalisation, 1x1, normalisation, ReLU, 3x3, normalisation, ReLU, 1x1 to four times the width, normalisation. `on_norm`
    is called for the second normalisation, the first with a ReLU after it."""

    width: int
    stride: int
    lowering: Lowering

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, on_norm: OnNorm | None = None) -> jax.Array:
        y = BatchNorm(self.lowering)(x, train=train)
        y = Conv(self.width, 1, 1, self.lowering)(y)
        norm = BatchNorm(self.lowering)
        y = norm(y, train=train)
        if on_norm:
            on_norm(y, norm)
        y = Conv(self.width, 3, self.stride, self.lowering)(relu(y))
        y = relu(BatchNorm(self.lowering)(y, train=train))
        y = Conv(4 * self.width, 1, 1, self.lowering)(y)
        y = BatchNorm(self.lowering)(y, train=train)
        return y + _shortcut(x, 4 * self.width, self.stride, self.lowering)


def _shortcut(x: jax.Array, features: int, stride: int, lowering: Lowering) -> jax.Array:
    layout = layout_of(lowering)
    if stride == 2:
        x = average_pool(x, layout.spatial_axes)
    added = [(0, 0, 0)] * x.ndim
    added[layout.channel_axis] = (0, features - x.shape[layout.channel_axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), added)


def average_pool(x: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """2x2 average pooling with stride 2; the last window of an odd axis has one pixel (PyTorch's `ceil_mode`).

    Args:
        x: float, any layout.
        axes: the axes of height and width.

    Returns:
        The array with each of the two axes halved, rounded up.
    """
    for axis in axes:
        length = x.shape[axis]
        after = [(0, 0, 0)] * x.ndim
        after[axis] = (0, length % 2, 0)
        padded = lax.pad(x, jnp.zeros((), x.dtype), after)
        first, second = (lax.slice_in_dim(padded, start, None, 2, axis) for start in (0, 1))
        counts = np.full(first.shape[axis], 2.0)
        counts[length // 2 :] = 1.0
        shape = [1] * x.ndim
        shape[axis] = -1
        x = (first + second) * jnp.asarray(1.0 / counts.reshape(shape), x.dtype)
    return x


class PyramidNet(nn.Module):
    """Taps: stage1 [N, H, W, c1] and stage2 [N, H/2, W/2, c2] are the outputs of the first two groups, before normalisation and
    ReLU; stage3 [N, H/4, W/4, c3] is the output of the third after the final normalisation and ReLU.

    Groups: group1 to group3, each with its sum as the output. `before_relu` of the last is the normalised sum; of the others it
    is computed by the next group's first block, as in the code of Heo et al. (2019). A bottleneck normalises the sum, applies
    its 1x1 convolution (which changes the channels) and normalises again, before the ReLU. A basic block has no ReLU before its
    strided 3x3 convolution, so the output of its first normalisation is used.
    """

    kind: str
    stem: int
    widths: tuple[tuple[int, ...], ...]
    """width of every block, group by group"""
    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        block_type = PyramidBlock if self.kind == "basic" else PyramidBottleneck
        taps = Taps(self.lowering, edits)
        x = layout_of(self.lowering).from_nhwc(images.astype(self.compute_dtype))
        x = Conv(self.stem, 3, 1, self.lowering, name="stem_conv")(x)
        x = BatchNorm(self.lowering, name="stem_norm")(x, train=train)
        for stage, widths in enumerate(self.widths):
            for index, width in enumerate(widths):
                starts_group = stage > 0 and index == 0
                on_norm = partial(taps.before_relu, f"group{stage}") if starts_group else None
                name = f"stage{stage + 1}_block{index + 1}"
                block = block_type(width, 2 if starts_group else 1, self.lowering, name=name)
                x = block(x, train=train, on_norm=on_norm)
            x = taps.group(f"group{stage + 1}", x)
            if stage == len(self.widths) - 1:
                norm = BatchNorm(self.lowering, name="last_norm")
                x = norm(x, train=train)
                taps.before_relu(f"group{stage + 1}", x, norm)
                x = relu(x)
            x = taps(f"stage{stage + 1}", x)
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def _pyramid_net(
    kind: str, depth: int, alpha: int, num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype
) -> PyramidNet:
    blocks = (depth - 2) // (6 if kind == "basic" else 9)
    stem, *widths = (scale_channels(round(16 + alpha * block / (3 * blocks)), width) for block in range(3 * blocks + 1))
    groups = tuple(tuple(widths[start : start + blocks]) for start in range(0, 3 * blocks, blocks))
    return PyramidNet(kind, stem, groups, num_classes, lowering, compute_dtype)


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], PyramidNet]] = {
    name: partial(_pyramid_net, *size) for name, size in SIZES.items()
}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
