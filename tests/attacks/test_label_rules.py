import numpy as np
import pytest

from bdjax.attacks import all_to_all, all_to_one, clean_label, label_map
from bdjax.errors import InputError

LABELS = np.array([0, 1, 2, 3, 2, 0], np.int32)


def test_all_to_one_leaves_the_target_class_out_unless_told():
    np.testing.assert_array_equal(all_to_one(2).candidates(LABELS), LABELS != 2)
    assert all_to_one(2, include_target=True).candidates(LABELS).all()
    np.testing.assert_array_equal(all_to_one(2).relabel(LABELS), [2] * 6)


@pytest.mark.parametrize("shift", [1, 3, -1, 5])
def test_all_to_all_permutes_the_classes_without_a_fixed_point(shift):
    rule = all_to_all(4, shift)
    classes = np.arange(4, dtype=np.int32)
    assert rule.candidates(LABELS).all()
    assert sorted(rule.relabel(classes)) == [0, 1, 2, 3]
    assert (rule.relabel(classes) != classes).all()


@pytest.mark.parametrize("shift", [0, 4, -8])
def test_all_to_all_refuses_a_shift_that_changes_nothing(shift):
    with pytest.raises(InputError, match="leaves every label"):
        all_to_all(4, shift)


def test_clean_label_takes_the_target_class_and_changes_no_label():
    rule = clean_label(2)
    np.testing.assert_array_equal(rule.candidates(LABELS), LABELS == 2)
    np.testing.assert_array_equal(rule.relabel(LABELS), LABELS)


def test_label_map_takes_and_maps_its_keys():
    rule = label_map({0: 1, 3: 0})
    np.testing.assert_array_equal(rule.candidates(LABELS), [True, False, False, True, False, True])
    np.testing.assert_array_equal(rule.relabel(LABELS), [1, 1, 2, 0, 2, 1])


@pytest.mark.parametrize("rule", [all_to_one(2), all_to_all(4), clean_label(2), label_map({0: 1})])
def test_rules_are_pure_and_keep_the_dtype(rule):
    before = LABELS.copy()
    relabelled = rule.relabel(LABELS)
    assert relabelled.dtype == np.int32 and rule.candidates(LABELS).dtype == bool
    assert relabelled is not LABELS and rule.name
    np.testing.assert_array_equal(LABELS, before)
    assert rule.relabel(LABELS[:0]).shape == (0,)
