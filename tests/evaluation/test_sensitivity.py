"""A trigger planted in copies of the rows, and what a detector made of them."""

import jax
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.evaluation import sensitivity
from bdjax.evaluation.sensitivity import least_found, measure, plant
from bdjax.types import Dataset, Detection, NotTested, PoisonedDataset

CLASSES, SIDE, ROWS = 4, 12, 400
TARGET = 2


def make_rows(colour=(40, 40, 40), **changes) -> Dataset:
    """Rows of one colour with a little noise; class 2 has the most."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], [90, 100, 120, 90]).astype(np.int32)
    images = (np.array(colour) + rng.integers(0, 8, (ROWS, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    return Dataset(images, labels, CLASSES, "own", "own/", ("ant", "bee", "cat", "dog"), **changes)


KEY = jax.random.key(0)


def test_half_the_number_the_number_and_twice_the_number_are_planted():
    rows = make_rows()
    planting = plant(KEY, rows, 30)
    assert [int(copy.is_poisoned.sum()) for copy in planting.suspects] == [15, 30, 60] and planting.target == TARGET
    for copy in planting.suspects:
        planted, data = copy.is_poisoned, copy.dataset
        assert (data.labels[planted] == TARGET).all() and (rows.labels[planted] != TARGET).all()
        assert len(set(rows.labels[planted].tolist())) == CLASSES - 1, "rows of every other class"
        np.testing.assert_array_equal(data.images[~planted], rows.images[~planted])
        np.testing.assert_array_equal(data.labels[~planted], rows.labels[~planted])
        changed = (data.images != rows.images).any(axis=(0, 3))
        assert changed[-3:, -3:].all() and changed.sum() == 9
    for small, large in zip(planting.suspects, planting.suspects[1:], strict=False):
        assert large.is_poisoned[small.is_poisoned].all(), "the smaller number is part of the larger one"


@pytest.mark.parametrize(
    ("colour", "title"),
    [((40, 40, 40), "3×3 white square"), ((245, 245, 245), "3×3 green square"), ((255, 0, 255), "3×3 green square")],
)
def test_the_square_stands_out_from_the_rows(colour, title):
    assert plant(KEY, make_rows(colour), 20).title == title


def test_a_larger_square_covers_more_pixels():
    rows = make_rows()
    planting = plant(KEY, rows, 30, scale=2)
    changed = (planting.suspects[-1].dataset.images != rows.images).any(axis=(0, 3))
    assert planting.title == "6×6 white square" and changed[-6:, -6:].all() and changed.sum() == 36


def test_without_a_number_of_the_settings_a_share_of_the_rows_is_planted():
    counts = [int(copy.is_poisoned.sum()) for copy in plant(KEY, make_rows(), None).suspects]
    assert counts == [4, 8, 16] and counts[1] == sensitivity.USUAL_SHARE * ROWS


def test_numbers_that_would_change_the_rows_too_much_are_left_out():
    assert [int(copy.is_poisoned.sum()) for copy in plant(KEY, make_rows(), 100).suspects] == [50, 100]
    with pytest.raises(
        InputError, match="cannot be planted: 150 rows are more than half of the 280 rows outside the largest"
    ):
        plant(KEY, make_rows(), 300)


def test_images_without_room_are_a_reason():
    rows = make_rows()
    tiny = Dataset(rows.images[:, :2, :2], rows.labels, CLASSES, "own", "")
    with pytest.raises(InputError, match="cannot be planted: "):
        plant(KEY, tiny, 20)


def test_known_poison_is_no_part_of_what_is_planted():
    rows = make_rows()
    truth = {"is_poisoned": np.arange(ROWS) < 7, "original_labels": rows.labels, "is_cover": np.zeros(ROWS, bool)}
    copy = plant(KEY, PoisonedDataset(**vars(rows), **truth), 20).suspects[0]
    assert int(copy.is_poisoned.sum()) == 10


def test_a_planted_trigger_is_found_if_most_of_it_is_flagged_and_little_else():
    planting = plant(KEY, make_rows(), 20)
    flags = np.stack([copy.is_poisoned for copy in planting.suspects])
    clean = np.flatnonzero(~flags.any(axis=0))
    flags[0, clean[:11]] = True  # ten hits among 21 flagged rows
    flags[1, np.flatnonzero(flags[1])[:10]] = False  # ten of twenty
    flags[2, clean[:5]] = True
    entries = measure(planting, Detection(flags, flags.astype(np.float32)))
    assert [(entry["planted"], entry["hits"], entry["flagged"], entry["found"]) for entry in entries] == [
        (10, 10, 21, False),
        (20, 10, 10, True),
        (40, 40, 45, True),
    ]
    assert entries[2]["precision"] == 40 / 45 and entries[1]["share"] == 0.05 and least_found(entries) == 20


def test_no_flags_and_no_test_are_no_finding():
    planting = plant(KEY, make_rows(), 20)
    none = np.zeros((3, ROWS), bool)
    entries = measure(planting, Detection(none, none.astype(np.float32)))
    assert least_found(entries) is None and [entry["precision"] for entry in entries] == [None] * 3
    flags = np.stack([copy.is_poisoned for copy in planting.suspects])
    limits = (NotTested(), NotTested("needs more rows"), NotTested())
    entries = measure(planting, Detection(flags, flags.astype(np.float32), not_tested=limits))
    assert [entry["found"] for entry in entries] == [True, False, True] and least_found(entries) == 40
