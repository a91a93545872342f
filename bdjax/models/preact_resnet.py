"""PreActResNet-18 (He et al. 2016, Identity Mappings in Deep Residual Networks), as used in backdoor benchmarks.

A 3x3 stem of w = 64 channels without normalisation, and four stages of two pre-activation blocks with w, 2w, 4w and 8w
channels; the blocks are those of the wide ResNets. He et al. apply normalisation and ReLU once more after the last block's sum.
The common port to CIFAR-10 leaves that out, and so does BackdoorBench, the usual reference: `preact_resnet18`.
`preact_resnet18_final_norm` is the network of the paper.
"""

from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.layers import BatchNorm, Classifier, Conv, Taps, layout_of, relu
from bdjax.models.wide_resnet import PreActivationBlock


class PreActResNet(nn.Module):
    """Taps: stage1 [N, H, W, w], stage2 [N, H/2, W/2, 2w], stage3 [N, H/4, W/4, 4w] and stage4 [N, H/8, W/8, 8w], the sums
    before normalisation and ReLU; with `has_final_norm`, stage4 is after both.

    Groups: group1 to group3, each with its sum as the output, and that sum after the next group's first normalisation, before
    the ReLU. Only with `has_final_norm` there is also group4, before the final ReLU; otherwise no normalisation or ReLU follows
    the last sum (the tap stage4)."""

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
