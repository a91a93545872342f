"""CBD: its weights in numbers, its critic, and that the biased network stays as it is."""

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

SMALL = {
    "biased_epochs": 1,
    "epochs": 2,
    "learning_rate": 1e-2,
    "steps": ((1, 1e-3),),
    "optimiser": "adam",
    "batch_size": 32,
    "critic_learning_rate": 0.01,
}


def test_weights_in_numbers():
    biased, own = jnp.array([1, 3], jnp.float32), jnp.array([1, 1], jnp.float32)
    np.testing.assert_allclose(row_weights(biased, own), [0.5, 0.75], rtol=1e-6)
    np.testing.assert_allclose(batch_weights(biased, own), [0.8, 1.2], rtol=1e-6)


def test_weights_have_mean_one_and_equal_losses_count_alike():
    biased, own = jnp.asarray(np.random.default_rng(0).exponential(size=(2, 50)), jnp.float32)
    weight = row_weights(biased, own)
    assert ((weight > 0) & (weight < 1)).all()
    np.testing.assert_allclose(jnp.mean(batch_weights(biased, own)), 1, rtol=1e-6)
    np.testing.assert_allclose(batch_weights(own, own), np.ones(50), rtol=1e-6)
    np.testing.assert_array_equal(batch_weights(jnp.zeros(4), jnp.ones(4)), np.zeros(4))


def test_no_gradient_flows_through_the_weights():
    own = jnp.array([1, 2, 3], jnp.float32)
    gradient = jax.grad(lambda values: jnp.sum(batch_weights(own[::-1], values) * values))(own)
    np.testing.assert_allclose(gradient, batch_weights(own[::-1], own), rtol=1e-6)


def test_a_row_the_biased_network_knows_has_no_gradient(inputs):
    model, image_shape = inputs.make_model(), inputs.runner.image_shape
    own, biased = (model.init(jax.random.key(seed), image_shape) for seed in (0, 1))
    # A biased network that says class 3 whatever it sees, and is as sure as can be.
    classifier = jax.tree.map(jnp.zeros_like, biased["params"]["classifier"])
    classifier["bias"] = jnp.where(jnp.arange(10) == 3, 1e4, 0).astype(jnp.float32)
    biased["params"]["classifier"] = classifier
    images = jnp.asarray(inputs.pool[:4], jnp.float32) / 255

    objective = jax.jit(reweighted_cross_entropy(model))

    def rows(labels):
        targets, variables = {"labels": jnp.array(labels, jnp.int32)}, {**own, "biased": biased}
        return objective(own["params"], variables, images, targets, jax.random.key(0))

    outcome = rows([3, 3, 1, 2])
    np.testing.assert_array_equal(outcome.losses[:2], np.zeros(2))
    assert (outcome.losses[2:] > 0).all()
    chex.assert_trees_all_equal(outcome.variables["biased"], biased)


def test_power_iteration_finds_the_largest_singular_value():
    kernel = jnp.asarray(np.diag([3.0, 1.0, 0.5])[:, :2], jnp.float32)
    np.testing.assert_allclose(spectral_norm(kernel), 3, rtol=1e-3)
    assert np.isfinite(spectral_norm(jnp.zeros((3, 2))))


def test_critic_tells_pairs_that_belong_together():
    theirs = jax.random.normal(jax.random.key(0), (64, 4))
    alike, unlike = theirs, jax.random.normal(jax.random.key(1), (64, 4))
    step = jax.jit(critic_step)

    def trained(own):
        critic = init_critic(jax.random.key(2), 4)
        for number in range(150):
            critic = step(critic, theirs, own, jnp.float32(0.02), jax.random.fold_in(jax.random.key(3), number))
        told = [dependence(critic["params"], theirs, own, jax.random.key(number)) for number in range(20)]
        return critic, float(np.mean(told))

    critic, found = trained(alike)
    assert int(critic["step"]) == 150
    for layer in critic["params"].values():
        assert 0.9 < np.linalg.svd(np.asarray(layer["kernel"]), compute_uv=False)[0] < 1.2
    assert found > 0.1 and found > 2 * trained(unlike)[1]


@pytest.mark.parametrize("disentangle", [False, True])
def test_result_is_the_clean_network_alone(inputs, disentangle):
    result = run(inputs, CBDSettings(**SMALL, disentangle=disentangle))
    assert result.variables.keys() == inputs.attacked.variables.keys()
    chex.assert_trees_all_equal_shapes(result.variables, inputs.attacked.variables)
    chex.assert_tree_all_finite(result.variables)
    assert result.flags is None and result.scores.shape == inputs.labels.shape and (result.scores <= 0).all()
    share = result.facts["rows that count at the end"]
    assert ((share > 0) & (share <= 1)).all()
