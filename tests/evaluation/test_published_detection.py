import numpy as np
import pytest

from bdjax.attacks.registry import ATTACKS
from bdjax.evaluation.published_detection import (
    ALL_TO_ALL,
    ALL_TO_ONE,
    BLENDED,
    DATASETS,
    PUBLISHED_F1,
    TRIGGERS,
    find_f1,
)

DEFENSES = ("vbd", "abl", "agpd", "scan")


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
def test_values(cell, paper, numbers):
    found = find_f1(*cell)
    assert (found.paper, found.f1, found.standard_deviation) == (paper, *numbers)


def test_what_the_paper_does_not_print():
    assert find_f1("digits", None, None, None, "vbd") is None
    assert find_f1("cifar10", ALL_TO_ONE, "white_square", 0.5, "vbd") is None


def f1(*cell):
    return find_f1(*cell).f1


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("defense", DEFENSES)
def test_rows_add_up_to_the_averages(dataset, defense):
    """A slip in a single row would show here; the paper rounds what it averages."""
    for rule, triggers in TRIGGERS.items():
        rows = np.mean([f1(dataset, rule, trigger, 1.0, defense) for trigger in triggers])
        assert rows == pytest.approx(f1(dataset, rule, None, 1.0, defense), abs=0.011)
        blended = np.mean([f1(dataset, rule, None, opacity, defense) for opacity in BLENDED])
        assert blended == pytest.approx(f1(dataset, rule, None, None, defense), abs=0.011)
    settings = [
        (len(triggers), f1(dataset, rule, None, opacity, defense))
        for rule, triggers in TRIGGERS.items()
        for opacity in (1.0, *BLENDED)
    ]
    counts, means = zip(*settings, strict=True)
    assert sum(counts) == 40
    assert np.average(means, weights=counts) == pytest.approx(f1(dataset, None, None, None, defense), abs=0.011)


def test_the_summary_is_the_mean_of_both_datasets():
    both = {one.defense: one.f1 for one in PUBLISHED_F1 if one.dataset is None}
    for defense in DEFENSES:
        rows = [f1(dataset, None, None, None, defense) for dataset in DATASETS]
        assert np.mean(rows) == pytest.approx(both[defense], abs=0.011)


def test_every_row_is_of_an_attack_that_can_be_run():
    assert {one.attack for one in PUBLISHED_F1} - {None} <= set(ATTACKS)
    assert len({one[1:6] for one in PUBLISHED_F1}) == len(PUBLISHED_F1) == 4 * (2 * (7 + 5 + 4 + 4) + 3)
    assert all(0 <= one.f1 <= 100 and one.standard_deviation >= 0 for one in PUBLISHED_F1)
