import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import l2_invisible, neurons
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.l2_invisible import L2_INVISIBLE, L2InvisibleSettings, choose_neurons, optimise_noise
from bdjax.errors import InputError
from bdjax.triggers.additive import Additive
from bdjax.types import Dataset

KEY = jax.random.key(3)
SETTINGS = L2InvisibleSettings(nonneg=True, steps=120, steps_per_doubling=20, neurons=4)
TAU = 3.2 * np.sqrt(64 / 3072)


@pytest.fixture(scope="module")
def noise(knowledge):
    """Each kind of noise, at the norm of the settings."""

    def make(**changes):
        return np.asarray(L2_INVISIBLE.make_params(KEY, knowledge, dataclasses.replace(SETTINGS, **changes)).delta)

    return {
        "nonneg": make(),
        "start": make(learning_rate=0.0),
        "start of both signs": make(learning_rate=0.0, nonneg=False),
        "random": make(optimised=False),
    }


@pytest.mark.parametrize("kind", ["nonneg", "start", "start of both signs", "random"])
def test_has_exactly_the_norm_and_is_as_faint(noise, knowledge, kind):
    np.testing.assert_allclose(np.linalg.norm(noise[kind]), TAU, rtol=1e-5)
    assert (noise[kind].min() >= 0) == (kind != "start of both signs")
    images = knowledge.train.images[:20] / np.float32(255)
    triggered = jax.vmap(lambda image: L2_INVISIBLE.apply(Additive(jnp.asarray(noise[kind])), image, None, None))(
        images
    )
    assert (-10 * np.log10(np.mean((triggered - images) ** 2, axis=(1, 2, 3))) >= 24.8 - 0.06).all()


def test_excites_the_chosen_neurons_more_than_the_noise_it_started_from(noise, knowledge):
    chosen, _ = choose_neurons(jax.random.split(KEY, 3)[0], knowledge, SETTINGS)
    model, variables = knowledge.clean_model
    images = knowledge.train.images[:300] / np.float32(255)

    @jax.jit
    def excited(added):
        return neurons.activations(model, variables, jnp.clip(images + added[None], 0, 1))[:, chosen].mean()

    clean, start, random, optimised = (
        float(excited(added))
        for added in (np.zeros((8, 8, 1), np.float32), *map(noise.get, ("start", "random", "nonneg")))
    )
    gains = optimised - clean, start - clean, random - clean
    assert gains[0] > 0 and gains[0] > 1.3 * max(gains[1:]), gains


def test_a_higher_penalty_leaves_a_smaller_norm_before_scaling(knowledge):
    # The norm bound is out of reach, so that the first penalty is that of every step and never doubles.
    unbounded = dataclasses.replace(SETTINGS, norm=1e6)
    norms = [
        float(np.linalg.norm(optimise_noise(KEY, knowledge, dataclasses.replace(unbounded, penalty=penalty))))
        for penalty in (0.0, 2.0, 4.0)
    ]
    assert norms[0] > 1.2 * norms[1] and norms[1] > 1.2 * norms[2] and norms[2] > 0.1, norms


def test_noise_that_a_penalty_leaves_nothing_of_is_refused(knowledge, monkeypatch):
    monkeypatch.setattr(l2_invisible, "optimise_noise", lambda *arguments: jnp.zeros((8, 8, 1)))
    with pytest.raises(InputError, match="the penalty 50 reduced the noise to 0"):
        L2_INVISIBLE.make_params(KEY, knowledge, dataclasses.replace(SETTINGS, penalty=50.0))


def test_neurons_are_those_with_the_largest_weight_to_the_target(knowledge):
    chosen, goal = choose_neurons(KEY, knowledge, SETTINGS)
    clean = neurons.clean_activations(KEY, knowledge, "l2_invisible")
    weights = neurons.classifier_kernel(knowledge.clean_model.variables)[:, 0]
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
def test_settings_that_cannot_be_are_refused(knowledge, change):
    with pytest.raises(InputError, match=f"{next(iter(change))} 0(.0)? is not (above 0|at least 1)"):
        L2_INVISIBLE.make_params(KEY, knowledge, dataclasses.replace(SETTINGS, **change))
