from collections import Counter

from bdjax.attacks.registry import ATTACKS
from bdjax.evaluation.published_distillation import PUBLISHED_STUDENTS
from bdjax.models import MODELS


def cell(paper, dataset, teacher, student, attack, method):
    (found,) = (
        one
        for one in PUBLISHED_STUDENTS
        if (one.paper, one.dataset, one.teacher, one.student, one.attack, one.method)
        == (paper, dataset, teacher, student, attack, method)
    )
    return found.clean_accuracy, found.success, found.teacher_accuracy, found.teacher_success


def test_every_cell_once():
    keys = Counter(one[:6] for one in PUBLISHED_STUDENTS)
    assert set(keys.values()) == {1}
    assert Counter(one.paper for one in PUBLISHED_STUDENTS) == {
        "RobustKD Table 3": 36,
        "RobustKD Tables 4, 5": 48,
        "RobustKD Table 6": 8,
        "RobustKD Table 7": 4,
    }


def test_names_are_those_of_the_registries():
    for one in PUBLISHED_STUDENTS:
        assert one.teacher in MODELS and one.student in MODELS and one.attack in ATTACKS


def test_some_cells_as_they_are_printed():
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
    for one in PUBLISHED_STUDENTS:
        assert 0 < one.success <= 100 and 50 < one.clean_accuracy <= 100 and 50 < one.teacher_accuracy <= 100
