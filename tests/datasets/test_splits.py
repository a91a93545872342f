import jax
import numpy as np
import pytest

from bdjax.datasets.splits import (
    balanced_rows,
    fixed_test_split,
    provider_rows,
    sample_rows,
    stratified_split,
    take,
    train_validation_rows,
)
from bdjax.errors import InputError
from bdjax.types import Dataset, PoisonedDataset

KEYS = [0, 1, 2]


def whole(files: tuple[str, ...] = ()) -> PoisonedDataset:
    """Four rows that differ in everything that rows have."""
    images = np.arange(4, dtype=np.uint8)[:, None, None, None]
    labels, is_poisoned, is_cover = np.array([0, 1, 0, 1], np.int32), np.arange(4) == 1, np.arange(4) == 3
    return PoisonedDataset(images, labels, 2, "set", "here", ("a", "b"), is_poisoned, 1 - labels, is_cover, files=files)


@pytest.mark.parametrize("rows", [np.array([3, 1]), np.array([False, True, False, True])])
def test_take_keeps_what_is_known_of_each_row(rows):
    files = ("b/0.png", "b/1.png", "a/2.png", "a/3.png")
    taken = take(whole(files), rows)
    numbers = np.arange(4)[rows]
    assert isinstance(taken, PoisonedDataset) and taken.images[:, 0, 0, 0].tolist() == numbers.tolist()
    assert taken.files == tuple(files[number] for number in numbers)
    assert taken.labels.tolist() == [1, 1] and taken.original_labels.tolist() == [0, 0]
    assert taken.is_poisoned.tolist() == (numbers == 1).tolist() and taken.is_cover.tolist() == (numbers == 3).tolist()
    assert (taken.num_classes, taken.name, taken.source, taken.class_names) == (2, "set", "here", ("a", "b"))


def test_take_of_rows_without_files():
    assert take(whole(), np.array([3, 1])).files == ()
    clean = Dataset(np.zeros((3, 1, 1, 1), np.uint8), np.zeros(3, np.int32), 2, "", "", (), files=("x", "y", "z"))
    taken = take(clean, np.array([2]))
    assert type(taken) is Dataset and taken.files == ("z",)


@pytest.mark.parametrize("seed", KEYS)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_stratified_split_parts_each_class(seed, fraction):
    labels = np.repeat(np.arange(4), [5, 10, 17, 40])
    stay, aside = stratified_split(jax.random.key(seed), labels, fraction)
    assert stay.dtype == aside.dtype == np.int32
    np.testing.assert_array_equal(np.sort(np.concatenate([stay, aside])), np.arange(len(labels)))
    assert (np.diff(stay) > 0).all() and (np.diff(aside) > 0).all()
    expected = [int(fraction * size + 0.5) for size in (5, 10, 17, 40)]
    np.testing.assert_array_equal(np.bincount(labels[aside], minlength=4), expected)


def test_stratified_split_does_not_depend_on_the_names_of_the_classes():
    labels = np.repeat(np.arange(3), 10)
    _, aside = stratified_split(jax.random.key(0), labels, 0.3)
    _, aside_renamed = stratified_split(jax.random.key(0), labels * 7 + 2, 0.3)
    np.testing.assert_array_equal(aside, aside_renamed)


def test_balanced_rows_are_of_all_classes_as_far_as_they_last():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 50)
    found = balanced_rows(jax.random.key(1), labels, 21)
    assert np.bincount(labels[found]).tolist() == [9, 3, 9] and found.dtype == np.int32
    assert len(set(found.tolist())) == 21 and (np.diff(found) > 0).all()
    np.testing.assert_array_equal(balanced_rows(jax.random.key(1), labels, 1000), np.arange(103))
    assert not np.array_equal(found, balanced_rows(jax.random.key(2), labels, 21))
    many = balanced_rows(jax.random.key(1), np.arange(500) % 100, 40)  # fewer rows than classes
    assert len(set((many % 100).tolist())) == 40


def test_fixed_test_split_stays_what_it_is():
    # If this changes, so does every result on the digits, on image folders and on .npz files.
    train_rows, test_rows = fixed_test_split(np.arange(20) % 2)
    assert test_rows.tolist() == [2, 6, 11, 19]
    assert train_rows.tolist() == sorted(set(range(20)) - {2, 6, 11, 19})


@pytest.mark.parametrize("seed", KEYS)
@pytest.mark.parametrize(
    ("num_rows", "validation_fraction", "num_train"),
    [(10, 0.0, 10), (10, 0.1, 9), (10, 0.9, 1), (10, 1.0, 0), (7, 0.5, 3), (100, 0.29, 71), (1, 0.0, 1), (3, 0.2, 2)],
)
def test_train_validation_rows(seed, num_rows, validation_fraction, num_train):
    rows = np.arange(num_rows) * 3 + 5
    train, validation = train_validation_rows(jax.random.key(seed), rows, validation_fraction)
    assert train.dtype == validation.dtype == np.int32
    assert len(train) == num_train
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), rows)


@pytest.mark.parametrize("seed", KEYS)
@pytest.mark.parametrize(
    ("num_rows", "fraction", "expected"), [(100, 0.29, 29), (10, 0.0, 0), (10, 1.0, 10), (7, 0.5, 3), (1438, 0.1, 143)]
)
def test_sample_rows_has_no_row_twice(seed, num_rows, fraction, expected):
    rows = sample_rows(jax.random.key(seed), num_rows, fraction)
    assert rows.dtype == np.int32 and rows.shape == (expected,)
    assert len(set(rows.tolist())) == expected
    assert all(0 <= row < num_rows for row in rows)


def test_provider_rows_overlap_between_providers_only():
    rows = provider_rows(jax.random.key(0), 1438, 7, 0.32)
    assert rows.dtype == np.int32 and rows.shape == (7, 460)
    for line in rows:
        assert len(set(line.tolist())) == 460
    for one in range(7):
        for other in range(one):
            shared = len(set(rows[one].tolist()) & set(rows[other].tolist()))
            assert 90 < shared < 210  # 147 by chance, standard deviation 8


def test_provider_rows_do_not_depend_on_the_number_of_providers():
    key = jax.random.key(3)
    np.testing.assert_array_equal(provider_rows(key, 50, 2, 0.5), provider_rows(key, 50, 5, 0.5)[:2])


def test_same_key_same_rows_other_key_other_rows():
    labels = np.arange(200) % 4
    functions = [
        lambda key: stratified_split(key, labels, 0.3)[1],
        lambda key: train_validation_rows(key, np.arange(200), 0.3)[1],
        lambda key: sample_rows(key, 200, 0.3),
        lambda key: provider_rows(key, 200, 2, 0.3),
    ]
    for function in functions:
        np.testing.assert_array_equal(function(jax.random.key(0)), function(jax.random.key(0)))
        assert not np.array_equal(function(jax.random.key(0)), function(jax.random.key(1)))


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    key = jax.random.key(0)
    with pytest.raises(InputError, match=rf"^fraction is {fraction}; it must be in 0..1$"):
        sample_rows(key, 10, fraction)
    with pytest.raises(InputError, match="^fraction is"):
        stratified_split(key, np.zeros(10, int), fraction)
    with pytest.raises(InputError, match="^validation_fraction is"):
        train_validation_rows(key, np.arange(10), fraction)


def test_providers_without_rows_are_refused():
    with pytest.raises(InputError, match="^fraction 0.05 of 10 rows leaves each provider without a row$"):
        provider_rows(jax.random.key(0), 10, 3, 0.05)
    with pytest.raises(InputError, match="^num_providers is 0; it must be at least 1$"):
        provider_rows(jax.random.key(0), 10, 0, 0.5)
