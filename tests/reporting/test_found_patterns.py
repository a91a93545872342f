import numpy as np
import pytest

from bdjax.evaluation.patterns import FoundPattern
from bdjax.reporting.found_patterns import choose_patterns, patterns_table


def pattern(attack, label=1, **changes):
    mask = np.zeros((8, 8), bool)
    mask[5:, 5:] = True
    true_mask = np.roll(mask, 1, 1).astype(np.float32)
    values = {
        "attack": attack,
        "seed": 3,
        "label": label,
        "pattern": np.ones((8, 8, 3), np.float32),
        "mask": mask,
        "success": 0.98,
        "network": "64P",
        "true_pattern": np.ones((8, 8, 3), np.float32),
        "true_mask": true_mask,
        "example": None,
        "is_true_class": True,
        "class_title": f"{label} (cat)",
        "flagged": 40,
        "sure": 0.8,
    }
    return FoundPattern(**{**values, **changes})


def test_patterns_that_are_drawn_are_of_many_attacks():
    found = [pattern("a", number) for number in range(3)] + [pattern("b"), pattern("c")]
    chosen = choose_patterns(found, 4)
    assert [(trigger.attack, trigger.label) for trigger in chosen] == [("a", 0), ("a", 1), ("b", 1), ("c", 1)]


def test_every_pattern_is_a_row_and_false_alarms_have_no_overlap():
    false = pattern("b", 2, true_mask=None, true_pattern=None, is_true_class=False, flagged=0, sure=0.1)
    unknown = pattern("c", is_true_class=None, true_mask=None, true_pattern=None, flagged=None, sure=None)
    table = patterns_table([pattern("a"), false, unknown])
    assert table.rows == (
        ("a", 3, "1 (cat)", "yes", "64P", 9, pytest.approx(0.5), 0.98, 40, 0.8),
        ("b", 3, "2 (cat)", "no", "64P", 9, None, 0.98, 0, 0.1),
        ("c", 3, "1 (cat)", None, "64P", 9, None, 0.98, None, None),
    )
    assert patterns_table([]) is None
