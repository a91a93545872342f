"""Patterns that a detector extracted, beside the triggers that the attacks really used."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.evaluation.suspects import Suspect
from bdjax.types import Detection

LEAST_OPACITY = 1e-3
"""What is fainter does not count as part of a true trigger."""


class FoundPattern(NamedTuple):
    """A trigger that a detector extracted, and the true one where it is known."""

    attack: str
    """what to call it: "white square 50 %" """
    seed: int
    label: int
    """the class that the trigger was found of"""
    pattern: np.ndarray
    """float32 [H, W, C] in [0, 1]"""
    mask: np.ndarray
    """bool [H, W]"""
    success: float
    """share of rows of other classes that it turns"""
    network: str
    """whose it is"""
    true_pattern: np.ndarray | None
    """float32 [H, W, C] in [0, 1]"""
    true_mask: np.ndarray | None
    """float32 [H, W]: how opaque the true trigger is"""
    example: np.ndarray | None
    """uint8 [H, W, C], a row that was flagged for it"""
    is_true_class: bool | None
    """whether the attack sends rows to that class"""

    @property
    def overlap(self) -> float | None:
        """Intersection over union of the found and the true mask; None if that is not known."""
        if self.true_mask is None:
            return None
        is_set = np.asarray(self.true_mask) > 0
        union = np.sum(is_set | self.mask)
        return float(np.sum(is_set & self.mask) / union) if union else 0.0


def compare_patterns(detected: Detection, suspects: Sequence[Suspect]) -> list[FoundPattern]:
    """Every pattern that was extracted, beside the true one.

    Args:
        detected: of M suspects.
        suspects: the same with the truth and their images.
    """
    found = []
    for member, (extracted, one) in enumerate(zip(detected.patterns, suspects, strict=True)):
        poisoned = true_classes(one)
        for each in extracted:
            own = detected.flags[member] & (one.dataset.labels == each.label)
            best = int(np.argmax(np.where(own, detected.scores[member], -1)))
            true_pattern, true_mask = true_trigger(one, each.label)
            found.append(
                FoundPattern(
                    attack=one.attack.title,
                    seed=one.seed,
                    label=each.label,
                    pattern=each.pattern,
                    mask=each.mask,
                    success=each.success,
                    network=each.network,
                    true_pattern=true_pattern,
                    true_mask=true_mask,
                    example=one.dataset.images[best] if own.any() else None,
                    is_true_class=each.label in poisoned,
                )
            )
    return found


def with_true_classes(detected: Detection, suspects: Sequence[Suspect]) -> Detection:
    """Say among the facts how many of the classes with a pattern are those that the attack sends rows to.

    Args:
        detected: of M suspects, by a detector that extracts patterns.
        suspects: the same with the truth.
    """
    labels = [np.array([each.label for each in extracted], int) for extracted in detected.patterns]
    hits = np.array([np.isin(own, true_classes(one)).sum() for own, one in zip(labels, suspects, strict=True)])
    facts = {
        **detected.facts,
        "poisoned classes": np.array([len(true_classes(one)) for one in suspects]),
        "poisoned classes found": hits,
        "clean classes taken for poisoned": np.array([len(own) for own in labels]) - hits,
    }
    return detected._replace(facts=facts)


def true_classes(suspect: Suspect) -> np.ndarray:
    """The classes that poisoned rows are labelled as."""
    return np.unique(suspect.dataset.labels[suspect.is_poisoned])


def true_trigger(suspect: Suspect, label: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The pattern, float32 [H, W, C], and its opacity at each pixel, float32 [H, W], of the trigger that leads to a class.

    They are read off what becomes of a black and of a white image, so they are exact of triggers that blend. None and None
    where the attack does not lead to that class, or there is none.
    """
    if not suspect.parts or label not in true_classes(suspect):
        return None, None
    part, params = suspect.parts[0], suspect.params[0]
    sources = np.arange(suspect.dataset.num_classes)
    source, shape = int(sources[part.rule.relabel(sources) == label][-1]), suspect.dataset.image_shape
    black, white = (
        part.attack.apply(params, jnp.full(shape, value, jnp.float32), jnp.int32(source), jax.random.key(0))
        for value in (0.0, 1.0)
    )
    opacity = np.asarray(1 - (white - black)).mean(axis=-1)
    is_there = opacity > LEAST_OPACITY
    pattern = np.where(is_there[..., None], np.asarray(black) / np.maximum(opacity[..., None], LEAST_OPACITY), 0)
    return np.clip(pattern, 0, 1).astype(np.float32), np.where(is_there, opacity, 0).astype(np.float32)
