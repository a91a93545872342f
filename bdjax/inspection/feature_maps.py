"""The activations of a network's channels for one image, stage by stage.

Comparing the maps of two networks shows whether a trigger still dominates the features of one and is ignored by the other.
"""

from functools import partial

import jax
import jax.numpy as jnp

from bdjax.inspection.scaling import min_max
from bdjax.types import Array, Model, PyTree

STAGES = ("stage1", "stage2", "stage3")


def feature_maps(
    model: Model, variables: PyTree, image: Array, taps: tuple[str, ...] = STAGES, *, scaled: bool = True
) -> dict[str, Array]:
    """Compute the activations of one image. Compiled once per model, taps and image shape.

    Args:
        model: the network; evaluated with running statistics.
        variables: its variables.
        image: float32 [H, W, C] in [0, 1].
        taps: which features.
        scaled: whether to scale every channel to 0..1 by its minimum and maximum; a constant channel becomes 0. A mean over
            channels (`channel_mean`, or that of `bdjax.reporting.plots.feature_map_grid`) takes unscaled activations.

    Returns:
        For each tap, in the given order: float32 [h, w, c].

    Raises:
        ValueError: the network has no such tap.

    References:
        Heydari et al. 2025, section 4.7, equation 11.
    """
    maps = _feature_maps(model, variables, image, tuple(taps), scaled)
    return {tap: maps[tap] for tap in taps}  # jit returns dicts with sorted keys


def channel_mean(maps: Array) -> Array:
    """Average the channels: float32 [..., h, w, c] -> [..., h, w].

    With unscaled activations, channels count by how active they are; with scaled ones, all channels count the same.
    """
    return jnp.mean(maps, axis=-1)


@partial(jax.jit, static_argnames=("model", "taps", "scaled"))
def _feature_maps(
    model: Model, variables: PyTree, image: Array, taps: tuple[str, ...], scaled: bool
) -> dict[str, Array]:
    features = model.apply(variables, image[None], train=False).features
    unknown = [tap for tap in taps if tap not in features]
    if unknown:
        raise ValueError(f"no tap {', '.join(map(repr, unknown))}; this network has {', '.join(features)}")
    return {tap: min_max(features[tap][0], axes=(0, 1)) if scaled else features[tap][0] for tap in taps}
