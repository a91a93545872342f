"""I-BAU: the hyper-gradient against closed forms, a round against plain steps, and statistics that stay."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses.contract import labelled
from bdjax.defenses.i_bau import IBauSettings, clip_norm, hyper_gradient, make_round, run
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.training.member import TrainConfig, as_float, resume_from

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


@pytest.mark.parametrize("terms", [0, 1, 5, 100])
def test_hyper_gradient_of_a_quadratic(terms):
    w = np.linalg.solve(A, B @ THETA)
    got = jax.jit(lambda w, theta: hyper_gradient(outer_loss, inner_step, w, theta, terms))(w, jnp.asarray(THETA))
    series = sum((np.linalg.matrix_power(np.eye(2) - RATE * A, k) for k in range(terms)), np.zeros((2, 2)))
    np.testing.assert_allclose(got, THETA + RATE * B.T @ series @ (w - C), rtol=1e-5, atol=1e-6)
    exact = jax.grad(lambda theta: outer_loss(jnp.linalg.solve(A, B @ theta), theta))(jnp.asarray(THETA))
    if terms == 100:
        np.testing.assert_allclose(got, exact, rtol=1e-4)
    else:
        assert np.abs(got - exact).max() > 1e-2


def batch_of(rows=8):
    pool = jax.random.randint(jax.random.key(2), (rows, 8, 8, 1), 0, 256).astype(jnp.uint8)
    return pool, labelled(np.arange(rows), np.arange(rows) % 10)


def test_second_derivatives_agree_between_lowerings():
    """The layers' gradients are written by hand: their derivatives, which the hyper-gradient needs, must hold too."""
    pool, rows = batch_of(4)
    images, labels, results = as_float(pool), rows.targets["labels"], []
    for lowering in ("native", "shifted"):
        model = make_model("resnet10", 10, 2, lowering)
        variables = jax.jit(lambda key, model=model: model.init(key, (8, 8, 1)))(jax.random.key(0))

        def slope(delta, params, model=model, variables=variables):
            def loss(delta):
                logits = model.apply({**variables, "params": params}, images + delta[None], train=False).logits
                return jnp.mean(losses.cross_entropy(logits, labels))

            return jax.grad(loss)(delta)

        def mixed(delta, params, slope=slope):
            return jax.vjp(slope, delta, params)[1](jnp.ones_like(delta))

        results.append(jax.jit(mixed)(jnp.full((8, 8, 1), 0.1), variables["params"]))
    chex.assert_trees_all_close(*results, rtol=1e-2, atol=1e-4)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(results[0][1])) > 1e-3


@pytest.fixture(scope="module")
def small():
    model = make_model("resnet10", 10, 2)
    return model, jax.jit(lambda key: model.init(key, (8, 8, 1)))(jax.random.key(0))


def played(small, settings):
    model, variables = small
    config = TrainConfig(
        epochs=2, batch_size=settings.batch_size, learning_rate=settings.learning_rate, schedule="constant"
    )
    pool, rows = batch_of()
    play = make_round(model, config, settings)
    return jax.jit(play)(resume_from(variables, jax.random.key(1), config), rows, pool)


def test_without_a_perturbation_a_round_is_plain_training(small):
    settings = IBauSettings(batch_size=8, perturbation_rate=0.0, terms=0, learning_rate=1e-3)
    state = played(small, settings)
    model, variables = small
    pool, rows = batch_of()

    def loss(params):
        logits = model.apply({**variables, "params": params}, as_float(pool), train=False).logits
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


def test_one_row_of_a_small_batch_is_perturbed(small):
    """One hundredth of eight rows, rounded down, would be none."""
    plain = IBauSettings(batch_size=8, perturbation_rate=0.0, terms=0)
    perturbed = dataclasses.replace(plain, perturbation_rate=10.0)
    pairs = zip(*(jax.tree.leaves(played(small, one).variables["params"]) for one in (plain, perturbed)), strict=True)
    assert max(np.abs(one - other).max() for one, other in pairs) > 1e-5


def test_bound_is_kept():
    np.testing.assert_allclose(clip_norm(jnp.array([3.0, 4.0]), 1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(clip_norm(jnp.array([3.0, 4.0]), 6.0), [3.0, 4.0])
    np.testing.assert_array_equal(clip_norm(jnp.zeros(2), 1.0), [0.0, 0.0])


def test_all_suspects_play_in_one_call(inputs):
    settings = IBauSettings(rounds=2, batch_size=32, terms=2, learning_rate=1e-3)
    result = run(inputs, settings)
    again = run(inputs, settings)  # read back
    chex.assert_trees_all_equal(result.variables, again.variables)
    chex.assert_trees_all_equal(result.variables["batch_stats"], inputs.attacked.variables["batch_stats"])
    before, after = (tree["params"]["classifier"]["kernel"] for tree in (inputs.attacked.variables, result.variables))
    assert np.all(np.abs(before - after).max(axis=(1, 2)) > 0)


def test_settings_that_cannot_be_are_refused(inputs):
    for change in ({"rounds": 0}, {"passes": 0}, {"terms": -1}, {"norm_bound": -1.0}, {"share": 2.0}):
        with pytest.raises(InputError, match=f"defense i_bau: {next(iter(change))} "):
            run(inputs, dataclasses.replace(IBauSettings(), **change))
