from typing import get_args

import numpy as np
import pytest

from bdjax import metrics
from bdjax.metrics import (
    DEFINITIONS,
    AttackMetrics,
    BackdoorMetrics,
    DefenseWord,
    DetectionMetrics,
    DetectionWord,
    attack_success_rate,
    attack_word,
    clean_accuracy,
    defense_word,
    definitions,
    deltas,
    detection_word,
    evaluated_rows,
    has_backdoor,
    measure,
    measure_attack,
    measure_detection,
    robust_accuracy,
)

LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 1])
TRIGGERED = np.array([0, 1, 0, 1, 0, 2, 1, 0])


def test_a_hand_counted_example():
    # Target 0: six rows remain; predicted 0 in three, as their label in two.
    assert attack_success_rate(TRIGGERED, LABELS, 0) == pytest.approx(3 / 6)
    assert robust_accuracy(TRIGGERED, LABELS, 0) == pytest.approx(2 / 6)
    assert clean_accuracy(TRIGGERED, LABELS) == pytest.approx(3 / 8)


def test_target_rows_count_only_if_asked_to():
    np.testing.assert_array_equal(evaluated_rows(LABELS, 0), LABELS != 0)
    assert evaluated_rows(LABELS, 0, include_target=True).all()
    assert attack_success_rate(TRIGGERED, LABELS, 0, include_target=True) == pytest.approx(4 / 8)
    assert robust_accuracy(TRIGGERED, LABELS, 0, include_target=True) == pytest.approx(3 / 8)
    # What is predicted for the target class's own rows is of no weight.
    other = np.where(LABELS == 0, 2, TRIGGERED)
    assert attack_success_rate(other, LABELS, 0) == attack_success_rate(TRIGGERED, LABELS, 0)
    assert robust_accuracy(other, LABELS, 0) == robust_accuracy(TRIGGERED, LABELS, 0)


def test_the_literal_divisor_is_the_whole_test_set():
    assert robust_accuracy(TRIGGERED, LABELS, 0, divide_by_test_size=True) == pytest.approx(2 / 8)


@pytest.mark.parametrize("seed", range(20))
def test_successes_and_recoveries_are_shares_of_the_same_rows(seed):
    random = np.random.default_rng(seed)
    classes = int(random.integers(2, 11))
    labels, predictions = random.integers(0, classes, (2, 50))
    target = int(random.integers(0, classes))
    attack, robust = (rate(predictions, labels, target) for rate in (attack_success_rate, robust_accuracy))
    assert 0 <= attack <= 1
    assert 0 <= robust <= 1
    assert attack + robust <= 1 + 1e-12
    rows = labels != target
    wrong = np.mean((predictions[rows] != target) & (predictions[rows] != labels[rows]))
    assert attack + robust + wrong == pytest.approx(1)
    order = random.permutation(50)
    assert attack_success_rate(predictions[order], labels[order], target) == pytest.approx(attack)


@pytest.mark.parametrize("target", [0, 1, 2])
def test_a_model_that_always_says_the_target_is_fully_attacked(target):
    predictions = np.full(len(LABELS), target)
    assert attack_success_rate(predictions, LABELS, target) == 1.0
    assert robust_accuracy(predictions, LABELS, target) == 0.0


def test_a_perfect_model_is_fully_robust():
    assert (attack_success_rate(LABELS, LABELS, 0), robust_accuracy(LABELS, LABELS, 0)) == (0.0, 1.0)
    # Counting the target's own rows would report an attack on it.
    assert attack_success_rate(LABELS, LABELS, 0, include_target=True) == pytest.approx(2 / 8)


def test_no_row_to_measure_on_is_an_error():
    for rate in (attack_success_rate, robust_accuracy):
        with pytest.raises(ValueError, match="all 3 test rows are of the target class 4"):
            rate(np.array([1, 2, 4]), np.array([4, 4, 4]), 4)


def test_one_model_under_several_triggers():
    result = measure(LABELS, np.stack([TRIGGERED, LABELS, np.zeros(8, int)]), LABELS, 0)
    assert result.cda == 1.0
    np.testing.assert_allclose(result.asr, [3 / 6, 0, 1])
    np.testing.assert_allclose(result.r_acc, [2 / 6, 1, 0])
    assert result.asr.dtype == result.r_acc.dtype == np.float64


# ---- Differences to the clean model ---------------------------------------------------------------------------------

# A clean model's ASR under seven triggers, 0.029 on average, and one teacher's ASR under its own, the third.
CLEAN = BackdoorMetrics(
    0.950, np.array([0.01, 0.02, 0.06, 0.03, 0.04, 0.02, 0.023]), np.array([0.9, 0.9, 0.8, 0.9, 0.7, 0.9, 0.85])
)
TEACHER = BackdoorMetrics(0.930, np.array([0.875]), np.array([0.115]))


def test_the_papers_table_subtracts_the_mean_over_all_triggers():
    found = deltas(CLEAN, TEACHER, [2])
    assert round(found["delta_asr"], 3) == 0.846  # 0.875 - 0.029
    assert found["delta_cda"] == pytest.approx(0.02)
    assert found["delta_r_acc"] == pytest.approx(5.95 / 7 - 0.115)


def test_section_4_6_has_the_same_trigger_on_both_sides():
    found = deltas(CLEAN, TEACHER, [2])["delta_per_trigger"]
    assert found["asr"] == pytest.approx([0.875 - 0.06])
    assert found["r_acc"] == pytest.approx([0.8 - 0.115])


def test_over_all_triggers_the_two_readings_agree_on_average():
    model = BackdoorMetrics(0.9, np.linspace(0, 1, 7), np.linspace(0.5, 0, 7))
    found = deltas(CLEAN, model)
    for metric in ("asr", "r_acc"):
        assert len(found["delta_per_trigger"][metric]) == 7
        assert np.mean(found["delta_per_trigger"][metric]) == pytest.approx(found[f"delta_{metric}"])
    same = deltas(CLEAN, CLEAN)
    assert same["delta_cda"] == 0
    assert same["delta_asr"] == pytest.approx(0)
    assert same["delta_per_trigger"] == {"asr": [0.0] * 7, "r_acc": [0.0] * 7}


def test_everything_reported_is_defined():
    fields = {*BackdoorMetrics._fields, *AttackMetrics._fields, *DetectionMetrics._fields}
    words = {*get_args(DefenseWord), *get_args(DetectionWord)}
    assert fields | {*deltas(CLEAN, TEACHER, [2])} | words <= set(DEFINITIONS)


def test_definitions_are_chosen_by_name_and_keep_their_order():
    assert list(definitions("removed", "cda", "asr")) == ["removed", "cda", "asr"]
    assert definitions("f1") == {"f1": DEFINITIONS["f1"]} and definitions() == {}
    with pytest.raises(KeyError, match="charm"):
        definitions("charm")


# ---- Words ----------------------------------------------------------------------------------------------------------

GRID = np.round(np.linspace(0, 1, 21), 2).tolist()
CONTROLS = [None, 0.0, 0.1, 0.45, 0.9]
STRENGTH = {"nothing to remove": 0, "removed": 1, "removed at a cost": 1, "weakened": 2, "kept": 3}


class TestAttackWord:
    @pytest.mark.parametrize(
        ("asr", "control", "expected"),
        [
            (1.0, None, "yes"),
            (0.9, None, "yes"),
            (0.899, None, "partly"),
            (0.5, None, "partly"),
            (0.499, None, "no"),
            (0.95, 0.45, "yes"),  # SIG on MNIST: half of its success is the trigger's own
            (0.94, 0.45, "partly"),
            (0.9, 0.0, "yes"),
            (0.6, 0.4, "partly"),
            (0.6, 0.41, "no"),
            (0.499, 0.0, "no"),
            (1.0, 1.0, "no"),
        ],
    )
    def test_by_hand(self, asr, control, expected):
        assert attack_word(asr, control) == expected

    @pytest.mark.parametrize("control", CONTROLS)
    def test_more_success_is_never_a_weaker_word(self, control):
        order = ["no", "partly", "yes"]
        ranks = [order.index(attack_word(asr, control)) for asr in GRID]
        assert ranks == sorted(ranks)

    @pytest.mark.parametrize("asr", GRID)
    def test_a_higher_control_is_never_a_stronger_word(self, asr):
        order = ["no", "partly", "yes"]
        ranks = [order.index(attack_word(asr, control)) for control in GRID]
        assert ranks == sorted(ranks, reverse=True)
        assert attack_word(asr) == attack_word(asr, 0.0)


class TestDefenseWord:
    @pytest.mark.parametrize(
        ("before", "after", "cda", "expected"),
        [
            ((0.9, None), (0.1, None), 0.9, "removed"),
            ((0.9, None), (0.27, None), 0.9, "removed"),  # 0.3 of what it was
            ((0.9, None), (0.28, None), 0.9, "weakened"),
            ((0.9, None), (0.45, None), 0.9, "weakened"),
            ((0.9, None), (0.46, None), 0.9, "kept"),
            ((1.0, None), (0.25, None), 0.9, "removed"),
            ((0.5, None), (0.1, None), 0.8, "removed"),  # the CDA loss of 0.1 is allowed
            ((0.9, None), (0.0, None), 0.799, "removed at a cost"),
            ((0.9, None), (0.4, None), 0.1, "weakened"),
            ((0.499, None), (0.0, None), 0.9, "nothing to remove"),
            ((0.5, None), (0.5, None), 0.9, "kept"),
            # With controls, only what is above them counts.
            ((0.9, 0.1), (0.2, 0.1), 0.9, "removed"),
            ((0.9, 0.1), (0.3, 0.2), 0.9, "removed"),  # 0.3 - 0.2 is 0.1
            ((0.9, 0.1), (0.34, 0.1), 0.9, "removed"),  # 0.24 of 0.8
            ((0.9, 0.1), (0.36, 0.1), 0.9, "weakened"),
            ((0.9, 0.1), (0.5, 0.1), 0.9, "weakened"),
            ((0.9, 0.1), (0.51, 0.1), 0.9, "kept"),
            ((0.3, 0.1), (0.2, 0.1), 0.9, "removed"),
            ((0.29, 0.0), (0.0, 0.0), 0.9, "nothing to remove"),
            ((0.95, 0.8), (0.0, 0.0), 0.9, "nothing to remove"),  # the trigger alone does that
            ((0.9, 0.1), (0.1, 0.4), 0.9, "removed"),
        ],
    )
    def test_by_hand(self, before, after, cda, expected):
        assert defense_word(before[0], after[0], 0.9, cda, before[1], after[1]) == expected

    @pytest.mark.parametrize("control", CONTROLS)
    def test_every_input_has_a_word_and_more_success_never_a_milder_one(self, control):
        for before in GRID:
            for cda in (0.5, 0.8, 0.95):
                words = [defense_word(before, after, 0.9, cda, control, control) for after in GRID]
                assert set(words) <= set(get_args(DefenseWord))
                ranks = [STRENGTH[word] for word in words]
                assert ranks == sorted(ranks)
                assert ("nothing to remove" in words) == (not has_backdoor(before, control))
                assert "nothing to remove" not in words or set(words) == {"nothing to remove"}

    def test_a_control_of_zero_changes_no_word_of_a_backdoor_that_works(self):
        for before in [value for value in GRID if value >= 0.5]:
            for after in GRID:
                plain = defense_word(before, after, 0.9, 0.9)
                assert plain == defense_word(before, after, 0.9, 0.9, 0.0, 0.0)

    def test_a_gain_of_accuracy_is_no_cost(self):
        assert defense_word(1.0, 0.0, 0.3, 0.9) == "removed"

    def test_a_removed_backdoor_is_never_merely_weakened(self):
        assert metrics.REMOVED_SHARE < metrics.WEAKENED_SHARE
        assert metrics.REMOVED_ASR <= metrics.WEAKENED_SHARE * metrics.BACKDOOR_ABOVE_CONTROL


@pytest.mark.parametrize(
    ("asr", "control", "expected"),
    [
        (0.5, None, True),
        (0.49, None, False),
        (0.3, 0.1, True),
        (0.3, 0.11, False),
        (0.29, 0.0, False),
        (1.0, 0.9, False),
    ],
)
def test_has_backdoor(asr, control, expected):
    assert has_backdoor(asr, control) is expected


def test_words_of_detectors():
    assert [detection_word(f1) for f1 in (1.0, 0.9, 0.899, 0.5, 0.499, 0.0)] == [
        "found",
        "found",
        "partly",
        "partly",
        "missed",
        "missed",
    ]


class TestMeasureAttack:
    CLEAN = np.array([0, 0, 1, 0, 2, 2, 2, 1])

    def test_agrees_with_the_rates_of_one_target(self):
        measured = measure_attack(self.CLEAN, TRIGGERED, LABELS, LABELS != 0, np.zeros(8, int))
        assert measured.cda == pytest.approx(7 / 8)
        assert measured.asr == attack_success_rate(TRIGGERED, LABELS, 0)
        assert measured.r_acc == robust_accuracy(TRIGGERED, LABELS, 0)
        assert measured.asr_with_target == attack_success_rate(TRIGGERED, LABELS, 0, include_target=True)
        assert measured.r_acc_with_target == robust_accuracy(TRIGGERED, LABELS, 0, include_target=True)
        assert measured.asr_outside is None

    def test_all_to_all_counts_every_row_and_has_no_one_target(self):
        measured = measure_attack(self.CLEAN, TRIGGERED, LABELS, np.ones(8, bool), (LABELS + 1) % 3)
        # Wanted 1 1 2 2 0 0 0 2, triggered 0 1 0 1 0 2 1 0.
        assert measured.asr == pytest.approx(2 / 8)
        assert measured.asr_with_target is None and measured.r_acc_with_target is None and measured.asr_outside is None

    def test_asr_outside_is_measured_on_the_rows_that_are_not_attacked(self):
        measured = measure_attack(self.CLEAN, TRIGGERED, LABELS, LABELS == 1, np.where(LABELS == 1, 0, LABELS))
        assert measured.asr == pytest.approx(2 / 3)  # rows of class 1: 0, 1, 0
        assert measured.asr_with_target == pytest.approx(3 / 5)
        assert measured.asr_outside == pytest.approx(1 / 3)  # rows of class 2: 0, 2, 1

    def test_no_victim_is_an_error(self):
        with pytest.raises(ValueError, match="none of the 8 test rows"):
            measure_attack(self.CLEAN, TRIGGERED, LABELS, np.zeros(8, bool), LABELS)


class TestMeasureDetection:
    # Rows 0 to 3 are poisoned; rows 0, 1 and 4 are flagged.
    POISONED = np.array([True] * 4 + [False] * 6)
    FLAGS = np.array([True, True, False, False, True, False, False, False, False, False])
    SCORES = np.array([0.9, 0.8, 0.1, 0.5, 0.7, 0.2, 0.5, 0.0, 0.0, 0.3])

    def test_a_hand_counted_example(self):
        found = measure_detection(self.FLAGS, self.SCORES, self.POISONED)
        assert found.flagged == pytest.approx(3 / 10)
        assert found.precision == pytest.approx(2 / 3)
        assert found.recall == pytest.approx(2 / 4)
        assert found.f1 == pytest.approx(4 / 7)
        # Of 24 pairs, 0.9 and 0.8 win six each, 0.5 wins four and ties once, and 0.1 wins two.
        assert found.auc == pytest.approx(18.5 / 24)

    @pytest.mark.parametrize("seed", range(5))
    def test_agrees_with_counting_every_pair(self, seed):
        random = np.random.default_rng(seed)
        truth, flags = random.uniform(size=(2, 60)) < [[0.3], [0.4]]
        scores = random.integers(0, 8, 60) / 8  # with ties
        found = measure_detection(flags, scores, truth)
        pairs = [(one > other) + 0.5 * (one == other) for one in scores[truth] for other in scores[~truth]]
        assert found.auc == pytest.approx(np.mean(pairs))
        assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))

    def test_no_flag_at_all_is_worth_nothing(self):
        found = measure_detection(np.zeros(10, bool), None, self.POISONED)
        assert found == (0.0, None, 0.0, 0.0, None)

    def test_perfect_and_inverted(self):
        assert measure_detection(self.POISONED, self.POISONED.astype(float), self.POISONED)[1:] == (1, 1, 1, 1)
        assert measure_detection(~self.POISONED, -self.POISONED.astype(float), self.POISONED)[1:] == (0, 0, 0, 0)

    def test_a_clean_set_or_an_unknown_one_has_false_alarms_only(self):
        for truth in (np.zeros(10, bool), None):
            assert measure_detection(self.FLAGS, self.SCORES, truth) == (0.3, None, None, None, None)
            assert measure_detection(None, None, truth) == (None,) * 5

    def test_what_is_not_there_is_not_measured(self):
        assert measure_detection(None, self.SCORES, self.POISONED) == (None, None, None, None, pytest.approx(18.5 / 24))
        assert measure_detection(self.FLAGS, None, self.POISONED).auc is None
        # Without a clean row there is no pair to compare.
        assert measure_detection(self.FLAGS, self.SCORES, np.ones(10, bool)).auc is None
