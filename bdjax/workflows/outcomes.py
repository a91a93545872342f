"""Outcomes of detectors on a batch of suspects, stored as plain arrays, so that a resumed run can read them back."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bdjax.datasets.archives import open_npz
from bdjax.datasets.validation import one_line
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, score_detection
from bdjax.evaluation.patterns import FoundPattern
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import AttackVariant, DefenseVariant
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset, Detection, NotTested, PoisonedDataset

FILES = "outcomes"
"""The folder of the batches' outcomes, inside that of the run."""


class Outcome(NamedTuple):
    """Every detector on a batch of suspects."""

    comparisons: list[Comparison]
    """one for each detector"""
    found: list[FoundPattern]
    """the extracted patterns of all detectors"""


def write_outcome(folder: RunFolder, name: str, outcome: Outcome) -> pathlib.Path:
    """Write the outcome of a batch of suspects, as plain arrays."""
    arrays: dict[str, np.ndarray] = {}
    for number, result in enumerate(outcome.comparisons[0].measured):
        arrays[f"labels {number}"] = result.suspect.dataset.labels
        arrays[f"is_poisoned {number}"] = result.suspect.is_poisoned
        arrays[f"is_cover {number}"] = getattr(result.suspect.dataset, "is_cover", np.zeros(0, bool))
    for number, comparison in enumerate(outcome.comparisons):
        arrays[f"flags {number}"], arrays[f"scores {number}"] = comparison.result.flags, comparison.result.scores
        arrays[f"seconds {number}"] = np.float64(comparison.measured[0].seconds)
        arrays[f"fact names {number}"] = np.array(list(comparison.result.facts), np.str_)
        if comparison.result.not_tested:
            limits = [{"reason": of.reason, "classes": dict(of.classes)} for of in comparison.result.not_tested]
            arrays[f"not tested {number}"] = np.array(json.dumps(limits))
        if comparison.result.warnings:
            arrays[f"warnings {number}"] = np.array(json.dumps(comparison.result.warnings))
        facts = [np.asarray(values, np.float64) for values in comparison.result.facts.values()]
        arrays[f"facts {number}"] = np.array(facts).reshape(len(facts), len(comparison.measured))
    for number, pattern in enumerate(outcome.found):
        for field, value in pattern._asdict().items():
            if value is not None:
                arrays[f"found {number} {field}"] = np.asarray(value)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return folder.write_bytes(name, buffer.getvalue())


def read_outcome(
    file: pathlib.Path,
    wanted: Sequence[tuple[AttackVariant, int]],
    variants: Sequence[DefenseVariant],
    class_names: tuple[str, ...] = (),
) -> Outcome | None:
    """Read what `write_outcome` wrote for these suspects and detectors; None if there is no such file.

    Args:
        file: the file.
        wanted: the attack and the seed of each suspect.
        variants: the detectors.
        class_names: names of the classes, which the file does not have.

    Raises:
        InputError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        with open_npz(file) as stored:
            if stored.problems:
                raise ValueError(" ".join(next(iter(stored.problems.items()))))
            arrays = {name: stored.read(name) for name in stored.headers}
        suspects = [_suspect(arrays, number, attack, seed, class_names) for number, (attack, seed) in enumerate(wanted)]
        comparisons = [_comparison(arrays, number, variant, suspects) for number, variant in enumerate(variants)]
        return Outcome(comparisons, _found(arrays))
    except Exception as error:  # also of arrays that are intact but not those of an outcome
        raise InputError(
            f"{file}: is damaged ({one_line(error)}); remove it to run the detectors on these suspects again"
        ) from error


def _suspect(
    arrays: Mapping[str, np.ndarray], number: int, attack: AttackVariant, seed: int, class_names: tuple[str, ...]
) -> Suspect:
    labels, is_poisoned = arrays[f"labels {number}"], arrays[f"is_poisoned {number}"]
    images = np.broadcast_to(np.uint8(0), (len(labels), 1, 1, 1))
    num_classes = int(labels.max()) + 1
    if attack.plan is None:
        dataset = Dataset(images, labels, num_classes, "", "", class_names)
    else:
        is_cover = arrays[f"is_cover {number}"]
        dataset = PoisonedDataset(images, labels, num_classes, "", "", class_names, is_poisoned, labels, is_cover)
    return Suspect(attack, seed, dataset, (), is_poisoned)


def _comparison(
    arrays: Mapping[str, np.ndarray], number: int, variant: DefenseVariant, suspects: Sequence[Suspect]
) -> Comparison:
    facts = dict(zip(map(str, arrays[f"fact names {number}"]), arrays[f"facts {number}"], strict=True))
    limits = json.loads(str(arrays.get(f"not tested {number}", "[]")))
    not_tested = tuple(
        NotTested(of["reason"], {int(label): reason for label, reason in of["classes"].items()}) for of in limits
    )
    warnings = tuple(map(str, json.loads(str(arrays.get(f"warnings {number}", "[]")))))
    detected = Detection(
        arrays[f"flags {number}"], arrays[f"scores {number}"], facts, not_tested=not_tested, warnings=warnings
    )
    return Comparison(
        variant, detected, score_detection(detected, suspects, variant, float(arrays[f"seconds {number}"]))
    )


def _found(arrays: Mapping[str, np.ndarray]) -> list[FoundPattern]:
    found, number = [], 0
    while f"found {number} label" in arrays:
        values = {field: arrays.get(f"found {number} {field}") for field in FoundPattern._fields}
        plain = {field: value.item() for field, value in values.items() if value is not None and value.ndim == 0}
        found.append(FoundPattern(**{**values, **plain}))
        number += 1
    return found
