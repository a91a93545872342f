"""What the channels of a network make of one image, stage by stage.

Between two networks, the maps show whether a trigger still dominates what the one sees and the other ignores.
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
    """Read the activations of one image. Compiled once per model, taps and shape of the image.

    Args:
        model: the network; evaluated with running statistics.
        variables: its variables.
        image: float32 [H, W, C] in [0, 1].
        taps: which features.
        scaled: whether every channel is stretched to 0..1 by its own least and greatest value, a constant channel to 0.
            Otherwise the activations are as they are, which is what a mean of channels (`channel_mean`, and the one that
            `bdjax.reporting.plots.feature_map_grid` draws) should be taken of.

    Returns:
        For each tap, in their order: float32 [h, w, c].

    Raises:
        ValueError: if the network has no such tap.

    References:
        Heydari et al. 2025, section 4.7, equation 11.
    """
    maps = _feature_maps(model, variables, image, tuple(taps), scaled)
    return {tap: maps[tap] for tap in taps}  # a compiled call sorts the keys of what it returns


def channel_mean(maps: Array) -> Array:
    """Average the channels: float32 [..., h, w, c] -> [..., h, w].

    Of raw activations, so that channels count by how active they are; of scaled ones, all channels count alike.
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
