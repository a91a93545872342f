import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import neurons
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.trojan import (
    TROJAN_SQUARE,
    TROJAN_WATERMARK,
    TrojanSettings,
    choose_neurons,
    square_mask,
    watermark_mask,
)
from bdjax.errors import InputError
from bdjax.triggers.additive import Additive

BOTH = pytest.mark.parametrize(("attack", "mask"), [(TROJAN_SQUARE, square_mask), (TROJAN_WATERMARK, watermark_mask)])
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def deltas(knowledge):
    """The triggers after some numbers of steps, from the same start."""
    return {
        (attack.name, steps): np.asarray(attack.make_params(KEY, knowledge, TrojanSettings(steps=steps)).delta)
        for attack in (TROJAN_SQUARE, TROJAN_WATERMARK)
        for steps in (1, 20, 200)
    }


def excited(trigger, knowledge):
    chosen, _ = choose_neurons(jax.random.split(KEY)[0], knowledge, TrojanSettings(), "trojan")
    model, variables = knowledge.clean_model
    return np.asarray(neurons.activations(model, variables, jnp.asarray(trigger)[None]))[0, chosen]


def test_square_lies_where_the_ones_in_circulation_do():
    assert np.flatnonzero(square_mask((32, 32, 3)).any(axis=(1, 2))).tolist() == list(range(21, 30))
    assert np.flatnonzero(square_mask((32, 32, 3)).any(axis=(0, 2))).tolist() == list(range(21, 30))
    assert square_mask((28, 28, 1)).sum() == 64 and square_mask((8, 8, 1)).sum() == 4


def test_watermark_is_as_large_as_the_one_in_circulation():
    mask = watermark_mask((32, 32, 3))
    assert mask.sum() == 320
    assert np.flatnonzero(mask.any(axis=(1, 2)))[[0, -1]].tolist() == [0, 29]
    assert 0.2 < watermark_mask((28, 28, 1)).mean() < 0.4 and 0.2 < watermark_mask((8, 8, 1)).mean() < 0.4


@BOTH
def test_nothing_outside_the_mask_changes_and_nothing_gets_darker(deltas, knowledge, attack, mask):
    trigger = deltas[attack.name, 20]
    inside = np.broadcast_to(mask((8, 8, 1)) > 0, trigger.shape)
    assert (trigger[~inside] == 0).all() and (trigger[inside] > 0).all() and trigger.max() <= 1
    image = jnp.asarray(knowledge.train.images[5], jnp.float32) / 255
    triggered = np.asarray(attack.apply(Additive(jnp.asarray(trigger)), image, None, None))
    assert (triggered >= image).all()
    np.testing.assert_array_equal(triggered[~inside], np.asarray(image)[~inside])
    psnr = -10 * np.log10(np.mean((triggered - image) ** 2))
    assert psnr >= -10 * np.log10(np.sum(trigger**2) / trigger.size) - 1e-3


@pytest.mark.parametrize(("norm", "psnr"), [(8.66, 16.1), (8.74, 16.0), (3.16, 24.9)])
def test_norms_are_those_of_the_triggers_in_circulation(norm, psnr):
    assert -10 * np.log10(norm**2 / 3072) == pytest.approx(psnr, abs=0.06)
    assert neurons.scaled_norm(norm, (32, 32, 3)) == pytest.approx(norm)
    full = jnp.ones((8, 8, 1))
    assert jnp.linalg.norm(neurons.capped(full, 3.0).ravel()) == pytest.approx(3.0, rel=1e-6)
    np.testing.assert_array_equal(neurons.capped(full, 9.0), full)
    # Below the norm the gradient is that of the perturbation; above it, none is left along the perturbation.
    ascent = jax.grad(lambda delta, largest: jnp.sum(neurons.capped(delta, largest)))
    np.testing.assert_array_equal(ascent(full, 9.0), full)
    np.testing.assert_allclose(ascent(full, 3.0), 0, atol=1e-6)
    tilted = ascent(full.at[0, 0].set(2.0), 3.0)
    assert float(jnp.vdot(tilted, full.at[0, 0].set(2.0))) == pytest.approx(0, abs=1e-5) and np.abs(tilted).max() > 0.01
    assert TROJAN_SQUARE.settings.largest_norm == 8.66 and TROJAN_WATERMARK.settings.largest_norm == 8.74


@BOTH
def test_the_longer_it_is_optimised_the_more_neurons_are_excited(deltas, knowledge, attack, mask):
    del mask
    blank = excited(np.zeros((8, 8, 1), np.float32), knowledge).mean()
    means = [excited(deltas[attack.name, steps], knowledge).mean() for steps in (1, 20, 200)]
    assert means[0] < means[1] < means[2]
    assert means[2] > 1.5 * blank


def test_each_activation_is_driven_to_at_most_ten_times_a_clean_one(knowledge):
    chosen, goal = choose_neurons(KEY, knowledge, TrojanSettings(), "trojan")
    clean = neurons.clean_activations(KEY, knowledge, "trojan")
    np.testing.assert_allclose(goal, np.minimum(100, 10 * clean[:, chosen].max(axis=0)), rtol=1e-6)
    weights = np.abs(neurons.classifier_kernel(knowledge.clean_model.variables)).sum(axis=1)
    alive = clean.max(axis=0) > 0
    assert set(chosen) == set(np.argsort(-np.where(alive, weights, 0))[:2])


def test_dead_neurons_are_passed_over():
    clean = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    assert neurons.strongest(np.array([9.0, 1.0, 5.0]), clean, 3, "trojan").tolist() == [2, 1]
    with pytest.raises(InputError, match="react to clean images; 0 do"):
        neurons.strongest(np.ones(3), np.zeros((2, 3)), 2, "trojan")


def test_what_cannot_be_is_refused(knowledge):
    without = Knowledge(knowledge.train, 0)
    with pytest.raises(InputError, match="trojan_square optimises its trigger on a clean model"):
        TROJAN_SQUARE.make_params(KEY, without, TrojanSettings())
    with pytest.raises(InputError, match="steps 0"):
        TROJAN_WATERMARK.make_params(KEY, knowledge, TrojanSettings(steps=0))
    with pytest.raises(InputError, match="does not react"):
        neurons.check_reaction(jnp.float32(0), "trojan")
