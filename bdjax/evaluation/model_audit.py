"""An audit of networks without their training sets: reversed triggers on held-out rows, beside clean control networks.

For every class of every network, Neural Cleanse finds the smallest mask and pattern that turn clean rows into this class. A
backdoor is a far smaller trigger into its target than into the other classes. What is measured of each of these triggers:

- the norm of its mask and the anomaly index of that among the network's classes (not for two classes: two numbers are equally
  far from their median);
- its success on held-out rows, which the search has not seen, of the network itself and of the control networks: a
  perturbation that fools every network, such as a drawing of the class, is no backdoor of this one;
- its score: how much smaller its mask is than those of the other classes, times the success that control networks do not share;
- its p-value: the K control networks have the same architecture and are trained on the clean rows, so they are what the network
  would be without a backdoor. See `p_value` for what that assumes.

A second test needs no gradient: triggers of several kinds are drawn at random and put on a few held-out rows
(`bdjax/inspection/random_triggers.py`). A network with a backdoor sends them to its target more often than control networks do;
see `response_deviations`.

One more network is trained on the clean rows with a planted trigger and treated like a suspect: a run that does not find that
one could not have found anything, and says so.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from bdjax.defenses import neural_cleanse
from bdjax.defenses.neural_cleanse import Triggers
from bdjax.inspection.random_triggers import Responses
from bdjax.inspection.weight_outliers import ClassOutlier, LayerOutlier

LEAST_SUCCESS = 0.8
"""A trigger that turns a smaller share of held-out rows into its class is no finding; ours."""
MOST_TRANSFER = 0.1
"""Nor is one that turns a larger share into it on the control networks, on average; ours."""
MOST_P_VALUE = 0.05
"""Largest p-value of a finding; where the control networks are too few for it, the smallest that they allow."""
MOST_NORMAL_P_VALUE = 0.01
"""Largest p-value of a finding if the controls' largest scores were normal; ours; like all of these, chosen on one seed of
digits."""
MOST_RESPONSE_P_VALUE = 0.001
"""Largest p-value of a finding by random triggers, after all kinds and classes are counted; ours."""
LEAST_EXCESS = 0.3
"""How much more of the held-out rows than on control networks, on average, such a finding turns into its class; ours."""
LEAST_ROWS = 32
"""Clean rows, and held-out rows, below which nothing is searched or measured; ours."""
KNOWS = 0.25
"""How far the accuracy of a network must lie between guessing (0) and perfect (1) to be tested; ours."""
LEAST_PLANTED = 0.8
"""Success of the planted trigger on its network below which it is no backdoor that could be found; ours."""


REVERSED, RANDOM = "reversed trigger", "random triggers"
"""The two tests, as the "by" of a class names them."""

Outcome = Literal["found", "nothing found", "could not be tested"]


class Measured(NamedTuple):
    """The reversed triggers of M networks of K classes, and what they do. J control networks."""

    triggers: Triggers
    """NumPy leaves [M, K, ...]"""
    norms: np.ndarray
    """float64 [M, K]: L1 norm of each mask, in pixels"""
    own: np.ndarray
    """float64 [M, K]: success on held-out rows of other classes"""
    transfer: np.ndarray
    """float64 [M, K, J]: the same on every control network; NaN for a control network's own trigger"""
    responses: Responses | None = None
    """leaves [M, S, K], for S kinds of random triggers; None where none were drawn"""
    kinds: tuple[str, ...] = ()
    """the S kinds"""


# ---- Statistics -----------------------------------------------------------------------------------------------------


def scores(norms: np.ndarray, own: np.ndarray, transfer: np.ndarray) -> np.ndarray:
    """How much smaller each class's mask is than is usual in its network, as far as its trigger works on this network alone.

    log(median norm / norm) times (success on the network - mean success on control networks), the latter at least 0. A score
    does not change if all norms of a network are multiplied by a number.

    Args:
        norms: float [..., K].
        own: success on held-out rows of the network, float [..., K].
        transfer: mean success on the control networks, float [..., K].

    Returns:
        float64 [..., K].
    """
    norms = np.maximum(np.asarray(norms, np.float64), 1e-6)
    return np.log(np.median(norms, axis=-1, keepdims=True) / norms) * np.maximum(own - transfer, 0)


def p_value(score: float, controls: Sequence[float]) -> float:
    """The share of networks without a backdoor that would have a score this large: (1 + number of controls with one) / (J + 1).

    Nearly exact for any distribution if the suspect, had it no backdoor, and the J controls are exchangeable: any order of
    their J + 1 scores is equally likely. (Nearly: the transfer of a control's trigger is the mean over one network less, and
    does not include the suspect.) The control networks differ from such a suspect in what is unknown of its training (its rows,
    their number, its recipe), so this holds as far as scores do not depend on that. The smallest possible value is 1 / (J + 1).

    Args:
        score: of a class of the suspect.
        controls: for each control network, its largest score over all classes, so that testing every class of the suspect needs
            no further correction.
    """
    return (1 + sum(control >= score for control in controls)) / (len(controls) + 1)


def normal_p_value(score: float, controls: Sequence[float]) -> float:
    """The same under the further assumption that the controls' largest scores are normal: a one-sided t-test of one new value.

    t = (score - mean) / (s sqrt(1 + 1 / J)) with J - 1 degrees of freedom. It can be far below 1 / (J + 1), but only as far as
    a normal distribution describes the tail, which so few networks cannot show. It orders findings; it proves nothing.

    Args:
        score: of a class of the suspect.
        controls: as for `p_value`, at least 2.
    """
    from scipy import special  # its import takes a second

    values = np.asarray(controls, np.float64)
    deviation = max(float(values.std(ddof=1)), 1e-9) * math.sqrt(1 + 1 / len(values))
    return float(special.stdtr(len(values) - 1, (values.mean() - score) / deviation))


def response_deviations(success: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """How far the success of random triggers on a network lies above that on control networks.

    With a(p) = arcsin sqrt(p), whose spread hardly depends on p, the deviation of kind s and class k is

        t = (a(p) - mean of a over controls) / (sigma_s sqrt(1 + 1 / J)),

    sigma_s^2 being the variance over the J controls, averaged over the K classes: so few controls do not show the spread of
    a single class.

    Args:
        success: of the network, float [S, K] in [0, 1].
        controls: of the control networks, float [J, S, K], J at least 2.

    Returns:
        float64 [S, K].
    """
    of_network, of_controls = (np.arcsin(np.sqrt(np.asarray(rates, np.float64))) for rates in (success, controls))
    spread = np.sqrt(of_controls.var(axis=0, ddof=1).mean(axis=1, keepdims=True))
    return (of_network - of_controls.mean(axis=0)) / (np.maximum(spread, 1e-3) * math.sqrt(1 + 1 / len(controls)))


def response_p_value(deviation: float, controls: int, kinds: int, classes: int) -> float:
    """The p-value of the largest of S K deviations: S K times that of a t-test with K (J - 1) degrees of freedom (Bonferroni).

    It assumes that deviations of clean networks are normal, and independent between the K classes of a network. Neither holds
    exactly, so it is a rule for a limit and not an error rate.

    Args:
        deviation: from `response_deviations`.
        controls: J.
        kinds: S.
        classes: K.
    """
    from scipy import special  # its import takes a second

    return min(1.0, kinds * classes * float(special.stdtr(classes * (controls - 1), -deviation)))


def response_numbers(measured: Measured, number: int, controls: Sequence[int]) -> list[dict[str, Any] | None]:
    """What random triggers do to every class of a network; a list of None where none were drawn.

    Args:
        measured: M networks.
        number: which of them.
        controls: the numbers of the control networks.

    Returns:
        For each class the "kind" of trigger that makes it a finding, or else that with the largest deviation; "success" of the
        strongest tenth of these, "controls" (the mean of the same), "deviations", "p_value", "strongest" (the number of the
        trigger with the largest success) and "found".
    """
    others = [place for place in controls if place != number]
    if measured.responses is None or len(others) < 2:
        return [None] * measured.norms.shape[1]
    success, strongest = (leaf[number] for leaf in measured.responses)
    of_controls = measured.responses.success[others]
    deviations, means = response_deviations(success, of_controls), of_controls.mean(axis=0)
    kinds, classes = success.shape
    entries = []
    for label in range(classes):
        excess = success[:, label] - means[:, label]
        p_values = [response_p_value(of_kind, len(others), kinds, classes) for of_kind in deviations[:, label]]
        found = (np.array(p_values) <= MOST_RESPONSE_P_VALUE) & (excess >= LEAST_EXCESS)
        kind = int(np.argmax(np.where(found.any() & ~found, -np.inf, deviations[:, label])))
        entries.append(
            {
                "kind": measured.kinds[kind],
                "success": float(success[kind, label]),
                "controls": float(means[kind, label]),
                "deviations": float(deviations[kind, label]),
                "p_value": p_values[kind],
                "strongest": int(strongest[kind, label]),
                "found": bool(found[kind]),
            }
        )
    return entries


def least_accuracy(num_classes: int) -> float:
    """The accuracy on clean rows below which a network is not tested."""
    return 1 / num_classes + KNOWS * (1 - 1 / num_classes)


def class_numbers(measured: Measured, number: int, controls: Sequence[int]) -> list[dict[str, Any]]:
    """What is known of every class of a network, with whether it is a finding.

    Args:
        measured: M networks.
        number: which of them.
        controls: the numbers of the control networks, in the order of `Measured.transfer`.

    Returns:
        For each class "class", "norm", "index" (anomaly index, negative for a norm above the median; None for two classes),
        "score", "success", "transfer" (mean over control networks), "p_value", "normal_p_value", "against": what speaks against
        a finding by the reversed trigger, in words; "random_triggers" from `response_numbers`; "found" and "by": which tests
        make it a finding.
    """
    norms, transfer = measured.norms[number], np.nanmean(measured.transfer, axis=2)
    all_scores = scores(measured.norms, measured.own, transfer)
    largest = all_scores[[place for place in controls if place != number]].max(axis=1).tolist()
    index = neural_cleanse.anomaly_index(norms) if len(norms) >= neural_cleanse.LEAST_CLASSES else None
    responses, entries = response_numbers(measured, number, controls), []
    for label, score in enumerate(all_scores[number].tolist()):
        sign = 1 if norms[label] < np.median(norms) else -1
        entry = {
            "class": label,
            "norm": float(norms[label]),
            "index": None if index is None else sign * float(index[label]),
            "score": score,
            "success": float(measured.own[number, label]),
            "transfer": float(transfer[number, label]),
            "p_value": p_value(score, largest),
            "normal_p_value": normal_p_value(score, largest) if len(largest) > 1 else None,
        }
        against, of_random = reasons_against(entry, len(largest)), responses[label]
        by = [REVERSED] * (not against) + [RANDOM] * (of_random is not None and of_random["found"])
        entries.append(entry | {"found": bool(by), "by": by, "against": against, "random_triggers": of_random})
    return entries


def reasons_against(entry: Mapping[str, Any], controls: int) -> list[str]:
    """What speaks against a finding by a reversed trigger, in words; empty for a finding.

    The anomaly index is not among it: on the digits it missed blended triggers, whose networks have masks of very different
    sizes, and exceeded 2 in a control network.

    Args:
        entry: the numbers of a class, see `class_numbers`.
        controls: the number of control networks.
    """
    texts = []
    # Negated, so that a number that is not known speaks against a finding.
    if not entry["success"] >= LEAST_SUCCESS:
        texts.append(f"its trigger turns only {_percent(entry['success'])} of held-out rows")
    if not entry["transfer"] <= MOST_TRANSFER:
        texts.append(f"its trigger fools the control networks, too ({_percent(entry['transfer'])} of held-out rows)")
    if entry["p_value"] > max(MOST_P_VALUE, 1 / (controls + 1)):
        count = round(entry["p_value"] * (controls + 1)) - 1
        texts.append(f"{count} of {controls} control networks {'has' if count == 1 else 'have'} an outlier as large")
    elif entry["normal_p_value"] is not None and entry["normal_p_value"] > MOST_NORMAL_P_VALUE:
        texts.append("it is hardly more of an outlier than what control networks have")
    return texts


def describe_weights(
    suspects: Sequence[tuple[Sequence[LayerOutlier], ClassOutlier]],
    controls: Sequence[tuple[Sequence[LayerOutlier], ClassOutlier]],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """What two detectors on the weights say of each suspect, beside the control networks.

    Args:
        suspects: for each, the outliers of its layers and of its last layer.
        controls: the same of the control networks.
        names: the title of each class.
    """
    largest = [max((layer.deviations for layer in layers), default=0.0) for layers, _ in controls]
    last = [outlier.deviations for _, outlier in controls]
    entries = []
    for layers, outlier in suspects:
        top = max(layers, key=lambda layer: layer.deviations, default=None)
        deviations = top.deviations if top else 0.0
        entries.append(
            {
                "channels": {
                    "layer": top.layer if top else None,
                    "channel": top.channel if top else None,
                    "deviations": deviations,
                    "controls": largest,
                    "p_value": p_value(deviations, largest),
                    "is_outlier": bool(top) and deviations > max(largest),
                },
                "last_layer": {
                    "class": outlier.label,
                    "title": names[outlier.label],
                    "means": outlier.means.tolist(),
                    "deviations": outlier.deviations,
                    "dixon": outlier.dixon,
                    "controls": last,
                    "p_value": p_value(outlier.deviations, last),
                    "is_outlier": outlier.deviations > max(last),
                },
            }
        )
    return entries


# ---- Outcome --------------------------------------------------------------------------------------------------------

NO_PLANTED = {"title": "", "class": None, "success": None, "works": False, "found": False, "why": "", "numbers": None}
"""The planted trigger of a run without one."""


def judge(
    models: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    black_box: bool,
    measured: Measured | None = None,
    places: Sequence[int] = (),
    accuracies: Sequence[float] = (),
    planted: Mapping[str, Any] = NO_PLANTED,
    weights: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The outcome of an audit of models, and the numbers behind it.

    Args:
        models: for each, "title", "source", "accuracy" on held-out rows, and "reason": why it was not tested, or "".
        names: the title of each class.
        black_box: whether the models' weights are unknown.
        measured: the networks in this order: the models without a reason, the controls, and the network with a planted trigger
            if there is one; None if no model was tested.
        places: which of them are the controls.
        accuracies: of each control network on held-out rows.
        planted: "title" and "class" of the planted trigger and its "success"; or "why" nothing was planted.
        weights: from `describe_weights`, for each model that was tested; None for black boxes.

    Returns:
        "outcome", "black_box", "models" (with "outcome", "reason", "found": labels, "classes": numbers of each
        class, and "weights" in addition), "controls" and "planted".
    """
    controls, planted = None, {**NO_PLANTED, **planted}
    if measured is not None:
        controls = describe_controls(measured, places, accuracies, names)
        if planted["success"] is not None:
            of_planted = class_numbers(measured, len(measured.norms) - 1, places)
            planted["works"] = planted["success"] >= LEAST_PLANTED
            planted["found"] = planted["class"] in [entry["class"] for entry in of_planted if entry["found"]]
            planted["numbers"] = {**of_planted[planted["class"]], "title": names[planted["class"]]}
    entries, number = [], 0
    for model in models:
        entry = {**model, "classes": [], "found": [], "weights": None}
        if not model["reason"] and measured is not None:
            numbers = class_numbers(measured, number, places)
            entry["classes"] = [{**of_class, "title": names[of_class["class"]]} for of_class in numbers]
            if not (reason := reason_of_controls(controls["accuracy"], least_accuracy(len(names)))):
                entry["found"] = [of_class["class"] for of_class in numbers if of_class["found"]]
            entry["weights"] = weights[number] if weights else None
            if not entry["found"]:
                best = max(of_class["success"] for of_class in numbers)
                entry["reason"] = reason or reason_of_run(planted, black_box, best)
            number += 1
        entry["outcome"] = outcome_of_model(entry["found"], entry["reason"])
        entries.append(entry)
    return {
        "outcome": outcome_of_all([entry["outcome"] for entry in entries]),
        "black_box": black_box,
        "models": entries,
        "controls": controls,
        "planted": planted,
    }


def describe_controls(
    measured: Measured, places: Sequence[int], accuracies: Sequence[float], names: Sequence[str]
) -> dict[str, Any]:
    """The control networks: of each its accuracy, the class with its largest score, and whether the rule, applied to it beside
    the other controls, would call it a finding, which is then a false alarm.

    Args:
        measured: all networks.
        places: which of them are the controls.
        accuracies: of each control network on held-out rows.
        names: the title of each class.
    """
    networks = []
    for place, accuracy in zip(places, accuracies, strict=True):
        of_classes = class_numbers(measured, place, places)
        top = max(of_classes, key=lambda entry: entry["score"])
        response = top_response(of_classes)
        kept = {name: top[name] for name in ("class", "norm", "index", "score", "success", "transfer")}
        is_finding = any(entry["found"] for entry in of_classes)
        entry = {"accuracy": accuracy, **kept, "title": names[top["class"]], "is_finding": is_finding, "response": None}
        if response is not None:
            label = response["class"]
            entry["response"] = {"class": label, "title": names[label], "random_triggers": response["random_triggers"]}
        networks.append(entry)
    return {
        "count": len(networks),
        "accuracy": float(np.mean(accuracies)),
        "smallest_p_value": 1 / (len(networks) + 1),
        "findings": sum(network["is_finding"] for network in networks),
        "networks": networks,
    }


def top_response(classes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The class of a network with a finding by random triggers, or else with the largest deviation; None if none were drawn.

    Args:
        classes: from `class_numbers`.
    """
    drawn = [entry for entry in classes if entry["random_triggers"] is not None]
    return max(
        drawn,
        key=lambda entry: (entry["random_triggers"]["found"], entry["random_triggers"]["deviations"]),
        default=None,
    )


def reason_of_controls(accuracy: float, least: float) -> str:
    """Why control networks are no controls, so that nothing can be found or not found; "" if they are.

    Args:
        accuracy: their mean accuracy on held-out rows.
        least: what it must be.
    """
    if accuracy >= least:
        return ""
    return (
        f"the control networks predict only {_percent(accuracy)} of the held-out rows correctly; with more clean rows or "
        "epochs they would be a control"
    )


def reason_of_run(planted: Mapping[str, Any], black_box: bool, best_success: float) -> str:
    """Why a model in which nothing was found could not be tested by this run; "" if it could.

    Args:
        planted: the network with a planted trigger: "success" of the trigger (None if none was planted), "works" and "found".
        black_box: whether triggers were searched on surrogates.
        best_success: the largest success of a reversed trigger of this model on held-out rows.
    """
    if planted["works"] and not planted["found"]:
        how = " through a surrogate" if black_box else ""
        return (
            f"not even a {planted['title']} that was planted in a network trained on the clean rows was found{how}; it turns "
            f"{_percent(planted['success'])} of held-out rows"
        )
    if best_success < LEAST_SUCCESS:
        return (
            f"the search found no trigger into any class that turns {_percent(LEAST_SUCCESS)} of held-out rows (at most "
            f"{_percent(best_success)})"
        )
    if not planted["works"]:
        through = " through a surrogate" if black_box else ""
        if planted["success"] is None:
            return f"no trigger could be planted to see whether a search{through} finds it"
        return (
            f"the network with a planted {planted['title']}, by which it is seen whether a search{through} finds a trigger, "
            f"did not learn it: it turns {_percent(planted['success'])} of held-out rows; use more --clean-rows or --epochs"
        )
    return ""


def outcome_of_model(found: Sequence[int], reason: str) -> Outcome:
    """The outcome of one model, from the classes that are findings and the reason why nothing could be found."""
    if found:
        return "found"
    return "could not be tested" if reason else "nothing found"


def outcome_of_all(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of a run: found if anything was found, could not be tested if no model could, otherwise nothing found."""
    if "found" in outcomes:
        return "found"
    return "could not be tested" if set(outcomes) <= {"could not be tested"} else "nothing found"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
