"""The thresholds behind the words of a verdict, with their meaning. Their values are where the words are made."""

from collections.abc import Mapping
from typing import Any

from bdjax import metrics
from bdjax.evaluation import model_audit, sensitivity
from bdjax.reporting import audit

_DEFENSES = {
    "backdoor_asr": (metrics.BACKDOOR_ASR, "least ASR of a network with a backdoor, without a known control"),
    "backdoor_asr_with_control": (metrics.BACKDOOR_ASR_WITH_CONTROL, "least ASR of a network with a backdoor, with a control"),
    "backdoor_above_control": (metrics.BACKDOOR_ABOVE_CONTROL, "least difference of that ASR and the control's"),
    "removed_asr": (metrics.REMOVED_ASR, "removed: most ASR above the control's"),
    "removed_share": (metrics.REMOVED_SHARE, "or most of it as a share of what it was before"),
    "weakened_share": (metrics.WEAKENED_SHARE, "weakened: most ASR above the control's as a share of what it was before"),
    "cda_loss": (metrics.CDA_LOSS, "most loss of CDA of a backdoor removed without a cost"),
}  # fmt: skip
_DETECTORS = {
    "detection_works": (metrics.DETECTION_WORKS, "least F1 of a detector that has found the poisoned rows"),
    "detection_fails": (metrics.DETECTION_FAILS, "F1 below which it has missed them"),
}
_AUDITS_OF_DATA = {
    "weak_success": (audit.WEAK_SUCCESS, "weak evidence: a pattern that turns a smaller share of other rows into its class"),
    "weak_share": (audit.WEAK_SHARE, "weak evidence: a smaller share of the class's rows is flagged"),
    "almost_all": (audit.ALMOST_ALL, "weak evidence: a larger share of a class of usual size is flagged"),
    "least_agreeing": (audit.LEAST_AGREEING, "weak, or without a flagged row no finding: fewer networks have a pattern"),
    "least_sure": (audit.LEAST_SURE, "weak evidence: a smaller share of the class's flagged rows has a high score"),
    "planted_found_share": (sensitivity.FOUND_SHARE, "found: least share of planted rows that are flagged, and vice versa"),
}  # fmt: skip
_AUDITS_OF_MODELS = {
    "least_success": (model_audit.LEAST_SUCCESS, "least share of held-out rows that a found trigger turns into its class"),
    "most_transfer": (model_audit.MOST_TRANSFER, "most of the same on the control networks"),
    "most_p_value": (model_audit.MOST_P_VALUE, "largest p-value of a finding, or the smallest that the controls allow"),
    "most_normal_p_value": (model_audit.MOST_NORMAL_P_VALUE, "largest p-value if the controls' scores were normal"),
    "most_response_p_value": (model_audit.MOST_RESPONSE_P_VALUE, "largest p-value of a finding by random triggers"),
    "least_excess": (model_audit.LEAST_EXCESS, "least success of random triggers above that on the control networks"),
    "knows": (model_audit.KNOWS, "how far the accuracy of a tested network lies between guessing (0) and perfect (1)"),
    "least_planted": (model_audit.LEAST_PLANTED, "least success of a planted trigger that could be found"),
    "least_rows": (model_audit.LEAST_ROWS, "fewest clean rows, and held-out rows, of a test"),
}  # fmt: skip
_OF_KIND = {
    "defenses": _DEFENSES,
    "detectors": _DETECTORS,
    "audit of data": _AUDITS_OF_DATA,
    "audit of models": _AUDITS_OF_MODELS,
}


def thresholds(kind: str) -> Mapping[str, Mapping[str, Any]]:
    """Name -> "value" and "meaning".

    Args:
        kind: from `verdict.kind_of`.
    """
    return {name: {"value": value, "meaning": meaning} for name, (value, meaning) in _OF_KIND[kind].items()}
