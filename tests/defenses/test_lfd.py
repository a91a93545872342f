"""LfD: weights against the paper's equations, and that low weights mean what they say."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses.contract import weighted_cross_entropy
from bdjax.defenses.lfd import LfdSettings, above_clean_mean, loss_history, row_weights, threshold
from bdjax.errors import InputError
from tests.defenses.conftest import small_model

GOLDEN_LOSSES = np.array([0.1, 0.2, 1.0, 2.0])


def test_golden_weights():
    settings = LfdSettings(alpha=0.5, beta=1e-3)
    assert threshold(GOLDEN_LOSSES, 0.5) == 0.2
    np.testing.assert_allclose(row_weights(GOLDEN_LOSSES, settings), [-5e-5, 0, 0.5, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("weighting", "expected"), [("ascent", [-1, -1, 1, 1]), ("drop", [0, 0, 1, 1]), ("plain", [1, 1, 1, 1])]
)
def test_ablations(weighting, expected):
    np.testing.assert_array_equal(row_weights(GOLDEN_LOSSES, LfdSettings(alpha=0.5, weighting=weighting)), expected)


def test_unknown_weighting_is_refused():
    with pytest.raises(InputError, match="weighting 'none' is not one of weighted ascent, ascent, drop, plain"):
        row_weights(GOLDEN_LOSSES, LfdSettings(weighting="none"))


@pytest.mark.parametrize(("alpha", "count"), [(0.01, 1), (0.1, 1), (0.15, 2), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_candidates_are_as_many_as_alpha_says(alpha, count):
    own = np.random.default_rng(0).permutation(np.linspace(0.1, 1, 10))
    assert np.sum(own <= threshold(own, alpha)) == count


def test_weights_are_within_bounds_and_zero_at_the_threshold():
    own = np.random.default_rng(1).gamma(1.0, size=200)
    weights = row_weights(own, LfdSettings(alpha=0.2, beta=0.5))
    gamma = threshold(own, 0.2)
    assert weights[own <= gamma].max() == 0 and weights[own == gamma] == 0
    assert weights.max() == 1 and weights[own > gamma].min() >= gamma / own.max()
    assert np.all(np.diff(weights[np.argsort(own)]) >= 0)


def test_a_constant_added_to_all_losses_leaves_the_candidates_alone():
    own = np.random.default_rng(2).gamma(1.0, size=50)
    assert threshold(own + 3, 0.15) == pytest.approx(threshold(own, 0.15) + 3)
    np.testing.assert_array_equal(own + 3 <= threshold(own + 3, 0.15), own <= threshold(own, 0.15))


def test_a_percentile_cuts_outliers_off_at_one():
    own = np.array([0.1, 0.2, 0.4, 0.5, 100.0])
    weights = row_weights(own, LfdSettings(alpha=0.2, max_percentile=75))
    np.testing.assert_allclose(weights, [0, 0.4, 0.8, 1, 1])


def _gradient(weight, loss_cap=0.0, scale=1.0):
    model = small_model()
    variables = jax.jit(lambda key: model.init(key, (8, 8, 1)))(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * scale, variables["params"])
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))
    targets = {"labels": jnp.array([0, 1, 2, 3], jnp.int32), "weight": jnp.asarray(weight, jnp.float32)}
    objective = weighted_cross_entropy(model, loss_cap)

    def mean(params):
        return jnp.mean(objective(params, variables, images, targets, jax.random.key(0)).losses)

    def plain(params, rows):
        output = model.apply({**variables, "params": params}, images, train=True)
        return jnp.sum(losses.cross_entropy(output.logits, targets["labels"])[jnp.array(rows)]) / 4

    return jax.jit(jax.grad(mean))(params), lambda rows: jax.jit(jax.grad(plain), static_argnums=1)(params, rows)


def test_rows_of_weight_zero_have_no_gradient_and_negative_ones_ascend():
    gradient, plain = _gradient([0.0, 0.0, 1.0, -0.5])
    expected = jax.tree.map(lambda a, b: a - 0.5 * b, plain((2,)), plain((3,)))
    chex.assert_trees_all_close(gradient, expected, atol=1e-6)
    gradient, _ = _gradient([0.0, 0.0, 0.0, 0.0])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_cap_ends_the_ascent_but_not_the_descent():
    gradient, _ = _gradient([-1.0, -1.0, -1.0, -1.0], loss_cap=1e-6)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    gradient, plain = _gradient([1.0, 1.0, 1.0, 1.0], loss_cap=1e-6)
    chex.assert_trees_all_close(gradient, plain((0, 1, 2, 3)), atol=1e-6)


def test_above_clean_mean_counts_poisons_only():
    own = np.array([1.0, 3.0, 2.5, 0.1, 5.0])
    assert above_clean_mean(own, np.array([False, False, True, True, True])) == 2


def test_loss_history_keeps_every_row_of_every_epoch(inputs):
    history = loss_history(inputs, None, 2)
    members, num_rows = inputs.index.shape
    assert history.shape == (members, 2, num_rows)
    seen = np.isfinite(history)
    batch = inputs.recipe.batch_size
    assert (seen.sum(axis=2) == num_rows // batch * batch).all()
    assert np.nanmean(history[:, 1]) < np.nanmean(history[:, 0])
    # The first batch's losses are those of fresh weights, near to log K; later ones are not all alike.
    assert np.nanmax(history[:, 0]) > np.log(10) > np.nanmin(history[:, 1])
