"""CBD: its weights in numbers, its critic, and that the biased network does not change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.cbd import (
    CBDSettings,
    batch_weights,
    critic_step,
    dependence,
    init_critic,
    reweighted_cross_entropy,
    row_weights,
    run,
    spectral_norm,
)
from bdjax.testing.small_network import small_model
from tests.defenses.conftest import init_small

SMALL = {
    "biased_epochs": 1,
    "epochs": 2,
    "learning_rate": 1e-2,
    "steps": ((1, 1e-3),),
    "optimiser": "adam",
    "batch_size": 32,
    "critic_learning_rate": 0.01,
}


weights_of = jax.jit(lambda biased, clean: (row_weights(biased, clean), batch_weights(biased, clean)))


def test_weights_in_numbers():
    weight, rescaled = weights_of(np.array([1, 3], np.float32), np.array([1, 1], np.float32))
    np.testing.assert_allclose(weight, [0.5, 0.75], rtol=1e-6)
    np.testing.assert_allclose(rescaled, [0.8, 1.2], rtol=1e-6)


def test_weights_have_mean_one_and_equal_losses_have_equal_weights():
    biased, clean = np.random.default_rng(0).exponential(size=(2, 50)).astype(np.float32)
    weight, rescaled = weights_of(biased, clean)
    assert ((weight > 0) & (weight < 1)).all()
    np.testing.assert_allclose(np.mean(rescaled), 1, rtol=1e-6)
    np.testing.assert_allclose(weights_of(clean, clean)[1], np.ones(50), rtol=1e-6)
    np.testing.assert_array_equal(weights_of(np.zeros_like(clean), clean)[1], np.zeros(50))


def test_no_gradient_flows_through_the_weights():
    clean = np.array([1, 2, 3], np.float32)
    gradient = jax.jit(jax.grad(lambda values: jnp.sum(batch_weights(clean[::-1], values) * values)))(clean)
    np.testing.assert_allclose(gradient, weights_of(clean[::-1], clean)[1], rtol=1e-6)


def test_rows_that_the_biased_network_has_learned_have_no_gradient():
    clean, biased = jax.tree.map(np.array, init_small(0)), jax.tree.map(np.array, init_small(1))
    # A biased network that predicts class 3 for every image with probability 1.
    biased["params"]["classifier"]["kernel"][:] = 0
    biased["params"]["classifier"]["bias"][:] = np.where(np.arange(10) == 3, 1e4, 0)
    images = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    targets, variables = {"labels": np.array([3, 3, 1, 2], np.int32)}, {**clean, "biased": biased}
    objective = jax.jit(reweighted_cross_entropy(small_model()))
    outcome = objective(clean["params"], variables, images, targets, jax.random.key(0))
    np.testing.assert_array_equal(outcome.losses[:2], np.zeros(2))
    assert (outcome.losses[2:] > 0).all()
    chex.assert_trees_all_equal(outcome.variables["biased"], biased)


def test_power_iteration_finds_the_largest_singular_value():
    kernel = jnp.asarray(np.diag([3.0, 1.0, 0.5])[:, :2], jnp.float32)
    norm = jax.jit(spectral_norm)
    np.testing.assert_allclose(norm(kernel), 3, rtol=1e-3)
    assert np.isfinite(norm(jnp.zeros((3, 2))))


def test_critic_distinguishes_pairs_from_the_same_image():
    biased, unrelated = np.random.default_rng(0).standard_normal((2, 64, 4)).astype(np.float32)

    @jax.jit
    def train(clean):
        def step(critic, key):
            return critic_step(critic, biased, clean, jnp.float32(0.02), key), None

        critic, _ = jax.lax.scan(step, init_critic(jax.random.key(2), 4), jax.random.split(jax.random.key(3), 150))
        keys = jax.random.split(jax.random.key(4), 20)
        found = jax.lax.map(lambda key: dependence(critic["params"], biased, clean, key), keys)
        return critic, jnp.mean(found)

    critic, found = train(biased)
    assert int(critic["step"]) == 150
    for layer in critic["params"].values():
        assert 0.9 < np.linalg.svd(np.asarray(layer["kernel"]), compute_uv=False)[0] < 1.2
    assert found > 0.1 and found > 2 * train(unrelated)[1]


@pytest.mark.slow
@pytest.mark.parametrize("disentangle", [False, True])
def test_result_is_the_clean_network_alone(inputs, disentangle):
    result = run(inputs, CBDSettings(**SMALL, disentangle=disentangle))
    assert result.variables.keys() == inputs.attacked.variables.keys()
    chex.assert_trees_all_equal_shapes(result.variables, inputs.attacked.variables)
    chex.assert_tree_all_finite(result.variables)
    assert result.flags is None and result.scores.shape == inputs.labels.shape and (result.scores <= 0).all()
    share = result.facts["rows that count at the end"]
    assert ((share > 0) & (share <= 1)).all()
