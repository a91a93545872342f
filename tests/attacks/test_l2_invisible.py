import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import datasets
from bdjax.attacks import l2_invisible, neurons
from bdjax.attacks.contract import CleanModel, Knowledge
from bdjax.attacks.l2_invisible import L2_INVISIBLE, L2InvisibleSettings, choose_neurons, optimise_noise
from bdjax.attacks.surrogate import train_surrogate
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.training.member import TrainConfig
from bdjax.triggers.additive import Additive
from bdjax.types import Dataset

KEY = jax.random.key(3)
SETTINGS = L2InvisibleSettings(nonneg=True, steps=120, steps_per_doubling=20, neurons=4)
TAU = 3.2 * np.sqrt(64 / 3072)


@cache
def knowledge():
    """Digits, and a small network that has learned them a little."""
    train = datasets.load("digits").train
    model = make_model("resnet10", 10, 4)
    config = TrainConfig(epochs=2, learning_rate=0.01)
    variables = train_surrogate(jax.random.key(1), model, train.images[:600], train.labels[:600], config)
    return Knowledge(train, 0, CleanModel(model, variables))


@cache
def delta(settings):
    return np.asarray(L2_INVISIBLE.make_params(KEY, knowledge(), settings).delta)


def excited(noise):
    chosen, _ = choose_neurons(jax.random.split(KEY, 3)[0], knowledge(), SETTINGS)
    model, variables = knowledge().clean_model
    images = jnp.asarray(knowledge().train.images[:300], jnp.float32) / 255
    return float(neurons.activations(model, variables, jnp.clip(images + noise[None], 0, 1))[:, chosen].mean())


@pytest.mark.parametrize("nonneg", [True, False])
def test_stays_within_the_norm(nonneg):
    noise = delta(dataclasses.replace(SETTINGS, nonneg=nonneg))
    assert 0.3 * TAU < np.linalg.norm(noise) <= TAU * (1 + 1e-5)
    assert (noise.min() >= 0) == nonneg
    images = jnp.asarray(knowledge().train.images[:20], jnp.float32) / 255
    triggered = jax.vmap(lambda image: L2_INVISIBLE.apply(Additive(jnp.asarray(noise)), image, None, None))(images)
    assert (-10 * np.log10(np.mean((triggered - images) ** 2, axis=(1, 2, 3))) >= 24.8 - 0.06).all()


def test_excites_the_chosen_neurons_more_than_the_noise_it_started_from():
    start = delta(dataclasses.replace(SETTINGS, learning_rate=0.0))
    random = delta(dataclasses.replace(SETTINGS, optimised=False))
    optimised = excited(delta(SETTINGS))
    assert optimised > 1.1 * excited(np.zeros((8, 8, 1), np.float32))
    assert optimised > excited(start) and optimised > excited(random)


def test_a_higher_penalty_leaves_a_smaller_norm_before_scaling():
    # The norm bound is out of reach, so that the first penalty is that of every step and never doubles.
    unbounded = dataclasses.replace(SETTINGS, norm=1e6)
    norms = [
        float(
            jnp.linalg.norm(optimise_noise(KEY, knowledge(), dataclasses.replace(unbounded, penalty=penalty)).ravel())
        )
        for penalty in (0.0, 1.0, 2.0)
    ]
    assert norms[0] > 1.2 * norms[1] and norms[1] > 1.2 * norms[2], norms


def test_noise_that_a_penalty_leaves_nothing_of_is_refused(monkeypatch):
    monkeypatch.setattr(l2_invisible, "optimise_noise", lambda *arguments: jnp.zeros((8, 8, 1)))
    with pytest.raises(InputError, match="the penalty 50 reduced the noise to 0"):
        L2_INVISIBLE.make_params(KEY, knowledge(), dataclasses.replace(SETTINGS, penalty=50.0))


def test_neurons_are_those_with_the_largest_weight_to_the_target():
    chosen, goal = choose_neurons(KEY, knowledge(), SETTINGS)
    clean = neurons.clean_activations(KEY, knowledge(), "l2_invisible")
    weights = neurons.classifier_kernel(knowledge().clean_model.variables)[:, 0]
    alive = np.flatnonzero(clean.max(axis=0) > 0)
    assert set(chosen) == set(alive[np.argsort(-weights[alive])[:4]])
    np.testing.assert_allclose(goal, 5 * clean[:, chosen].mean(axis=0), rtol=1e-5)


def test_without_a_network_only_on_request():
    shape = (32, 32, 3)
    none = Knowledge(Dataset(np.zeros((4, *shape), np.uint8), np.zeros(4, np.int32), 2, "none", "none"), 0)
    with pytest.raises(InputError, match="l2_invisible optimises its trigger on a clean model"):
        L2_INVISIBLE.make_params(KEY, none, L2InvisibleSettings())
    noise = np.asarray(L2_INVISIBLE.make_params(KEY, none, L2InvisibleSettings(optimised=False)).delta)
    assert noise.min() == 0 and 0.45 < (noise == 0).mean() < 0.55
    assert np.linalg.norm(noise) == pytest.approx(3.2, rel=1e-5)
    assert -10 * np.log10(np.mean(noise**2)) == pytest.approx(24.8, abs=0.06)


@pytest.mark.parametrize("change", [{"steps": 0}, {"norm": 0.0}, {"batch_size": 0}, {"steps_per_doubling": 0}])
def test_settings_that_cannot_be_are_refused(change):
    with pytest.raises(InputError, match=f"{next(iter(change))} 0 must be above 0"):
        L2_INVISIBLE.make_params(KEY, knowledge(), dataclasses.replace(SETTINGS, **change))
