"""Metrics, their definitions, and the words for them in tables and verdicts.

- **CDA**, clean data accuracy: the share of the untouched test rows that are predicted as their label.
- **ASR**, attack success rate: the share of triggered test rows predicted as the attacker's target. Rows of the target class
  are left out: they would count as successes even without an attack.
- **R-ACC**, robust accuracy: the share of *the same* triggered rows predicted as their true label, so ASR + R-ACC <= 1.

`DEFINITIONS` is the only table of definitions, the constants below are the only thresholds, and `attack_word`, `has_backdoor`,
`defense_word` and `detection_word` are the only functions that turn numbers into words, so the same numbers get the same word
in every experiment. Thresholds apply to means over seeds.

All functions take predicted classes as NumPy arrays; predictions come from argmax, where ties go to the lowest class.
References: Heydari et al. 2025, equations 7-10.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

AttackWord = Literal["yes", "partly", "no"]
DefenseWord = Literal["nothing to remove", "removed", "removed at a cost", "weakened", "kept"]
DetectionWord = Literal["found", "partly", "missed"]

ATTACK_WORKS, ATTACK_WORKS_ABOVE_CONTROL = 0.9, 0.5
"""Minimum ASR, and minimum ASR above the control's, of an attack that works."""
ATTACK_WORKS_PARTLY, ATTACK_WORKS_PARTLY_ABOVE_CONTROL = 0.5, 0.2
"""The same minima for an attack that works partly."""
LEAST_CONTROLS = 2
"""Control networks of an audit of models, without which no spread is known."""
BACKDOOR_ASR = 0.5
"""Minimum ASR of a network with a backdoor, without a known control."""
BACKDOOR_ASR_WITH_CONTROL, BACKDOOR_ABOVE_CONTROL = 0.3, 0.2
"""Minimum ASR of a network with a backdoor, and its minimum above the control's, with a known control."""
REMOVED_ASR, REMOVED_SHARE = 0.1, 0.3
"""A backdoor is removed if the ASR above the control's is at most the first, or at most this share of its value before."""
WEAKENED_SHARE = 0.5
"""A backdoor that is not removed is weakened if the ASR above the control's is at most this share of its value before."""
CDA_LOSS = 0.1
"""Maximum loss of CDA for the verdict "removed"."""
DETECTION_WORKS, DETECTION_FAILS = 0.9, 0.5
"""F1 from which a detector has found the poisoned rows, and below which it has missed them."""
ROUNDING = 1e-9
"""Tolerance of every threshold, for rounding: 0.3 - 0.2 counts as 0.1."""

_BEFORE = "(before: without defense; for students, after plain distillation)"
_LEFT = f"mean ASR above the control's at most {REMOVED_ASR:g} or at most {REMOVED_SHARE:g} of what it was before"
DEFINITIONS: Mapping[str, str] = {
    "cda": "clean data accuracy: share of untouched test rows predicted as their label (higher is better)",
    "asr": (
        "attack success rate: share of triggered victim rows predicted as the class that the attacker wants, rows of that "
        "class left out; of several triggers the mean"
    ),
    "r_acc": "robust accuracy: share of the same triggered rows predicted as their true label (higher is better)",
    "control_asr": (
        "ASR of the same trigger where no backdoor can be: on the clean network of the same seed and architecture; for a "
        "student, on the student that the same method makes of that network"
    ),
    "clean_cda": "CDA of the clean network of the same seed",
    "delta_cda": "CDA of the clean model minus CDA of this model",
    "delta_asr": "ASR of this model minus ASR of the clean model, both averaged over all triggers",
    "delta_r_acc": "R-ACC of the clean model minus R-ACC of this model, both averaged over all triggers",
    "delta_per_trigger": "the same differences with the same trigger on both sides",
    "asr_with_target": "share of triggered rows, victims and those of the target class, predicted as the target class",
    "r_acc_with_target": "share of the rows of asr_with_target predicted as their true label",
    "asr_outside": "share of the triggered rows that the attack does not aim at, predicted as the target class",
    "cover_accuracy": "share of victim rows predicted as their true label under what cover rows carry in training",
    "psnr": "peak signal-to-noise ratio of the triggered test images, in dB, the mean over victim rows",
    "ssim": "structural similarity of the triggered test images, the mean over victim rows",
    "flagged": "share of the training rows that the defense flags, isolates or drops",
    "precision": "share of the flagged rows that are poisoned; unknown if none is flagged",
    "recall": "share of the poisoned rows that are flagged",
    "f1": "harmonic mean of precision and recall; 0 if nothing is flagged",
    "auc": "chance that a poisoned row's score is above a clean one's",
    "parameters": "trainable numbers of a network; running statistics are not counted",
    "works": (
        f"yes: mean ASR at least {ATTACK_WORKS:g} and, where a control is known, at least {ATTACK_WORKS_ABOVE_CONTROL:g} "
        f"above it; partly: at least {ATTACK_WORKS_PARTLY:g}, and at least {ATTACK_WORKS_PARTLY_ABOVE_CONTROL:g} above it; "
        "no: less"
    ),
    "passes": (
        f"mean ASR at least {BACKDOOR_ASR_WITH_CONTROL:g}, and at least {BACKDOOR_ABOVE_CONTROL:g} above the mean control ASR"
    ),
    "removed": f"{_LEFT}, and mean CDA at most {CDA_LOSS:g} below {_BEFORE}",
    "removed at a cost": f"{_LEFT}, but mean CDA more than {CDA_LOSS:g} below",
    "weakened": f"mean ASR above the control's at most {WEAKENED_SHARE:g} of what it was before",
    "kept": "more is left than of a weakened backdoor",
    "nothing to remove": (
        f"there is no backdoor before (mean ASR below {BACKDOOR_ASR:g} or, where a control is known, below "
        f"{BACKDOOR_ASR_WITH_CONTROL:g} or less than {BACKDOOR_ABOVE_CONTROL:g} above it)"
    ),
    "found": f"F1 at least {DETECTION_WORKS:g}",
    "partly": f"F1 from {DETECTION_FAILS:g} to below {DETECTION_WORKS:g}",
    "missed": f"F1 below {DETECTION_FAILS:g}",
}
"""The meaning of every number and word in results.json, tables and verdicts. An unknown control counts as 0."""


ABBREVIATIONS: Mapping[str, str] = {"CDA": "cda", "ASR": "asr", "R-ACC": "r_acc", "F1": "f1", "AUC": "auc"}
"""How reports abbreviate numbers -> their names in `DEFINITIONS`."""


def definitions(*names: str) -> dict[str, str]:
    """Name -> definition, for the given names in the given order.

    Raises:
        KeyError: if a name is not in `DEFINITIONS`.
    """
    return {name: DEFINITIONS[name] for name in names}


def attack_word(asr: float, control_asr: float | None = None) -> AttackWord:
    """Whether an attack works, by `DEFINITIONS["works"]`.

    Some triggers also fool clean networks, so a high ASR alone does not show a backdoor.

    Args:
        asr: on the victim rows, in [0, 1].
        control_asr: of the clean network under the same trigger; None if unknown: then only the ASR counts.
    """
    above = np.inf if control_asr is None else asr - control_asr
    if _at_least(asr, ATTACK_WORKS) and _at_least(above, ATTACK_WORKS_ABOVE_CONTROL):
        return "yes"
    if _at_least(asr, ATTACK_WORKS_PARTLY) and _at_least(above, ATTACK_WORKS_PARTLY_ABOVE_CONTROL):
        return "partly"
    return "no"


def has_backdoor(asr: float, control_asr: float | None = None) -> bool:
    """Whether a network has a backdoor to remove, by `DEFINITIONS["passes"]` and `DEFINITIONS["nothing to remove"]`.

    Args:
        asr: under the trigger, in [0, 1].
        control_asr: of the network without a backdoor under the same trigger; None if unknown.
    """
    if control_asr is None:
        return _at_least(asr, BACKDOOR_ASR)
    return _at_least(asr, BACKDOOR_ASR_WITH_CONTROL) and _at_least(asr - control_asr, BACKDOOR_ABOVE_CONTROL)


def defense_word(
    asr_before: float,
    asr_after: float,
    cda_before: float,
    cda_after: float,
    control_before: float | None = None,
    control_after: float | None = None,
) -> DefenseWord:
    """The verdict on a defense, a word of `DEFINITIONS`.

    All rules use the ASR above the control's, since the rest of the ASR is not due to the backdoor.

    Args:
        asr_before: without the defense, in [0, 1].
        asr_after: with the defense.
        cda_before: without the defense, in [0, 1].
        cda_after: with the defense.
        control_before: ASR of the same trigger on a network without a backdoor, without the defense; None if unknown.
        control_after: the same with the defense.
    """
    if not has_backdoor(asr_before, control_before):
        return "nothing to remove"
    before, after = asr_before - (control_before or 0.0), asr_after - (control_after or 0.0)
    if _at_most(after, REMOVED_ASR) or _at_most(after, REMOVED_SHARE * before):
        return "removed" if _at_most(cda_before - cda_after, CDA_LOSS) else "removed at a cost"
    return "weakened" if _at_most(after, WEAKENED_SHARE * before) else "kept"


def detection_word(f1: float) -> DetectionWord:
    """The verdict on a detector, a word of `DEFINITIONS`.

    Args:
        f1: of its flags, in [0, 1].
    """
    if _at_least(f1, DETECTION_WORKS):
        return "found"
    return "partly" if _at_least(f1, DETECTION_FAILS) else "missed"


def _at_least(value: float, bound: float) -> bool:
    return bool(value >= bound - ROUNDING)


def _at_most(value: float, bound: float) -> bool:
    return bool(value <= bound + ROUNDING)


class BackdoorMetrics(NamedTuple):
    """The metrics of one model under T triggers."""

    cda: float
    asr: np.ndarray
    """float64 [T], in [0, 1]"""
    r_acc: np.ndarray
    """float64 [T], in [0, 1]"""


def clean_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """CDA (equation 7).

    Args:
        predictions: int [N], classes predicted on untouched images.
        labels: int [N].
    """
    return float(np.mean(predictions == labels))


class AttackMetrics(NamedTuple):
    """The metrics of one model under one trigger whose success is defined by a label rule."""

    cda: float
    asr: float
    """share of the victim rows predicted as the class that the attacker wants"""
    r_acc: float
    """share of the victim rows predicted as their true label"""
    asr_with_target: float | None
    """share of the victims and the rows of the target class predicted as the target; None if targets differ between rows"""
    r_acc_with_target: float | None
    """share of the same rows predicted as their true label; None if targets differ between rows"""
    asr_outside: float | None
    """share of all other triggered rows predicted as the target; None if there are none"""


def measure_attack(
    clean: np.ndarray, triggered: np.ndarray, labels: np.ndarray, victims: np.ndarray, wanted: np.ndarray
) -> AttackMetrics:
    """CDA, ASR and R-ACC where the attacker's class may differ from row to row.

    Args:
        clean: int [N], predictions on untouched images.
        triggered: int [N], predictions on the same images with the trigger.
        labels: int [N], true labels.
        victims: bool [N], the rows that the attack aims at.
        wanted: int [N], the class that the attacker wants for each row.

    Raises:
        ValueError: if there is no victim.
    """
    if not victims.any():
        raise ValueError(f"the attack aims at none of the {len(labels)} test rows, so there is no ASR to measure")

    def share(hits: np.ndarray, rows: np.ndarray) -> float:
        return float(np.mean(hits[rows]))

    targets = np.unique(wanted[victims])
    with_target = victims | (labels == targets[0])
    outside = ~with_target
    one_target = len(targets) == 1
    return AttackMetrics(
        cda=clean_accuracy(clean, labels),
        asr=share(triggered == wanted, victims),
        r_acc=share(triggered == labels, victims),
        asr_with_target=share(triggered == targets[0], with_target) if one_target else None,
        r_acc_with_target=share(triggered == labels, with_target) if one_target else None,
        asr_outside=share(triggered == targets[0], outside) if one_target and outside.any() else None,
    )


class DetectionMetrics(NamedTuple):
    """How well flags and scores find the poisoned training rows. None where there is nothing to measure."""

    flagged: float | None
    """share of all rows that are flagged; on a clean set, the false-alarm rate"""
    precision: float | None
    """share of the flagged rows that are poisoned"""
    recall: float | None
    """share of the poisoned rows that are flagged"""
    f1: float | None
    """0 if nothing is flagged"""
    auc: float | None
    """chance that a poisoned row's score is above a clean one's, ties counting half"""


def measure_detection(
    flags: np.ndarray | None, scores: np.ndarray | None, is_poisoned: np.ndarray | None
) -> DetectionMetrics:
    """Precision, recall, F1 and AUC of a detector of poisoned rows.

    Args:
        flags: bool [n]; None for a method without flags.
        scores: float [n], higher for more suspicious rows; None for a method without scores.
        is_poisoned: bool [n], the ground truth; None if unknown.
    """
    flagged = None if flags is None else float(np.mean(flags))
    if is_poisoned is None or not is_poisoned.any():
        return DetectionMetrics(flagged, None, None, None, None)
    precision = recall = f1 = auc = None
    if flags is not None:
        hits = int(np.sum(flags & is_poisoned))
        precision = hits / int(flags.sum()) if flags.any() else None
        recall = hits / int(is_poisoned.sum())
        f1 = 2 * hits / int(flags.sum() + is_poisoned.sum())
    if scores is not None and not is_poisoned.all():
        from sklearn.metrics import roc_auc_score  # slow to import

        auc = float(roc_auc_score(is_poisoned, scores))
    return DetectionMetrics(flagged, precision, recall, f1, auc)


def top_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """The rows with the highest scores: bool [n], of equal scores the first.

    Args:
        scores: float [n].
        count: how many, in 0..n.
    """
    flags = np.zeros(len(scores), bool)
    flags[np.argsort(-scores, kind="stable")[:count]] = True
    return flags


def evaluated_rows(labels: np.ndarray, target: int, *, include_target: bool = False) -> np.ndarray:
    """The rows that ASR and R-ACC are measured on (equation 8): bool [N].

    Raises:
        ValueError: if no row is left.
    """
    rows = np.ones(len(labels), bool) if include_target else labels != target
    if not rows.any():
        raise ValueError(f"all {len(labels)} test rows are of the target class {target}, so there is no ASR to measure")
    return rows


def attack_success_rate(
    predictions: np.ndarray, labels: np.ndarray, target: int, *, include_target: bool = False
) -> float:
    """ASR (equation 9).

    Args:
        predictions: int [N], classes predicted on triggered images.
        labels: int [N], their true labels.
        target: the attacker's class.
        include_target: also count rows of the target class, as some papers' code does (adds about 1/K).
    """
    return float(np.mean(predictions[evaluated_rows(labels, target, include_target=include_target)] == target))


def robust_accuracy(
    predictions: np.ndarray,
    labels: np.ndarray,
    target: int,
    *,
    include_target: bool = False,
    divide_by_test_size: bool = False,
) -> float:
    """R-ACC (equation 10).

    Args:
        predictions: int [N], classes predicted on triggered images.
        labels: int [N], their true labels.
        target: the attacker's class.
        include_target: also count rows of the target class.
        divide_by_test_size: divide by the size of the test set, as the literal equation does although its sum leaves out the
            target class; the default divides by the number of rows in the sum.
    """
    rows = evaluated_rows(labels, target, include_target=include_target)
    hits = np.sum(predictions[rows] == labels[rows])
    return float(hits / (len(labels) if divide_by_test_size else rows.sum()))


def measure(clean: np.ndarray, triggered: np.ndarray, labels: np.ndarray, target: int) -> BackdoorMetrics:
    """CDA, ASR and R-ACC of one model.

    Args:
        clean: int [N], predictions on untouched images.
        triggered: int [T, N], predictions on the same images under each of T triggers.
        labels: int [N].
        target: the attacker's class.
    """
    return BackdoorMetrics(
        clean_accuracy(clean, labels),
        np.array([attack_success_rate(row, labels, target) for row in triggered]),
        np.array([robust_accuracy(row, labels, target) for row in triggered]),
    )


def deltas(
    clean_model: BackdoorMetrics, model: BackdoorMetrics, triggers: Sequence[int] | None = None
) -> dict[str, Any]:
    """The differences from the clean model, in both readings of the paper.

    Section 4.6 has the same trigger on both sides (`delta_per_trigger`), but Table 1 subtracts the clean model's mean over all
    triggers (`delta_*`): compare the latter with the paper's tables.

    Args:
        clean_model: measured under all T triggers.
        model: measured under some of them.
        triggers: which triggers, indices into 0..T-1; None for all.
    """
    which = np.arange(len(clean_model.asr)) if triggers is None else np.asarray(triggers)
    return {
        "delta_cda": clean_model.cda - model.cda,
        "delta_asr": float(np.mean(model.asr) - np.mean(clean_model.asr)),
        "delta_r_acc": float(np.mean(clean_model.r_acc) - np.mean(model.r_acc)),
        "delta_per_trigger": {
            "asr": (model.asr - clean_model.asr[which]).tolist(),
            "r_acc": (clean_model.r_acc[which] - model.r_acc).tolist(),
        },
    }
