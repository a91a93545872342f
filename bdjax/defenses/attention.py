"""Attention maps, and the losses that align a student's maps with its teacher's, for NAD and attention transfer.

Equation numbers are those of Li et al. 2021 (NAD); the maps are those of attention transfer (Zagoruyko & Komodakis 2017).
"""

from collections.abc import Sequence

import jax.numpy as jnp

from bdjax.types import Array


def attention_map(features: Array, power: float) -> Array:
    """Attention map: the sum over channels of |F|^p, scaled to norm 1 for each image (equation 2).

    Args:
        features: float32 [N, h, w, C].
        power: p.

    Returns:
        float32 [N, h, w], at least 0; all 0 for an image whose features are all 0.
    """
    attention = jnp.sum(jnp.abs(features) ** power, axis=3)
    # A whole map may be 0, where the gradient of the square root would be infinite.
    norm = jnp.sqrt(jnp.sum(jnp.square(attention), axis=(1, 2), keepdims=True) + 1e-24)
    return attention / (norm + 1e-6)


def attention_loss(student: Array, teacher: Array, power: float) -> Array:
    """The mean square difference of two attention maps (equation 3).

    Args:
        student: float32 [N, h, w, C].
        teacher: float32 [N, h, w, C']; the number of channels may differ.
        power: p.

    Returns:
        float32 [N].
    """
    return jnp.mean(jnp.square(attention_map(student, power) - attention_map(teacher, power)), axis=(1, 2))


def distillation_loss(
    student: Sequence[Array], teacher: Sequence[Array], betas: tuple[float, ...], power: float
) -> Array:
    """The weighted sum of the attention losses of several taps (equation 4 without the cross-entropy).

    Args:
        student: features of each tap, in the order of the network. Taps of a single pixel have no attention map and are
            skipped.
        teacher: features of the same taps.
        betas: weights of the last taps that remain; with fewer taps than weights, the last weights are used.
        power: p.

    Returns:
        float32 [N].
    """
    pairs = [pair for pair in zip(student, teacher, strict=True) if pair[0].shape[1] * pair[0].shape[2] > 1]
    count = min(len(betas), len(pairs))
    total = jnp.zeros(student[0].shape[0], jnp.float32)
    for beta, pair in zip(betas[len(betas) - count :], pairs[len(pairs) - count :], strict=True):
        total += beta * attention_loss(*pair, power)
    return total
