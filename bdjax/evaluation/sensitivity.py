"""How small an attack does a detector find in rows like these? A simple trigger is planted in copies of them.

An audit that finds nothing says little unless it also says what it would have found. So a small square is put on a known number
of a copy's rows, which get the label of the largest class, and the same detector looks at the copy. Several numbers of planted
rows are members of the same call. The smaller numbers are part of the larger ones, so that only the number differs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax.attacks.contract import Knowledge
from bdjax.attacks.registry import find_attack
from bdjax.errors import InputError
from bdjax.evaluation.measure import not_tested_of
from bdjax.evaluation.suspects import Suspect, make_suspect
from bdjax.evaluation.variants import read_attack
from bdjax.types import Dataset, Detection, Key

SQUARES = ("green_square", "white_square")
"""Attacks to choose from: opaque squares of 3 x 3 cells in the bottom right corner; a cell is a pixel unless scaled."""
MULTIPLES = (0.5, 1.0, 2.0)
"""Numbers of planted rows, as multiples of the number that a detector's settings ask for (`Defense.smallest`)."""
USUAL_SHARE = 0.02
"""Share of the rows that stands in for that number where the settings give none; ours."""
MOST_PLANTED = 0.5
"""Most rows that are planted, as a share of those outside the target class: beyond, the copy is not like the rows any more."""
FOUND_SHARE = 0.5
"""A planted trigger counts as found if this share of its rows is flagged, and this share of the flagged rows has it; ours."""
MOST_COMPARED = 1000
"""Rows that the contrast of the squares is measured on."""


class Planting(NamedTuple):
    """Copies of the rows with a planted trigger."""

    title: str
    """"3×3 green square" """
    target: int
    """the class that planted rows are labelled as"""
    suspects: tuple[Suspect, ...]
    """by increasing number of planted rows, which `Suspect.is_poisoned` marks"""


def plant(key: Key, rows: Dataset, smallest: int | None, scale: int = 1) -> Planting:
    """Plant a square of good contrast in copies of the rows.

    The target is the class with the most rows, where planted rows are the smallest share. Planted rows are of all other
    classes.

    Args:
        key: decides which rows are planted.
        rows: uint8 images [n, H, W, C]; poisoned rows among them stay as they are.
        smallest: the number of planted rows that `MULTIPLES` refers to; None for `USUAL_SHARE` of the rows.
        scale: side of the square in units of 3 pixels.

    Raises:
        InputError: there are too few rows, or the images are too small: a predicate of "the trigger".
    """
    names = [field.name for field in dataclasses.fields(Dataset)]
    plain = Dataset(**{name: getattr(rows, name) for name in names})  # known poison is no part of what is planted
    counts = np.bincount(plain.labels, minlength=plain.num_classes)
    target = int(np.argmax(counts))
    others = len(plain) - int(counts[target])
    base = smallest or max(1, round(USUAL_SHARE * len(plain)))
    wanted = sorted({max(1, round(multiple * base)) for multiple in MULTIPLES})
    fitting = [count for count in wanted if count <= MOST_PLANTED * others]
    if not fitting:
        raise InputError(
            f"cannot be planted: {wanted[0]:,} rows are more than half of the {others:,} rows outside the largest class"
        )
    try:
        name, (height, width) = _most_visible(plain, target, scale)
        square = f"{name}:scale={scale}:label_rule=all_to_one"
        suspects = tuple(
            make_suspect(
                key,
                read_attack(f"{square}:poison_rate={count / len(plain)!r}", plain, target),
                *(plain, 0, None, True),
            )
            for count in fitting
        )
    except InputError as error:
        raise InputError(f"cannot be planted: {error}") from error
    return Planting(f"{height}×{width} {find_attack(name).title.lower()}", target, suspects)


def _most_visible(rows: Dataset, target: int, scale: int) -> tuple[str, tuple[int, int]]:
    """The attack of `SQUARES` whose square differs most from the pixels that it covers, and its (height, width)."""
    images = rows.images[:: -(-len(rows) // MOST_COMPARED)].astype(np.float32) / 255
    best: tuple[float, str, tuple[int, int]] | None = None
    for name in SQUARES:
        attack = find_attack(name)
        settings = dataclasses.replace(attack.settings, scale=scale)
        params = attack.make_params(jax.random.key(0), Knowledge(rows, target), settings)
        mask = np.asarray(params.mask)[..., 0] > 0
        contrast = float(np.abs(images[:, mask] - np.asarray(params.pattern)[mask]).mean())
        if best is None or contrast > best[0]:
            best = contrast, name, (int(mask.any(axis=1).sum()), int(mask.any(axis=0).sum()))
    return best[1:]


def measure(planting: Planting, found: Detection) -> list[dict[str, Any]]:
    """What a detector made of the copies.

    Args:
        planting: M copies.
        found: the detector's output for them.

    Returns:
        An entry for each: "planted" rows, the "share" of all rows that they are, how many of them are among the "flagged" rows
        ("hits"), "precision" (None if nothing is flagged), and whether the trigger was "found", see `FOUND_SHARE`. A copy that
        could not be tested has no flags.
    """
    return [_measure(suspect, found, number) for number, suspect in enumerate(planting.suspects)]


def _measure(suspect: Suspect, found: Detection, number: int) -> dict[str, Any]:
    planted = suspect.is_poisoned
    flags = found.flags[number] & (not not_tested_of(found, number).reason)
    count, hits, flagged = int(planted.sum()), int((flags & planted).sum()), int(flags.sum())
    return {
        "planted": count,
        "share": count / len(planted),
        "flagged": flagged,
        "hits": hits,
        "precision": hits / flagged if flagged else None,
        "found": hits >= FOUND_SHARE * count and hits >= FOUND_SHARE * flagged,
    }


def least_found(sets: Sequence[dict[str, Any]]) -> int | None:
    """The number of planted rows from which on every copy was found; None if the largest was not.

    Args:
        sets: from `measure`.
    """
    least = None
    for entry in sorted(sets, key=lambda entry: -entry["planted"]):
        if not entry["found"]:
            break
        least = entry["planted"]
    return least
