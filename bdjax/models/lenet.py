"""LeNet-5 (LeCun et al. 1998) in its modern form: ReLU, max-pools and a fully connected layer instead of the RBF units.

It is designed for 32x32 pixels: two 5x5 convolutions without padding, each with a 2x2 max-pool, give 28x28, 14x14, 10x10 and
5x5 pixels. On smaller images, a convolution whose input is smaller than designed is padded by 2 and keeps the size. So 28x28
digits are padded by 2, as in the paper, and 8x8 digits become 8x8, 4x4, 4x4 and 2x2 pixels.

`width` is ignored: the channels 6, 16, 120 and 84 define LeNet-5.
"""

from collections.abc import Callable

import jax
from flax import linen as nn

from bdjax.choices import ComputeDtype, Lowering
from bdjax.models.layers import Classifier, Conv, Dense, Taps, layout_of, max_pool, relu

DESIGN_SIDES = (32, 14)
"""Input sides that the first and the second convolution are designed for; smaller inputs are padded."""


class LeNet(nn.Module):
    """Taps: stage1 [N, H/2, W/2, 6] and stage2 [N, H/4, W/4, 16] after their pools (smaller without padding: 14x14 and 5x5 for
    32x32), stage3 [N, 1, 1, 84] the last hidden layer."""

    num_classes: int
    lowering: Lowering
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        del train  # there is no normalisation
        taps = Taps(self.lowering, edits)
        layout = layout_of(self.lowering)
        x = layout.from_nhwc(images.astype(self.compute_dtype))
        for stage, (features, side) in enumerate(zip((6, 16), DESIGN_SIDES, strict=True)):
            padding = 0 if min(x.shape[axis] for axis in layout.spatial_axes) >= side else 2
            conv = Conv(features, 5, 1, self.lowering, padding, bias=True, name=f"stage{stage + 1}_conv")
            x = taps(f"stage{stage + 1}", max_pool(relu(conv(x)), layout.spatial_axes))
        x = relu(Dense(120, self.lowering, name="hidden1")(x))
        x = taps("stage3", relu(Dense(84, self.lowering, name="hidden2")(x)))
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def _lenet(num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> LeNet:
    del width
    return LeNet(num_classes, lowering, compute_dtype)


NETWORKS: dict[str, Callable[[int, int, Lowering, ComputeDtype], LeNet]] = {"lenet": _lenet}
"""Name -> (number of classes, width, lowering, dtype) -> module."""
