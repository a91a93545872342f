"""ResNets with three stages (the modified ones of TA-KD), with four stages (for CIFAR and for ImageNet), and very small ones.

Compared with the ImageNet ResNets of He et al. (2016), the first convolution is 3x3 with stride 1 and padding 1, and there is
no max-pool; only `*_imagenet` have the 7x7 convolution with stride 2 and the 3x3 max-pool with stride 2. Stage s is 2^(s-1)
times as wide as the first, w = 64 channels (times 4 with bottleneck blocks).

- TA-KD (Heydari et al. 2025, section 4.4, "Network Modifications") also leaves out the fourth stage.
- `*_cifar` keep it: the ResNet-18 and -34 that most papers train on CIFAR-10.
- `*_imagenet` are the networks of torchvision and timm as they come.
- `resnet_s1`, `resnet_s` and `resnet_s2` are the low-capacity networks of Learning from Distinction (appendix A.3): four
  stages of one block. The first two are defined by their few neurons, so `width` only scales their stem. The paper does not
  describe the stem but says that only blocks and neurons differ from ResNet-18, so the stem keeps 64 channels.
- `resnet56` is the network of He et al. for CIFAR-10 (section 4.2): three stages of nine basic blocks with 16, 32 and 64
  channels. Its shortcuts are projections where the shape changes (their option B), as in all networks of this file.
"""

from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.layers import BatchNorm, Classifier, Conv, Taps, layout_of, max_pool_3x3, relu, scale_channels

BLOCKS = {
    "resnet10": ("basic", (1, 1, 1)),  # not in the paper: one block a stage, for the quick presets
    "resnet18": ("basic", (2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6)),
    "resnet50": ("bottleneck", (3, 4, 6)),
    "resnet101": ("bottleneck", (3, 4, 23)),
    "resnet18_cifar": ("basic", (2, 2, 2, 2)),
    "resnet34_cifar": ("basic", (3, 4, 6, 3)),
    "resnet50_cifar": ("bottleneck", (3, 4, 6, 3)),
    "resnet18_imagenet": ("basic", (2, 2, 2, 2)),
    "resnet34_imagenet": ("basic", (3, 4, 6, 3)),
    "resnet50_imagenet": ("bottleneck", (3, 4, 6, 3)),
    "resnet_s2": ("basic", (1, 1, 1, 1)),
}
"""Name -> block type and number of blocks in each stage."""

NEURONS = {"resnet_s1": (1, 1, 1, 1), "resnet_s": (2, 2, 2, 4)}
"""Name -> channels of the single block in each stage."""

OnSum = Callable[[jax.Array, BatchNorm], jax.Array]
"""(a block's sum before its last ReLU, the last normalisation on its main path) -> the replacement of the sum."""


class BasicBlock(nn.Module):
    width: int
    stride: int
    lowering: Lowering

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, on_sum: OnSum | None = None) -> jax.Array:
        y = Conv(self.width, 3, self.stride, self.lowering)(x)
        y = relu(BatchNorm(self.lowering)(y, train=train))
        y = Conv(self.width, 3, 1, self.lowering)(y)
        norm = BatchNorm(self.lowering)
        y = norm(y, train=train)
        y = y + _shortcut(x, self.width, self.stride, self.lowering, train)
        return relu(on_sum(y, norm) if on_sum else y)


class BottleneckBlock(nn.Module):
    """The 3x3 convolution has the stride, as in torchvision."""

    width: int
    stride: int
    lowering: Lowering

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, on_sum: OnSum | None = None) -> jax.Array:
        y = relu(BatchNorm(self.lowering)(Conv(self.width, 1, 1, self.lowering)(x), train=train))
        y = relu(BatchNorm(self.lowering)(Conv(self.width, 3, self.stride, self.lowering)(y), train=train))
        norm = BatchNorm(self.lowering)
        y = norm(Conv(4 * self.width, 1, 1, self.lowering)(y), train=train)
        y = y + _shortcut(x, 4 * self.width, self.stride, self.lowering, train)
        return relu(on_sum(y, norm) if on_sum else y)


def _shortcut(x: jax.Array, features: int, stride: int, lowering: Lowering, train: bool) -> jax.Array:
    """The identity, or a 1x1 convolution with batch normalisation wherever the shape changes (torchvision's rule)."""
    if stride == 1 and x.shape[layout_of(lowering).channel_axis] == features:
        return x
    x = Conv(features, 1, stride, lowering, name="shortcut_conv")(x)
    return BatchNorm(lowering, name="shortcut_norm")(x, train=train)


class ResNet(nn.Module):
    """Taps: stage1 [N, H, W, w'], stage2 [N, H/2, W/2, 2w'], stage3 [N, H/4, W/4, 4w'], with w' = w, or 4w if bottleneck;
    and stage4 [N, H/8, W/8, 8w'] if there is a fourth stage; with the ImageNet stem a quarter of these heights and widths.

    Groups: one for every stage. Both `output` and `before_relu` are the sum of the stage's last block, and its tap is their
    ReLU. Mean and deviation are those of the last normalisation of that block, without what the shortcut adds (as in the code
    of Heo et al. 2019)."""

    kind: str
    blocks: tuple[int, ...]
    width: int
    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"
    stage_widths: tuple[int, ...] | None = None
    """width of every stage; None for w, 2w, 4w and so on"""
    has_imagenet_stem: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        block = BasicBlock if self.kind == "basic" else BottleneckBlock
        taps = Taps(self.lowering, edits)
        layout = layout_of(self.lowering)
        x = layout.from_nhwc(images.astype(self.compute_dtype))
        size, stride = (7, 2) if self.has_imagenet_stem else (3, 1)
        x = Conv(self.width, size, stride, self.lowering, name="stem_conv")(x)
        x = relu(BatchNorm(self.lowering, name="stem_norm")(x, train=train))
        if self.has_imagenet_stem:
            x = max_pool_3x3(x, layout.spatial_axes)
        widths = self.stage_widths or [self.width * 2**stage for stage in range(len(self.blocks))]
        for stage, (count, width) in enumerate(zip(self.blocks, widths, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                on_sum = partial(_record, taps, f"group{stage + 1}") if index == count - 1 else None
                x = block(width, stride, self.lowering, name=name)(x, train=train, on_sum=on_sum)
            x = taps(f"stage{stage + 1}", x)
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def _record(taps: Taps, group: str, x: jax.Array, norm: BatchNorm) -> jax.Array:
    """Record a group that the ReLU follows directly."""
    x = taps.group(group, x)
    taps.before_relu(group, x, norm)
    return x


def _usual(name: str, num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> ResNet:
    has_stem = name.endswith("_imagenet")
    return ResNet(*BLOCKS[name], width, num_classes, lowering, compute_dtype, has_imagenet_stem=has_stem)


def _very_small(name: str, num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> ResNet:
    neurons = NEURONS[name]
    return ResNet("basic", (1,) * len(neurons), width, num_classes, lowering, compute_dtype, neurons)


def _resnet56(num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> ResNet:
    widths = tuple(scale_channels(channels, width) for channels in (16, 32, 64))
    return ResNet("basic", (9, 9, 9), widths[0], num_classes, lowering, compute_dtype, widths)


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], ResNet]] = {
    **{name: partial(_usual, name) for name in BLOCKS},
    **{name: partial(_very_small, name) for name in NEURONS},
    "resnet56": _resnet56,
}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
