import dataclasses

import chex
import jax
import numpy as np
import pytest

from bdjax.attacks.outsourcing import OutsourcingConfig, outsource, split_rows, triggered_views
from bdjax.errors import InputError
from bdjax.types import Dataset

RANDOM = np.random.default_rng(0)
DATA = Dataset(
    RANDOM.integers(0, 256, (50, 8, 8, 1), np.uint8), RANDOM.integers(0, 4, 50).astype(np.int32), 4, "data", "here"
)
CONFIG = OutsourcingConfig(
    num_providers=3, provider_fraction=0.4, target=2, poison_rate=0.25, minimum_contrast=0.5, blend_opacity=(0.5, 0.6)
)
KEYS = [jax.random.key(seed) for seed in (3, 4)]


@pytest.fixture(scope="module")
def outsourced():
    return outsource(KEYS, DATA, CONFIG)


def whole(rows):
    """Training and validation rows of each member in one."""
    parts = [np.asarray(part.index) for part in rows], [np.asarray(part.targets["labels"]) for part in rows]
    return tuple(np.concatenate(part, axis=1) for part in parts)


def test_shares_and_counts(outsourced):
    # 20 of 50 rows for each, of which 16 are trained on; 5 of them are poisoned.
    assert outsourced.train.index.shape == outsourced.train.targets["labels"].shape == (6, 16)
    assert outsourced.validation.index.shape == (6, 4)
    assert outsourced.num_poisoned == 5
    assert outsourced.pool.shape == (50 + 2 * 3 * 5, 8, 8, 1) and outsourced.pool.dtype == np.uint8
    assert [len(triggers.names) for triggers in outsourced.triggers] == [3, 3]
    for part in (outsourced.train, outsourced.validation):
        assert part.index.dtype == part.targets["labels"].dtype == np.int32


def test_the_clean_images_come_first_and_unchanged(outsourced):
    np.testing.assert_array_equal(outsourced.pool[:50], DATA.images)


def test_each_provider_has_its_own_poisoned_copies_labelled_as_the_target(outsourced):
    index, labels = whole((outsourced.train, outsourced.validation))
    assert index.min() >= 0 and index.max() < len(outsourced.pool)
    for member in range(6):
        is_copy = index[member] >= 50
        copies = index[member, is_copy]
        assert sorted(copies) == list(range(50 + member * 5, 55 + member * 5))  # its own, all of them, once
        assert (labels[member, is_copy] == CONFIG.target).all()
        clean = index[member, ~is_copy]
        np.testing.assert_array_equal(labels[member, ~is_copy], DATA.labels[clean])
        assert len(set(clean)) == len(clean) == 15  # no row twice, none both in training and in validation


def test_the_copies_are_rows_of_other_classes_under_the_providers_own_trigger(outsourced):
    eligible = np.flatnonzero(DATA.labels != CONFIG.target)
    for seed, triggers in enumerate(outsourced.triggers):
        views = triggered_views(DATA.images[eligible], triggers)[1:]
        for provider in range(3):
            start = 50 + (seed * 3 + provider) * 5
            with_trigger = {image.tobytes() for image in views[provider]}
            assert all(copy.tobytes() in with_trigger for copy in outsourced.pool[start : start + 5])


def test_a_poisoned_row_is_not_kept_clean_as_well(outsourced):
    index, _ = whole((outsourced.train, outsourced.validation))
    for seed, triggers in enumerate(outsourced.triggers):
        views = triggered_views(DATA.images, triggers)[1:]
        for provider in range(3):
            member = seed * 3 + provider
            kept = index[member][index[member] < 50]
            with_trigger = {image.tobytes() for image in views[provider, kept]}
            start = 50 + member * 5
            assert not any(copy.tobytes() in with_trigger for copy in outsourced.pool[start : start + 5])


def test_providers_and_seeds_differ(outsourced):
    index, _ = whole((outsourced.train, outsourced.validation))
    held = {tuple(sorted(row[row < 50])) for row in index}
    assert len(held) == 6
    first, second = outsourced.triggers
    assert not np.array_equal(first.params.pattern, second.params.pattern)


def test_the_same_keys_give_the_same(outsourced):
    again = outsource(KEYS, DATA, CONFIG)
    chex.assert_trees_all_equal(again[:3], outsourced[:3])
    for new, old in zip(again.triggers, outsourced.triggers, strict=True):
        assert new.names == old.names
        chex.assert_trees_all_equal(new.params, old.params)


def test_a_seeds_providers_do_not_depend_on_the_other_seeds(outsourced):
    alone = outsource(KEYS[1:], DATA, CONFIG)
    np.testing.assert_array_equal(alone.pool[50:], outsourced.pool[65:])
    assert alone.triggers[0].names == outsourced.triggers[1].names
    together = np.asarray(outsourced.train.index[3:])
    np.testing.assert_array_equal(alone.train.index, np.where(together < 50, together, together - 15))


def test_look_alikes():
    config = dataclasses.replace(CONFIG, num_similar=2)
    (triggers,) = outsource(KEYS[:1], DATA, config).triggers
    assert triggers.similar_group.sum() == 2
    assert sum("(similar)" in name for name in triggers.names) == 2


def test_without_validation_rows_everything_is_trained_on():
    outsourced = outsource(KEYS[:1], DATA, dataclasses.replace(CONFIG, validation_fraction=0.0))
    assert outsourced.train.index.shape == (3, 20)
    assert outsourced.validation.index.shape == (3, 0)


@pytest.mark.parametrize(
    "changes",
    [{"poison_rate": 0.01}, {"provider_fraction": 0.001}, {"num_similar": 1}, {"num_providers": 0}, {"target": 4}],
)
def test_what_cannot_be(changes):
    with pytest.raises(InputError):
        outsource(KEYS[:1], DATA, dataclasses.replace(CONFIG, **changes))


def test_the_clean_reference_has_all_rows():
    train, validation = split_rows(KEYS, DATA.labels, 0.2)
    assert train.index.shape == (2, 40) and validation.index.shape == (2, 10)
    index, labels = whole((train, validation))
    for seed in range(2):
        assert sorted(index[seed]) == list(range(50))
        np.testing.assert_array_equal(labels[seed], DATA.labels[index[seed]])
    assert not np.array_equal(index[0], index[1])


def test_views_are_the_images_and_then_each_trigger(outsourced):
    triggers = outsourced.triggers[0]
    views = triggered_views(DATA.images[:7], triggers)
    assert views.shape == (4, 7, 8, 8, 1) and views.dtype == np.uint8
    np.testing.assert_array_equal(views[0], DATA.images[:7])
    for number, view in enumerate(views[1:]):
        mask, pattern, opacity = (np.asarray(leaf[number], np.float64) for leaf in triggers.params)
        clean = DATA.images[:7] / 255
        expected = clean + opacity * mask * (pattern - clean)
        assert np.abs(view / 255 - expected).max() < 0.51 / 255
        assert (view != views[0]).any()


def test_without_triggers_there_is_one_view():
    np.testing.assert_array_equal(triggered_views(DATA.images, None), DATA.images[None])
