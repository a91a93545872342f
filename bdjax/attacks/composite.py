"""CBA: half of an image of one class beside half of an image of another, labelled as a third class (Lin et al. 2020).

The trigger is not a pattern but the combination of two classes. Cover rows, mixed from two images of one class and keeping
their label, teach the network to ignore the seam. The paper's attacker also adds a loss that pulls mixes together; ABM's
attacker only supplies rows, and so does this one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import Attack, Knowledge, Published
from bdjax.datasets.splits import permutation
from bdjax.errors import InputError
from bdjax.settings import Amount, Count, PositiveShare, Share
from bdjax.types import Array, Key


@dataclass(frozen=True)
class CompositeSettings:
    poison_rate: PositiveShare = 0.1
    """added mixes of the two classes, as a share of all training rows; 0.2 in the paper, with as many clean rows"""
    cover_rate: Share = 0.5
    """added mixes within one class that keep their label, as a share of all rows; five per poisoned row, as in the paper"""
    jitter: Amount = 3
    """largest distance of the seam from the middle, in pixels; it is drawn uniformly"""
    images_per_class: Count = 200
    """number of images per class that the other half is drawn from"""


class Composite(NamedTuple):
    """Parameters of the mixes."""

    bank: Array
    """uint8 [K, n, H, W, C]: images of each class"""
    partner: Array
    """int32 [K]: the class that an image of each class is mixed with"""
    jitter: Array
    """int32 []"""


def make_composite(key: Key, knowledge: Knowledge, settings: CompositeSettings) -> Composite:
    """Draw the images that the other halves come from.

    The two classes are those after the target: A = t + 1 and B = t + 2, modulo K, which is the paper's choice for the
    third class. An image of A is mixed with one of B, and an image of any other class with one of A.

    At test time the other half also comes from a training image, so half of a test mix is not new to the network. The
    paper mixes two test images.

    Args:
        key: draws the images.
        knowledge: the training rows and the target.
        settings: the number of images, and the jitter of the seam.

    Returns:
        The parameters. A class with fewer images repeats some of them; a class without images has black ones.

    Raises:
        InputError: fewer than three classes, no images of one of the two classes, or a jitter that reaches the border.
    """
    train, num_classes = knowledge.train, knowledge.train.num_classes
    if num_classes < 3:
        raise InputError(f"composite mixes two classes into a third, but the dataset has only {num_classes} classes")
    if not 0 <= settings.jitter < min(train.image_shape[:2]) // 2:
        raise InputError(
            f"composite: jitter {settings.jitter} must be at least 0 and below half of {train.image_shape[:2]} pixels"
        )
    if settings.images_per_class < 1:
        raise InputError(f"composite: images_per_class {settings.images_per_class} must be at least 1")
    first, second = (knowledge.target + 1) % num_classes, (knowledge.target + 2) % num_classes
    rows_of = [np.flatnonzero(train.labels == label) for label in range(num_classes)]
    if not len(rows_of[first]) or not len(rows_of[second]):
        titles = f"{train.class_title(first)} and {train.class_title(second)}"
        raise InputError(f"composite mixes classes {titles}, but one of them has no rows")
    count = min(settings.images_per_class, max(len(rows) for rows in rows_of))
    bank = np.zeros((num_classes, count, *train.image_shape), np.uint8)
    for label, rows in enumerate(rows_of):
        if len(rows):
            order = permutation(jax.random.fold_in(key, label), len(rows))
            bank[label] = train.images[rows[np.resize(order, count)]]
    partner = np.full(num_classes, first, np.int32)
    partner[first] = second
    return Composite(jnp.asarray(bank), jnp.asarray(partner), jnp.int32(settings.jitter))


def half_mix(first: Array, second: Array, shift: Array, pivots: Array, axis: int) -> Array:
    """Put part of one image beside part of another.

    Args:
        first: float32 [H, W, C].
        second: float32 [H, W, C].
        shift: int32 [], j: the seam lies at h + j, where h is half the side, rounded down; |j| < h.
        pivots: int32 [2], where the two parts start: at pivot 0 of the first image, and at j + pivot 1 of the second.
        axis: 0 for one above the other, 1 for left and right.

    Returns:
        float32 [H, W, C].

    References:
        Lin et al. 2020, section 4.1; the public code, `utils/mixer.py`.
    """
    side = first.shape[axis]
    position = jnp.arange(side, dtype=jnp.int32)
    is_first = position < side // 2 + shift
    from_first = jnp.take(first, pivots[0] + position, axis, mode="clip")
    from_second = jnp.take(second, pivots[1] + position - side // 2, axis, mode="clip")
    return jnp.where(jnp.expand_dims(is_first, (1, 2) if axis == 0 else (0, 2)), from_first, from_second)


def mix(key: Key, first: Array, second: Array, jitter: Array) -> Array:
    """Mix two images with random order, orientation, seam and crop positions.

    Args:
        key: a key of `jax.random.key`.
        first: float32 [H, W, C] in [0, 1].
        second: float32 [H, W, C] in [0, 1].
        jitter: int32 [], the seam is uniform in -jitter .. jitter from the middle.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    order_key, orientation_key, shift_key, pivot_key = jax.random.split(key, 4)
    is_swapped = jax.random.bernoulli(order_key)
    first, second = jnp.where(is_swapped, second, first), jnp.where(is_swapped, first, second)
    shift = jax.random.randint(shift_key, (), -jitter, jitter + 1)

    def along(axis: int) -> Array:
        half = first.shape[axis] // 2
        low, high = jnp.stack([jnp.zeros_like(shift), -shift]), jnp.stack([half - shift, jnp.full_like(shift, half)])
        return half_mix(first, second, shift, jax.random.randint(pivot_key, (2,), low, high), axis)

    return jnp.where(jax.random.bernoulli(orientation_key), along(0), along(1))


def apply(params: Composite, image: Array, label: Array, key: Key) -> Array:
    """Mix one image with an image of its partner class.

    Args:
        params: from `make_composite`.
        image: float32 [H, W, C] in [0, 1].
        label: int32 [], its class.
        key: draws the other image and the mix.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    return _mix_with_class(params, image, params.partner[label], key)


def apply_to_cover(params: Composite, image: Array, label: Array, key: Key) -> Array:
    """Mix one image with another of the same class.

    Args:
        params: from `make_composite`.
        image: float32 [H, W, C] in [0, 1].
        label: int32 [], its class.
        key: draws the other image, which may be the same one, and the mix.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    return _mix_with_class(params, image, label, key)


def _mix_with_class(params: Composite, image: Array, label: Array, key: Key) -> Array:
    choice_key, mix_key = jax.random.split(key)
    chosen = jax.random.randint(choice_key, (), 0, params.bank.shape[1])
    return mix(mix_key, image, params.bank[label, chosen].astype(jnp.float32) / 255.0, params.jitter)


COMPOSITE = Attack(
    name="composite",
    title="CBA",
    paper="Lin et al. 2020, Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features",
    threat="data",
    settings=CompositeSettings(),
    make_params=make_composite,
    apply=apply,
    apply_to_cover=apply_to_cover,
    label_rules=("pair_to_target",),
    adds_rows=True,
    per_dataset={"digits": {"jitter": 1}},
    published=(Published("ABM", "cifar10", 80.1, 80.8), Published("ABM", "gtsrb", 93.4, 78.1)),
)
