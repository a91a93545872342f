import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses import contract
from bdjax.defenses.ft_sam import FT_SAM, FtSamSettings, adaptive_ascent, sharpness_aware, smoothed_cross_entropy
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


@jax.jit
def _smoothed(params, smoothing):
    def mean_loss(params):
        output = _apply({**VARIABLES, "params": params}, IMAGES, train=True)
        return jnp.mean(smoothed_cross_entropy(output.logits, TARGETS["labels"], smoothing)), output

    (loss, output), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return loss, gradient, output


def smoothed(params, smoothing=0.1):
    """The mean smoothed cross-entropy at some parameters, its gradient and the network's output."""
    return _smoothed(params, np.float32(smoothing))


@jax.jit
def _sharpness_aware(params, rho, smoothing):
    objective = sharpness_aware.__wrapped__(MODEL, rho, smoothing)  # traced numbers cannot be cached

    def mean_loss(params):
        outcome = objective(params, VARIABLES, IMAGES, TARGETS, jax.random.key(0))
        return jnp.mean(outcome.losses), outcome

    (loss, outcome), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return loss, gradient, outcome


def at_worst_point(rho, smoothing=0.1):
    """The mean of the objective's losses, its gradient and its outcome."""
    return _sharpness_aware(PARAMS, np.float32(rho), np.float32(smoothing))


ascent = jax.jit(adaptive_ascent)


# ---- Smoothing ------------------------------------------------------------------------------------------------------


def test_smoothed_labels_give_the_other_classes_equal_shares():
    logits = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    expected = -(0.9 * math.log(0.7) + 0.05 * math.log(0.2) + 0.05 * math.log(0.1))
    found = jax.jit(smoothed_cross_entropy)(logits, np.array([0]), np.float32(0.1))
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_without_smoothing_it_is_the_cross_entropy_and_with_it_the_smoothed_labels_are_best():
    logits = RANDOM.standard_normal((8, 3)).astype(np.float32)
    plain = jax.jit(losses.cross_entropy)(logits, TARGETS["labels"])
    found = jax.jit(smoothed_cross_entropy)(logits, TARGETS["labels"], np.float32(0.0))
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    best = np.log(np.array([[0.9, 0.05, 0.05]], np.float32))
    gradient = jax.jit(jax.grad(lambda logits: smoothed_cross_entropy(logits, jnp.array([0]), 0.1)[0]))(best)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


# ---- The ascent -----------------------------------------------------------------------------------------------------


def test_the_ascent_is_scaled_by_the_weights():
    params, gradient = {"a": jnp.array([1.0]), "b": jnp.array([-2.0])}, {"a": jnp.array([3.0]), "b": jnp.array([0.5])}
    step = ascent(params, gradient, 2.0)  # |theta| g = (3, 1), theta² g = (3, 2)
    np.testing.assert_allclose(step["a"], [6 / math.sqrt(10)], rtol=1e-6)
    np.testing.assert_allclose(step["b"], [4 / math.sqrt(10)], rtol=1e-6)


@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_relative_to_the_weights_the_ascent_is_rho_long_whatever_their_scale(rho):
    params, gradient = (jax.tree.map(np.asarray, tree) for tree in (PARAMS, smoothed(PARAMS)[1]))
    step = jax.tree.map(np.asarray, ascent(params, gradient, rho))
    relative = jax.tree.leaves(jax.tree.map(lambda e, p: np.sum(np.square(e / p)), step, params))
    np.testing.assert_allclose(math.sqrt(sum(relative)), rho, rtol=1e-4)
    # Weights c times as large have gradients 1/c as large, and a step c times as long.
    rescaled = ascent(jax.tree.map(lambda p: 8 * p, params), jax.tree.map(lambda g: g / 8, gradient), rho)
    chex.assert_trees_all_close(rescaled, jax.tree.map(lambda e: 8 * e, step), rtol=1e-4)


def test_without_a_gradient_there_is_no_ascent():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    chex.assert_trees_all_equal(ascent(PARAMS, zeros, 2.0), zeros)


# ---- The objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_radius_it_is_fine_tuning_on_smoothed_labels(smoothing):
    loss, gradient, outcome = at_worst_point(0.0, smoothing)
    expected_loss, expected_gradient, plain = smoothed(PARAMS, smoothing)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(outcome.logits, plain.logits, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_at_the_worst_point_which_counts_as_a_constant():
    loss_here, gradient_here, _ = smoothed(PARAMS)
    step = ascent(PARAMS, gradient_here, 0.5)
    _, expected, _ = smoothed(jax.tree.map(lambda p, e: np.asarray(p + e), PARAMS, step))
    loss, gradient, _ = at_worst_point(0.5)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected["out"] - gradient_here["out"]).max() > 1e-3
    assert loss > loss_here + 1e-3  # an ascent


def test_running_statistics_are_those_of_the_first_pass():
    expected = smoothed(PARAMS)[2].variables
    chex.assert_trees_all_close(at_worst_point(2.0)[2].variables, expected, rtol=1e-5, atol=1e-6)


def test_no_epochs_change_nothing(inputs):
    result = contract.run(FT_SAM, inputs, FtSamSettings(epochs=0))  # which receives no more than it declares
    jax.tree.map(np.testing.assert_array_equal, result.variables, inputs.attacked.variables)
    np.testing.assert_array_equal(result.facts["weight change"], 0)
