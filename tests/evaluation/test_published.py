"""The papers' rows: some as they are printed, all against the averages that the papers print of them."""

from collections import Counter

import numpy as np
import pytest

from bdjax.attacks.registry import ATTACKS
from bdjax.evaluation.published import (
    ALL_TO_ALL,
    ALL_TO_ONE,
    BLENDED,
    DETECTION_DATASETS,
    PUBLISHED,
    TRIGGERS,
    find_published,
)
from bdjax.models import MODELS

DETECTORS = ("vbd", "abl", "agpd", "scan")
NETWORKS = find_published(measured="network")
FLAGS = find_published(measured="flags")
STUDENTS = find_published(measured="student")


def test_every_row_is_of_a_network_flags_or_of_a_student_and_has_that_alone():
    assert len(PUBLISHED) == len(NETWORKS) + len(FLAGS) + len(STUDENTS)
    for row in NETWORKS:
        assert row[7:] == (None,) * 8, row
    for row in FLAGS:
        assert row.f1 is not None and row.clean_accuracy is row.success is row.teacher is row.student is None
    for row in STUDENTS:
        assert row.teacher and row.student and row.f1 is row.rule is row.opacity is None


# ---- Networks behind a defense: LfD and ABM ------------------------------------------------------------------------


def find(paper, dataset, attack, method):
    (row,) = find_published(paper=paper, dataset=dataset, attack=attack, method=method)
    return row.clean_accuracy, row.success


@pytest.mark.parametrize(
    ("row", "numbers"),
    [
        (("LfD Table 1", "cifar10", "badnets_grid", "none"), (91.51, 100)),
        (("LfD Table 1", "cifar10", "blended", "abl"), (77.57, 44.18)),
        (("LfD Table 1", "cifar10", "l2_invisible", "lfd"), (91.88, 0.11)),
        (("LfD Table 1", "cifar10", "sig", "activation_clustering"), (65.77, 87.37)),
        (("LfD Table 1", "cifar10", "none", "abl"), (73.27, None)),
        (("LfD Table 1", "gtsrb", "trojan_square", "lfd"), (93.84, 25.7)),
        (("LfD Table 1", "gtsrb", "label_consistent", "fine_pruning"), (89.71, 59.26)),
        (("ABM Table III", "cifar10", "none", "abl"), (45.8, None)),
        (("ABM Table III", "cifar10", "composite", "abl"), (80.99, 43.52)),
        (("ABM Table III", "cifar10", "narcissus", "abl"), (None, None)),
        (("ABM Table III", "gtsrb", "bpp_offline", "nad"), (89.52, 66.3)),
        (("ABM Table III", "gtsrb", "narcissus", "abm"), (93.86, 14.31)),
        (("ABM Table XI", "cifar10", "composite", "abm"), (79.4, 2.98)),
        (("ABM Table XI", "cifar10", "narcissus", "none"), (80.87, 100)),
        (("ABM Table XI", "gtsrb", "badnets", "abm"), (93.65, 0.6)),
        (("ABM Table XI", "gtsrb", "sig", "cbd"), (None, None)),
    ],
)
def test_networks_as_they_are_printed(row, numbers):
    assert find(*row) == numbers


def means(paper, dataset, method):
    rows = find_published(paper=paper, dataset=dataset, method=method)
    rows = [row for row in rows if row.attack != "none" and row.success is not None]
    return np.mean([[row.clean_accuracy, row.success] for row in rows], axis=0)


@pytest.mark.parametrize(
    ("paper", "dataset", "defense", "printed"),
    [
        ("LfD Table 1", "cifar10", "lfd", (92.09, 0.67)),
        ("ABM Table III", "cifar10", "none", (80.22, 96.84)),
        ("ABM Table III", "cifar10", "nad", (77.82, 2.81)),
        ("ABM Table III", "cifar10", "abl", (79.72, 9.95)),
        ("ABM Table III", "cifar10", "bab", (77.79, 8.83)),
        ("ABM Table III", "gtsrb", "none", (91.18, 90.49)),
        ("ABM Table III", "gtsrb", "nad", (89.22, 21.74)),
        ("ABM Table III", "gtsrb", "abl", (80.91, 6.51)),
        ("ABM Table III", "gtsrb", "bab", (88.15, 2.14)),
    ],
)
def test_networks_add_up_to_the_averages_that_are_right(paper, dataset, defense, printed):
    """A slip in a single row would show here; 0.67 is the average of LfD's rows, while its abstract prints 0.52."""
    np.testing.assert_allclose(means(paper, dataset, defense), printed, atol=0.011)


@pytest.mark.parametrize(
    ("paper", "dataset", "defense", "ours", "printed"),
    [
        ("LfD Table 1", "gtsrb", "lfd", 6.14, 11.31),
        ("LfD Table 1", "gtsrb", "abl", 11.32, 19.17),
        ("ABM Table III", "cifar10", "abm", 1.04, 0.91),
    ],
)
def test_averages_that_the_rows_do_not_give(paper, dataset, defense, ours, printed):
    success = means(paper, dataset, defense)[1]
    assert success == pytest.approx(ours, abs=0.011) and abs(success - printed) > 0.1


def test_every_network_is_of_something_that_can_be_run():
    assert {row.attack for row in NETWORKS} <= {"none", *ATTACKS}
    assert {row.dataset for row in NETWORKS} == {"cifar10", "gtsrb"}
    assert len({row[:5] for row in NETWORKS}) == len(NETWORKS) == 17 * 5 + 16 * 5 + 16 * 3
    for row in NETWORKS:
        assert all(value is None or 0 <= value <= 100 for value in (row.clean_accuracy, row.success))
        assert row.success is None or row.clean_accuracy is not None


# ---- Flags of detectors: VBD ---------------------------------------------------------------------------------------


def find_f1(dataset, rule, attack, opacity, method):
    wanted = {"dataset": dataset, "rule": rule, "attack": attack, "opacity": opacity, "method": method}
    return find_published(measured="flags", **wanted)


@pytest.mark.parametrize(
    ("cell", "paper", "numbers"),
    [
        (("cifar10", ALL_TO_ONE, "white_square", 1.0, "vbd"), "VBD Table 1", (97.46, 0.31)),
        (("tiny_imagenet", ALL_TO_ONE, "big_kitty", 1.0, "agpd"), "VBD Table 1", (0, 0)),
        (("cifar10", ALL_TO_ONE, None, 1.0, "scan"), "VBD Table 1", (99.64, 0.02)),
        (("tiny_imagenet", ALL_TO_ALL, "white_grid_all_to_all", 1.0, "vbd"), "VBD Table 2", (52.27, 2.68)),
        (("cifar10", ALL_TO_ONE, None, 0.2, "vbd"), "VBD Table 3", (96.85, 0.75)),
        (("tiny_imagenet", ALL_TO_ALL, None, 0.5, "agpd"), "VBD Table 4", (35.05, 0.18)),
        (("cifar10", ALL_TO_ALL, None, None, "scan"), "VBD Table 4", (0.47, 1.04)),
        (("tiny_imagenet", None, None, None, "abl"), "VBD Table 5", (61.64, 0.94)),
    ],
)
def test_flags_as_they_are_printed(cell, paper, numbers):
    (found,) = find_f1(*cell)
    assert (found.paper, found.f1, found.standard_deviation) == (paper, *numbers)


def test_what_the_paper_does_not_print():
    assert find_f1("digits", None, None, None, "vbd") == ()
    assert find_f1("cifar10", ALL_TO_ONE, "white_square", 0.5, "vbd") == ()


def f1(*cell):
    (found,) = find_f1(*cell)
    return found.f1


@pytest.mark.parametrize("dataset", DETECTION_DATASETS)
@pytest.mark.parametrize("method", DETECTORS)
def test_flags_add_up_to_the_averages(dataset, method):
    """A slip in a single row would show here; the paper rounds what it averages."""
    for rule, triggers in TRIGGERS.items():
        rows = np.mean([f1(dataset, rule, trigger, 1.0, method) for trigger in triggers])
        assert rows == pytest.approx(f1(dataset, rule, None, 1.0, method), abs=0.011)
        blended = np.mean([f1(dataset, rule, None, opacity, method) for opacity in BLENDED])
        assert blended == pytest.approx(f1(dataset, rule, None, None, method), abs=0.011)
    settings = [
        (len(triggers), f1(dataset, rule, None, opacity, method))
        for rule, triggers in TRIGGERS.items()
        for opacity in (1.0, *BLENDED)
    ]
    counts, means = zip(*settings, strict=True)
    assert sum(counts) == 40
    assert np.average(means, weights=counts) == pytest.approx(f1(dataset, None, None, None, method), abs=0.011)


def test_the_summary_is_the_mean_of_both_datasets():
    both = {row.method: row.f1 for row in FLAGS if row.dataset is None}
    for method in DETECTORS:
        rows = [f1(dataset, None, None, None, method) for dataset in DETECTION_DATASETS]
        assert np.mean(rows) == pytest.approx(both[method], abs=0.011)


def test_all_flags_are_of_an_attack_that_can_be_run():
    assert {row.attack for row in FLAGS} - {None} <= set(ATTACKS)
    assert (
        len({(row.dataset, row.rule, row.attack, row.opacity, row.method) for row in FLAGS})
        == len(FLAGS)
        == 4 * (2 * (7 + 5 + 4 + 4) + 3)
    )
    assert all(0 <= row.f1 <= 100 and row.standard_deviation >= 0 for row in FLAGS)


# ---- Students: RobustKD --------------------------------------------------------------------------------------------


def cell(paper, dataset, teacher, student, attack, method):
    names = {"teacher": teacher, "student": student, "attack": attack, "method": method}
    (found,) = find_published(paper=paper, dataset=dataset, **names)
    return found.clean_accuracy, found.success, found.teacher_accuracy, found.teacher_success


def test_every_student_once():
    keys = Counter((*row[:5], row.teacher, row.student) for row in STUDENTS)
    assert set(keys.values()) == {1}
    assert Counter(row.paper for row in STUDENTS) == {
        "RobustKD Table 3": 36,
        "RobustKD Tables 4, 5": 48,
        "RobustKD Table 6": 8,
        "RobustKD Table 7": 4,
    }


def test_names_of_students_are_those_of_the_registries():
    for row in STUDENTS:
        assert row.teacher in MODELS and row.student in MODELS and row.attack in ATTACKS


def test_students_as_they_are_printed():
    wide, small = "wrn_28_4", "wrn_16_2"
    both = "RobustKD Tables 4, 5"
    assert cell("RobustKD Table 3", "gtsrb", wide, "resnet56", "hidden_trigger", "fkd") == (96.48, 23.62, 98.57, None)
    assert cell(both, "cifar100", wide, small, "latent_backdoor", "robust_kd") == (76.25, 2.67, 80.72, 96.14)
    assert cell(both, "flowers17", "pyramidnet_200_240", "pyramidnet_110_84", "ckd", "fkd") == (
        95.47,
        82.36,
        96.25,
        98.67,
    )
    assert cell("RobustKD Table 6", "cifar100", wide, "wrn_28_2", "ckd", "robust_kd") == (76.02, 10.94, 78.68, 99.83)
    assert cell("RobustKD Table 7", "cifar100", wide, small, "ckd_low_variance", "robust_kd") == (
        75.98,
        14.42,
        75.47,
        90.56,
    )


def test_all_of_the_paper_s_successes_are_percentages():
    for row in STUDENTS:
        assert 0 < row.success <= 100 and 50 < row.clean_accuracy <= 100 and 50 < row.teacher_accuracy <= 100
