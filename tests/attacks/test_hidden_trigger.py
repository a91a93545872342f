import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.contract import Knowledge
from bdjax.attacks.hidden_trigger import (
    HIDDEN_TRIGGER,
    HiddenTriggerSettings,
    assign_greedily,
    craft,
    draw_soft_patch,
    make_hidden_trigger,
    squared_distances,
)
from bdjax.attacks.label_rules import make_rule
from bdjax.attacks.neurons import activations
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by
from bdjax.errors import InputError
from bdjax.triggers import masked_blend

SHAPE = (8, 8, 1)
RADIUS = 64 / 255


@pytest.fixture(scope="module")
def knowledge(digits, clean_digits_model):
    """Ten rows of each of three classes: the target 2, its source 0, and 1."""
    rows = np.concatenate([np.flatnonzero(digits.train.labels == label)[:10] for label in range(3)])
    return Knowledge(dataclasses.replace(digits.train[rows], num_classes=3), 2, clean_digits_model)


def settings_of(**changes):
    return HiddenTriggerSettings(**{"radius": RADIUS, "step_size": 0.03, "steps": 40, "pairs": 8, **changes})


def test_rows_stay_near_and_their_features_come_close(knowledge):
    settings = settings_of()
    params = make_hidden_trigger(jax.random.key(1), knowledge, settings)
    is_target = knowledge.train.labels == 2
    starts = jnp.asarray(knowledge.train.images[is_target][:8], jnp.float32) / 255
    keys = jax.random.split(jax.random.key(2), 8)
    crafted = craft(params, starts, jnp.full(8, 2), keys)
    assert np.abs(crafted - starts).max() <= RADIUS + 1e-6
    assert crafted.min() >= 0 and crafted.max() <= 1
    chosen = np.asarray(jax.random.permutation(keys[0], 10))[:8]
    patched = masked_blend.apply_to_batch(params.patch, params.sources[chosen].astype(jnp.float32) / 255)
    wanted = activations(params.model, params.variables, patched)

    def mean_distance(images):
        distances = squared_distances(activations(params.model, params.variables, images), wanted)
        return float(jnp.take_along_axis(distances, assign_greedily(distances)[:, None], 1).mean())

    assert mean_distance(crafted) <= 0.4 * mean_distance(starts)
    has_patch = np.asarray(params.patch.mask[..., 0] > 0)
    assert (np.abs(crafted - params.patch.pattern[None])[:, has_patch].max(axis=(1, 2)) > 0.1).all()


def test_sources_are_of_the_class_after_the_target(knowledge):
    params = make_hidden_trigger(jax.random.key(1), knowledge, settings_of(source_images=4))
    assert params.sources.shape == (4, *SHAPE)
    of_source = {image.tobytes() for image in knowledge.train.images[knowledge.train.labels == 0]}
    assert {np.asarray(image).tobytes() for image in params.sources} <= of_source


def test_rows_of_the_target_class_alone_are_poisoned_and_keep_their_labels(knowledge):
    settings = settings_of(steps=2, pairs=3, poison_rate=0.2)
    params = make_hidden_trigger(jax.random.key(1), knowledge, settings)
    rule = make_rule("hidden_source", 2, 3)
    poisoned = poison_by(jax.random.key(3), knowledge.train, ConfiguredAttack(HIDDEN_TRIGGER, settings, rule), params)
    assert poisoned.is_poisoned.sum() == 6 and (poisoned.labels[poisoned.is_poisoned] == 2).all()
    np.testing.assert_array_equal(poisoned.labels, knowledge.train.labels)
    change = poisoned.images[poisoned.is_poisoned].astype(int) - knowledge.train.images[poisoned.is_poisoned]
    assert 0 < np.abs(change).max() <= 64
    assert (np.abs(change).max(axis=(1, 2, 3)) > 0).all()
    victims = rule.victims(knowledge.train.labels)
    np.testing.assert_array_equal(victims, knowledge.train.labels == 0)


def test_greedy_pairs_are_those_of_a_loop():
    distances = np.random.default_rng(0).uniform(size=(6, 9)).astype(np.float32)
    expected, left = np.zeros(6, int), distances.copy()
    for _ in range(6):
        row, column = np.unravel_index(np.argmin(left), left.shape)
        expected[row] = column
        left[row, :] = left[:, column] = np.inf
    np.testing.assert_array_equal(assign_greedily(jnp.asarray(distances)), expected)
    assert len(set(expected)) == 6


def test_distances_are_squared_lengths():
    first, second = jax.random.normal(jax.random.key(0), (2, 4, 5))
    expected = np.square(np.asarray(first)[:, None] - np.asarray(second)[None]).sum(-1)
    np.testing.assert_allclose(squared_distances(first, second), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "side", "margin"), [((32, 32, 3), 8, 5), ((28, 28, 1), 7, 4), ((8, 8, 1), 2, 1)])
def test_the_patch_is_a_square_near_the_corner(shape, side, margin):
    patch = draw_soft_patch(jax.random.key(0), shape, 0.25, 0.16)
    rows, columns = np.nonzero(np.asarray(patch.mask[..., 0]))
    assert len(rows) == side * side
    assert (rows.max(), columns.max()) == (shape[0] - margin - 1, shape[1] - margin - 1)
    cells = np.asarray(patch.pattern)[rows, columns]
    np.testing.assert_array_equal(cells.min(axis=0), 0)
    np.testing.assert_allclose(cells.max(axis=0), 1, atol=1e-6)


def test_what_cannot_be_is_refused(knowledge):
    with pytest.raises(InputError, match="none was supplied"):
        make_hidden_trigger(jax.random.key(0), Knowledge(knowledge.train, 2), settings_of())
    with pytest.raises(InputError, match="steps -1"):
        make_hidden_trigger(jax.random.key(0), knowledge, settings_of(steps=-1))
    with pytest.raises(InputError, match="pairs 0"):
        make_hidden_trigger(jax.random.key(0), knowledge, settings_of(pairs=0))
    with pytest.raises(InputError, match="does not fit"):
        make_hidden_trigger(jax.random.key(0), knowledge, settings_of(size=0.95))
