"""A defense on suspects, measured: CDA, ASR and R-ACC of what comes out, and the worth of its flags and scores."""

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
from bdjax.metrics import AttackMetrics, DetectionMetrics, clean_accuracy, measure_attack, measure_detection
from bdjax.training import ensemble
from bdjax.types import Dataset, DefenseResult, Detection, Key, Model, PyTree


class Measured(NamedTuple):
    """One suspect after one defense."""

    suspect: Suspect
    variant: DefenseVariant
    cda: float | None
    """None of a detector alone"""
    metrics: tuple[AttackMetrics, ...]
    """under each of the suspect's triggers; empty where none is known"""
    detection: DetectionMetrics
    facts: Mapping[str, float]
    seconds: float
    """of the call that this suspect shared, divided by their number"""

    @property
    def asr(self) -> float | None:
        """The mean over the suspect's triggers."""
        return float(np.mean([one.asr for one in self.metrics])) if self.metrics else None

    @property
    def r_acc(self) -> float | None:
        """Likewise."""
        return float(np.mean([one.r_acc for one in self.metrics])) if self.metrics else None


class Comparison(NamedTuple):
    """One defense on suspects that were members of one call: what a report shows."""

    variant: DefenseVariant
    result: DefenseResult | Detection
    """of M suspects"""
    measured: list[Measured]
    """M, in the same order"""


class TriggeredViews(NamedTuple):
    """The test images of each suspect under each of its triggers."""

    test: Dataset
    triggered: tuple[tuple[np.ndarray, ...], ...]
    """[suspect][part]: uint8 [N, H, W, C]"""


def make_views(key: Key, suspects: Sequence[Suspect], test: Dataset) -> TriggeredViews:
    """Put every suspect's triggers onto the test images.

    Args:
        key: for triggers that are random per image: the same images for every defense.
        suspects: any.
        test: the clean test set.
    """
    return TriggeredViews(
        test,
        tuple(
            tuple(
                trigger_all(jax.random.fold_in(key, one.seed), test, part.attack.apply, params)
                for part, params in zip(one.parts, one.params, strict=True)
            )
            for one in suspects
        ),
    )


def defend(
    inputs: DefenseInput, suspects: Sequence[Suspect], variant: DefenseVariant, views: TriggeredViews
) -> tuple[DefenseResult, list[Measured]]:
    """Run one defense on all suspects, and measure what comes out.

    Args:
        inputs: the suspects; of what is known of them the defense gets what it needs.
        suspects: the same with the truth.
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
    """What the flags and scores of a detector are worth, for every suspect; nothing is trained, so there is no CDA.

    Args:
        found: of M suspects.
        suspects: the same with the truth.
        variant: the detector.
        seconds: that it took for one of them.
    """
    results = []
    for i, one in enumerate(suspects):
        detection = measure_detection(found.flags[i], found.scores[i], one.is_poisoned)
        facts = {name: float(values[i]) for name, values in found.facts.items()}
        results.append(Measured(one, variant, None, (), detection, facts, seconds))
    return results


def measure_by_class(suspect: Suspect, found: Detection) -> list[dict[str, Any]] | None:
    """What the flags and scores of a detector are worth: of all rows, then of each class with poisoned or flagged rows.

    Args:
        suspect: the rows.
        found: of this one suspect: M = 1.

    Returns:
        Numbers of rows, and precision, recall, F1 and AUC, with the "class" (None: all rows); None if the truth is unknown.
    """
    if suspect.is_poisoned is None:
        return None
    flags, scores, truth, labels = found.flags[0], found.scores[0], suspect.is_poisoned, suspect.dataset.labels

    def worth(label: int | None, own: np.ndarray) -> dict[str, Any]:
        measured = measure_detection(flags[own], scores[own], truth[own])
        counts = {"rows": own, "poisoned": truth & own, "flagged": flags & own, "hits": flags & truth & own}
        numbers = {name: int(values.sum()) for name, values in counts.items()}
        shares = {name: getattr(measured, name) for name in ("precision", "recall", "f1", "auc")}
        return {"class": label, **numbers, **shares}

    shown = np.unique(labels[flags | truth])
    return [worth(None, np.ones(len(labels), bool)), *(worth(int(label), labels == label) for label in shown)]


def measure(
    inputs: DefenseInput,
    result: DefenseResult,
    suspects: Sequence[Suspect],
    variant: DefenseVariant,
    views: TriggeredViews,
    seconds: float,
) -> list[Measured]:
    """CDA, ASR, R-ACC and the worth of the flags, for every suspect."""
    runner, batch_size, test = inputs.runner, inputs.recipe.evaluation_batch_size, views.test
    clean = np.argmax(runner.predict(result.model, result.variables, test.images, batch_size), -1)
    measured: list[list[AttackMetrics]] = [[] for _ in suspects]
    for part in range(max(len(one.parts) for one in suspects)):
        # Members without such a trigger see the plain images, so that all stay members of one call.
        own = [views.triggered[i][part] if part < len(one.parts) else test.images for i, one in enumerate(suspects)]
        answers = np.argmax(runner.predict_own(result.model, result.variables, np.stack(own), batch_size), -1)
        for i, one in enumerate(suspects):
            if part < len(one.parts):
                rule = one.parts[part].rule
                victims, wanted = rule.victims(test.labels), rule.wanted(test.labels)
                measured[i].append(measure_attack(clean[i], answers[i], test.labels, victims, wanted))
    results = []
    for i, one in enumerate(suspects):
        flags, scores = (None if each is None else each[i] for each in (result.flags, result.scores))
        results.append(
            Measured(
                one,
                variant,
                clean_accuracy(clean[i], test.labels),
                tuple(measured[i]),
                measure_detection(flags, scores, one.is_poisoned),
                {name: float(values[i]) for name, values in result.facts.items()},
                seconds,
            )
        )
    return results


def success_on(
    inputs: DefenseInput,
    model: Model,
    of_seed: Mapping[int, PyTree],
    suspects: Sequence[Suspect],
    variant: DefenseVariant,
    views: TriggeredViews,
) -> list[float | None]:
    """ASR of each suspect's triggers on another network of its seed: the control, if that network has no backdoor.

    Args:
        inputs: the suspects as the defense got them.
        model: the other networks' architecture.
        of_seed: seed -> the variables of its network.
        suspects: M of them.
        variant: the defense that made the other networks.
        views: the test images.

    Returns:
        M numbers; None for a suspect without a trigger, or of a seed without such a network.
    """
    if not of_seed:
        return [None] * len(suspects)
    spare = next(iter(of_seed.values()))  # for members whose number is not asked for
    variables = ensemble.stack([of_seed.get(suspect.seed, spare) for suspect in suspects])
    measured = measure(inputs, DefenseResult(model, variables), suspects, variant, views, 0.0)
    return [each.asr if each.suspect.seed in of_seed else None for each in measured]


def clean_members(comparison: Comparison) -> dict[int, PyTree]:
    """Seed -> the variables of what a defense made of that seed's suspect without a backdoor; empty without such suspects."""
    found: dict[int, PyTree] = {}
    for number, suspect in enumerate(each.suspect for each in comparison.measured):
        if suspect.is_clean and suspect.seed not in found:
            found[suspect.seed] = ensemble.members(comparison.result.variables, number)
    return found
