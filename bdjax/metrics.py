"""What is measured, each with one written definition and one implementation.

- **CDA**, clean data accuracy: the share of the untouched test rows that are predicted as their label.
- **ASR**, attack success rate: the share of triggered test rows predicted as the attacker's target. Rows that are of the
  target class anyway are left out: they would count as successes of no attack.
- **R-ACC**, robust accuracy: the share of *the same* triggered rows predicted as their true label, so ASR + R-ACC <= 1.

Everything is NumPy on predicted classes; predictions come from argmax, whose ties go to the lowest class.
References: Heydari et al. 2025, equations 7-10.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

DEFINITIONS: Mapping[str, str] = {
    "cda": "clean data accuracy: share of untouched test rows predicted as their label (higher is better)",
    "asr": "attack success rate: share of triggered test rows, target class left out, predicted as the target class",
    "r_acc": "robust accuracy: share of the same triggered rows predicted as their true label (higher is better)",
    "delta_cda": "CDA of the clean model minus CDA of this model",
    "delta_asr": "ASR of this model minus ASR of the clean model, both averaged over all triggers",
    "delta_r_acc": "R-ACC of the clean model minus R-ACC of this model, both averaged over all triggers",
    "delta_per_trigger": "the same differences with the same trigger on both sides",
}


class BackdoorMetrics(NamedTuple):
    """One model under T triggers."""

    cda: float
    asr: np.ndarray  # float64 [T], in [0, 1]
    r_acc: np.ndarray  # float64 [T], in [0, 1]


def clean_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """CDA (equation 7).

    Args:
        predictions: int [N], classes predicted on untouched images.
        labels: int [N].
    """
    return float(np.mean(predictions == labels))


class AttackMetrics(NamedTuple):
    """One model under one trigger whose success a label rule defines. Every share is of the rows that it names."""

    cda: float
    asr: float  # of the victims, predicted as what the attacker wants
    r_acc: float  # of the victims, predicted as their true label
    asr_with_target: float | None  # of the victims and the rows of the target class; None if there is no one target
    r_acc_with_target: float | None
    spill: float | None  # of all other triggered rows, predicted as the target; None if there are none


def measure_attack(
    clean: np.ndarray, triggered: np.ndarray, labels: np.ndarray, victims: np.ndarray, wanted: np.ndarray
) -> AttackMetrics:
    """CDA, ASR and R-ACC where the attacker's class may differ from row to row.

    Args:
        clean: int [N], predictions on untouched images.
        triggered: int [N], predictions on the same images with the trigger.
        labels: int [N], true labels.
        victims: bool [N], the rows that count.
        wanted: int [N], what the attacker wants of each.

    Raises:
        ValueError: if there is no victim.
    """
    if not victims.any():
        raise ValueError(f"none of the {len(labels)} test rows is one that the attack is measured on")

    def share(hits: np.ndarray, rows: np.ndarray) -> float:
        return float(np.mean(hits[rows]))

    targets = np.unique(wanted[victims])
    with_target = victims | (labels == targets[0])
    others = ~with_target
    one_target = len(targets) == 1
    return AttackMetrics(
        cda=clean_accuracy(clean, labels),
        asr=share(triggered == wanted, victims),
        r_acc=share(triggered == labels, victims),
        asr_with_target=share(triggered == targets[0], with_target) if one_target else None,
        r_acc_with_target=share(triggered == labels, with_target) if one_target else None,
        spill=share(triggered == targets[0], others) if one_target and others.any() else None,
    )


class DetectionMetrics(NamedTuple):
    """What flags and scores of training rows are worth. None where there is nothing to measure."""

    flagged: float | None  # share of all rows that are flagged; on a clean set, the false-alarm rate
    precision: float | None  # share of the flagged rows that are poisoned
    recall: float | None  # share of the poisoned rows that are flagged
    f1: float | None  # 0 if nothing is flagged
    auc: float | None  # chance that a poisoned row's score is above a clean one's, ties counting half


def measure_detection(
    flags: np.ndarray | None, scores: np.ndarray | None, is_poisoned: np.ndarray | None
) -> DetectionMetrics:
    """Precision, recall, F1 and AUC of a detector of poisoned rows.

    Args:
        flags: bool [n], or None of a method that only scores.
        scores: float [n], higher for rows that are more suspicious; or None of one that only flags.
        is_poisoned: bool [n], the truth; None where nobody knows it.
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
        auc = float(roc_auc_score(is_poisoned, scores))
    return DetectionMetrics(flagged, precision, recall, f1, auc)


def evaluated_rows(labels: np.ndarray, target: int, *, include_target: bool = False) -> np.ndarray:
    """The rows that ASR and R-ACC are measured on (equation 8): bool [N].

    Raises:
        ValueError: if none is left.
    """
    rows = np.ones(len(labels), bool) if include_target else labels != target
    if not rows.any():
        raise ValueError(f"every one of the {len(labels)} test rows is of the target class {target}: no ASR to measure")
    return rows


def attack_success_rate(
    predictions: np.ndarray, labels: np.ndarray, target: int, *, include_target: bool = False
) -> float:
    """ASR (equation 9).

    Args:
        predictions: int [N], classes predicted on triggered images.
        labels: int [N], their true labels.
        target: the attacker's class.
        include_target: count rows of the target class too, as some papers' code does (adds about 1/K).
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
        include_target: count rows of the target class too.
        divide_by_test_size: the literal equation divides by the whole test set though its sum leaves the target class
            out; the default divides by the rows summed over.
    """
    rows = evaluated_rows(labels, target, include_target=include_target)
    hits = np.sum(predictions[rows] == labels[rows])
    return float(hits / (len(labels) if divide_by_test_size else rows.sum()))


def measure(clean: np.ndarray, triggered: np.ndarray, labels: np.ndarray, target: int) -> BackdoorMetrics:
    """All three for one model.

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
    """The drops and the rise against the clean model, in both readings.

    Section 4.6 has the same trigger on both sides (`delta_per_trigger`), but Table 1 subtracts the clean model's mean
    over all triggers (`delta_*`): use the latter against the paper's tables.

    Args:
        clean_model: measured under all T triggers.
        model: measured under some of them.
        triggers: which ones, indices into 0..T-1; None for all.
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
