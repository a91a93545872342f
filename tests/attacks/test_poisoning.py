import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import all_to_all, all_to_one, clean_label, label_map, poison, poisoned_rows, select_rows
from bdjax.attacks.label_rules import source_specific
from bdjax.attacks.poisoning import IMAGES_AT_ONCE, ConfiguredAttack, poison_by, poison_by_several, select_cover_rows
from bdjax.attacks.sig import SIG, SIG_STRIPED
from bdjax.errors import InputError
from bdjax.triggers import TRIGGERS, masked_blend
from bdjax.types import Dataset, PoisonedDataset

SHAPES = [(8, 8, 1), (12, 10, 3)]


def make_dataset(shape=(8, 8, 1), count=100, num_classes=10):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = (np.arange(count) % num_classes).astype(np.int32)
    return Dataset(images, labels, num_classes, "noise", "a test", tuple("abcdefghij"[:num_classes]))


def brighten_by_class_and_key(params, image, label, key):
    """A trigger that depends on the label and the key."""
    return image * 0.5 + params * label.astype(jnp.float32) + 0.1 * jax.random.uniform(key)


class TestSelectRows:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("rate", [0.01, 0.1, 0.29, 0.9])
    def test_counts_are_of_all_rows_and_rows_are_candidates(self, seed, rate):
        labels = make_dataset().labels
        rows = select_rows(jax.random.key(seed), labels, rate, all_to_one(0))
        assert len(rows) == len(set(rows.tolist())) == round(rate * 100)
        assert rows.dtype == np.int32 and (labels[rows] != 0).all()

    def test_rate_of_candidates_counts_victims_only(self):
        labels = make_dataset().labels
        assert len(select_rows(jax.random.key(0), labels, 0.1, all_to_one(0), rate_of="candidates")) == 9
        assert len(select_rows(jax.random.key(0), labels, 1.0, all_to_one(0), rate_of="candidates")) == 90

    def test_counts_are_rounded_down(self):
        assert len(select_rows(jax.random.key(0), np.zeros(459, np.int32), 0.01, all_to_one(1))) == 4

    def test_key_decides(self):
        labels = make_dataset().labels
        first, again, other = (select_rows(jax.random.key(k), labels, 0.2, all_to_one(0)) for k in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert set(first.tolist()) != set(other.tolist())

    def test_a_larger_rate_extends_a_smaller_one(self):
        labels = make_dataset().labels
        few, many = (select_rows(jax.random.key(0), labels, rate, all_to_one(0)) for rate in (0.1, 0.3))
        np.testing.assert_array_equal(many[:10], few)

    @pytest.mark.parametrize("count", [99, 100, 459, 1437, 20000])
    def test_less_than_one_row_is_an_error_that_names_the_rate_that_helps(self, count):
        labels = np.ones(count, np.int32)
        with pytest.raises(InputError, match=rf"poison rate 1e-05 of {count} rows is less than one row") as caught:
            select_rows(jax.random.key(0), labels, 1e-5, all_to_one(0))
        message = str(caught.value)
        assert "\n" not in message
        smallest = float(re.search(r"smallest rate that gives one row is (\S+)", message)[1])
        assert len(select_rows(jax.random.key(0), labels, smallest, all_to_one(0))) == 1
        with pytest.raises(InputError):
            select_rows(jax.random.key(0), labels, 0.999 * smallest, all_to_one(0))

    def test_clean_label_cannot_exceed_its_class(self):
        labels = make_dataset().labels
        rows = select_rows(jax.random.key(0), labels, 0.1, clean_label(3))
        assert sorted(rows) == list(range(3, 100, 10))
        with pytest.raises(InputError, match=r"only 10 may be poisoned .* largest rate possible is 0\.1$"):
            select_rows(jax.random.key(0), labels, 0.11, clean_label(3))

    def test_no_candidates_is_an_error(self):
        with pytest.raises(InputError, match="none of 100 rows"):
            select_rows(jax.random.key(0), make_dataset().labels, 0.1, label_map({77: 0}))

    @pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
    def test_rates_are_shares(self, rate):
        with pytest.raises(InputError, match="poison rate"):
            select_rows(jax.random.key(0), make_dataset().labels, rate, all_to_one(0))

    def test_unknown_base_is_an_error(self):
        with pytest.raises(InputError, match="candidates"):
            select_rows(jax.random.key(0), make_dataset().labels, 0.1, all_to_one(0), rate_of="victims")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(TRIGGERS))
class TestPoisonedRows:
    def test_is_the_nearest_of_256_levels(self, shape, name):
        params = TRIGGERS[name].init(jax.random.key(0), shape)
        images = make_dataset(shape, 5).images
        poisoned = poisoned_rows(images, params)
        chex.assert_shape(poisoned, images.shape)
        chex.assert_type(poisoned, jnp.uint8)
        exact = masked_blend.apply_to_batch(params, jnp.asarray(images, jnp.float32) / 255.0)
        error = np.abs(np.asarray(poisoned, np.float64) / 255.0 - np.asarray(exact, np.float64))
        assert error.max() <= 1 / 510 + 1e-6

    def test_pixels_outside_the_mask_are_bit_identical(self, shape, name):
        params = TRIGGERS[name].init(jax.random.key(0), shape)
        images = make_dataset(shape, 5).images
        outside = np.asarray(params.mask)[..., 0] == 0.0
        np.testing.assert_array_equal(np.asarray(poisoned_rows(images, params))[:, outside], images[:, outside])


def test_every_level_survives_the_trigger_that_does_nothing():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(poisoned_rows(levels, masked_blend.identity((16, 16, 1))), levels)


def test_more_images_than_fit_at_once_are_the_same_as_one_by_one():
    images = make_dataset((8, 8, 1), IMAGES_AT_ONCE + 3).images
    params = TRIGGERS["solid"].init(jax.random.key(0), (8, 8, 1))
    together = np.asarray(poisoned_rows(images, params))
    for row in (0, IMAGES_AT_ONCE - 1, IMAGES_AT_ONCE, IMAGES_AT_ONCE + 2):
        np.testing.assert_array_equal(together[row], poisoned_rows(images[row : row + 1], params)[0])


@pytest.mark.parametrize("shape", SHAPES)
class TestPoison:
    def test_touches_the_selected_rows_only(self, shape):
        clean = make_dataset(shape)
        rows = select_rows(jax.random.key(1), clean.labels, 0.1, all_to_one(0))
        params = TRIGGERS["blend"].init(jax.random.key(0), shape)
        before = clean.images.copy(), clean.labels.copy()
        poisoned = poison(clean, rows, TRIGGERS["blend"].apply, all_to_one(0), params=params)

        assert isinstance(poisoned, PoisonedDataset)
        others = np.setdiff1d(np.arange(100), rows)
        np.testing.assert_array_equal(np.flatnonzero(poisoned.is_poisoned), np.sort(rows))
        np.testing.assert_array_equal(poisoned.images[others], clean.images[others])
        np.testing.assert_array_equal(poisoned.labels[others], clean.labels[others])
        np.testing.assert_array_equal(poisoned.images[rows], poisoned_rows(clean.images[rows], params))
        assert (poisoned.images[rows] != clean.images[rows]).any(axis=(1, 2, 3)).all()
        assert (poisoned.labels[rows] == 0).all()
        np.testing.assert_array_equal(poisoned.original_labels, clean.labels)
        assert poisoned.images.dtype == np.uint8 and poisoned.labels.dtype == np.int32
        assert (poisoned.name, poisoned.source, poisoned.class_names) == (clean.name, clean.source, clean.class_names)
        np.testing.assert_array_equal(clean.images, before[0])
        np.testing.assert_array_equal(clean.labels, before[1])

    def test_a_row_comes_out_the_same_whoever_else_is_poisoned(self, shape):
        clean, params, key = make_dataset(shape), jnp.float32(0.03), jax.random.key(5)
        arguments = {"params": params, "key": key}
        many = poison(clean, np.array([7, 3, 50, 99]), brighten_by_class_and_key, all_to_all(10), **arguments)
        alone = poison(clean, np.array([50]), brighten_by_class_and_key, all_to_all(10), **arguments)
        np.testing.assert_array_equal(many.images[50], alone.images[50])
        expected = brighten_by_class_and_key(
            params, clean.images[7].astype(np.float32) / 255.0, jnp.int32(7), jax.random.fold_in(key, 7)
        )
        assert np.abs(many.images[7] / 255.0 - np.clip(np.asarray(expected), 0, 1)).max() <= 1 / 510 + 1e-6
        assert many.labels[[7, 3, 50, 99]].tolist() == [8, 4, 1, 0]


def test_clean_label_poisoning_changes_no_label():
    clean = make_dataset()
    params = TRIGGERS["solid"].init(jax.random.key(0), (8, 8, 1))
    rows = select_rows(jax.random.key(1), clean.labels, 0.05, clean_label(4))
    poisoned = poison(clean, rows, TRIGGERS["solid"].apply, clean_label(4), params=params)
    np.testing.assert_array_equal(poisoned.labels, clean.labels)
    assert poisoned.is_poisoned.sum() == 5


@pytest.mark.parametrize(
    ("rows", "rule", "message"),
    [
        ([], all_to_one(0), "no row of 100 was selected for poisoning"),
        ([3, 100], all_to_one(0), "from 0 to 99"),
        ([-1], all_to_one(0), "from 0 to 99"),
        ([3, 3], all_to_one(0), "distinct"),
        ([3], all_to_one(10), "gives label 10, but classes go from 0 to 9"),
    ],
)
def test_poison_checks_what_it_is_given(rows, rule, message):
    params = TRIGGERS["solid"].init(jax.random.key(0), (8, 8, 1))
    with pytest.raises(InputError, match=message):
        poison(make_dataset(), np.array(rows, np.int32), TRIGGERS["solid"].apply, rule, params=params)


def test_one_compilation_serves_all_triggers_of_a_shape():
    chex.clear_trace_counter()
    apply = chex.assert_max_traces(masked_blend.apply, n=1)
    images = make_dataset((8, 8, 1), 4).images
    for name in sorted(TRIGGERS):
        poisoned_rows(images, TRIGGERS[name].init(jax.random.key(0), (8, 8, 1)), trigger_apply=apply)


def negative(params, image, label, key):
    return 1.0 - image


def half(params, image, label, key):
    return 0.5 * image


class TestCoverRows:
    def test_are_of_the_rule_and_never_poisoned(self):
        labels = make_dataset().labels
        rule = source_specific([1], 0, [5, 7])
        rows = select_rows(jax.random.key(0), labels, 0.05, rule)
        cover = select_cover_rows(jax.random.key(1), labels, 0.1, rule, rows)
        assert len(cover) == 10 and np.isin(labels[cover], [5, 7]).all()
        everyone = select_cover_rows(jax.random.key(1), labels, 0.9, all_to_one(0), np.arange(10))
        assert sorted(everyone) == list(range(10, 100))

    def test_more_than_there_are_is_an_error(self):
        rule = source_specific([1], 0, [5, 7])
        with pytest.raises(InputError, match=r"only 20 that are not poisoned .* possible is 0\.2$"):
            select_cover_rows(jax.random.key(1), make_dataset().labels, 0.21, rule, np.zeros(0, int))

    def test_get_the_trigger_and_keep_their_label(self):
        clean = make_dataset()
        poisoned = poison(
            clean,
            np.array([1, 11]),
            negative,
            all_to_one(0),
            params=(),
            cover_rows=np.array([5]),
            cover_apply=half,
        )
        np.testing.assert_array_equal(poisoned.images[[1, 11]], 255 - clean.images[[1, 11]])
        np.testing.assert_allclose(poisoned.images[5].astype(int), clean.images[5] / 2, atol=0.51)
        assert poisoned.labels[[1, 11, 5]].tolist() == [0, 0, 5]
        assert np.flatnonzero(poisoned.is_poisoned).tolist() == [1, 11]
        assert np.flatnonzero(poisoned.is_cover).tolist() == [5]


def test_added_rows_leave_the_clean_ones_as_they_are():
    clean = make_dataset()
    poisoned = poison(
        clean, np.array([3, 1]), negative, all_to_one(0), params=(), cover_rows=np.array([5]), adds_rows=True
    )
    assert len(poisoned) == 103
    np.testing.assert_array_equal(poisoned.images[:100], clean.images)
    np.testing.assert_array_equal(poisoned.images[100:], 255 - clean.images[[3, 1, 5]])
    assert poisoned.labels[100:].tolist() == [0, 0, 5] and poisoned.original_labels[100:].tolist() == [3, 1, 5]
    assert poisoned.is_poisoned[100:].tolist() == [True, True, False]
    assert poisoned.is_cover[100:].tolist() == [False, False, True]


def test_rows_keep_their_files_unless_some_are_added():
    clean = dataclasses.replace(make_dataset(), files=tuple(f"{row}.png" for row in range(100)))
    assert poison(clean, np.array([3, 1]), negative, all_to_one(0), params=()).files == clean.files
    assert poison(clean, np.array([3, 1]), negative, all_to_one(0), params=(), adds_rows=True).files == ()
    in_place = ConfiguredAttack(SIG.__class__(**{**vars(SIG), "apply": negative}), SIG.settings, clean_label(3))
    adding = in_place._replace(attack=SIG.__class__(**{**vars(in_place.attack), "adds_rows": True}))
    both = (in_place, in_place._replace(rule=clean_label(4)))
    assert poison_by_several(jax.random.key(0), clean, both, ((), ()))[0].files == clean.files
    for parts in ((in_place, adding), (adding, in_place)):
        parts = (parts[0], parts[1]._replace(rule=clean_label(4)))
        assert poison_by_several(jax.random.key(0), clean, parts, ((), ()))[0].files == ()


def test_crafted_rows_are_made_together():
    def mean_of_all(params, images, labels, keys):
        return jnp.broadcast_to(jnp.mean(images, axis=0), images.shape)

    clean = make_dataset()
    poisoned = poison(clean, np.array([1, 2]), negative, all_to_one(0), params=(), craft=mean_of_all)
    np.testing.assert_array_equal(poisoned.images[1], poisoned.images[2])
    np.testing.assert_allclose(poisoned.images[1], clean.images[[1, 2]].mean(axis=0), atol=0.51)


class TestHybrid:
    def parts(self):
        attack = SIG.__class__(**{**vars(SIG), "apply": negative})
        other = SIG.__class__(**{**vars(SIG_STRIPED), "apply": half, "adds_rows": True})
        return (
            ConfiguredAttack(other, other.settings, all_to_one(3)),
            ConfiguredAttack(attack, attack.settings, clean_label(3)),
        )

    def test_no_row_carries_two_triggers_and_each_gets_its_count(self):
        clean = make_dataset()
        poisoned, rows = poison_by_several(jax.random.key(0), clean, self.parts(), ((), ()))
        added, in_place = rows
        assert len(added) == len(in_place) == 8 and not set(added) & set(in_place)
        assert len(poisoned) == 108 and (added >= 100).all()
        assert (clean.labels[in_place] == 3).all() and poisoned.labels[added].tolist() == [3] * 8
        assert poisoned.is_poisoned.sum() == 16
        np.testing.assert_array_equal(poisoned.images[in_place], 255 - clean.images[in_place])
        np.testing.assert_array_equal(poisoned.original_labels[:100], clean.labels)

    def test_one_part_is_what_it_is_alone(self):
        clean, part = make_dataset(), self.parts()[1]
        several, rows = poison_by_several(jax.random.key(0), clean, [part], [()])
        alone = poison_by(jax.random.key(0), clean, part, ())
        np.testing.assert_array_equal(several.images, alone.images)
        np.testing.assert_array_equal(np.flatnonzero(alone.is_poisoned), rows[0])
