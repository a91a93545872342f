"""Wide ResNets of pre-activation blocks for small images (Zagoruyko & Komodakis 2016): WRN-d-k is d layers deep, k times wide.

A 3x3 stem of 16 channels, three groups of (d - 4) / 6 blocks with 16k, 32k and 64k channels, a final normalisation with ReLU.
A block starts with normalisation and ReLU. Where it changes the shape, its shortcut is a 1x1 convolution of their output,
without normalisation; elsewhere it is the identity. No dropout.
"""

from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.layers import BatchNorm, Classifier, Conv, Taps, layout_of, relu, scale_channels

SIZES = ((10, 2), (16, 1), (16, 2), (16, 4), (28, 2), (28, 4), (40, 1), (40, 2))
"""(depth, widening factor) of the named networks."""


class PreActivationBlock(nn.Module):
    width: int
    stride: int
    lowering: Lowering

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, on_first_norm: Callable[[jax.Array, BatchNorm], None] | None = None
    ) -> jax.Array:
        norm = BatchNorm(self.lowering)
        ready = norm(x, train=train)
        if on_first_norm:
            on_first_norm(ready, norm)
        ready = relu(ready)
        y = Conv(self.width, 3, self.stride, self.lowering)(ready)
        y = relu(BatchNorm(self.lowering)(y, train=train))
        y = Conv(self.width, 3, 1, self.lowering)(y)
        if self.stride == 1 and x.shape[layout_of(self.lowering).channel_axis] == self.width:
            return x + y
        return Conv(self.width, 1, self.stride, self.lowering, name="shortcut_conv")(ready) + y


class WideResNet(nn.Module):
    """Taps: stage1 [N, H, W, 16k] and stage2 [N, H/2, W/2, 32k] are the outputs of the first two groups, before normalisation
    and ReLU; stage3 [N, H/4, W/4, 64k] is the output of the third after the final normalisation and ReLU.

    Groups: group1 to group3, each with its sum as the output, and that sum after the next group's first normalisation (or the
    final one), before the ReLU."""

    stem: int
    widths: tuple[int, int, int]
    blocks: int
    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        taps = Taps(self.lowering, edits)
        x = layout_of(self.lowering).from_nhwc(images.astype(self.compute_dtype))
        x = Conv(self.stem, 3, 1, self.lowering, name="stem_conv")(x)
        for stage, width in enumerate(self.widths):
            for index in range(self.blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                starts_group = stage > 0 and index == 0
                on_first_norm = partial(taps.before_relu, f"group{stage}") if starts_group else None
                block = PreActivationBlock(width, stride, self.lowering, name=name)
                x = block(x, train=train, on_first_norm=on_first_norm)
            x = taps.group(f"group{stage + 1}", x)
            if stage == len(self.widths) - 1:
                norm = BatchNorm(self.lowering, name="last_norm")
                x = norm(x, train=train)
                taps.before_relu(f"group{stage + 1}", x, norm)
                x = relu(x)
            x = taps(f"stage{stage + 1}", x)
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def _wide_resnet(
    depth: int, factor: int, num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype
) -> WideResNet:
    stem, *widths = (scale_channels(channels, width) for channels in (16, 16 * factor, 32 * factor, 64 * factor))
    return WideResNet(stem, tuple(widths), (depth - 4) // 6, num_classes, lowering, compute_dtype)


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], WideResNet]] = {
    f"wrn_{depth}_{factor}": partial(_wide_resnet, depth, factor) for depth, factor in SIZES
}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
