"""MobileNetV2 for small images (Sandler et al. 2018), and the MobileNetV2-S of Learning from Distinction (appendix A.3).

An inverted residual block expands its channels by a 1x1 convolution, filters them by a depthwise 3x3 convolution and projects
them to few channels again, with batch normalisation after all three and ReLU6 after the first two. For images of 32x32 pixels
the stem and the second stage have stride 1 instead of 2, as in the usual ports to CIFAR-10.

Those ports give a block of stride 1 that changes the width a 1x1 convolution as shortcut, which the paper does not have;
`mobilenet_v2` follows the ports, since published results use them, but with the paper's ReLU6; `mobilenet_v2_relu` has their
ReLU as well, so that their weights can be read. `mobilenet_v2_s` has a shortcut only where shapes agree. Its
paper gives channels but no strides: here they are 1, 2 and 2 for its three blocks. Its few channels make it small, so `width`
does not change it.
"""

from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.layers import BatchNorm, Classifier, Conv, DepthwiseConv, Taps, layout_of, relu, relu6, scale_channels

Block = tuple[int, int, int]
"""Channels after the expansion, channels after the projection, stride."""

STAGES = (
    # expansion, channels, blocks, stride of the first block (table 2 of the paper, for 32x32)
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, LAST = 32, 1280

SMALL_STAGES: tuple[tuple[Block, ...], ...] = (((4, 8, 1),), ((4, 8, 2), (8, 8, 2)))
SMALL_STEM, SMALL_LAST = 4, 16


class InvertedResidual(nn.Module):
    expanded: int
    features: int
    stride: int
    projects_shortcut: bool
    activation: Callable[[jax.Array], jax.Array]
    lowering: Lowering

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = self.activation(_conv_norm(x, self.expanded, 1, self.lowering, "expand", train))
        y = DepthwiseConv(self.stride, self.lowering, name="filter_conv")(y)
        y = self.activation(BatchNorm(self.lowering, name="filter_norm")(y, train=train))
        y = _conv_norm(y, self.features, 1, self.lowering, "project", train)
        if self.stride > 1:
            return y
        if x.shape[layout_of(self.lowering).channel_axis] == self.features:
            return y + x
        return y + _conv_norm(x, self.features, 1, self.lowering, "shortcut", train) if self.projects_shortcut else y


def _conv_norm(x: jax.Array, features: int, size: int, lowering: Lowering, name: str, train: bool) -> jax.Array:
    x = Conv(features, size, 1, lowering, name=f"{name}_conv")(x)
    return BatchNorm(lowering, name=f"{name}_norm")(x, train=train)


class MobileNetV2(nn.Module):
    """Taps: stage1, stage2 and so on [N, h, w, c] after each stage, and last the final 1x1 convolution after its normalisation
    and activation: stage8 [N, H/8, W/8, 1280], or stage3 [N, H/4, W/4, 16] of MobileNetV2-S."""

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    last: int
    projects_shortcut: bool
    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"
    activation: Callable[[jax.Array], jax.Array] = relu6

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        taps = Taps(self.lowering, edits)
        x = layout_of(self.lowering).from_nhwc(images.astype(self.compute_dtype))
        x = self.activation(_conv_norm(x, self.stem, 3, self.lowering, "stem", train))
        for stage, blocks in enumerate(self.stages):
            for index, block in enumerate(blocks):
                name = f"stage{stage + 1}_block{index + 1}"
                layer = InvertedResidual(*block, self.projects_shortcut, self.activation, self.lowering, name=name)
                x = layer(x, train=train)
            x = taps(f"stage{stage + 1}", x)
        x = self.activation(_conv_norm(x, self.last, 1, self.lowering, "last", train))
        x = taps(f"stage{len(self.stages) + 1}", x)
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def _usual(
    activation: Callable[[jax.Array], jax.Array],
    num_classes: int,
    width: int,
    lowering: Lowering,
    compute_dtype: ComputeDtype,
) -> MobileNetV2:
    stem = channels = scale_channels(STEM, width)
    stages = []
    for expansion, unscaled, count, stride in STAGES:
        features, blocks = scale_channels(unscaled, width), []
        for index in range(count):
            blocks.append((expansion * channels, features, stride if index == 0 else 1))
            channels = features
        stages.append(tuple(blocks))
    last = scale_channels(LAST, width)
    return MobileNetV2(stem, tuple(stages), last, True, num_classes, lowering, compute_dtype, activation)


def _small(num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> MobileNetV2:
    del width
    return MobileNetV2(SMALL_STEM, SMALL_STAGES, SMALL_LAST, False, num_classes, lowering, compute_dtype)


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], MobileNetV2]] = {
    "mobilenet_v2": partial(_usual, relu6),
    "mobilenet_v2_relu": partial(_usual, relu),
    "mobilenet_v2_s": _small,
}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
