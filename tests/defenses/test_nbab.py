"""NBAB: which rows are stamped, what is asked of the network, which rows are isolated."""

import jax
import numpy as np
import pytest

from bdjax.defenses import nbab
from bdjax.defenses.nbab import NbabSettings, Verified, choose_implants, isolate, make_patch, suspicion, verify
from bdjax.errors import InputError

SMALL = NbabSettings(alpha=0.0, epochs=3, optimiser="adam", learning_rate=1e-2, implant_rate=0.2, patch_size=2)


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
    ("rank", "order"), [("suspicious", [2, 0, 1, 3]), ("activation", [1, 2, 3, 0]), ("margin", [0, 2, 1, 3])]
)
def test_rows_that_fail_come_first_unless_the_order_is_another(rank, order):
    margins, activations = np.array([[-9.0, 1.0, -1.0, 2.0]]), np.array([[0.5, 9.0, 5.0, 1.0]])
    verified = Verified(margins, activations, None, None, None, None)
    assert np.argsort(-suspicion(verified, rank)[0]).tolist() == order


def test_the_own_trigger_is_learnt_beside_the_task(inputs):
    verified = verify(inputs, SMALL)
    members, num_rows = inputs.index.shape
    assert verified.margins.shape == (members, num_rows)
    assert verified.nets.model.num_classes == inputs.num_classes + 1
    assert (verified.implant_success > 0.5).all() and (verified.clean_accuracy > 0.3).all()
    np.testing.assert_array_equal(verified.margins > 0, verified.predictions == inputs.num_classes)


def test_all_rows_are_stamped_in_order_however_many_at_a_time(inputs, monkeypatch):
    whole = verify(inputs, SMALL).margins
    monkeypatch.setattr(nbab, "CHUNK", 50)
    np.testing.assert_allclose(verify(inputs, SMALL).margins, whole, rtol=1e-4, atol=1e-4)


def test_alignment_pulls_stamped_features_to_clean_ones(inputs):
    def distance(alpha):
        settings = NbabSettings(**{**vars(SMALL), "alpha": alpha})
        nets = verify(inputs, settings).nets
        rows = inputs.all_rows()
        plain = inputs.embeddings(nets.model, nets.variables, rows)
        pool = np.asarray(inputs.pool)
        stamped = np.stack([make_patch(2, "checkerboard")(pool[index], index) for index in inputs.index])
        images = stamped[:, :32].astype(np.float32) / 255
        apply = jax.jit(lambda v, x: nets.model.apply(v, x, train=False).features)
        moved = []
        for member in range(len(stamped)):
            features = apply(jax.tree.map(lambda leaf, i=member: leaf[i], nets.variables), images[member])
            moved.append(np.mean(list(features.values())[-1], axis=(1, 2)))
        return np.mean(np.square(np.stack(moved) - plain[:, :32])) / np.mean(np.square(plain))

    assert distance(30.0) < 0.5 * distance(0.0)


def test_cover_rows_keep_their_labels(inputs, monkeypatch):
    seen = {}
    train = type(inputs).train

    def spy(self, stage, model, config, rows, **how):
        seen["rows"] = rows
        return train(self, stage, model, config, rows, **how)

    monkeypatch.setattr(type(inputs), "train", spy)
    settings = NbabSettings(**{**vars(SMALL), "weak_by": "cover", "cover_rate": 0.25, "alpha": 5.0})
    verify(inputs, settings)
    num_rows = inputs.index.shape[1]
    new = np.asarray(seen["rows"].targets["labels"])[:, num_rows:]
    assert (np.sum(new != inputs.num_classes, axis=1) == round(0.25 * new.shape[1])).all()
    assert not np.any(seen["rows"].targets["suppression"])


def test_unknown_choices_are_refused(inputs):
    with pytest.raises(InputError, match="nbab: trigger 'mine' is not one of patch, attacker"):
        verify(inputs, NbabSettings(trigger="mine"))
    with pytest.raises(ValueError, match="not one of checkerboard"):
        make_patch(2, "red")
    with pytest.raises(ValueError, match="not one of suspicious"):
        suspicion(Verified(None, None, None, None, None, None), "random")
