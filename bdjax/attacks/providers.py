"""TA-KD's threat model: several providers, each of which poisons its share of the data with its own trigger."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from bdjax.attacks.label_rules import all_to_one
from bdjax.attacks.poisoning import poisoned_rows, select_rows
from bdjax.choices import RateOf
from bdjax.errors import InputError
from bdjax.triggers import TRIGGERS, MaskedBlend, masked_blend, patches, pictures
from bdjax.types import Dataset, Key

TRIGGER_TYPES = ("solid", "checkerboard", "blend", "noise")
"""The first types get one provider more if the number of providers is not divisible by the number of types."""


class ProviderTriggers(NamedTuple):
    """One trigger per provider, P in all."""

    params: MaskedBlend
    """leaves with a leading axis P"""
    names: tuple[str, ...]
    """names in reports: "blend", "solid (similar)" """
    similar_group: np.ndarray
    """bool [P]: providers whose triggers resemble each other"""


class ProviderPool(NamedTuple):
    """The training sets of all providers as views into one pool of images.

    Providers overlap, and all but 1 % of their rows are clean, so the pool holds the dataset once, and the poisoned copies.
    """

    images: np.ndarray
    """uint8 [N + P n_p, H, W, C]: the dataset's images, then n_p poisoned copies per provider"""
    rows: np.ndarray
    """int32 [P, n]: the number in the pool of each provider's images"""
    labels: np.ndarray
    """int32 [P, n]: the labels after poisoning"""
    is_poisoned: np.ndarray
    """bool [P, n]"""
    original_labels: np.ndarray
    """int32 [P, n]"""


def provider_trigger_types(key: Key, num_providers: int, types: Sequence[str] = TRIGGER_TYPES) -> tuple[str, ...]:
    """Assign trigger types to providers.

    Each type goes to floor(P / number of types) providers, the first types to one more until every provider has one; the
    assignment is then shuffled. Seven providers and four types give 2, 2, 2, 1.

    Args:
        key: a key of `jax.random.key`.
        num_providers: P.
        types: the types; the first ones get the remaining providers.

    Returns:
        P types.

    References:
        Heydari et al. 2025, section 4.2 ("one randomly selected trigger type"); the counts are those of the
        released code.
    """
    quotient, remainder = divmod(num_providers, len(types))
    assigned = [name for place, name in enumerate(types) for _ in range(quotient + (place < remainder))]
    return tuple(assigned[place] for place in np.asarray(jax.random.permutation(key, num_providers)))


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

    Blended pictures are drawn without replacement; once all have been used, from the full set again.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C), C being 1 or 3.
        num_providers: P, at least 1.
        num_similar: number of providers whose triggers resemble each other: 0, or 2 to P. Their type, solid or
          checkerboard, is drawn, and their triggers are perturbed copies of the first; the other providers share the
          three remaining types. The paper has 3 of 7 on CIFAR-10 and none on MNIST.
        similarity: how similar they are, from 0 to 1; see `bdjax.triggers.patches.draw_similar_patches`.
        blend_opacity: the range that a blended picture's opacity is drawn from; by default
          `bdjax.triggers.blend.DEFAULT_OPACITY_RANGE`.
        minimum_contrast: the least brightness of solid patches and the least contrast of checkerboards, from 0 to 1; 0
          as published.

    Returns:
        The triggers, in shuffled order.

    Raises:
        InputError: the numbers of providers are inconsistent, or the image has no room for a patch.

    References:
        Heydari et al. 2025, section 4.2 and figure 2.
    """
    if num_providers < 1:
        raise InputError(f"the number of providers must be at least 1, not {num_providers}")
    if num_similar != 0 and not 2 <= num_similar <= num_providers:
        raise InputError(
            f"{num_similar} similar triggers among {num_providers} providers: must be 0, or 2 to {num_providers}"
        )
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
    """Let every provider poison its share of a dataset, all with the same target class.

    Only rows outside the target class are poisoned. Every provider poisons the same number of rows, n_p. A rate of
    "all" rows, as in the paper's text, gives equal numbers. A rate of the "candidates", as in the released code, may not:
    then n_p is the smallest of the providers' numbers, since the arrays of a pool need equal shapes.

    Args:
        key: a key of `jax.random.key`; it draws the rows.
        dataset: N clean rows.
        provider_rows: int [P, n], the rows of the dataset that each provider has, distinct within each provider.
        triggers: one per provider.
        rate: share of each provider's rows to poison, in (0, 1].
        target: the target class of all providers.
        rate_of: see `bdjax.attacks.poisoning.select_rows`.

    Returns:
        The pool. Column j of provider p is row `provider_rows[p, j]` of the dataset, poisoned or not.

    Raises:
        InputError: the rate gives no row, or more rows than there are candidates; the target is not a class; or the
          numbers of triggers and providers differ.

    References:
        Heydari et al. 2025, section 4.3, equation 2.
    """
    provider_rows = np.asarray(provider_rows, np.int32)
    num_providers = len(provider_rows)
    if len(triggers.names) != num_providers:
        raise InputError(f"{len(triggers.names)} triggers for {num_providers} providers: each provider needs one")
    if not 0 <= target < dataset.num_classes:
        raise InputError(f"target {target} is not a class; classes are {dataset.class_range}")
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
