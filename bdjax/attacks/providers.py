"""The attack that TA-KD is tried against: several providers, each of whom poisons its share with its own trigger."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from bdjax.attacks.label_rules import all_to_one
from bdjax.attacks.poisoning import RateOf, poisoned_rows, select_rows
from bdjax.errors import InputError
from bdjax.triggers import TRIGGERS, MaskedBlend, masked_blend, patches, pictures
from bdjax.types import Dataset, Key

TRIGGER_TYPES = ("solid", "checkerboard", "blend", "noise")
"""In the order in which they get one more than the others when the providers cannot be shared out evenly."""


class ProviderTriggers(NamedTuple):
    """One trigger per provider, P in all."""

    params: MaskedBlend
    """every leaf with a leading axis P"""
    names: tuple[str, ...]
    """as a report prints them: "blend", "solid (similar)" """
    similar_group: np.ndarray
    """bool [P]: the providers whose triggers resemble each other"""


class ProviderPool(NamedTuple):
    """The training sets of all providers as views into one pool of images.

    Providers overlap, and all but 1 % of their rows are untouched, so the pool is the dataset once and the poisoned
    copies.
    """

    images: np.ndarray
    """uint8 [N + P n_p, H, W, C]: the dataset's images, then n_p poisoned copies per provider"""
    rows: np.ndarray
    """int32 [P, n]: which image of the pool each provider has in each place"""
    labels: np.ndarray
    """int32 [P, n]: what the provider says it is"""
    is_poisoned: np.ndarray
    """bool [P, n]"""
    original_labels: np.ndarray
    """int32 [P, n]"""


def provider_trigger_types(key: Key, num_providers: int, types: Sequence[str] = TRIGGER_TYPES) -> tuple[str, ...]:
    """Share trigger types out among providers.

    Each type goes to floor(P / number of types) providers, the first types to one more until all have one, and then who
    gets which is shuffled. Seven providers and four types give 2, 2, 2, 1.

    Args:
        key: a key of `jax.random.key`.
        num_providers: P.
        types: the types, in order of precedence.

    Returns:
        P types.

    References:
        Heydari et al. 2025, section 4.2 ("one randomly selected trigger type"); the counts are those of the
        released code.
    """
    quotient, remainder = divmod(num_providers, len(types))
    shared = [name for place, name in enumerate(types) for _ in range(quotient + (place < remainder))]
    return tuple(shared[place] for place in np.asarray(jax.random.permutation(key, num_providers)))


def make_provider_triggers(
    key: Key,
    image_shape: tuple[int, int, int],
    num_providers: int,
    *,
    num_similar: int = 0,
    similarity: float = 0.75,
    blend_opacity: tuple[float, float] | None = None,
    minimum_contrast: float = 0.0,
) -> ProviderTriggers:
    """Draw one trigger for each provider.

    Blended pictures are drawn without replacement, from a full set again each time that all have been used.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C), C being 1 or 3.
        num_providers: P, at least 1.
        num_similar: how many providers have triggers that resemble each other: 0, or 2 to P. One of solid and
          checkerboard is drawn, and the first of its kind perturbed; the other providers share the three remaining
          types. The paper has 3 of 7 on CIFAR-10 and none on MNIST.
        similarity: how much they do, from 0 to 1; see `bdjax.triggers.patches.draw_similar_patches`.
        blend_opacity: the range that a blended picture's opacity is drawn from; by default that of
          `bdjax.triggers.blend.DEFAULT_OPACITY_RANGE`.
        minimum_contrast: the least brightness of solid patches and the least contrast of checkerboards, from 0 to 1. 0
          is the published law.

    Returns:
        The triggers, in shuffled order.

    Raises:
        InputError: the numbers of providers do not go together, or the image has no room for a patch.

    References:
        Heydari et al. 2025, section 4.2 and figure 2.
    """
    if num_providers < 1:
        raise InputError(f"{num_providers} providers: there must be at least 1")
    if num_similar != 0 and not 2 <= num_similar <= num_providers:
        raise InputError(f"{num_similar} similar triggers among {num_providers} providers: 0, or 2 to {num_providers}")
    type_key, similar_key, family_key, picture_key, instance_key, order_key = jax.random.split(key, 6)

    types, names, triggers = TRIGGER_TYPES, [], []
    if num_similar:
        family = ("solid", "checkerboard")[int(jax.random.bernoulli(family_key))]
        types = tuple(name for name in TRIGGER_TYPES if name != family)
        names = [f"{family} (similar)"] * num_similar
        triggers = patches.draw_similar_patches(
            similar_key, family, image_shape, num_similar, similarity=similarity, minimum_contrast=minimum_contrast
        )

    others = provider_trigger_types(type_key, num_providers - num_similar, types)
    picture_names = iter(_draw_pictures(picture_key, others.count("blend")))
    for place, name in enumerate(others):
        options = {}
        if name == "blend":
            options = {"picture": next(picture_names), "opacity_range": blend_opacity}
        elif name in ("solid", "checkerboard"):
            options = {"minimum_contrast": minimum_contrast}
        names.append(name)
        triggers.append(TRIGGERS[name].init(jax.random.fold_in(instance_key, place), image_shape, **options))

    order = np.asarray(jax.random.permutation(order_key, num_providers))
    return ProviderTriggers(
        params=masked_blend.stack([triggers[place] for place in order]),
        names=tuple(names[place] for place in order),
        similar_group=order < num_similar,
    )


def poison_providers(
    key: Key,
    dataset: Dataset,
    provider_rows: np.ndarray,
    triggers: ProviderTriggers,
    *,
    rate: float,
    target: int,
    rate_of: RateOf = "all",
) -> ProviderPool:
    """Let every provider poison its share of a dataset, all towards one class.

    Only rows outside the target class are poisoned. Every provider poisons the same number of rows, n_p. A rate of
    "all" rows, the paper's text, gives equal numbers by itself. A rate of the "candidates", as in the released code,
    need not: then n_p is the least of the providers' numbers, as a pool of arrays has one shape.

    Args:
        key: a key of `jax.random.key`; it chooses the rows.
        dataset: N clean rows.
        provider_rows: int [P, n], the rows of the dataset that each provider holds, distinct within each provider.
        triggers: one per provider.
        rate: the share of each provider's rows to poison, in (0, 1].
        target: the class that all providers attack towards.
        rate_of: see `bdjax.attacks.poisoning.select_rows`.

    Returns:
        The pool. Column j of provider p is row `provider_rows[p, j]` of the dataset, poisoned or not.

    Raises:
        InputError: no row would be poisoned, more than may be, the target is no class, or the number of triggers is not
          that of the providers.

    References:
        Heydari et al. 2025, section 4.3, equation 2.
    """
    provider_rows = np.asarray(provider_rows, np.int32)
    num_providers = len(provider_rows)
    if len(triggers.names) != num_providers:
        raise InputError(f"{len(triggers.names)} triggers for {num_providers} providers: each needs one")
    if not 0 <= target < dataset.num_classes:
        raise InputError(f"target class {target}: classes go from 0 to {dataset.num_classes - 1}")
    rule = all_to_one(target)
    original_labels = dataset.labels[provider_rows]
    chosen = [
        select_rows(jax.random.fold_in(key, provider), labels, rate, rule, rate_of=rate_of)
        for provider, labels in enumerate(original_labels)
    ]
    num_poisoned = min(len(columns) for columns in chosen)

    rows, labels = provider_rows.copy(), original_labels.copy()
    is_poisoned = np.zeros(rows.shape, bool)
    copies = []
    for provider, columns in enumerate(chosen):
        columns = columns[:num_poisoned]
        params = jax.tree.map(lambda leaf, provider=provider: leaf[provider], triggers.params)
        copies.append(np.asarray(poisoned_rows(dataset.images[provider_rows[provider, columns]], params)))
        rows[provider, columns] = len(dataset) + provider * num_poisoned + np.arange(num_poisoned)
        labels[provider, columns] = rule.relabel(original_labels[provider, columns])
        is_poisoned[provider, columns] = True
    return ProviderPool(np.concatenate([dataset.images, *copies]), rows, labels, is_poisoned, original_labels)


def _draw_pictures(key: Key, count: int) -> list[str]:
    names = sorted(pictures.PICTURES)
    drawn = []
    while len(drawn) < count:
        order = jax.random.permutation(jax.random.fold_in(key, len(drawn)), len(names))
        drawn += [names[place] for place in np.asarray(order)]
    return drawn[:count]
