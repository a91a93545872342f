"""Outsourced training in TA-KD's threat model: several providers, each with its own rows and its own trigger.

Every provider draws its share of the training set, poisons a small part of it with its trigger, splits the result into
training and validation rows, and trains. All providers of all seeds are members of one ensemble, so the result is one pool
of images and, for each member, row numbers into it (Heydari et al. 2025, sections 4.1-4.3).
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.poisoning import poisoned_rows
from bdjax.attacks.providers import ProviderTriggers, make_provider_triggers, poison_providers
from bdjax.choices import RateOf
from bdjax.datasets.splits import provider_rows, train_validation_rows
from bdjax.settings import Amount, Increasing, Members, PositiveShare, Share, ShareBelowOne
from bdjax.training.member import Rows
from bdjax.types import Array, Dataset, Key


@dataclass(frozen=True)
class OutsourcingConfig:
    """Providers, their shares of the data and their triggers. The defaults are the paper's."""

    num_providers: Members = 7
    provider_fraction: PositiveShare = 0.4
    """share of the training set that each provider gets"""
    validation_fraction: ShareBelowOne = 0.2
    """share of a provider's rows for validation, split off after poisoning"""
    target: Amount = 0
    poison_rate: PositiveShare = 0.01
    poison_rate_of: RateOf = "all"
    """what the rate is a share of: "all" rows, or the "candidates" outside the target class, as in the paper's code"""
    num_similar: Amount = 0
    """number of triggers in a group that resemble each other; 3 in the paper's CIFAR-10 experiment"""
    similarity: Share = 0.75
    blend_opacity: Annotated[tuple[Share, Share], Increasing(or_equal=True)] | None = None
    """range of the opacity of blended pictures; None for 0.05-0.1 (grey images) and 0.15-0.2 (colour)"""
    minimum_contrast: Share = 0.0
    """least contrast of patches; at 0, the paper's sampling, a solid patch may be as dark as the pixels under it"""


class Outsourced(NamedTuple):
    """The data of all providers of all seeds."""

    pool: np.ndarray
    """uint8 [P, H, W, C]: the clean images, then all poisoned copies"""
    train: Rows
    """leaves [S * providers, n]"""
    validation: Rows
    """leaves [S * providers, n']"""
    triggers: tuple[ProviderTriggers, ...]
    """for each seed"""
    num_poisoned: int
    """number of poisoned rows of each provider"""


def outsource(keys: list[Key], dataset: Dataset, config: OutsourcingConfig) -> Outsourced:
    """Draw, poison and split every provider's rows, for every seed.

    Args:
        keys: one per seed, S in all.
        dataset: the training set that providers draw from.
        config: shares, rates and triggers.

    Raises:
        InputError: a provider would have no row, or poison none.
    """
    extra, train, validation, triggers = [], [], [], []
    num_clean = num_pool = len(dataset)
    for key in keys:
        draw_key, trigger_key, poison_key, split_key = jax.random.split(key, 4)
        rows = provider_rows(draw_key, num_clean, config.num_providers, config.provider_fraction)
        seed_triggers = make_provider_triggers(
            trigger_key,
            dataset.image_shape,
            config.num_providers,
            num_similar=config.num_similar,
            similarity=config.similarity,
            blend_opacity=config.blend_opacity,
            minimum_contrast=config.minimum_contrast,
        )
        poisoned = poison_providers(
            poison_key,
            dataset,
            rows,
            seed_triggers,
            rate=config.poison_rate,
            target=config.target,
            rate_of=config.poison_rate_of,
        )
        copies = poisoned.images[num_clean:]
        index = np.where(poisoned.rows >= num_clean, poisoned.rows - num_clean + num_pool, poisoned.rows)
        for provider in range(config.num_providers):
            positions = np.arange(index.shape[1])
            provider_key = jax.random.fold_in(split_key, provider)
            parts = train_validation_rows(provider_key, positions, config.validation_fraction)
            for members, columns in zip((train, validation), parts, strict=True):
                members.append((index[provider, columns], poisoned.labels[provider, columns]))
        extra.append(copies)
        num_pool += len(copies)
        triggers.append(seed_triggers)
    return Outsourced(
        np.concatenate([dataset.images, *extra]),
        as_rows(train),
        as_rows(validation),
        tuple(triggers),
        int(poisoned.is_poisoned[0].sum()),
    )


def split_rows(keys: list[Key], labels: np.ndarray, validation_fraction: float) -> tuple[Rows, Rows]:
    """Split all rows of the set into training and validation rows for the clean reference, by each seed's key.

    Args:
        keys: one per seed, S in all.
        labels: int32 [N].
        validation_fraction: in [0, 1).

    Returns:
        (training, validation): leaves [S, n] and [S, n'], indices into the set.
    """
    parts = [train_validation_rows(key, np.arange(len(labels)), validation_fraction) for key in keys]
    return tuple(as_rows([(part[i], labels[part[i]]) for part in parts]) for i in (0, 1))


def as_rows(members: list[tuple[np.ndarray, np.ndarray]]) -> Rows:
    """Stack each member's (indices, labels), both int [n], into rows [M, n] for the training engine."""
    index, labels = (np.stack(part).astype(np.int32) for part in zip(*members, strict=True))
    return Rows(jnp.asarray(index), {"labels": jnp.asarray(labels)})


def triggered_views(images: Array, triggers: ProviderTriggers | None) -> np.ndarray:
    """The test images, unchanged and with each trigger, in 8 bits like the image files of an attacker.

    Args:
        images: uint8 [N, H, W, C].
        triggers: those of T providers; None for no triggered views.

    Returns:
        uint8 [1 + T, N, H, W, C]; the first view is the unchanged images.
    """
    views = [np.asarray(images)]
    if triggers is not None:
        for i in range(len(triggers.names)):
            views.append(np.asarray(poisoned_rows(images, jax.tree.map(lambda leaf, i=i: leaf[i], triggers.params))))
    return np.stack(views)
