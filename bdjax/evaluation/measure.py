"""Runs a defense on suspects and measures it: CDA, ASR and R-ACC of the defended models, quality of the flags and scores."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax.attacks.poisoning import trigger_all
from bdjax.defenses import contract
from bdjax.defenses.contract import DefenseInput
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import DefenseVariant
from bdjax.metrics import (
    AttackMetrics,
    DetectionMetrics,
    clean_accuracy,
    measure_attack,
    measure_detection,
    top_rows,
)
from bdjax.training import ensemble
from bdjax.types import Dataset, DefenseResult, Detection, Key, Model, NotTested, PyTree

LABELS = {"auc": "AUC", "precision": "precision", "recall": "recall"}


class Measured(NamedTuple):
    """One suspect after one defense."""

    suspect: Suspect
    variant: DefenseVariant
    cda: float | None
    """None for a detector, which makes no model"""
    metrics: tuple[AttackMetrics, ...]
    """one entry for each of the suspect's triggers; empty if no trigger is known"""
    detection: DetectionMetrics
    facts: Mapping[str, float | None]
    """None for a number that is not finite, as of a network that diverged"""
    seconds: float
    """time of the shared call divided by the number of suspects in it"""
    not_tested: NotTested = NotTested()
    """what of the suspect could not be tested"""
    warning: str = ""
    """why the result should not be relied on; "" for nothing"""

    @property
    def asr(self) -> float | None:
        """The mean over the suspect's triggers."""
        return float(np.mean([metrics.asr for metrics in self.metrics])) if self.metrics else None

    @property
    def r_acc(self) -> float | None:
        """The mean over the suspect's triggers."""
        return float(np.mean([metrics.r_acc for metrics in self.metrics])) if self.metrics else None


class Comparison(NamedTuple):
    """One defense on suspects that were members of the same call: what a report shows."""

    variant: DefenseVariant
    result: DefenseResult | Detection
    """for M suspects"""
    measured: list[Measured]
    """M entries, in the same order"""


class TriggeredViews(NamedTuple):
    """The test images of each suspect under each of its triggers."""

    test: Dataset
    triggered: tuple[tuple[np.ndarray, ...], ...]
    """[suspect][trigger]: uint8 [N, H, W, C]"""


def make_views(key: Key, suspects: Sequence[Suspect], test: Dataset) -> TriggeredViews:
    """Apply every suspect's triggers to the test images.

    Args:
        key: for triggers that are random per image; every defense sees the same images.
        suspects: M of them.
        test: the clean test set.
    """
    return TriggeredViews(
        test,
        tuple(
            tuple(
                trigger_all(jax.random.fold_in(key, suspect.seed), test, part.attack.apply, params)
                for part, params in zip(suspect.parts, suspect.params, strict=True)
            )
            for suspect in suspects
        ),
    )


def defend(
    inputs: DefenseInput, suspects: Sequence[Suspect], variant: DefenseVariant, views: TriggeredViews
) -> tuple[DefenseResult, list[Measured]]:
    """Run one defense on all suspects, and measure the defended models.

    Args:
        inputs: the suspects as defenses see them; the defense is given only what it declares as needed.
        suspects: the same suspects with the ground truth.
        variant: the defense.
        views: the test images.
    """
    start = time.perf_counter()
    result = contract.run(variant.defense, inputs, variant.settings)
    seconds = (time.perf_counter() - start) / len(suspects)
    return result, measure(inputs, result, suspects, variant, views, seconds)


def score_detection(
    found: Detection, suspects: Sequence[Suspect], variant: DefenseVariant, seconds: float
) -> list[Measured]:
    """Score a detector's flags for every suspect; nothing is trained, so there is no CDA.

    Args:
        found: the detector's output for M suspects.
        suspects: the same suspects with the ground truth.
        variant: the detector.
        seconds: time per suspect.
    """
    results = []
    for i, suspect in enumerate(suspects):
        limits = not_tested_of(found, i)
        # Without a test there are no flags, which is not the same as none that is set.
        flags, scores = (None, None) if limits.reason else (found.flags[i], found.scores[i])
        detection = measure_detection(flags, scores, suspect.is_poisoned)
        facts = {name: _number(values[i]) for name, values in found.facts.items()}
        results.append(Measured(suspect, variant, None, (), detection, facts, seconds, limits, warning_of(found, i)))
    return results


def _number(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


def warning_of(found: Detection | DefenseResult, number: int) -> str:
    """Why the result of one of the suspects should not be relied on; "" for no reason."""
    return found.warnings[number] if found.warnings else ""


def not_tested_of(found: Detection | DefenseResult, number: int) -> NotTested:
    """What could not be tested of one of the suspects."""
    return found.not_tested[number] if found.not_tested else NotTested()


def measure_by_class(suspect: Suspect, found: Detection) -> list[dict[str, Any]] | None:
    """Score a detector's flags over all rows, then within each class that has poisoned or flagged rows.

    Args:
        suspect: the rows.
        found: the detector's output for this suspect alone: M = 1.

    Returns:
        A dict for all rows ("class": None) and one for each class: counts, precision, recall, F1 and AUC. None if the ground
        truth is unknown.
    """
    if suspect.is_poisoned is None:
        return None
    flags, scores, truth, labels = found.flags[0], found.scores[0], suspect.is_poisoned, suspect.dataset.labels

    def score(label: int | None, rows: np.ndarray) -> dict[str, Any]:
        measured = measure_detection(flags[rows], scores[rows], truth[rows])
        counts = {"rows": rows, "poisoned": truth & rows, "flagged": flags & rows, "hits": flags & truth & rows}
        numbers = {name: int(values.sum()) for name, values in counts.items()}
        shares = {name: getattr(measured, name) for name in ("precision", "recall", "f1", "auc")}
        return {"class": label, **numbers, **shares}

    shown = np.unique(labels[flags | truth])
    return [score(None, np.ones(len(labels), bool)), *(score(int(label), labels == label) for label in shown)]


def measure(
    inputs: DefenseInput,
    result: DefenseResult,
    suspects: Sequence[Suspect],
    variant: DefenseVariant,
    views: TriggeredViews,
    seconds: float,
) -> list[Measured]:
    """CDA, ASR, R-ACC and the quality of the flags, for every suspect; as facts CDA and ASR of `more_networks`."""
    runner, batch_size, test = inputs.runner, inputs.recipe.evaluation_batch_size, views.test
    clean = np.argmax(runner.predict(result.model, result.variables, test.images, batch_size), -1)
    measured: list[list[AttackMetrics]] = [[] for _ in suspects]
    for part in range(max(len(suspect.parts) for suspect in suspects)):
        # Members with fewer triggers get the plain images, so that all stay members of one call.
        images = [
            views.triggered[i][part] if part < len(suspect.parts) else test.images for i, suspect in enumerate(suspects)
        ]
        predicted = np.argmax(runner.predict_own(result.model, result.variables, np.stack(images), batch_size), -1)
        for i, suspect in enumerate(suspects):
            if part < len(suspect.parts):
                rule = suspect.parts[part].rule
                victims, wanted = rule.victims(test.labels), rule.wanted(test.labels)
                measured[i].append(measure_attack(clean[i], predicted[i], test.labels, victims, wanted))
    results, of_more = [], _of_more_networks(inputs, result, suspects, variant, views)
    for i, suspect in enumerate(suspects):
        limits = not_tested_of(result, i)
        flags, scores = (
            None if values is None or limits.reason else values[i] for values in (result.flags, result.scores)
        )
        results.append(
            Measured(
                suspect,
                variant,
                clean_accuracy(clean[i], test.labels),
                tuple(measured[i]),
                measure_detection(flags, scores, suspect.is_poisoned),
                {name: _number(values[i]) for name, values in result.facts.items()}
                | _of_singles(result, suspect, i)
                | of_more[i],
                seconds,
                limits,
                warning_of(result, i),
            )
        )
    return results


def _of_more_networks(
    inputs: DefenseInput,
    result: DefenseResult,
    suspects: Sequence[Suspect],
    variant: DefenseVariant,
    views: TriggeredViews,
) -> list[dict[str, float | None]]:
    """For each suspect, the CDA of each of `DefenseResult.more_networks`; for an attacked suspect also the ASR, and as its
    control the ASR on the clean suspect's network of the same seed, where the run has one."""
    found: list[dict[str, float | None]] = [{} for _ in suspects]
    for name, network in result.more_networks.items():
        alone = DefenseResult(*network)
        measured = measure(inputs, alone, suspects, variant, views, 0.0)
        of_seed = clean_members(Comparison(variant, alone, measured))
        controls = success_on(inputs, alone.model, of_seed, suspects, variant, views)
        for facts, of_suspect, control in zip(found, measured, controls, strict=True):
            facts[f"{name}'s CDA"] = of_suspect.cda
            if of_suspect.metrics:
                facts |= {f"{name}'s ASR": of_suspect.asr, f"{name}'s control ASR": control}
    return found


def _of_singles(result: DefenseResult, suspect: Suspect, number: int) -> dict[str, float | None]:
    """How well each of several networks finds the poisoned rows by itself: the range of AUC, and of precision and recall where
    it flags as many rows as the defense. Empty without several networks or without the ground truth."""
    if result.single_scores is None or result.single_scores.shape[1] < 2 or suspect.is_poisoned is None:
        return {}
    all_scores, flags = result.single_scores[number], result.flags[number]
    measured = [measure_detection(top_rows(scores, flags.sum()), scores, suspect.is_poisoned) for scores in all_scores]
    found = {name: [getattr(single, name) for single in measured] for name in ("auc", "precision", "recall")}
    return {
        f"{LABELS[name]} of a single network, {which}": float(function(values))
        for name, values in found.items()
        if None not in values
        for which, function in (("lowest", min), ("median", np.median), ("highest", max))
    }


def success_on(
    inputs: DefenseInput,
    model: Model,
    of_seed: Mapping[int, PyTree],
    suspects: Sequence[Suspect],
    variant: DefenseVariant,
    views: TriggeredViews,
) -> list[float | None]:
    """ASR of each suspect's triggers on another network of the same seed: the control, if that network has no backdoor.

    Args:
        inputs: the suspects as the defense got them.
        model: architecture of the other networks.
        of_seed: seed -> variables of its network.
        suspects: M of them.
        variant: the defense that made the other networks.
        views: the test images.

    Returns:
        M numbers; None for a suspect without a trigger, or if `of_seed` lacks its seed.
    """
    if not of_seed:
        return [None] * len(suspects)
    spare = next(iter(of_seed.values()))  # fills the places of members whose number is dropped below
    variables = ensemble.stack([of_seed.get(suspect.seed, spare) for suspect in suspects])
    measured = measure(inputs, DefenseResult(model, variables), suspects, variant, views, 0.0)
    return [result.asr if result.suspect.seed in of_seed else None for result in measured]


def clean_members(comparison: Comparison) -> dict[int, PyTree]:
    """Seed -> variables of the defended model of that seed's clean suspect; empty if no suspect is known to be clean."""
    found: dict[int, PyTree] = {}
    for number, suspect in enumerate(result.suspect for result in comparison.measured):
        if suspect.is_clean and suspect.seed not in found:
            found[suspect.seed] = ensemble.members(comparison.result.variables, number)
    return found
