"""I-BAU: the hyper-gradient against closed forms, a round against plain steps, and statistics that stay."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses import contract, i_bau
from bdjax.defenses.contract import labelled
from bdjax.defenses.i_bau import I_BAU, IBauSettings, check, clip_norm, hyper_gradient, make_round, run
from bdjax.errors import InputError
from bdjax.models.layers import convolve_3x3
from bdjax.training.member import TrainConfig, as_float, resume_from
from tests.defenses.tiny import LINEAR, SHAPE, tiny_inputs

RATE = 0.3
# The inner problem is min over w of w A w / 2 - w B theta, so w(theta) = A^-1 B theta; the outer loss is
# |w - c|^2 / 2 + |theta|^2 / 2.
A = np.array([[2.0, 0.5], [0.5, 1.0]], np.float32)
B = np.array([[1.0, -1.0, 0.5], [0.3, 0.8, -0.2]], np.float32)
C = np.array([0.4, -0.7], np.float32)
THETA = np.array([0.5, 1.0, -2.0], np.float32)


def outer_loss(w, theta):
    return jnp.sum(jnp.square(w - C)) / 2 + jnp.sum(jnp.square(theta)) / 2


def inner_step(w, theta):
    return w - RATE * jax.grad(lambda w: w @ A @ w / 2 - w @ B @ theta)(w)


def test_hyper_gradient_of_a_quadratic():
    w = np.linalg.solve(A, B @ THETA)
    gradient = jax.jit(lambda w, theta, terms: hyper_gradient(outer_loss, inner_step, w, theta, terms))
    # By theta, the outer loss at w(theta) = A^-1 B theta has this gradient.
    exact = THETA + B.T @ np.linalg.inv(A) @ (w - C)
    for terms in (0, 1, 5, 100):
        found = gradient(w, jnp.asarray(THETA), terms)
        series = sum((np.linalg.matrix_power(np.eye(2) - RATE * A, k) for k in range(terms)), np.zeros((2, 2)))
        np.testing.assert_allclose(found, THETA + RATE * B.T @ series @ (w - C), rtol=1e-5, atol=1e-6)
        if terms == 100:
            np.testing.assert_allclose(found, exact, rtol=1e-4)
        else:
            assert np.abs(found - exact).max() > 1e-2


def batch_of(rows=8):
    pool = jax.random.randint(jax.random.key(2), (rows, 8, 8, 1), 0, 256).astype(jnp.uint8)
    return pool, labelled(np.arange(rows), np.arange(rows) % 10)


def test_second_derivatives_of_the_convolution():
    """Its gradient is written by hand: the derivative of that, which the hyper-gradient needs, must hold too."""
    random = np.random.default_rng(0)
    images = random.standard_normal((2, 5, 6, 3)).astype(np.float32)  # [C, H, W, N]
    kernel = random.standard_normal((3, 3, 2, 4)).astype(np.float32)

    def by_jax(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("CHWN", "HWIO", "CHWN"))

    @jax.jit
    def second_derivatives(images, kernel):
        def of(convolve):
            slope = jax.grad(lambda images, kernel: jnp.sum(jnp.sin(convolve(images, kernel))))
            return jax.vjp(slope, images, kernel)[1](jnp.ones_like(images))

        return of(convolve_3x3), of(by_jax)

    found, expected = second_derivatives(images, kernel)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)
    assert min(np.abs(leaf).max() for leaf in expected) > 1


PLAIN = IBauSettings(batch_size=8, perturbation_rate=0.0, terms=0, learning_rate=1e-3)
VARIABLES = LINEAR.init(jax.random.key(0), SHAPE)


def after_a_round(settings):
    config = TrainConfig(
        epochs=2, batch_size=settings.batch_size, learning_rate=settings.learning_rate, schedule="constant"
    )
    pool, rows = batch_of()
    state = resume_from(VARIABLES, jax.random.key(1), config)
    return jax.jit(make_round(LINEAR, config, settings))(state, rows, pool)


@pytest.fixture(scope="module")
def after_plain_round():
    return after_a_round(PLAIN)


def test_without_a_perturbation_a_round_is_plain_training(after_plain_round):
    state, variables = after_plain_round, VARIABLES
    pool, rows = batch_of()

    def loss(params):
        logits = LINEAR.apply({**variables, "params": params}, as_float(pool), train=False).logits
        return jnp.mean(losses.cross_entropy(logits, rows.targets["labels"]))

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    np.testing.assert_allclose(state.history["loss"], [value, 0], rtol=1e-5)
    # The first step of Adam is the rate times the sign of the gradient, where that is not tiny.
    for before, after, slope in zip(
        *map(jax.tree.leaves, (variables["params"], state.variables["params"], gradient)), strict=True
    ):
        clear = np.abs(slope) > 1e-4
        np.testing.assert_allclose((before - after)[clear], 1e-3 * np.sign(slope)[clear], rtol=2e-3, atol=1e-6)
    chex.assert_trees_all_equal(state.variables["batch_stats"], variables["batch_stats"])
    assert state.epoch == 1


def test_one_row_of_a_small_batch_is_perturbed(after_plain_round):
    """One hundredth of eight rows, rounded down, would be none."""
    perturbed = after_a_round(dataclasses.replace(PLAIN, perturbation_rate=10.0))
    pairs = zip(*(jax.tree.leaves(state.variables["params"]) for state in (after_plain_round, perturbed)), strict=True)
    assert max(np.abs(plain - other).max() for plain, other in pairs) > 1e-4


def test_the_perturbation_is_found_without_the_labels(monkeypatch):
    """Where the network predicts the labels themselves, nothing changes; where it does not, the perturbation is another."""
    settings = dataclasses.replace(PLAIN, perturbation_rate=10.0, share=1.0)
    by_predictions = after_a_round(settings)
    pool, rows = batch_of()
    predicted = i_bau.predicted_classes(LINEAR, VARIABLES, as_float(pool))
    assert np.any(predicted != rows.targets["labels"])
    monkeypatch.setattr(i_bau, "predicted_classes", lambda model, variables, images: rows.targets["labels"])
    by_labels = after_a_round(settings)
    pairs = zip(*(jax.tree.leaves(state.variables["params"]) for state in (by_predictions, by_labels)), strict=True)
    assert max(np.abs(one - other).max() for one, other in pairs) > 1e-5


def test_bound_is_kept():
    clipped = jax.jit(clip_norm)
    np.testing.assert_allclose(clipped(jnp.array([3.0, 4.0]), 1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(clipped(jnp.array([3.0, 4.0]), 6.0), [3.0, 4.0])
    np.testing.assert_array_equal(clipped(jnp.zeros(2), 1.0), [0.0, 0.0])


def test_all_suspects_are_trained_in_one_call(tmp_path):
    inputs = tiny_inputs(tmp_path, LINEAR)
    settings = IBauSettings(rounds=2, batch_size=32, terms=2, learning_rate=1e-3)
    result = contract.run(I_BAU, inputs, settings)  # which receives no more than it declares
    again = run(inputs, settings)  # restored from the checkpoint
    chex.assert_trees_all_equal(result.variables, again.variables)
    chex.assert_trees_all_equal(result.variables["batch_stats"], inputs.attacked.variables["batch_stats"])
    before, after = (tree["params"]["classifier"]["kernel"] for tree in (inputs.attacked.variables, result.variables))
    assert np.all(np.abs(before - after).max(axis=(1, 2)) > 0)


def test_invalid_settings_are_refused():
    for change in ({"rounds": 0}, {"passes": 0}, {"terms": -1}, {"norm_bound": -1.0}, {"share": 2.0}):
        with pytest.raises(InputError, match=f"defense i_bau: {next(iter(change))} "):
            check(dataclasses.replace(IBauSettings(), **change))


def test_settings_are_checked_before_anything_is_trained():
    with pytest.raises(InputError, match="defense i_bau: rounds "):
        run(None, IBauSettings(rounds=0))
