"""The toy network has two features, one tap of one pixel: everything can be computed by hand."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.suppression import most_pairs, suppressed_cross_entropy
from bdjax.defenses.contract import weighted_cross_entropy
from bdjax.models import make_model
from bdjax.types import Model, ModelOutput

CLASSES, ROWS = 3, 5
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.random((ROWS, 2, 1, 1, 4)).astype(np.float32)  # two views of each row
LABELS = np.array([0, 1, 2, 1, 0], np.int32)
SUPPRESSION = np.array([0.0, 2.0, 0.0, 0.5, 2.0], np.float32)
PARAMS = {
    "features": jnp.asarray(GENERATOR.normal(size=(4, 2)), jnp.float32),
    "head": jnp.asarray(GENERATOR.normal(size=(2, CLASSES)), jnp.float32),
}


def apply(variables, images, *, train, edits=None):
    del train, edits
    features = images @ variables["params"]["features"]
    logits = jnp.mean(features, axis=(1, 2)) @ variables["params"]["head"]
    # What a batch leaves behind in the running statistics, for the test of which view does.
    return ModelOutput(logits, {"last": features}, {**variables, "batch_stats": {"mean": jnp.mean(images)}})


TOY = Model(lambda key, shape: {"params": PARAMS, "batch_stats": {"mean": jnp.float32(0)}}, apply, CLASSES, "toy")
VARIABLES = {"params": PARAMS, "batch_stats": {"mean": jnp.float32(0)}}


def run(objective, params, images=IMAGES, suppression=SUPPRESSION, variables=VARIABLES):
    targets = {"labels": jnp.asarray(LABELS), "suppression": jnp.asarray(suppression), "weight": jnp.ones(ROWS)}
    return jax.jit(objective)(params, variables, jnp.asarray(images), targets, jax.random.key(0))


def cross_entropy(logits):
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(ROWS), LABELS]


def test_values_are_those_of_the_equation():
    params = jax.tree.map(np.asarray, PARAMS)
    features = IMAGES[:, :, 0, 0] @ params["features"]  # [N, 2 views, 2]
    logits = features[:, 0] @ params["head"]
    expected = cross_entropy(logits) + SUPPRESSION * np.square(features[:, 0] - features[:, 1]).mean(-1)
    outcome = run(suppressed_cross_entropy(TOY), PARAMS)
    np.testing.assert_allclose(outcome.losses, expected, rtol=1e-5)
    np.testing.assert_allclose(outcome.logits, logits, rtol=1e-5)
    np.testing.assert_array_equal(outcome.labels, LABELS)


def test_no_gradient_flows_through_the_partner():
    """By the chain rule with the partner's features fixed: only the first view has a gradient."""

    def loss(params):
        return jnp.sum(run(suppressed_cross_entropy(TOY), params).losses)

    def plain(params):
        return jnp.sum(run(suppressed_cross_entropy(TOY), params, suppression=np.zeros(ROWS)).losses)

    params = jax.tree.map(np.asarray, PARAMS)
    learnt, partner = IMAGES[:, 0, 0, 0], IMAGES[:, 1, 0, 0]
    apart = (learnt - partner) @ params["features"]  # [N, 2]
    held = np.einsum("n,ni,nj->ij", SUPPRESSION, learnt, 2 * apart / 2)
    both = np.einsum("n,ni,nj->ij", SUPPRESSION, learnt - partner, 2 * apart / 2)
    added = jax.jit(jax.grad(loss))(PARAMS)["features"] - jax.jit(jax.grad(plain))(PARAMS)["features"]
    np.testing.assert_allclose(added, held, rtol=1e-4, atol=1e-5)
    assert np.abs(both - held).max() > 0.1


def test_running_statistics_are_those_of_the_learnt_views():
    outcome = run(suppressed_cross_entropy(TOY), PARAMS)
    np.testing.assert_allclose(outcome.variables["batch_stats"]["mean"], IMAGES[:, 0].mean(), rtol=1e-6)


@cache
def outcome_and_gradient(pairs):
    """In one program for each number of pairs."""

    def loss(params):
        outcome = run(suppressed_cross_entropy(TOY, pairs=pairs), params)
        return jnp.sum(outcome.losses), outcome

    (_, outcome), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    return outcome, gradient


@pytest.mark.parametrize("pairs", [3, 4, ROWS])
def test_partners_in_the_same_batch_have_the_same_values_and_gradients_without_normalisation(pairs):
    """Three rows are suppressed; partners of other rows have no effect."""
    (apart, of_apart), (together, of_together) = (outcome_and_gradient(number) for number in (0, pairs))
    # Logits are sums of larger numbers, which a CPU adds in an order that depends on how many rows there are.
    np.testing.assert_allclose(together.losses, apart.losses, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(together.logits, apart.logits, rtol=1e-6, atol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (of_apart, of_together)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    joined = np.concatenate([IMAGES[:, 0], IMAGES[[1, 4, 3, 0, 2][:pairs], 1]])  # by suppression, then in order
    np.testing.assert_allclose(together.variables["batch_stats"]["mean"], joined.mean(), rtol=1e-6)


def test_rows_beyond_the_number_of_pairs_are_not_suppressed():
    plain, one = (
        run(suppressed_cross_entropy(TOY, pairs=1), PARAMS, suppression=values).losses
        for values in (np.zeros(ROWS), SUPPRESSION)
    )
    assert np.flatnonzero(np.asarray(one) != np.asarray(plain)).tolist() == [1]


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.1, 34), (0.5, 98), (1.0, 128)])
def test_most_pairs_of_a_batch_of_128(share, most):
    assert most_pairs(128, share) == most
    draws = np.random.default_rng(0).binomial(128, share, 10_000)
    assert draws.max() <= most


def test_a_row_that_is_its_own_partner_is_not_suppressed():
    same = np.repeat(IMAGES[:, :1], 2, axis=1)
    losses = run(suppressed_cross_entropy(TOY), PARAMS, images=same).losses
    plain = run(suppressed_cross_entropy(TOY), PARAMS, suppression=np.zeros(ROWS)).losses
    np.testing.assert_array_equal(losses, plain)


@pytest.fixture(scope="module")
def network():
    model = make_model("vbd_16p", CLASSES, 4)
    return model, jax.jit(model.init, static_argnums=1)(jax.random.key(0), (8, 8, 1))


def test_suppression_of_0_is_plain_training(network):
    """On a network with batch normalisation: partners leave nothing behind, neither in gradients nor in statistics."""
    model, variables = network
    views = np.random.default_rng(1).random((ROWS, 2, 8, 8, 1)).astype(np.float32)

    def gradient(objective, images):
        def loss(params):
            outcome = run(objective, params, images, np.zeros(ROWS, np.float32), variables)
            return jnp.mean(outcome.losses), outcome.variables["batch_stats"]

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    suppressed = gradient(suppressed_cross_entropy(model), views)
    plain = gradient(weighted_cross_entropy(model), views[:, 0])
    assert jax.tree.structure(suppressed) == jax.tree.structure(plain)
    for one, other in zip(jax.tree.leaves(suppressed), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(suppressed[0]))


def test_objectives_of_one_model_are_one_function():
    """Else each stage would compile its own."""
    assert suppressed_cross_entropy(TOY) is suppressed_cross_entropy(TOY)
