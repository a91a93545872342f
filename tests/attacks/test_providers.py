import collections
from functools import cache

import chex
import jax
import numpy as np
import pytest

from bdjax.attacks import make_provider_triggers, poison_providers, poisoned_rows, provider_trigger_types
from bdjax.errors import InputError
from bdjax.triggers import masked_blend, pictures
from bdjax.types import Dataset

SHAPES = [(8, 8, 1), (32, 32, 3)]


def make_dataset(shape=(8, 8, 1), count=200):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    return Dataset(images, (np.arange(count) % 10).astype(np.int32), 10, "noise", "a test")


def make_rows(num_providers, rows_each=80, count=200):
    generator = np.random.default_rng(1)
    return np.stack([generator.permutation(count)[:rows_each] for _ in range(num_providers)]).astype(np.int32)


class TestTypes:
    @pytest.mark.parametrize("seed", range(3))
    def test_seven_providers_get_2_2_2_1(self, seed):
        types = collections.Counter(provider_trigger_types(jax.random.key(seed), 7))
        assert types == {"solid": 2, "checkerboard": 2, "blend": 2, "noise": 1}

    def test_four_providers_and_three_types_get_2_1_1(self):
        types = provider_trigger_types(jax.random.key(0), 4, ("checkerboard", "blend", "noise"))
        assert collections.Counter(types) == {"checkerboard": 2, "blend": 1, "noise": 1}

    @pytest.mark.parametrize("num_providers", [1, 2, 4, 7, 13])
    def test_any_number_is_shared_out_evenly(self, num_providers):
        types = provider_trigger_types(jax.random.key(0), num_providers)
        counts = [types.count(name) for name in ("solid", "checkerboard", "blend", "noise")]
        assert sum(counts) == num_providers and max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)

    def test_order_is_shuffled_by_the_key(self):
        orders = {provider_trigger_types(jax.random.key(seed), 7) for seed in range(8)}
        assert len(orders) > 4


class TestTriggers:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("num_providers", [1, 2, 7])
    def test_stack_has_one_row_per_provider(self, shape, num_providers):
        triggers = make_provider_triggers(jax.random.key(0), shape, num_providers)
        chex.assert_shape(triggers.params.mask, (num_providers, *shape[:2], 1))
        chex.assert_shape(triggers.params.pattern, (num_providers, *shape))
        chex.assert_shape(triggers.params.opacity, (num_providers,))
        assert len(triggers.names) == num_providers
        assert triggers.similar_group.shape == (num_providers,) and not triggers.similar_group.any()
        for name, mask, opacity in zip(triggers.names, triggers.params.mask, triggers.params.opacity, strict=True):
            assert (name == "blend") == bool(mask.all()) == bool(opacity < 1.0)

    def test_key_decides(self):
        first, again, other = (make_provider_triggers(jax.random.key(seed), (8, 8, 1), 7) for seed in (0, 0, 100))
        chex.assert_trees_all_equal(first.params, again.params)
        assert first.names == again.names
        assert any(bool((a != b).any()) for a, b in zip(first.params, other.params, strict=True))

    def test_pictures_are_drawn_without_replacement(self):
        triggers = make_provider_triggers(jax.random.key(0), (8, 8, 1), 16)
        drawn = [
            pattern for name, pattern in zip(triggers.names, triggers.params.pattern, strict=True) if name == "blend"
        ]
        counts = [
            sum(bool((np.asarray(pattern) == pictures.draw(name, (8, 8, 1))).all()) for pattern in drawn)
            for name in pictures.PICTURES
        ]
        assert sorted(counts) == [1, 1, 2]

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("seed", range(4))
    def test_three_similar_of_seven(self, shape, seed):
        triggers = make_provider_triggers(jax.random.key(seed), shape, 7, num_similar=3)
        group = np.flatnonzero(triggers.similar_group)
        names = {triggers.names[provider] for provider in group}
        assert len(group) == 3 and len(names) == 1
        family = names.pop().removesuffix(" (similar)")
        assert family in ("solid", "checkerboard")
        rest = [name for provider, name in enumerate(triggers.names) if provider not in group]
        assert family not in rest and sorted(collections.Counter(rest).values()) == [1, 1, 2]
        masks = np.asarray(triggers.params.mask)[group]
        patterns = np.asarray(triggers.params.pattern)[group]
        # The base is not known by its place, but two copies of one base share pixels with it and are within 2 x 0.25.
        overlaps = [(masks[a] * masks[b]).sum() > 0 for a, b in ((0, 1), (0, 2), (1, 2))]
        assert sum(overlaps) >= 2
        if family == "solid":
            colours = patterns.max(axis=(1, 2))
            assert sorted(np.abs(colours[a] - colours[b]).max() for a, b in ((0, 1), (0, 2), (1, 2)))[1] <= 0.25 + 1e-6

    def test_both_families_occur_in_the_similar_group(self):
        firsts = set()
        for seed in range(8):
            triggers = make_provider_triggers(jax.random.key(seed), (8, 8, 1), 3, num_similar=3)
            firsts.add(triggers.names[0])
        assert firsts == {"solid (similar)", "checkerboard (similar)"}

    def test_options_reach_the_triggers(self):
        triggers = make_provider_triggers(
            jax.random.key(0), (28, 28, 1), 8, blend_opacity=(0.5, 0.5), minimum_contrast=0.9
        )
        for provider, name in enumerate(triggers.names):
            mask, pattern, opacity = (np.asarray(leaf[provider]) for leaf in triggers.params)
            inside = pattern[mask[..., 0] > 0]
            if name == "blend":
                assert opacity == 0.5
            if name == "solid":
                assert inside.min() >= 0.9
            if name == "checkerboard":
                assert inside.max() - inside.min() >= 0.9 - 1e-6

    @pytest.mark.parametrize(
        ("num_providers", "num_similar", "message"),
        [(0, 0, "at least 1"), (7, 8, "2 to 7"), (7, 1, "2 to 7"), (7, -1, "2 to 7")],
    )
    def test_impossible_numbers_are_errors(self, num_providers, num_similar, message):
        with pytest.raises(InputError, match=message):
            make_provider_triggers(jax.random.key(0), (8, 8, 1), num_providers, num_similar=num_similar)


@cache
def make_pool(shape, rate_of, key=3):
    dataset, rows = make_dataset(shape), make_rows(4)
    triggers = make_provider_triggers(jax.random.key(0), shape, 4)
    pool = poison_providers(jax.random.key(key), dataset, rows, triggers, rate=0.1, target=0, rate_of=rate_of)
    return dataset, rows, triggers, pool


@pytest.mark.parametrize("shape", [(10, 8, 3)])
@pytest.mark.parametrize("rate_of", ["all", "candidates"])
class TestPool:
    def test_counts_are_equal_and_avoid_the_target(self, shape, rate_of):
        dataset, rows, _, pool = make_pool(shape, rate_of)
        counts = pool.is_poisoned.sum(axis=1)
        victims = (dataset.labels[rows] != 0).sum(axis=1)
        assert (counts == (8 if rate_of == "all" else int(0.1 * victims.min()))).all()
        assert (pool.original_labels[pool.is_poisoned] != 0).all()
        assert (pool.labels[pool.is_poisoned] == 0).all()

    def test_rows_map_back_to_the_originals(self, shape, rate_of):
        dataset, rows, triggers, pool = make_pool(shape, rate_of)
        num_poisoned = int(pool.is_poisoned[0].sum())
        assert pool.images.shape == (200 + 4 * num_poisoned, *shape) and pool.images.dtype == np.uint8
        np.testing.assert_array_equal(pool.images[:200], dataset.images)
        np.testing.assert_array_equal(pool.original_labels, dataset.labels[rows])
        clean = ~pool.is_poisoned
        np.testing.assert_array_equal(pool.rows[clean], rows[clean])
        np.testing.assert_array_equal(pool.labels[clean], dataset.labels[rows][clean])
        assert sorted(pool.rows[pool.is_poisoned]) == list(range(200, len(pool.images)))
        for provider in range(4):
            columns = np.flatnonzero(pool.is_poisoned[provider])
            params = jax.tree.map(lambda leaf, provider=provider: leaf[provider], triggers.params)
            np.testing.assert_array_equal(
                pool.images[pool.rows[provider, columns]],
                poisoned_rows(dataset.images[rows[provider, columns]], params),
            )
        chex.assert_type([pool.rows, pool.labels, pool.original_labels], np.int32)
        chex.assert_equal_shape([pool.rows, pool.labels, pool.original_labels, pool.is_poisoned, rows])

    def test_key_decides_and_the_inputs_stay(self, shape, rate_of):
        dataset, rows, _, pool = make_pool(shape, rate_of)
        _, _, _, again = make_pool.__wrapped__(shape, rate_of)
        _, _, _, other = make_pool(shape, rate_of, key=4)
        chex.assert_trees_all_equal(pool, again)
        assert (pool.is_poisoned != other.is_poisoned).any()
        np.testing.assert_array_equal(rows, make_rows(4))
        np.testing.assert_array_equal(dataset.images, make_dataset(shape).images)


@pytest.mark.parametrize(("rate_of", "expected"), [("all", 2), ("candidates", 1)])
def test_unequal_numbers_of_victims_give_equal_numbers_of_poison(rate_of, expected):
    dataset = make_dataset()
    targets, victims = np.flatnonzero(dataset.labels == 0), np.flatnonzero(dataset.labels != 0)
    rows = np.stack([victims[:20], np.concatenate([targets[:9], victims[50:61]])])
    triggers = make_provider_triggers(jax.random.key(0), (8, 8, 1), 2)
    pool = poison_providers(jax.random.key(1), dataset, rows, triggers, rate=0.1, target=0, rate_of=rate_of)
    assert pool.is_poisoned.sum(axis=1).tolist() == [expected, expected]
    assert len(pool.images) == 200 + 2 * expected


def test_providers_choose_differently_even_from_the_same_rows():
    rows = np.tile(make_rows(1), (3, 1))
    triggers = make_provider_triggers(jax.random.key(0), (8, 8, 1), 3)
    pool = poison_providers(jax.random.key(1), make_dataset(), rows, triggers, rate=0.1, target=0)
    assert (pool.is_poisoned[0] != pool.is_poisoned[1]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.001}, "of 80 rows is less than one row; the smallest rate that gives one row is 0.0125"),
        ({"rate": 0.99}, "may be poisoned"),
        ({"target": 10}, "classes are 0 to 9"),
        ({"provider_rows": make_rows(3)}, "4 triggers for 3 providers"),
    ],
)
def test_impossible_attacks_are_errors(changes, message):
    arguments = {"provider_rows": make_rows(4), "rate": 0.1, "target": 0} | changes
    triggers = make_provider_triggers(jax.random.key(0), (8, 8, 1), 4)
    with pytest.raises(InputError, match=message):
        poison_providers(jax.random.key(1), make_dataset(), triggers=triggers, **arguments)


def test_an_honest_provider_is_a_row_of_the_same_tree():
    """Identity triggers let a test bed have clean teachers among poisoned ones."""
    shape = (8, 8, 1)
    params = masked_blend.stack([masked_blend.identity(shape), masked_blend.identity(shape)])
    triggers = make_provider_triggers(jax.random.key(0), shape, 2)._replace(params=params)
    dataset = make_dataset()
    pool = poison_providers(jax.random.key(1), dataset, make_rows(2), triggers, rate=0.1, target=0)
    np.testing.assert_array_equal(pool.images[pool.rows], dataset.images[make_rows(2)])
