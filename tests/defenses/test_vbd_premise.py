"""When VBD's result should not be relied on, and how many poisoned rows it asks for."""

import dataclasses

import numpy as np
import pytest

from bdjax.defenses import contract
from bdjax.defenses.contract import Facts
from bdjax.defenses.registry import DEFENSES
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.defenses.vbd_premise import LEARNED, doubt, smallest
from bdjax.types import Detection

SETTINGS = VBDSettings(networks="64P/16-16P")
FACTS = Facts(np.full(10, 300), np.zeros(10, int))


def found(**evidence) -> Detection:
    flags = np.zeros((2, 5), bool)
    return Detection(
        flags, flags.astype(np.float32), evidence={name: np.array(value) for name, value in evidence.items()}
    )


@pytest.mark.parametrize(("rows", "share", "expected"), [(20, 0.2, 100), (8, 0.2, 40), (20, 0.3, 67), (10, 0.1, 100)])
def test_the_settings_ask_for_so_many_poisoned_rows_of_a_class(rows, share, expected):
    settings = VBDSettings(rows_per_class=rows, detect_share=share)
    assert smallest(settings, FACTS) == expected == DEFENSES["vbd"].smallest(settings, FACTS)


def test_all_networks_must_have_learned_the_classes():
    first, second = doubt(SETTINGS, found(accuracies=[[LEARNED, 0.99], [0.89, 0.99]]))
    assert first.startswith("simple networks learned the classes: they predict 90 % or more of the training rows")
    assert not second


def test_what_they_remember_of_their_training_rows_does_not_count_where_more_is_known():
    memorised = found(accuracies=[[0.99, 0.99]] * 2, held_back_accuracies=[[0.4, 0.5], [0.95, 0.91]])
    first, second = doubt(SETTINGS, memorised)
    assert not first and "90 % or more of the held-back rows" in second


def test_networks_that_diverged_learned_nothing_and_unknown_accuracies_are_no_reason():
    assert doubt(SETTINGS, found(accuracies=[[np.nan, np.nan]] * 2)) == ("", "")
    assert doubt(SETTINGS, found()) == ("", "")


def test_detect_asks_for_the_doubt(monkeypatch):
    result = found(accuracies=[[0.1, 0.2]] * 2)
    monkeypatch.setattr(contract, "restricted", lambda *_: None)
    for warnings, expected in ((("", "careful"), ("", "careful")), (("", ""), ())):
        defense = dataclasses.replace(
            DEFENSES["vbd"], least=None, detect=lambda *_: result, doubt=lambda *_, given=warnings: given
        )
        assert contract.detect(defense, None, SETTINGS).warnings == expected
