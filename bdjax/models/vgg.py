"""VGGs with batch normalisation for small images (Simonyan & Zisserman 2015), and the VGG-S of Learning from Distinction.

Stages of 3x3 convolutions with bias, batch normalisation and ReLU, each stage ending in a 2x2 max-pool; one of the original's
three fully connected layers remains, as usual on CIFAR-10. Images smaller than 32x32 have no room for five pools, so a stage
pools only if its map is at least 2 pixels high and wide. The remaining pixels are averaged.

VGG-S (appendix A.3) has the convolutions of VGG-11 with 4, 8, 16, 16, 32, 32, 32 and 512 channels. The few channels make it
small, so `width` only scales its last, wide convolution.
"""

from collections.abc import Callable

import jax
from flax import linen as nn

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.layers import BatchNorm, Classifier, Conv, Taps, layout_of, max_pool, relu, scale_channels

CHANNELS = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "vgg19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
    "vgg_s": ((4,), (8,), (16, 16), (32, 32), (32, 512)),
}
"""Name -> channels of the convolutions in each stage, at the papers' size."""


class Vgg(nn.Module):
    """Taps: stage1 to stage5, the output of each stage after its pool: [N, H/2, W/2, c], [N, H/4, W/4, c] and so on."""

    stages: tuple[tuple[int, ...], ...]
    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        taps = Taps(self.lowering, edits)
        layout = layout_of(self.lowering)
        x = layout.from_nhwc(images.astype(self.compute_dtype))
        for stage, channels in enumerate(self.stages):
            for index, features in enumerate(channels):
                name = f"stage{stage + 1}_conv{index + 1}"
                x = Conv(features, 3, 1, self.lowering, bias=True, name=name)(x)
                x = relu(BatchNorm(self.lowering, name=name.replace("conv", "norm"))(x, train=train))
            if min(x.shape[axis] for axis in layout.spatial_axes) >= 2:
                x = max_pool(x, layout.spatial_axes)
            x = taps(f"stage{stage + 1}", x)
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def _usual(name: str) -> Callable[[int, int, Lowering, ComputeDtype], Vgg]:
    def make(num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> Vgg:
        stages = tuple(tuple(scale_channels(channels, width) for channels in stage) for stage in CHANNELS[name])
        return Vgg(stages, num_classes, lowering, compute_dtype)

    return make


def _small(num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> Vgg:
    *stages, (narrow, wide) = CHANNELS["vgg_s"]
    return Vgg((*stages, (narrow, scale_channels(wide, width))), num_classes, lowering, compute_dtype)


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], Vgg]] = {
    "vgg11": _usual("vgg11"),
    "vgg16": _usual("vgg16"),
    "vgg19": _usual("vgg19"),
    "vgg_s": _small,
}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
