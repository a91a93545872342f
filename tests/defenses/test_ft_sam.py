import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses.ft_sam import FtSamSettings, adaptive_ascent, run, sharpness_aware, smoothed_cross_entropy
from bdjax.types import Model, ModelOutput

RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.random((8, 2, 2, 1)), jnp.float32)
TARGETS = {"labels": jnp.asarray(RANDOM.integers(0, 3, 8), jnp.int32)}
PARAMS = {
    "hidden": jnp.asarray(RANDOM.standard_normal((4, 5)), jnp.float32),
    "out": jnp.asarray(RANDOM.standard_normal((5, 3)), jnp.float32),
}
VARIABLES = {"params": PARAMS, "batch_stats": {"mean": jnp.zeros(5)}}


def _apply(variables, images, *, train, edits=None):
    """Two layers with the mean of batch normalisation between them."""
    params, running = variables["params"], variables["batch_stats"]["mean"]
    hidden = images.reshape(len(images), -1) @ params["hidden"]
    mean = hidden.mean(0) if train else running
    logits = jnp.tanh(hidden - mean[None]) @ params["out"]
    after = {**variables, "batch_stats": {"mean": 0.9 * running + 0.1 * mean}} if train else variables
    return ModelOutput(logits, {}, after)


MODEL = Model(lambda key, shape: VARIABLES, _apply, 3, "two layers")


def smoothed(params, smoothing=0.1):
    output = _apply({**VARIABLES, "params": params}, IMAGES, train=True)
    return jnp.mean(smoothed_cross_entropy(output.logits, TARGETS["labels"], smoothing))


def outcome_at(params, rho, smoothing=0.1):
    return sharpness_aware(MODEL, rho, smoothing)(params, VARIABLES, IMAGES, TARGETS, jax.random.key(0))


def gradient_of(rho, smoothing=0.1):
    return jax.grad(lambda params: jnp.mean(outcome_at(params, rho, smoothing).losses))(PARAMS)


# ---- Smoothing ------------------------------------------------------------------------------------------------------


def test_smoothed_labels_give_the_other_classes_equal_shares():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    expected = -(0.9 * math.log(0.7) + 0.05 * math.log(0.2) + 0.05 * math.log(0.1))
    np.testing.assert_allclose(smoothed_cross_entropy(logits, jnp.array([0]), 0.1), [expected], rtol=1e-6)


def test_without_smoothing_it_is_the_cross_entropy_and_with_it_the_labels_shares_are_best():
    logits = jnp.asarray(RANDOM.standard_normal((8, 3)), jnp.float32)
    plain = losses.cross_entropy(logits, TARGETS["labels"])
    np.testing.assert_allclose(smoothed_cross_entropy(logits, TARGETS["labels"], 0.0), plain, rtol=1e-5)
    best = jnp.log(jnp.array([[0.9, 0.05, 0.05]]))
    gradient = jax.grad(lambda logits: smoothed_cross_entropy(logits, jnp.array([0]), 0.1)[0])(best)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


# ---- The ascent -----------------------------------------------------------------------------------------------------


def test_the_ascent_is_scaled_by_the_weights():
    params, gradient = {"a": jnp.array([1.0]), "b": jnp.array([-2.0])}, {"a": jnp.array([3.0]), "b": jnp.array([0.5])}
    step = adaptive_ascent(params, gradient, 2.0)  # |theta| g = (3, 1), theta² g = (3, 2)
    np.testing.assert_allclose(step["a"], [6 / math.sqrt(10)], rtol=1e-6)
    np.testing.assert_allclose(step["b"], [4 / math.sqrt(10)], rtol=1e-6)


@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_relative_to_the_weights_the_ascent_is_rho_long_whatever_their_scale(rho):
    gradient = jax.grad(smoothed)(PARAMS)
    step = adaptive_ascent(PARAMS, gradient, rho)
    relative = jax.tree.leaves(jax.tree.map(lambda e, p: jnp.sum(jnp.square(e / p)), step, PARAMS))
    np.testing.assert_allclose(math.sqrt(sum(relative)), rho, rtol=1e-4)
    # Weights c times as large have gradients 1/c as large, and a step c times as long.
    rescaled = adaptive_ascent(jax.tree.map(lambda p: 8 * p, PARAMS), jax.tree.map(lambda g: g / 8, gradient), rho)
    chex.assert_trees_all_close(rescaled, jax.tree.map(lambda e: 8 * e, step), rtol=1e-4)


def test_without_a_gradient_there_is_no_ascent():
    step = adaptive_ascent(PARAMS, jax.tree.map(jnp.zeros_like, PARAMS), 2.0)
    chex.assert_trees_all_equal(step, jax.tree.map(jnp.zeros_like, PARAMS))


# ---- The objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_radius_it_is_fine_tuning_on_smoothed_labels(smoothing):
    outcome = outcome_at(PARAMS, 0.0, smoothing)
    plain = _apply(VARIABLES, IMAGES, train=True)
    np.testing.assert_allclose(jnp.mean(outcome.losses), smoothed(PARAMS, smoothing), rtol=1e-6)
    np.testing.assert_array_equal(outcome.logits, plain.logits)
    expected = jax.grad(lambda params: smoothed(params, smoothing))(PARAMS)
    chex.assert_trees_all_close(gradient_of(0.0, smoothing), expected, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_the_one_at_the_worst_point_which_counts_as_a_constant():
    step = adaptive_ascent(PARAMS, jax.grad(smoothed)(PARAMS), 0.5)
    expected = jax.grad(smoothed)(jax.tree.map(jnp.add, PARAMS, step))
    chex.assert_trees_all_close(gradient_of(0.5), expected, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(expected["out"] - gradient_of(0.0)["out"]).max()) > 1e-3
    assert float(jnp.mean(outcome_at(PARAMS, 0.5).losses)) > float(smoothed(PARAMS))  # worse there, so it is an ascent


def test_running_statistics_are_those_of_the_first_pass():
    expected = _apply(VARIABLES, IMAGES, train=True).variables
    chex.assert_trees_all_equal(outcome_at(PARAMS, 2.0).variables, expected)


def test_compiled_or_not_it_is_the_same():
    objective = sharpness_aware(MODEL, 2.0, 0.1)
    arguments = PARAMS, VARIABLES, IMAGES, TARGETS, jax.random.key(0)
    chex.assert_trees_all_close(jax.jit(objective)(*arguments), objective(*arguments), rtol=1e-4, atol=1e-5)


def test_no_epochs_change_nothing(inputs):
    result = run(inputs, FtSamSettings(epochs=0))
    jax.tree.map(np.testing.assert_array_equal, result.variables, inputs.attacked.variables)
    np.testing.assert_array_equal(result.facts["weight change"], 0)
