import numpy as np
import pytest

from bdjax.attacks import all_to_all, all_to_one, clean_label, label_map
from bdjax.attacks.label_rules import LABEL_RULES, make_rule, source_specific, titled
from bdjax.errors import InputError

LABELS = np.array([0, 1, 2, 3, 2, 0], np.int32)


def test_all_to_one_leaves_the_target_class_out_by_default():
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
    with pytest.raises(InputError, match="changes no label"):
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


def test_victims_and_what_is_wanted_of_them():
    np.testing.assert_array_equal(all_to_one(2, include_target=True).victims(LABELS), LABELS != 2)
    np.testing.assert_array_equal(clean_label(2).victims(LABELS), LABELS != 2)
    np.testing.assert_array_equal(clean_label(2).wanted(LABELS), [2] * 6)
    assert all_to_all(4).victims(LABELS).all()
    np.testing.assert_array_equal(all_to_all(4).wanted(LABELS), [1, 2, 3, 0, 3, 1])
    np.testing.assert_array_equal(label_map({3: 0}).victims(LABELS), LABELS == 3)


def test_cover_rows_keep_their_label_and_are_of_the_cover_classes():
    rule = source_specific([1], 0, [2])
    np.testing.assert_array_equal(rule.candidates(LABELS), LABELS == 1)
    np.testing.assert_array_equal(rule.cover(LABELS), LABELS == 2)
    np.testing.assert_array_equal(rule.relabel(LABELS), [0, 0, 2, 3, 2, 0])


@pytest.mark.parametrize(("sources", "cover"), [([], [2]), ([0], [2]), ([1, 2], [2])])
def test_sources_that_overlap_are_refused(sources, cover):
    with pytest.raises(InputError, match="source"):
        source_specific(sources, 0, cover)


@pytest.mark.parametrize("name", sorted(LABEL_RULES))
@pytest.mark.parametrize(("target", "num_classes"), [(0, 10), (9, 10), (1, 43), (1, 4), (2, 3)])
def test_every_rule_of_the_table_fits_any_target(name, target, num_classes):
    rule = make_rule(name, target, num_classes)
    labels = np.arange(num_classes, dtype=np.int32)
    assert rule.candidates(labels).any() and rule.victims(labels).any() and rule.name
    for relabelled in (rule.relabel(labels), rule.wanted(labels)):
        assert relabelled.dtype == np.int32 and relabelled.min() >= 0 and relabelled.max() < num_classes
    # What is wanted of a victim is never what it is anyway.
    assert (rule.wanted(labels) != labels)[rule.victims(labels)].all()


def test_tact_has_the_classes_of_its_toolbox():
    rule = make_rule("source_specific", 0, 10)
    labels = np.arange(10)
    assert np.flatnonzero(rule.candidates(labels)).tolist() == [1]
    assert np.flatnonzero(rule.cover(labels)).tolist() == [5, 7]


@pytest.mark.parametrize(
    ("name", "target", "reason"), [("all_to_none", 0, "not one of"), ("all_to_one", 10, "not a class")]
)
def test_what_is_not_there_is_refused(name, target, reason):
    with pytest.raises(InputError, match=reason):
        make_rule(name, target, 10)


def test_two_classes_to_the_target_with_every_class_as_cover():
    rule = make_rule("pair_to_target", 4, 6)
    labels = np.arange(6, dtype=np.int32)
    np.testing.assert_array_equal(rule.candidates(labels), [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(rule.victims(labels), rule.candidates(labels))
    np.testing.assert_array_equal(rule.relabel(labels), [4, 1, 2, 3, 4, 4])
    assert rule.cover(labels).all()
    with pytest.raises(InputError, match="two classes besides the target"):
        make_rule("pair_to_target", 0, 2)


def test_a_hidden_source_keeps_labels_and_counts_one_class():
    rule = make_rule("hidden_source", 5, 6)
    labels = np.arange(6, dtype=np.int32)
    np.testing.assert_array_equal(rule.candidates(labels), labels == 5)
    np.testing.assert_array_equal(rule.relabel(labels), labels)
    np.testing.assert_array_equal(rule.victims(labels), labels == 0)
    np.testing.assert_array_equal(rule.wanted(labels), np.full(6, 5))


@pytest.mark.parametrize(
    ("rule", "title"),
    [
        (all_to_one(1), "all-to-one, target 1 (b)"),
        (all_to_all(3), "all-to-all, shift 1"),
        (source_specific([0, 2], 1, [3]), "source 0 (a)+2 (c) to target 1 (b), cover 3 (d)"),
        (label_map({0: 1, 2: 3}), "classes 0 (a) to 1 (b), 2 (c) to 3 (d)"),
        (clean_label(2), "clean-label, target 2 (c)"),
    ],
)
def test_reports_have_the_names_of_classes_and_names_of_rules_do_not(rule, title):
    assert titled(rule.name, lambda number: f"{number} ({'abcd'[number]})") == title
    assert titled(rule.name, str) == rule.name
