"""PreActResNet-18 (He et al. 2016, Identity Mappings in Deep Residual Networks), as comparisons of backdoors train it.

A 3x3 stem of w = 64 channels without normalisation, and four stages of two pre-activation blocks with w, 2w, 4w and 8w
channels; a block is that of the wide ResNets. He et al. normalise and rectify once more after the last block, because
nothing did so since its sum. The common port to CIFAR-10 leaves that out, and BackdoorBench, whose numbers are what others
are compared with, has taken it over: `preact_resnet18`. `preact_resnet18_final_norm` is the network of the paper.
"""

from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from bdjax.models.layers import BatchNorm, Classifier, ComputeDtype, Conv, Lowering, Taps, layout_of, relu
from bdjax.models.wide_resnet import PreActivationBlock


class PreActResNet(nn.Module):
    """Taps: stage1 [N, H, W, w], stage2 [N, H/2, W/2, 2w], stage3 [N, H/4, W/4, 4w] and stage4 [N, H/8, W/8, 8w], sums that
    are neither normalised nor rectified; stage4 is both with `has_final_norm`.

    Groups: group1 to group3, each with its sum as the output, and that sum after the next group's first normalisation, before
    the ReLU; and group4, before the final normalisation's ReLU, with `has_final_norm` alone, since without it nothing is
    normalised or rectified after the last sum (which is the tap stage4)."""

    blocks: tuple[int, ...]
    width: int
    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"
    has_final_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        taps = Taps(self.lowering, edits)
        x = layout_of(self.lowering).from_nhwc(images.astype(self.compute_dtype))
        x = Conv(self.width, 3, 1, self.lowering, name="stem_conv")(x)
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                starts_group = stage > 0 and index == 0
                on_first_norm = partial(taps.before_relu, f"group{stage}") if starts_group else None
                block = PreActivationBlock(self.width * 2**stage, stride, self.lowering, name=name)
                x = block(x, train=train, on_first_norm=on_first_norm)
            is_last = stage == len(self.blocks) - 1
            if not is_last or self.has_final_norm:
                x = taps.group(f"group{stage + 1}", x)
            if is_last and self.has_final_norm:
                norm = BatchNorm(self.lowering, name="last_norm")
                x = norm(x, train=train)
                taps.before_relu(f"group{stage + 1}", x, norm)
                x = relu(x)
            x = taps(f"stage{stage + 1}", x)
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def _preact_resnet18(
    has_final_norm: bool, num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype
) -> PreActResNet:
    return PreActResNet((2, 2, 2, 2), width, num_classes, lowering, compute_dtype, has_final_norm)


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], PreActResNet]] = {
    "preact_resnet18": partial(_preact_resnet18, False),
    "preact_resnet18_final_norm": partial(_preact_resnet18, True),
}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
