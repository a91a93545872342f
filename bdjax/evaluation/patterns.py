"""Compares the patterns that a detector extracted with the attacks' true triggers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses.vbd_patterns import sure_share
from bdjax.evaluation.suspects import Suspect
from bdjax.types import Detection

LEAST_OPACITY = 1e-3
"""Pixels fainter than this do not count as part of a true trigger."""


class FoundPattern(NamedTuple):
    """A trigger that a detector extracted, and the true one where it is known."""

    attack: str
    """display name of the attack: "white square 50 %" """
    seed: int
    label: int
    """the class whose rows carry the pattern"""
    pattern: np.ndarray
    """float32 [H, W, C] in [0, 1]"""
    mask: np.ndarray
    """bool [H, W]"""
    success: float
    """share of rows of other classes that the pattern sends to this class"""
    network: str
    """name of the network that found it"""
    true_pattern: np.ndarray | None
    """float32 [H, W, C] in [0, 1]"""
    true_mask: np.ndarray | None
    """float32 [H, W]: opacity of the true trigger"""
    example: np.ndarray | None
    """uint8 [H, W, C]: the flagged row with the highest score"""
    is_true_class: bool | None
    """whether the attack sends rows to that class"""
    class_title: str = ""
    """the class as reports name it; empty for its number"""
    flagged: int | None = None
    """number of rows of the class that are flagged; None if it was not recorded"""
    sure: float | None = None
    """of its rows with a score of at least 0.5, the share with a high score (`sure_share`); None if it was not recorded"""

    @property
    def overlap(self) -> float | None:
        """Intersection over union of the found and the true mask; None if the true mask is unknown."""
        if self.true_mask is None:
            return None
        is_set = np.asarray(self.true_mask) > 0
        union = np.sum(is_set | self.mask)
        return float(np.sum(is_set & self.mask) / union) if union else 0.0


def compare_patterns(detected: Detection, suspects: Sequence[Suspect]) -> list[FoundPattern]:
    """Every extracted pattern beside the true trigger.

    Args:
        detected: the detector's output for M suspects.
        suspects: the same suspects with the ground truth and their images.
    """
    found = []
    for member, (extracted, suspect) in enumerate(zip(detected.patterns, suspects, strict=True)):
        poisoned = true_classes(suspect)
        for pattern in extracted:
            flagged = detected.flags[member] & (suspect.dataset.labels == pattern.label)
            best = int(np.argmax(np.where(flagged, detected.scores[member], -1)))
            true_pattern, true_mask = true_trigger(suspect, pattern.label)
            found.append(
                FoundPattern(
                    attack=suspect.attack.title,
                    seed=suspect.seed,
                    label=pattern.label,
                    pattern=pattern.pattern,
                    mask=pattern.mask,
                    success=pattern.success,
                    network=pattern.network,
                    true_pattern=true_pattern,
                    true_mask=true_mask,
                    example=suspect.dataset.images[best] if flagged.any() else None,
                    is_true_class=pattern.label in poisoned,
                    class_title=suspect.dataset.class_title(pattern.label),
                    flagged=int(flagged.sum()),
                    sure=sure_share(detected.scores[member, suspect.dataset.labels == pattern.label]),
                )
            )
    return found


def with_true_classes(detected: Detection, suspects: Sequence[Suspect]) -> Detection:
    """Add to the facts how many classes are poisoned, and how many of them have an extracted pattern.

    Args:
        detected: the output of a detector that extracts patterns, for M suspects.
        suspects: the same suspects with the ground truth.
    """
    labels = [np.array([pattern.label for pattern in extracted], int) for extracted in detected.patterns]
    true_labels = [true_classes(suspect) for suspect in suspects]
    hits = np.array([np.isin(found, true).sum() for found, true in zip(labels, true_labels, strict=True)])
    facts = {
        **detected.facts,
        "poisoned classes": np.array([len(true) for true in true_labels]),
        "poisoned classes found": hits,
        "clean classes taken for poisoned": np.array([len(found) for found in labels]) - hits,
    }
    return detected._replace(facts=facts)


def true_classes(suspect: Suspect) -> np.ndarray:
    """The labels of the poisoned rows, each once."""
    return np.unique(suspect.dataset.labels[suspect.is_poisoned])


def true_trigger(suspect: Suspect, label: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The pattern, float32 [H, W, C], of the trigger that leads to a class, and its opacity at each pixel, float32 [H, W].

    They follow from applying the trigger to a black and to a white image, which is exact for triggers that blend. (None, None)
    if there is no attack, or it does not lead to that class.
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
