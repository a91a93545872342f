"""What a detector extracted beside the trigger that the attack really used."""

import jax
import numpy as np
import pytest

from bdjax.evaluation.patterns import compare_patterns, true_trigger, with_true_classes
from bdjax.evaluation.suspects import Suspect, make_suspect
from bdjax.evaluation.variants import NO_ATTACK, AttackVariant, read_attack
from bdjax.types import Dataset, Detection, ExtractedPattern

CLASSES, ROWS, SHAPE = 4, 80, (12, 12, 3)


def rows():
    images = np.random.default_rng(0).integers(0, 255, (ROWS, *SHAPE)).astype(np.uint8)
    return Dataset(images, (np.arange(ROWS) % CLASSES).astype(np.int32), CLASSES, "noise", "")


@pytest.fixture(scope="module")
def suspects():
    """White squares of half opacity on rows of class 2, and no attack."""
    attack = read_attack("white_square:poison_rate=0.2:opacity=0.5", rows(), 2)
    clean = Suspect(AttackVariant(NO_ATTACK, None, 0, 0.0), 0, rows(), (), np.zeros(ROWS, bool))
    return [make_suspect(jax.random.key(0), attack, rows(), 1, None, True), clean]


def detection():
    """Patterns of classes 2 and 3 of the first suspect, a single row flagged for the former."""
    mask = np.zeros(SHAPE[:2], bool)
    mask[-3:, -3:] = True
    patterns = tuple(
        ExtractedPattern(label, mask[..., None] * np.ones(SHAPE, np.float32), mask, 0.9) for label in (2, 3)
    )
    flags, scores = np.zeros((2, ROWS), bool), np.zeros((2, ROWS), np.float32)
    return Detection(flags, scores, {"classes with a pattern": np.array([2, 0])}, patterns=(patterns, ()))


def test_a_true_trigger_is_read_off_what_it_makes_of_black_and_white(suspects):
    pattern, opacity = true_trigger(suspects[0], 2)
    assert set(np.unique(opacity.round(5))) == {0.0, 0.5}
    np.testing.assert_allclose(pattern[opacity > 0], 1, atol=1e-5)
    assert true_trigger(suspects[0], 3) == (None, None) == true_trigger(suspects[1], 2)


def test_patterns_stand_beside_the_true_one_and_a_flagged_row(suspects):
    found = detection()
    row = int(np.flatnonzero(suspects[0].dataset.labels == 2)[4])
    found.flags[0, row] = True
    right, wrong = compare_patterns(found, suspects)
    assert (right.label, right.is_true_class, right.seed) == (2, True, 1)
    assert (wrong.label, wrong.is_true_class, wrong.true_mask, wrong.overlap) == (3, False, None, None)
    np.testing.assert_array_equal(right.example, suspects[0].dataset.images[row])
    assert wrong.example is None
    assert (right.flagged, wrong.flagged) == (1, 0)
    is_set = right.true_mask > 0
    assert right.overlap == np.sum(is_set & right.mask) / np.sum(is_set | right.mask) > 0


def test_classes_with_a_pattern_are_counted_against_those_of_the_attack(suspects):
    facts = with_true_classes(detection(), suspects).facts
    assert {name: values.tolist() for name, values in facts.items()} == {
        "classes with a pattern": [2, 0],
        "poisoned classes": [1, 0],
        "poisoned classes found": [1, 0],
        "clean classes taken for poisoned": [1, 0],
    }
