"""When VBD's result should not be relied on, and how many poisoned rows it asks for."""

import numpy as np
import pytest

from bdjax.defenses.registry import DEFENSES
from bdjax.defenses.vbd import Analysis, to_detection
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.defenses.vbd_premise import LEARNED, doubt, smallest

SETTINGS = VBDSettings(networks="64P/16-16P")


@pytest.mark.parametrize(("rows", "share", "expected"), [(20, 0.2, 100), (8, 0.2, 40), (20, 0.3, 67), (10, 0.1, 100)])
def test_the_settings_ask_for_so_many_poisoned_rows_of_a_class(rows, share, expected):
    settings = VBDSettings(rows_per_class=rows, detect_share=share)
    assert smallest(settings) == expected == DEFENSES["vbd"].smallest(settings)


def test_all_networks_must_have_learned_the_classes():
    first, second = doubt(np.array([[LEARNED, 0.99], [0.89, 0.99]]))
    assert first.startswith("simple networks learned the classes: they predict 90 % or more of the held-back rows")
    assert not second


def test_nothing_is_said_where_there_is_nothing_to_say():
    assert doubt(np.array([[0.4, 0.99], [np.nan, np.nan]])) == ()


def test_an_analysis_passes_it_on():
    shape = (1, 3, 8, 8)
    analysis = Analysis(
        *(np.zeros((1, 5), bool), np.zeros((1, 5), np.float32), np.full((1, 2), 0.99), np.full((1, 2), 0.95)),
        *(np.ones((1, 2, 3)), np.zeros((1, 2, 3)), np.zeros((1, 3), bool), np.full((1, 3), -1)),
        *(np.zeros(shape, bool), np.zeros((*shape, 3), np.float32), np.zeros((1, 3)), np.zeros((1, 5), np.int32)),
    )
    (warning,) = to_detection(analysis, SETTINGS).warnings
    assert "learned the classes" in warning
    assert to_detection(analysis._replace(held_back_accuracies=np.array([[0.95, 0.5]])), SETTINGS).warnings == ()
