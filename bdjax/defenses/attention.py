"""Attention maps, and the losses of a student whose maps are to be its teacher's: what NAD and attention transfer share.

Equation numbers are those of Li et al. 2021 (NAD); the maps are those of attention transfer (Zagoruyko & Komodakis 2017).
"""

from collections.abc import Sequence

import jax.numpy as jnp

from bdjax.types import Array


def attention_map(features: Array, power: float) -> Array:
    """Where a network looks: the sum over channels of |F|^p, each image's map scaled to norm 1 (equation 2).

    Args:
        features: float32 [N, h, w, C].
        power: p.

    Returns:
        float32 [N, h, w], at least 0; all 0 for an image with no features at all.
    """
    attention = jnp.sum(jnp.abs(features) ** power, axis=3)
    # The smallest of floors under the root: its gradient is infinite at 0, and a whole map may be 0.
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
    """The attention losses of several taps, weighted (equation 4 without the cross-entropy).

    Args:
        student: features of each tap, in the order of the network. Those of a single pixel have no attention, and are left
            out.
        teacher: likewise.
        betas: weights of the last taps that are left; if there are fewer, the last weights count.
        power: p.

    Returns:
        float32 [N].
    """
    maps = [pair for pair in zip(student, teacher, strict=True) if pair[0].shape[1] * pair[0].shape[2] > 1]
    count = min(len(betas), len(maps))
    total = jnp.zeros(student[0].shape[0], jnp.float32)
    for beta, (of_student, of_teacher) in zip(betas[len(betas) - count :], maps[len(maps) - count :], strict=True):
        total += beta * attention_loss(of_student, of_teacher, power)
    return total
