"""NBAB: which rows are stamped, what the network learns, which rows are isolated."""

import dataclasses

import jax
import numpy as np
import pytest

from bdjax.defenses import nbab
from bdjax.defenses.nbab import NbabSettings, Verified, choose_implants, isolate, make_patch, suspicion, verify
from bdjax.errors import InputError
from bdjax.training import recipes
from tests.defenses.tiny import tiny_inputs

SMALL = NbabSettings(alpha=0.0, epochs=10, optimiser="adam", learning_rate=1e-2, implant_rate=0.2, patch_size=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_inputs(tmp_path_factory.mktemp("suspects"))


@pytest.fixture(scope="module")
def verified(inputs):
    return verify(inputs, SMALL)


@pytest.mark.parametrize(("pattern", "cells"), [("white", [[255, 255]] * 2), ("checkerboard", [[0, 255], [255, 0]])])
def test_patch_is_in_the_upper_left_and_nowhere_else(pattern, cells):
    images = np.random.default_rng(0).integers(0, 200, (3, 8, 8, 1), np.uint8)
    stamped = make_patch(2, pattern)(images, np.zeros(3, np.int32))
    np.testing.assert_array_equal(stamped[:, :2, :2, 0], [cells] * 3)
    stamped[:, :2, :2] = images[:, :2, :2]
    np.testing.assert_array_equal(stamped, images)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.33, 1.0])
def test_implants_are_distinct_and_balanced_over_labels(rate):
    labels = np.random.default_rng(1).integers(0, 10, 1000).astype(np.int32)
    labels[:300] = 7
    rows = choose_implants(labels, rate, np.random.default_rng(0))
    assert len(rows) == round(rate * 1000) == len(np.unique(rows))
    wanted = rate * np.bincount(labels, minlength=10)
    assert np.abs(np.bincount(labels[rows], minlength=10) - wanted).max() <= 1
    other = choose_implants(labels, rate, np.random.default_rng(1))
    assert rate == 1.0 or not np.array_equal(rows, other)


def test_isolation_takes_the_highest_scores_first():
    scores = np.array([[-3.0, 1.0, -2.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(isolate(scores, 0.5), [[False, True, False, True], [True, True, False, False]])
    np.testing.assert_array_equal(isolate(scores, 0.01).sum(axis=1), [1, 1])
    assert isolate(scores, 1.0).all()


@pytest.mark.parametrize(
    ("rank", "order"),
    [
        ("suspicious", [2, 0, 1, 3]),
        ("activation", [1, 2, 3, 0]),
        ("lead", [3, 2, 0, 1]),
        ("margin", [0, 2, 1, 3]),
    ],
)
def test_suspicious_rows_come_first_unless_the_rank_is_another(rank, order):
    margins, activations = np.array([[-9.0, 1.0, -1.0, 2.0]]), np.array([[0.5, 9.0, 5.0, 1.0]])
    leads = np.array([[0.3, 0.1, 0.4, 0.9]])
    results = Verified(margins, activations, leads, None, None, None, None)
    assert np.argsort(-suspicion(results, rank)[0]).tolist() == order


def test_the_planted_trigger_is_learnt_beside_the_task(inputs, verified):
    members, num_rows = inputs.index.shape
    assert verified.margins.shape == verified.activations.shape == (members, 1, num_rows)
    assert (verified.leads >= 0).all()
    logits = nbab.stamped_logits(inputs, verified.nets, [make_patch(2, SMALL.pattern)] * members)[..., :-1]
    highest, second = np.moveaxis(np.sort(logits)[..., :-3:-1], -1, 0)
    np.testing.assert_allclose(verified.leads[:, 0], highest - second, rtol=1e-4, atol=1e-4)
    assert verified.nets.model.num_classes == inputs.num_classes + 1
    assert (verified.implant_success > 0.5).all() and (verified.clean_accuracy > 0.3).all()
    share = np.mean(verified.margins > 0, axis=-1)
    np.testing.assert_allclose(0.2 * verified.implant_success + 0.8 * verified.held_out_success, share, rtol=1e-6)


def test_a_recipe_is_followed_but_for_smoothed_labels(inputs):
    """With smoothed labels the poisons' logits are capped, and a rank by activation finds none of them."""
    recipe = dataclasses.replace(inputs.recipe, **recipes.fields("speedrun", 32))
    with_recipe = dataclasses.replace(inputs, recipe=recipe)
    assert recipe.label_smoothing > 0
    config = nbab._training(with_recipe, dataclasses.replace(SMALL, optimiser="recipe"))
    changes = {"epochs": SMALL.epochs, "augmentation": "none", "label_smoothing": 0.0}
    assert config == dataclasses.replace(recipe, **changes)


def test_networks_of_several_rungs_are_members_of_one_call(inputs, trained_on):
    _, rows = trained_on(dataclasses.replace(SMALL, alpha=30.0), (1.0, 0.0, 2.0, 1.0))
    (members, num_rows), suppression = inputs.index.shape, rows.targets["suppression"]
    assert rows.index.shape[0] == 4 * members
    assert suppression[:, num_rows:].min(axis=1).tolist() == [30.0, 0.0, 60.0, 30.0] * members
    sources = rows.index[:4, num_rows:, 1]
    assert not np.array_equal(sources[0], sources[3])  # each network has its own stamped rows


def test_a_ranking_over_networks_ignores_unusable_ones():
    scores = np.array([[[0.1, 0.9, 0.5], [9.0, 2.0, 3.0], [0.0, 0.2, 0.1]]])
    is_usable = nbab.usable(np.array([[0.5, 0.99, 0.3]]), 0.05, 0.9)
    assert is_usable.tolist() == [[True, False, True]]
    np.testing.assert_allclose(nbab.agreement(scores, is_usable), [[0.0, 1.0, 0.5]])
    assert nbab.usable(np.array([[np.nan]]), 0.05, 0.9).all()  # every row was stamped in training
    defaults = NbabSettings()
    of_dead_and_dominant = nbab.usable(np.array([[0.0, 0.99]]), defaults.least_success, defaults.most_success)
    assert not of_dead_and_dominant.any()  # so that the default settings can warn
    none = np.zeros((1, 3), bool)  # then all networks count, and the premise is reported as failed
    np.testing.assert_allclose(nbab.agreement(scores, none), [[2 / 6, 4 / 6, 3 / 6]])
    np.testing.assert_allclose(nbab.agreement(scores[:, :1], none[:, :1]), [[0.0, 1.0, 0.5]])


def test_stamped_rows_depend_on_the_suspect_and_not_on_its_place(inputs):
    def first_draws(keys):
        given = dataclasses.replace(inputs, keys=keys)
        return [generator.integers(1 << 30) for generator in given.generators("stage")]

    draws = first_draws(inputs.keys)
    assert len(set(draws)) == len(draws)
    assert first_draws(inputs.keys[::-1]) == draws[::-1]
    other = [generator.integers(1 << 30) for generator in inputs.generators("another stage")]
    assert not set(other) & set(draws)


def test_all_rows_are_stamped_in_order_however_many_at_a_time(inputs, verified, monkeypatch):
    monkeypatch.setattr(nbab, "CHUNK", 200)
    again = verify(inputs, SMALL)  # the network is restored from its checkpoint
    np.testing.assert_allclose(again.margins, verified.margins, rtol=1e-4, atol=1e-4)


@pytest.fixture
def trained_on(inputs, verified, monkeypatch):
    """From changes of the settings to the pool and the rows that the network is trained on, without training it."""

    def record(settings, rungs=(1.0,)):
        seen = []

        def train(self, stage, model, config, rows, **options):
            seen.append((np.asarray(self.pool), jax.tree.map(np.asarray, rows)))
            repeated = jax.tree.map(lambda leaf: np.repeat(leaf, len(rungs), axis=0), verified.nets.variables)
            return verified.nets._replace(variables=repeated)

        monkeypatch.setattr(type(inputs), "train", train)
        verify(inputs, settings, rungs)
        return seen[-1]

    return record


def test_stamped_rows_are_added_and_aligned_with_the_rows_they_come_from(inputs, trained_on):
    """What the alignment does to features is in the tests of `suppressed_cross_entropy`."""
    pool, rows = trained_on(dataclasses.replace(SMALL, alpha=30.0))
    num_rows = inputs.index.shape[1]
    (learnt, partner), suppression = np.moveaxis(rows.index, -1, 0), rows.targets["suppression"]
    np.testing.assert_array_equal(learnt[:, :num_rows], inputs.index)
    np.testing.assert_array_equal(partner[:, :num_rows], inputs.index)
    np.testing.assert_array_equal(rows.targets["labels"][:, :num_rows], inputs.labels)
    assert learnt.shape[1] == num_rows + round(0.2 * num_rows)
    assert (rows.targets["labels"][:, num_rows:] == inputs.num_classes).all()
    stamp = make_patch(2, "checkerboard")
    for member in range(len(learnt)):
        sources = pool[partner[member, num_rows:]]
        np.testing.assert_array_equal(pool[learnt[member, num_rows:]], stamp(sources, None))
        assert np.isin(partner[member, num_rows:], inputs.index[member]).all()
    assert not suppression[:, :num_rows].any() and (suppression[:, num_rows:] == 30).all()


def test_partners_may_join_the_batch(inputs, trained_on):
    pool, rows = trained_on(dataclasses.replace(SMALL, alpha=30.0, partners="together"))
    apart_pool, apart = trained_on(dataclasses.replace(SMALL, alpha=30.0))
    assert rows.index.shape == apart.index.shape and pool.shape == apart_pool.shape
    with pytest.raises(InputError, match="partners 'alone' is not one of apart, together"):
        verify(inputs, dataclasses.replace(SMALL, partners="alone"))


def test_cover_rows_keep_their_labels(inputs, trained_on):
    _, rows = trained_on(dataclasses.replace(SMALL, weak_by="cover", cover_rate=0.25, alpha=5.0))
    num_rows = inputs.index.shape[1]
    new = rows.targets["labels"][:, num_rows:]
    assert (np.sum(new != inputs.num_classes, axis=1) == round(0.25 * new.shape[1])).all()
    assert not np.any(rows.targets["suppression"])
    assert rows.index.ndim == 2  # without alignment no partner is computed


def test_unknown_choices_are_refused():
    with pytest.raises(InputError, match="nbab: trigger 'mine' is not one of patch, attacker"):
        verify(None, NbabSettings(trigger="mine"))
    with pytest.raises(ValueError, match="not one of checkerboard"):
        make_patch(2, "red")
    with pytest.raises(ValueError, match="not one of suspicious"):
        suspicion(Verified(*[None] * 7), "random")
