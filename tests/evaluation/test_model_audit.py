"""The statistics and the outcome of an audit of models, on numbers written by hand."""

import math

import numpy as np
import pytest

from bdjax.defenses.neural_cleanse import Triggers
from bdjax.evaluation import model_audit
from bdjax.evaluation.model_audit import Measured
from bdjax.inspection.random_triggers import Responses
from bdjax.inspection.weight_outliers import ClassOutlier, LayerOutlier

NAMES = [f"class {number}" for number in range(5)]
CLEAN_NORMS = [[10.0, 11, 9, 10, 12], [20.0, 22, 18, 21, 19], [8.0, 9, 10, 9, 8], [12.0, 11, 13, 10, 12]]
PLANTED = {"title": "3×3 white square", "class": 1, "success": 0.99}


def measured(suspect, success=1.0, transfer=0.1, controls=CLEAN_NORMS, planted=(10.0, 1.0, 9.0, 11.0, 10.0)):
    """A suspect, controls, and a network with a planted trigger, with these norms."""
    norms = np.array([suspect, *controls, planted])
    shape = (*norms.shape, 2, 2, 1)
    triggers = Triggers(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    moved = np.full((*norms.shape, len(controls)), transfer)
    for place in range(len(controls)):
        moved[1 + place, :, place] = np.nan
    return Measured(triggers, norms, np.full(norms.shape, success), moved)


def judged(numbers, black_box=False, accuracies=(0.9, 0.9, 0.9, 0.9), planted=PLANTED):
    models = [{"title": "the model", "source": "folder", "accuracy": 0.9, "reason": ""}]
    places = [1, 2, 3, 4]
    return model_audit.judge(
        models, NAMES, black_box=black_box, measured=numbers, places=places, accuracies=accuracies, planted=planted
    )


def test_scores_compare_norms_with_their_median_as_far_as_controls_do_not_share_the_success():
    norms, own = np.array([10.0, 1.0, 9.0, 11.0, 10.0]), np.full(5, 0.9)
    ratios = np.log([1, 10, 10 / 9, 10 / 11, 1])
    np.testing.assert_allclose(model_audit.scores(norms, own, 0.4 * np.ones(5)), 0.5 * ratios, atol=1e-12)
    np.testing.assert_allclose(model_audit.scores(7 * norms, own, 0.4), 0.5 * ratios, atol=1e-12)
    np.testing.assert_array_equal(model_audit.scores(norms, own, np.ones(5)), 0)


@pytest.mark.parametrize(("score", "expected"), [(2.0, 0.25), (0.3, 0.5), (0.25, 0.75), (0.0, 1.0)])
def test_the_p_value_is_a_rank_among_the_controls_with_ties_counted(score, expected):
    assert model_audit.p_value(score, [0.1, 0.25, 0.3]) == expected


def test_the_normal_p_value_is_that_of_a_t_test_of_one_new_value():
    # mean 0.2, s = 0.1, J = 3: t = (0.6 - 0.2) / (0.1 sqrt(4 / 3)) = 3.4641, 2 degrees of freedom.
    assert model_audit.normal_p_value(0.6, [0.1, 0.2, 0.3]) == pytest.approx(0.0370904, abs=1e-6)
    assert model_audit.normal_p_value(0.2, [0.1, 0.2, 0.3]) == pytest.approx(0.5)


def test_a_far_smaller_mask_that_only_works_on_the_suspect_is_found():
    results = judged(measured([10.0, 9.0, 1.0, 11.0, 10.0]))
    (model,) = results["models"]
    assert (results["outcome"], model["found"]) == ("found", [2])
    of_class = model["classes"][2]
    assert of_class["p_value"] == 1 / 5 and of_class["normal_p_value"] < 0.01
    assert of_class["index"] == pytest.approx(9 / 1.4826)
    assert model["classes"][3]["index"] < 0  # a mask above the median
    assert results["controls"]["smallest_p_value"] == 1 / 5
    assert results["planted"]["works"] and results["planted"]["found"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"success": 0.5}, "turns only 50 %"),
        ({"transfer": 0.9}, "fools the control networks"),
        (
            {"controls": [*CLEAN_NORMS[:3], [10.0, 9.0, 0.5, 11.0, 10.0]]},
            "1 of 4 control networks has an outlier as large",
        ),
    ],
)
def test_each_condition_of_a_finding_is_needed(changes, reason):
    results = judged(measured([10.0, 9.0, 1.0, 11.0, 10.0], **changes))
    (model,) = results["models"]
    assert not model["found"]
    assert any(reason in text for text in model["classes"][2]["against"])


@pytest.mark.parametrize(
    ("controls", "p_value", "found"), [(9, 0.1, True), (9, 0.2, False), (39, 0.05, True), (39, 0.075, False)]
)
def test_with_many_controls_a_p_value_of_5_percent_is_enough(controls, p_value, found):
    entry = {"index": 3.0, "success": 1.0, "transfer": 0.1, "p_value": p_value, "normal_p_value": 0.001}
    assert (model_audit.reasons_against(entry, controls) == []) == found


def test_masks_of_usual_sizes_are_nothing_found_because_the_planted_trigger_was_found():
    results = judged(measured([10.0, 9.0, 8.0, 11.0, 10.0]))
    assert results["outcome"] == "nothing found" and results["models"][0]["reason"] == ""
    assert results["planted"]["found"]


def test_two_classes_have_no_anomaly_index_and_are_decided_by_the_controls():
    norms = np.array([[10.0, 1.0], [10.0, 9.0], [8.0, 9.0], [11.0, 10.0], [1.0, 10.0]])
    shape = (*norms.shape, 2, 2, 1)
    numbers = Measured(
        Triggers(np.zeros(shape), np.zeros(shape)), norms, np.ones(norms.shape), np.zeros((*norms.shape, 3))
    )
    entries = model_audit.class_numbers(numbers, 0, [1, 2, 3])
    assert [entry["index"] for entry in entries] == [None, None]
    assert [entry["found"] for entry in entries] == [False, True]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accuracies": (0.2, 0.2, 0.2, 0.2)}, "the control networks predict only 20 %"),
        ({"numbers": measured([10.0] * 5, planted=[10.0] * 5)}, "not even a 3×3 white square"),
        ({"numbers": measured([10.0] * 5, planted=[10.0] * 5), "black_box": True}, "found through a surrogate"),
        ({"planted": {"why": "the trigger cannot be planted"}, "black_box": True}, "no trigger could be planted"),
        ({"numbers": measured([10.0] * 5, success=0.3), "planted": {"why": ""}}, "the search found no trigger"),
    ],
)
def test_what_could_not_have_been_found_could_not_be_tested(changes, reason):
    results = judged(**{"numbers": measured([10.0, 9.0, 8.0, 11.0, 10.0]), **changes})
    assert results["outcome"] == "could not be tested"
    assert reason in results["models"][0]["reason"]


def test_without_a_planted_trigger_that_works_it_is_unknown_what_would_be_found():
    results = judged(measured([10.0] * 5, planted=[10.0] * 5), planted={**PLANTED, "success": 0.5})
    assert results["outcome"] == "could not be tested" and not results["planted"]["works"]
    reason = results["models"][0]["reason"]
    assert "did not learn it: it turns 50 % of held-out rows" in reason and "3×3 white square" in reason


def test_control_networks_that_learned_nothing_make_no_finding():
    found = judged(measured([1.0, 10.0, 9.0, 11.0, 10.0]))
    assert found["outcome"] == "found"
    untaught = judged(measured([1.0, 10.0, 9.0, 11.0, 10.0]), accuracies=(0.2, 0.2, 0.2, 0.2))
    assert untaught["outcome"] == "could not be tested" and untaught["models"][0]["found"] == []
    assert "predict only 20 %" in untaught["models"][0]["reason"]


def test_numbers_that_are_not_known_are_no_finding():
    entry = {"success": math.nan, "transfer": math.nan, "p_value": 0.1, "normal_p_value": 1e-6}
    assert len(model_audit.reasons_against(entry, 9)) == 2


def test_control_networks_that_the_rule_would_find_are_counted():
    usual, outlier = [10.0, 9.5, 10.5, 11.0, 10.0], [1.0, 10.0, 9.0, 11.0, 10.0]
    numbers = measured(usual, transfer=0.05, controls=[CLEAN_NORMS[0]] * 4)
    assert judged(numbers)["controls"]["findings"] == 0
    numbers.norms[2] = outlier  # the second control network
    controls = judged(numbers)["controls"]
    assert controls["findings"] == 1 and [network["is_finding"] for network in controls["networks"]].index(True) == 1


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["nothing found", "found", "could not be tested"], "found"),
        (["nothing found", "could not be tested"], "nothing found"),
        (["could not be tested"] * 2, "could not be tested"),
    ],
)
def test_the_outcome_of_several_models(outcomes, expected):
    assert model_audit.outcome_of_all(outcomes) == expected


def test_a_model_that_was_not_tested_keeps_its_reason():
    models = [{"title": "the model", "source": "", "accuracy": 0.1, "reason": "it predicts 10 % correctly"}]
    results = model_audit.judge(models, NAMES, black_box=False)
    assert (
        results["outcome"] == "could not be tested" and results["models"][0]["reason"] == "it predicts 10 % correctly"
    )


def test_the_accuracy_that_a_network_needs_lies_a_quarter_of_the_way_from_guessing_to_perfect():
    assert model_audit.least_accuracy(10) == pytest.approx(0.325)
    assert model_audit.least_accuracy(2) == pytest.approx(0.625)


def test_weights_are_compared_with_those_of_the_controls():
    def network(deviations, label, last):
        return [LayerOutlier("conv", 8, 3, 2.0, deviations)], ClassOutlier(label, np.zeros(5), last, 0.1)

    controls = [network(1.0, 0, 1.5), network(2.0, 1, 2.5)]
    suspect, usual = model_audit.describe_weights([network(3.0, 4, 9.0), network(1.5, 2, 2.0)], controls, NAMES)
    assert suspect["channels"]["is_outlier"] and suspect["channels"]["p_value"] == 1 / 3
    assert suspect["last_layer"]["is_outlier"] and suspect["last_layer"]["class"] == 4
    assert not usual["channels"]["is_outlier"] and usual["channels"]["p_value"] == 2 / 3
    assert not usual["last_layer"]["is_outlier"]


# ---- Random triggers ------------------------------------------------------------------------------------------------


def with_responses(numbers, suspect, controls=None, kinds=("patch", "wave")):
    """The same networks, with these successes of random triggers, [kinds, classes], of the suspect and of each control."""
    usual = np.full((len(kinds), len(NAMES)), 0.1)
    controls = [usual + 0.02 * number for number in range(4)] if controls is None else controls
    success = np.stack([suspect, *controls, usual])
    return numbers._replace(responses=Responses(success, np.full(success.shape, 7)), kinds=kinds)


def responding(kind, label, rate):
    """The successes of a suspect with one that differs."""
    success = np.full((2, len(NAMES)), 0.13)
    success[kind, label] = rate
    return success


def test_deviations_are_in_standard_deviations_of_the_controls_after_arcsin_sqrt():
    # a = arcsin sqrt p: 0.25 -> pi / 6, 0.5 -> pi / 4, 0.75 -> pi / 3. Controls: variance (pi / 12)^2 in class 0 and 0 in
    # class 1, so on average sigma = pi / (12 sqrt 2), and 3 controls add a factor of sqrt(4 / 3).
    controls = np.array([[[0.25, 0.5]], [[0.5, 0.5]], [[0.75, 0.5]]])
    found = model_audit.response_deviations(np.array([[0.75, 0.25]]), controls)
    np.testing.assert_allclose(found, np.array([[1, -1]]) * math.sqrt(2) / math.sqrt(4 / 3), atol=1e-12)


def test_the_p_value_counts_kinds_and_classes():
    # A t-distribution with 2 degrees of freedom: P(T > 4) = 1/2 - 4 / (2 sqrt 18) = 0.0285955.
    assert model_audit.response_p_value(4.0, controls=2, kinds=1, classes=2) == pytest.approx(2 * 0.0285955, abs=1e-6)
    assert model_audit.response_p_value(4.0, 2, 5, 2) == pytest.approx(10 * 0.0285955, abs=1e-5)
    assert model_audit.response_p_value(0.0, 5, 7, 10) == 1.0


def test_a_class_that_random_triggers_reach_far_more_often_than_on_controls_is_found():
    numbers = measured([10.0, 9.0, 8.0, 11.0, 10.0])
    results = judged(with_responses(numbers, responding(1, 3, 0.9)))
    (model,) = results["models"]
    assert (results["outcome"], model["found"]) == ("found", [3])
    entry = model["classes"][3]
    assert entry["by"] == [model_audit.RANDOM] and entry["against"]
    of_random = entry["random_triggers"]
    assert (of_random["kind"], of_random["success"], of_random["strongest"]) == ("wave", 0.9, 7)
    assert of_random["controls"] == pytest.approx(0.13) and of_random["p_value"] <= 0.001
    assert all(other["by"] == [] for other in model["classes"] if other is not entry)


def test_both_tests_can_find_the_same_class():
    results = judged(with_responses(measured([10.0, 9.0, 1.0, 11.0, 10.0]), responding(0, 2, 0.9)))
    assert results["models"][0]["classes"][2]["by"] == [model_audit.REVERSED, model_audit.RANDOM]


def test_without_random_triggers_only_the_reversed_ones_count():
    (model,) = judged(measured([10.0, 9.0, 1.0, 11.0, 10.0]))["models"]
    assert all(entry["random_triggers"] is None for entry in model["classes"])
    assert model["classes"][2]["by"] == [model_audit.REVERSED]


@pytest.mark.parametrize(
    ("rate", "spread"),
    [(0.13 + model_audit.LEAST_EXCESS - 0.01, 0.0001), (0.9, 0.3)],
    ids=["too few rows", "controls that differ as much"],
)
def test_each_condition_of_a_finding_by_random_triggers_is_needed(rate, spread):
    controls = [np.full((2, 5), 0.13 + spread * (number - 1.5)).clip(0, 1) for number in range(4)]
    results = judged(with_responses(measured([10.0, 9.0, 8.0, 11.0, 10.0]), responding(1, 3, rate), controls))
    (model,) = results["models"]
    assert model["found"] == [] and not model["classes"][3]["random_triggers"]["found"]


def test_a_control_network_is_compared_with_the_others_alone():
    usual = np.full((2, 5), 0.13)
    controls = [usual, usual + 0.01, usual - 0.01, responding(0, 4, 0.95)]
    results = judged(with_responses(measured([10.0, 9.0, 8.0, 11.0, 10.0]), usual, controls))
    networks = results["controls"]["networks"]
    assert [network["is_finding"] for network in networks] == [False, False, False, True]
    assert networks[3]["response"]["class"] == 4 and networks[3]["response"]["random_triggers"]["controls"] < 0.2
    assert results["outcome"] == "nothing found"


def test_control_networks_that_learned_nothing_make_no_finding_by_random_triggers():
    numbers = with_responses(measured([10.0, 9.0, 8.0, 11.0, 10.0]), responding(1, 3, 0.9))
    assert judged(numbers, accuracies=(0.2, 0.2, 0.2, 0.2))["outcome"] == "could not be tested"
