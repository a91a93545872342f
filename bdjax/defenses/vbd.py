"""VBD: variance-based defense (Aseervatham et al. 2025). Which rows are poisoned, and what does the trigger look like?

1. Three networks too simple for the classes are trained on most of the suspect rows. Of the held-out rows, those of each class
   with the most confident predictions are assumed to be malicious.
2. to 4. A class is suspicious if its most and least confident rows use the most important pixel differently. Its trigger is
   extracted, and kept if it works on rows of other classes. That is `bdjax/defenses/vbd_patterns.py`, for one network at a
   time; of several patterns of one class, the best is kept by low accuracy of the network and high success of the pattern.
5. For each pattern a detector learns from gradient images g(x; c) of rows of other classes, unchanged (0) and with the pattern
   blended in at random opacities (1); later also from the rows of class c, with its own predictions as labels.
6. Rows of class c that its detector predicts as 1 are flagged. Stages 5 and 6 are `bdjax/defenses/vbd_detector.py`.
7. A clean network is trained without the flagged rows, or with new labels for them.

All M suspect training sets are processed together; each detector is a member of a call.

What the paper leaves open, or where its text and code differ: in the code the detectors are trained on rows of the whole
training set, in the text on those of the detection split. Here, as in the code, a row goes to the detector of its own class
(in the text, every row goes to every detector).
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdjax.defenses import vbd_patterns, vbd_premise
from bdjax.defenses.contract import Defense, DefenseInput, Facts, apart, count_text, fingerprint, labelled, limits
from bdjax.defenses.filtering import as_result, retrained
from bdjax.defenses.vbd_detector import Pattern, epochs_for, of_class, pixels, train_detectors
from bdjax.defenses.vbd_patterns import Candidate, VBDSettings
from bdjax.defenses.vbd_splits import fold_rows, split_rows
from bdjax.errors import InputError
from bdjax.models import MODELS
from bdjax.models.simple_cnn import LAYERS, network_name
from bdjax.settings import check_values
from bdjax.training import ensemble
from bdjax.training.stages import Nets
from bdjax.types import Array, DefenseResult, Detection, ExtractedPattern, Model, NotTested

CHANCE_LEVEL = 0.01
"""A p-value is no chance if it is below this after Bonferroni's correction; ours."""
LEAST_CHECKED = 100
"""Smallest number of rows that a pattern is checked on; not in the paper, for small sets."""
CLASSES_AT_ONCE, PATTERNS_AT_ONCE = 10, 16
"""How many share a call, which bounds the memory for hundreds of classes."""


class Analysis(NamedTuple):
    """All that VBD finds about M suspects, with J networks and K classes."""

    flags: np.ndarray
    """bool [M, n]"""
    scores: np.ndarray
    """float32 [M, n]: the detector's probability; 0 for rows of a class without a detector"""
    accuracies: np.ndarray
    """float64 [M, J]: accuracy of the simple networks on their training rows, after training and with running statistics"""
    held_back_accuracies: np.ndarray
    """float64 [M, J]: their accuracy on the held-back rows"""
    p_values: np.ndarray
    """float64 [M, J, K]"""
    success: np.ndarray
    """float64 [M, J, K]: success rate of the candidate pattern in the check; 0 without a candidate"""
    may_be_chance: np.ndarray
    """bool [M, K], see the function of this name"""
    network: np.ndarray
    """int [M, K]: the network whose pattern is kept, or -1"""
    masks: np.ndarray
    """bool [M, K, H, W]: mask of the pattern that is kept"""
    patterns: np.ndarray
    """float32 [M, K, H, W, C] in [0, 1], zero outside the mask"""
    detector_accuracies: np.ndarray
    """float64 [M, K]; 0 without a pattern"""
    new_labels: np.ndarray
    """int32 [M, n]: the second most likely class of flagged rows, the given label of all others"""
    not_tested: tuple[NotTested, ...] = ()
    """for each of the M suspects, the classes of which no network had enough rows to test"""

    @property
    def is_poisoned_class(self) -> np.ndarray:
        """Classes with a pattern: bool [M, K]."""
        return self.network >= 0


def train_networks(inputs: DefenseInput, settings: VBDSettings, rows: np.ndarray) -> list[Nets]:
    """Stage 1: train each simple network on some rows of each suspect, int [M, n'] into the training set."""
    index, labels = (np.take_along_axis(values, rows, axis=1) for values in (inputs.index, inputs.labels))
    epochs = epochs_for(settings.epochs, settings.least_steps, rows.shape[1], settings.batch_size)
    config = inputs.config(
        epochs=epochs,
        batch_size=settings.batch_size,
        optimiser=settings.optimiser,
        momentum=0.9,
        nesterov=False,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule="constant",
        augmentation="none",
        keep_last_batch=False,
    )
    description = (
        f"{epochs} epochs, batch {settings.batch_size}, {settings.optimiser} {settings.learning_rate:g}, decay "
        f"{settings.weight_decay:g}, "
        + (f"{settings.detect_share:g} held back" if settings.folds == 1 else f"{settings.folds} splits")
    )
    return [
        inputs.train(
            f"vbd: {layers}, {description}", inputs.make_model(network_name(layers)), config, labelled(index, labels)
        )
        for layers in settings.layers
    ]


@cache
def row_is_right(model: Model) -> Callable[..., Array]:
    """For `DefenseInput.per_row`: whether a row is predicted as its label."""
    return lambda variables, images, targets: (
        jnp.argmax(model.apply(variables, images, train=False).logits, axis=1) == targets["labels"]
    )


def accuracy_on(inputs: DefenseInput, nets: Nets, rows: np.ndarray) -> np.ndarray:
    """Accuracy of each suspect's network on rows of its training set, int [M, n']: float64 [M]."""
    index, labels = (np.take_along_axis(values, rows, axis=1) for values in (inputs.index, inputs.labels))
    return inputs.per_row(row_is_right(nets.model), nets.variables, labelled(index, labels)).mean(axis=1)


def find_candidates(
    inputs: DefenseInput, settings: VBDSettings, nets: Nets, held_back: np.ndarray, logits: np.ndarray
) -> list[list[Candidate]]:
    """Stages 2 and 3 with networks of one kind: a candidate for each suspect and class.

    With several splits the rows of a class are those that any of them holds back, each with the logits and the gradient of the
    network that was not trained on it.

    Args:
        inputs: the suspects, each as often as there are splits.
        settings: of the defense.
        nets: a simple network for each of these members.
        held_back: int [M * folds, d], rows of the training sets.
        logits: float32 [M * folds, d, K], of these rows.

    Returns:
        M lists of K candidates.
    """
    folds = settings.folds
    index, labels = (np.take_along_axis(values, held_back, axis=1) for values in (inputs.index, inputs.labels))
    by_suspect = [values.reshape(-1, folds * values.shape[1], *values.shape[2:]) for values in (index, labels, logits)]
    found: list[list[Candidate]] = [[] for _ in by_suspect[0]]
    # Gradients are as large as images, and there may be hundreds of classes.
    for start in range(0, inputs.num_classes, CLASSES_AT_ONCE):
        classes = np.arange(start, start + CLASSES_AT_ONCE) % inputs.num_classes  # the same shape in each iteration
        rows = [
            [vbd_patterns.select_rows(of_suspect, given, label, settings.rows_per_class) for label in classes]
            for _, given, of_suspect in zip(*by_suspect, strict=True)
        ]
        gradients = _gradients(inputs, nets, index, rows, classes, settings)
        for suspect, of_suspect in enumerate(rows):
            for place in range(min(CLASSES_AT_ONCE, inputs.num_classes - start)):
                if min(map(len, of_suspect[place])) < settings.least_rows:
                    found[suspect].append(vbd_patterns.no_candidate(inputs.runner.image_shape))
                    continue
                found[suspect].append(
                    vbd_patterns.find_candidate(
                        pixels(inputs, by_suspect[0][suspect, of_suspect[place][0]]),
                        *gradients[suspect][place],
                        p_value=settings.p_value,
                        pixel_rule=settings.pixel_rule,
                    )
                )
    return found


def _gradients(
    inputs: DefenseInput, nets: Nets, index: np.ndarray, rows: list, classes: np.ndarray, settings: VBDSettings
) -> list:
    """g of the chosen rows: for each suspect and class a list of two arrays, float32 [chosen, H, W, C].

    Args:
        inputs: the suspects, each as often as there are splits.
        nets: a simple network for each of these members.
        index: int [M * folds, d], the held-back rows of the pool.
        rows: for each suspect and class two arrays of places in the held-back rows of all splits, 0 to folds * d - 1.
        classes: int [classes].
        settings: of the defense.
    """
    folds, held_back = settings.folds, index.shape[1]
    which = np.zeros((len(index), len(classes), 2, settings.rows_per_class), np.int64)
    for suspect, of_suspect in enumerate(rows):
        for place, parts in enumerate(of_suspect):
            for part, chosen in enumerate(parts):
                for fold in range(folds):
                    of_fold = chosen[chosen // held_back == fold] % held_back
                    which[suspect * folds + fold, place, part, : len(of_fold)] = of_fold
    wanted = np.broadcast_to(classes[:, None, None], which.shape).reshape(len(index), -1)
    chosen = np.take_along_axis(index, which.reshape(len(index), -1), axis=1)
    function = vbd_patterns.row_margin_gradients(nets.model)
    gradients = inputs.per_row(function, nets.variables, of_class(chosen, wanted))
    gradients = apart(gradients.reshape(*which.shape, *gradients.shape[2:]), folds)

    def gathered(suspect: int, place: int, part: int) -> np.ndarray:
        fold_of = rows[suspect][place][part] // held_back
        number = np.zeros(len(fold_of), np.int64)
        for fold in range(folds):
            number[fold_of == fold] = np.arange(np.sum(fold_of == fold))
        return gradients[suspect, fold_of, place, part, number]

    return [
        [[gathered(suspect, place, part) for part in (0, 1)] for place in range(len(classes))]
        for suspect in range(len(rows))
    ]


def check_candidates(
    inputs: DefenseInput, settings: VBDSettings, nets: Nets, held_back: np.ndarray, found: list[list[Candidate]]
) -> np.ndarray:
    """Stage 4 with networks of one kind: the success rate of each candidate on rows of other classes, at full opacity.

    Args:
        inputs: the suspects, each as often as there are splits.
        settings: of the defense.
        nets: the networks that found the candidates, one for each of these members.
        held_back: int [M * folds, d], in the order of `split_rows`.
        found: the candidate of each suspect and class.

    Returns:
        float64 [M * folds, K]; 0 without a candidate.
    """
    found = [of_suspect for of_suspect in found for _ in range(settings.folds)]
    count = min(max(round(settings.check_share * held_back.shape[1]), LEAST_CHECKED), held_back.shape[1])
    index, labels = (
        np.take_along_axis(values, held_back[:, :count], axis=1) for values in (inputs.index, inputs.labels)
    )
    success = np.zeros((len(index), inputs.num_classes))
    for start in range(0, inputs.num_classes, CLASSES_AT_ONCE):
        classes = np.arange(start, start + CLASSES_AT_ONCE) % inputs.num_classes
        of_classes = [[of_member[label] for label in classes] for of_member in found]
        if not any(candidate.mask.any() for of_member in of_classes for candidate in of_member):
            continue
        masks = [[candidate.mask[..., None] for candidate in of_member] for of_member in of_classes]
        patterns = [[candidate.pattern for candidate in of_member] for of_member in of_classes]
        variables = {
            "network": nets.variables,
            "masks": jnp.asarray(masks, jnp.float32),
            "patterns": jnp.asarray(patterns),
        }
        wanted = np.tile(np.repeat(np.arange(CLASSES_AT_ONCE), count), (len(index), 1))
        rows = of_class(np.tile(index, (1, CLASSES_AT_ONCE)), wanted)
        predictions = inputs.per_row(vbd_patterns.row_patched_predictions(nets.model), variables, rows)
        predictions = predictions.reshape(len(index), CLASSES_AT_ONCE, count)
        for member, of_member in enumerate(of_classes):
            for place in range(min(CLASSES_AT_ONCE, inputs.num_classes - start)):
                others = labels[member] != classes[place]
                if of_member[place].mask.any() and others.any():
                    success[member, classes[place]] = np.mean(predictions[member, place, others] == classes[place])
    return success


def choose_networks(accuracies: np.ndarray, success: np.ndarray, settings: VBDSettings) -> np.ndarray:
    """Choose the network whose pattern is kept, for each class (section 3.3.8).

    Args:
        accuracies: float [M, J].
        success: float [M, J, K].
        settings: reads `least_success`, `votes` and `accuracy_weight`.

    Returns:
        int [M, K]: a network, or -1 if too few networks have a pattern that works.
    """
    works = success >= settings.least_success
    score = vbd_patterns.pair_score(accuracies[:, :, None], success, settings.accuracy_weight)
    best = np.argmax(np.where(works, score, -np.inf), axis=1)
    return np.where(works.sum(axis=1) >= settings.votes, best, -1)


def may_be_chance(
    p_values: np.ndarray, tests: np.ndarray, success: np.ndarray, has_learned: np.ndarray, settings: VBDSettings
) -> np.ndarray:
    """Classes whose pattern may be chance: the p-value does not survive Bonferroni's correction, and no second network agrees.

    With `p_value` 0.01, ten classes and two networks, a clean set has a class below it in one of five runs. A second network
    with a pattern of the same class makes that unlikely, but not if the networks learned the classes: both rely on features of
    clean rows then. Not in the paper.

    Args:
        p_values: float [M, J, K].
        tests: int [M], the number of p-values that could have been small.
        success: float [M, J, K].
        has_learned: bool [M], see `vbd_premise.has_learned`.
        settings: reads `least_success`.

    Returns:
        bool [M, K].
    """
    works = success >= settings.least_success
    smallest = np.where(works, p_values, 1.0).min(axis=1)
    is_agreed = (works.sum(axis=1) >= 2) & ~has_learned[:, None]
    return works.any(axis=1) & ~is_agreed & (smallest * tests[:, None] >= CHANCE_LEVEL)


def analyse(inputs: DefenseInput, settings: VBDSettings) -> Analysis:
    """Stages 1 to 6.

    Args:
        inputs: the suspects; reads only their training sets.
        settings: of the defense.

    Raises:
        InputError: an invalid setting.

    References:
        Aseervatham et al. 2025, algorithm 1 and section 3.3.8.
    """
    check(settings)
    folds, keys = settings.folds, inputs.keys_for("vbd: split")
    if folds == 1:
        each = inputs
        parts = [split_rows(keys[i], labels, settings.detect_share) for i, labels in enumerate(inputs.labels)]
        training, held_back = (np.stack(rows) for rows in zip(*parts, strict=True))
    else:
        each = inputs.copies(folds)
        parts = [fold_rows(keys[i], labels, folds) for i, labels in enumerate(inputs.labels)]
        training, held_back = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    networks = train_networks(each, settings, training)
    index, labels = (np.take_along_axis(values, held_back, axis=1) for values in (each.index, each.labels))
    logits = [each.logits(nets.model, nets.variables, labelled(index, labels)) for nets in networks]
    found = [
        find_candidates(each, settings, nets, held_back, of_held_back)
        for nets, of_held_back in zip(networks, logits, strict=True)
    ]
    success_by_fold = np.stack(
        [
            apart(check_candidates(each, settings, nets, held_back, candidates), folds)
            for nets, candidates in zip(networks, found, strict=True)
        ],
        axis=1,
    )  # [M, J, folds, K]
    success = success_by_fold.mean(axis=2)
    accuracies, held_back_accuracies = (
        np.stack([apart(of_member, folds).mean(axis=1) for of_member in of_networks], axis=1)
        for of_networks in (
            [accuracy_on(each, nets, training) for nets in networks],
            [np.mean(np.argmax(of_held_back, -1) == labels, axis=1) for of_held_back in logits],
        )
    )
    p_values = np.array(
        [[[candidate.p_value for candidate in of_member] for of_member in of_network] for of_network in found]
    ).swapaxes(0, 1)
    num, num_rows = inputs.labels.shape
    classes = range(inputs.num_classes)
    tests = np.array([sum(_can_be_small(found, member, label, settings) for label in classes) for member in range(num)])
    has_learned = vbd_premise.has_learned(held_back_accuracies)
    is_chance = may_be_chance(p_values, tests, success, has_learned, settings)
    chosen = choose_networks(accuracies, success, settings)

    height, width, channels = inputs.runner.image_shape
    masks = np.zeros((num, inputs.num_classes, height, width), bool)
    patterns = np.zeros((num, inputs.num_classes, height, width, channels), np.float32)
    detector_accuracies = np.zeros((num, inputs.num_classes))
    scores = np.zeros((num, num_rows), np.float32)
    flags, new_labels = np.zeros((num, num_rows), bool), inputs.labels.copy()
    all_rows = np.tile(np.arange(num_rows), (num * folds, 1))
    for number, nets in enumerate(networks):
        # A detector reads the gradients of a single network: of several splits, that on which the pattern works best.
        best_fold = success_by_fold[:, number].argmax(axis=1)
        candidates = [of_suspect for of_suspect in found[number] for _ in range(folds)]
        kept = [Pattern(int(m * folds + best_fold[m, c]), int(c), number) for m, c in np.argwhere(chosen == number)]
        for start in range(0, len(kept), PATTERNS_AT_ONCE):
            chunk = kept[start : start + PATTERNS_AT_ONCE]
            rows = held_back if settings.detector_rows == "held_back" else all_rows
            detections = train_detectors(each, settings, nets, chunk, candidates, rows)
            for pattern, (where, probabilities, accuracy) in zip(chunk, detections, strict=True):
                member, label = pattern.member // folds, pattern.label
                masks[member, label] = found[number][member][label].mask
                patterns[member, label] = found[number][member][label].pattern
                detector_accuracies[member, label] = accuracy
                scores[member, where] = probabilities
                least_sure = settings.least_sure
                if is_chance[member, label] and settings.chance_sure:
                    least_sure = np.inf if has_learned[member] else max(least_sure, settings.chance_sure)
                is_sure = vbd_patterns.sure_share(probabilities) >= least_sure
                if accuracy >= settings.least_accuracy and is_sure:
                    flags[member, where] = probabilities >= 0.5
        if kept:
            first = nets._replace(variables=ensemble.members(nets.variables, np.arange(0, num * folds, folds)))
            new_labels = _second_best(inputs, first, chosen == number, flags, new_labels)
    return Analysis(
        flags=flags,
        scores=scores,
        accuracies=accuracies,
        held_back_accuracies=held_back_accuracies,
        p_values=p_values,
        success=success,
        may_be_chance=is_chance,
        network=chosen,
        masks=masks,
        patterns=patterns,
        detector_accuracies=detector_accuracies,
        new_labels=new_labels,
        not_tested=tuple(_not_tested(found, member, labels, settings) for member, labels in enumerate(inputs.labels)),
    )


def _can_be_small(found: list[list[list[Candidate]]], member: int, label: int, settings: VBDSettings) -> int:
    """Networks under which the p-value of a class could have been small."""
    return sum(of_network[member][label].least_p_value < settings.p_value for of_network in found)


def _not_tested(
    found: list[list[list[Candidate]]], member: int, labels: np.ndarray, settings: VBDSettings
) -> NotTested:
    """The classes of a suspect with rows whose p-value could not be small enough under any network."""
    classes = {}
    for label in np.unique(labels).tolist():
        if not _can_be_small(found, member, label, settings):
            classes[label] = (
                "has too few held-back rows that the simple networks predict as their label, too few others to compare them "
                "with, or gradients that are not finite"
            )
    reason = (
        "needs more rows: in no class are enough predicted as their label" if len(classes) == len(set(labels)) else ""
    )
    return NotTested(reason, classes)


def _second_best(
    inputs: DefenseInput, nets: Nets, classes: np.ndarray, flags: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Relabel the flagged rows of some classes, bool [M, K], with a network's second most likely class."""
    flagged = [
        np.flatnonzero(of_classes & flags)
        for of_classes, flags in zip(np.take_along_axis(classes, inputs.labels, 1), flags, strict=True)
    ]
    longest = max(map(len, flagged))
    if not longest:
        return labels
    padded = np.stack([np.resize(rows, longest) if len(rows) else np.zeros(longest, int) for rows in flagged])
    rows = labelled(*(np.take_along_axis(values, padded, axis=1) for values in (inputs.index, inputs.labels)))
    logits = np.array(inputs.logits(nets.model, nets.variables, rows))
    np.put_along_axis(logits, np.asarray(rows.targets["labels"])[..., None], -np.inf, axis=2)
    labels = labels.copy()
    for member, rows in enumerate(flagged):
        labels[member, rows] = np.argmax(logits[member, : len(rows)], axis=1)
    return labels


def to_detection(analysis: Analysis, settings: VBDSettings) -> Detection:
    """Convert an analysis to a `Detection`.

    Its evidence has the "accuracies" [M, J], the "held_back_accuracies" [M, J], the "p_values" [M, J, K], the "success"
    [M, J, K], "may_be_chance" [M, K] and the "new_labels" [M, n] of `Analysis`.
    """
    found = analysis.is_poisoned_class
    facts = {
        "classes with a pattern": found.sum(axis=1),
        "smallest p-value": analysis.p_values.min(axis=(1, 2)),
        "best success of a pattern": analysis.success.max(axis=(1, 2)),
        "mean accuracy of the simple networks": analysis.accuracies.mean(axis=1),
        "the same on held-back rows": analysis.held_back_accuracies.mean(axis=1),
    }
    # The same number of pictures for every suspect: of all classes with a pattern in any suspect.
    shown = np.flatnonzero(found.any(axis=0))
    pictures = {}
    if len(shown):
        names = ", ".join(map(str, shown))
        pictures[f"patterns of classes {names}"] = analysis.patterns[:, shown]
        pictures[f"masks of classes {names}"] = analysis.masks[:, shown, :, :, None].astype(np.float32)
    names = ("accuracies", "held_back_accuracies", "p_values", "success", "may_be_chance", "new_labels")
    evidence = {name: getattr(analysis, name) for name in names}
    patterns = tuple(_patterns(analysis, settings, member) for member in range(len(found)))
    return Detection(
        analysis.flags,
        analysis.scores,
        facts,
        pictures,
        patterns,
        evidence,
        not_tested=analysis.not_tested,
        warnings=vbd_premise.doubt(analysis.held_back_accuracies),
    )


def _patterns(analysis: Analysis, settings: VBDSettings, member: int) -> tuple[ExtractedPattern, ...]:
    """The patterns kept for one suspect, by class."""
    networks, chosen = settings.layers, analysis.network[member]
    return tuple(
        ExtractedPattern(
            label=int(label),
            pattern=analysis.patterns[member, label],
            mask=analysis.masks[member, label],
            success=float(analysis.success[member, chosen[label], label]),
            network=networks[chosen[label]],
            accuracy=float(analysis.detector_accuracies[member, label]),
        )
        for label in np.flatnonzero(chosen >= 0)
    )


def detect(inputs: DefenseInput, settings: VBDSettings) -> Detection:
    """Run `analyse`, and return its result as a `Detection`."""
    return to_detection(analyse(inputs, settings), settings)


def run(inputs: DefenseInput, settings: VBDSettings) -> DefenseResult:
    """All stages: detect, then train networks without the flagged rows, or with other labels for them.

    Args:
        inputs: the suspects; reads only their training sets.
        settings: of the defense.

    Returns:
        The clean networks, with the flags and scores of all rows.

    Raises:
        InputError: an invalid setting.
    """
    analysis = analyse(inputs, settings)
    found = to_detection(analysis, settings)
    stage = f"vbd: {settings.clean_model} {fingerprint(settings=settings)}"
    if settings.clean_model == "suppress":
        return retrained(inputs, stage, found)
    rows = labelled(inputs.index, analysis.new_labels)
    nets = inputs.train(stage, inputs.make_model(), inputs.recipe, rows)
    return as_result(nets, found)


def least(settings: VBDSettings, facts: Facts) -> NotTested:
    """What cannot be tested: see `Defense.least`."""
    if np.sum(facts.rows > 0) < 2:
        return NotTested("needs rows of at least 2 classes: a pattern is checked on rows of other classes")
    needed = vbd_patterns.least_held_back(settings)
    if needed is None:
        return NotTested(
            f"finds nothing, whatever the rows are: with rows_per_class {settings.rows_per_class} and least_rows "
            f"{settings.least_rows}, no p-value is below p_value {settings.p_value:g}"
        )
    share = settings.held_back_share
    held_back = vbd_patterns.most_held_back(facts.rows, share)
    classes = {
        int(
            label
        ): f"has {count_text(facts.rows[label])}, {held_back[label]} of them held back; needs at least {needed}"
        for label in np.flatnonzero((facts.rows > 0) & (held_back < needed))
    }
    about = math.ceil(needed / share)
    reason = (
        f"needs at least {needed} held-back rows of a class, which is about {about:,} rows: the p-value of fewer is never "
        f"below {settings.p_value:g}"
    )
    return limits(facts, classes, reason)


def check(settings: VBDSettings) -> None:
    """Reject invalid settings.

    Raises:
        InputError: naming the setting.
    """
    for layers in settings.layers:
        if network_name(layers) not in MODELS:
            raise InputError(f"defense vbd: networks {layers!r} is not one of {', '.join(LAYERS)}")
    check_values(
        "defense vbd",
        settings,
        choices={
            "optimiser": ("sgd", "adam"),
            "pixel_rule": ("paper", "code"),
            "detector_rows": ("all", "held_back"),
            "clean_model": ("suppress", "relabel"),
        },
        at_least={"votes": 1},
        at_most={"votes": len(settings.layers)},
    )


VBD = Defense(
    name="vbd",
    title="VBD",
    paper="Aseervatham et al. 2025, Variance-Based Defense Against Blended Backdoor Attacks",
    stage="before training",
    needs=("training set",),
    settings=VBDSettings(),
    run=run,
    detect=detect,
    check=check,
    least=least,
    smallest=vbd_premise.smallest,
    changes={
        "quick": {
            "networks": "64P/10-10P",
            "epochs": 5,
            "least_steps": 600,
            "batch_size": 64,
            "detector_rows": "held_back",
            "most_detector_rows": 7200,
            "detector_epochs": 8,
            "least_detector_steps": 200,
            "detector_batch_size": 64,
            "own_rows": 0.25,
            "least_sure": 0.5,
            "chance_sure": 0.8,
            "first_labelling": 3,
            "last_labelling": 6,
        },
        # Detectors of so few steps are unsure of poisoned classes, too.
        "quick textures": {"networks": "10-10P", "least_steps": 0, "least_detector_steps": 100, "least_sure": 0.0},
        "quick digits": {
            "networks": "16P/4-4P/8-8P",
            "epochs": 20,
            "batch_size": 32,
            "rows_per_class": 8,
            "least_rows": 4,
            "detector_rows": "all",
            "detector_epochs": 20,
            "detector_batch_size": 32,
            "first_labelling": 5,
            "last_labelling": 11,
        },
        "tiny_imagenet": {"batch_size": 64, "detector_batch_size": 64},
    },
)
