"""Outliers among a network's weights: two cheap signs of a backdoor that need neither images nor gradients.

- Channels whose Lipschitz bound is far above the others' of their layer: the neurons of a backdoor answer strongly to a small
  trigger (Zheng et al. 2022, Data-free Backdoor Removal based on Channel Lipschitzness).
- A class whose weights in the last layer are larger on average than those of the other classes: the target of an attack gathers
  evidence from many features (Fields et al. 2021, Trojan Signatures in DNN Weights).

Both compare values within one network, whose usual spread depends on its architecture and its training. So they mean something
only beside the same numbers of clean networks, and neither is a proof.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bdjax.types import Array, PyTree

EPSILON = 1e-12
"""In place of a spread of 0."""
CONSISTENCY = 1.4826
"""Ratio of a normal distribution's standard deviation to its median absolute deviation."""


class LayerOutlier(NamedTuple):
    """The channel of a layer with the largest Lipschitz bound."""

    layer: str
    """path of the convolution"""
    channels: int
    channel: int
    bound: float
    """its Lipschitz bound"""
    deviations: float
    """how far that is above the mean of the layer's channels, in their standard deviations; at most (n - 1) / sqrt(n) for n
    channels, so that layers of 10 or fewer channels cannot reach 3"""


class ClassOutlier(NamedTuple):
    """The class whose weights in the last layer are the largest."""

    label: int
    means: np.ndarray
    """float64 [K]: mean weight of each class"""
    deviations: float
    """how far the largest mean is above the median, in robust standard deviations (1.4826 times the median absolute one)"""
    dixon: float
    """Dixon's Q: the gap to the second largest mean over the range of all means, in [0, 1]"""


def lipschitz_bounds(kernel: Array, scale: Array, variance: Array, epsilon: float = 1e-5) -> np.ndarray:
    """An upper bound of the Lipschitz constant of each output channel of a convolution with its normalisation.

    The bound of a channel is the largest singular value of its weights, as a matrix [C, kh kw], times |scale| / sqrt(variance):
    as in the paper's public code, which takes this for the norm of the channel's operator (equation 5 of the paper).

    Args:
        kernel: float [kh, kw, C, O].
        scale: float [O], of the normalisation.
        variance: float [O], running variance of the normalisation.
        epsilon: added to the variance.

    Returns:
        float64 [O].
    """
    weights = np.asarray(kernel, np.float64)
    matrices = weights.transpose(3, 2, 0, 1).reshape(weights.shape[3], weights.shape[2], -1)
    norms = np.linalg.norm(matrices, ord=2, axis=(1, 2))
    return norms * np.abs(np.asarray(scale, np.float64)) / np.sqrt(np.asarray(variance, np.float64) + epsilon)


def channel_outliers(variables: PyTree, pairs: Sequence[tuple[str, str]]) -> list[LayerOutlier]:
    """The channel with the largest Lipschitz bound in every layer.

    Args:
        variables: of one network.
        pairs: from `bdjax.models.normalised_convolutions`.

    Returns:
        An entry for each pair whose convolution has weights of its own and at least 2 channels.
    """
    found = []
    for convolution, norm in pairs:
        parameters = at(variables["params"], convolution)
        if "kernel" not in parameters or np.shape(parameters["kernel"])[-1] < 2:  # constants, or nothing to compare
            continue
        scale = at(variables["params"], norm)["scale"]
        bounds = lipschitz_bounds(parameters["kernel"], scale, at(variables["batch_stats"], norm)["variance"])
        channel, spread = int(bounds.argmax()), max(float(bounds.std(ddof=1)), EPSILON)
        deviations = float(bounds[channel] - bounds.mean()) / spread
        found.append(LayerOutlier(convolution, len(bounds), channel, float(bounds[channel]), deviations))
    return found


def class_outlier(kernel: Array) -> ClassOutlier:
    """The class whose weights in the last layer are the largest on average.

    Args:
        kernel: float [d, K], with K of at least 2.
    """
    means = np.asarray(kernel, np.float64).mean(axis=0)
    label, ordered = int(means.argmax()), np.sort(means)
    spread = CONSISTENCY * np.median(np.abs(means - np.median(means)))
    deviations = (ordered[-1] - np.median(means)) / max(spread, EPSILON)
    return ClassOutlier(
        label, means, float(deviations), float((ordered[-1] - ordered[-2]) / max(ordered[-1] - ordered[0], EPSILON))
    )


def at(tree: PyTree, path: str) -> PyTree:
    """The part of a tree of dictionaries at a path such as "stage1_block1/Conv_0"; an empty dictionary if there is none."""
    for name in path.split("/"):
        tree = tree.get(name, {})
    return tree
