"""LfD: weights against the paper's equations, and that low weights mean what they say."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses.contract import weighted_cross_entropy
from bdjax.defenses.lfd import (
    LfdSettings,
    above_clean_mean,
    combined,
    loss_history,
    row_weights,
    scaled,
    teacher_losses,
    threshold,
)
from bdjax.errors import InputError
from tests.defenses.tiny import LINEAR, TINY, tiny_inputs, tiny_variables

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
    teacher_losses = np.random.default_rng(0).permutation(np.linspace(0.1, 1, 10))
    assert np.sum(teacher_losses <= threshold(teacher_losses, alpha)) == count


def test_weights_are_within_bounds_and_zero_at_the_threshold():
    teacher_losses = np.random.default_rng(1).gamma(1.0, size=200)
    weights = row_weights(teacher_losses, LfdSettings(alpha=0.2, beta=0.5))
    gamma = threshold(teacher_losses, 0.2)
    assert weights[teacher_losses <= gamma].max() == 0 and weights[teacher_losses == gamma] == 0
    assert weights.max() == 1 and weights[teacher_losses > gamma].min() >= gamma / teacher_losses.max()
    assert np.all(np.diff(weights[np.argsort(teacher_losses)]) >= 0)


def test_a_constant_added_to_all_losses_leaves_the_candidates_alone():
    teacher_losses = np.random.default_rng(2).gamma(1.0, size=50)
    raised = teacher_losses + 3
    assert threshold(raised, 0.15) == pytest.approx(threshold(teacher_losses, 0.15) + 3)
    np.testing.assert_array_equal(raised <= threshold(raised, 0.15), teacher_losses <= threshold(teacher_losses, 0.15))


def test_a_percentile_cuts_outliers_off_at_one():
    teacher_losses = np.array([0.1, 0.2, 0.4, 0.5, 100.0])
    weights = row_weights(teacher_losses, LfdSettings(alpha=0.2, max_percentile=75))
    np.testing.assert_allclose(weights, [0, 0.4, 0.8, 1, 1])


def test_scaled_weights_have_mean_one_and_the_same_proportions():
    weights = row_weights(np.random.default_rng(3).gamma(1.0, size=300), LfdSettings(alpha=0.15))
    assert weights.mean() < 0.5  # the maximum is an outlier
    result = scaled(weights, "mean")
    assert result.mean() == pytest.approx(1, rel=1e-5) and result.dtype == np.float32
    np.testing.assert_allclose(result * weights.mean(), weights, rtol=1e-5)
    np.testing.assert_array_equal(scaled(weights, "printed"), weights)
    for without_scale in (-weights, 0 * weights):
        np.testing.assert_array_equal(scaled(without_scale, "mean"), without_scale)


def test_the_minimum_keeps_a_row_low_that_one_teacher_finds_easy():
    # [1, 3 teachers, 4 rows]: only the second teacher found the trigger, which is on row 0.
    losses = np.array([[[2.0, 1.0, 1.5, 2.5], [0.0, 1.2, 1.4, 2.0], [3.0, 0.9, 1.0, 2.2]]])
    assert combined(losses, "minimum").argmin() == 0
    assert combined(losses, "mean").argmin() == combined(losses, "median").argmin() == 1
    np.testing.assert_allclose(combined(losses, "minimum"), [[0.0, 0.9, 1.0, 2.0]])
    np.testing.assert_allclose(combined(losses, "median"), [[2.0, 1.0, 1.4, 2.2]])


def test_teachers_are_members_of_one_call_and_differ_in_their_start(tmp_path):
    inputs = tiny_inputs(tmp_path)
    inputs = dataclasses.replace(inputs, make_model=lambda name=None: LINEAR)
    members, num_rows = inputs.index.shape
    losses = teacher_losses(inputs, LfdSettings(teacher="lenet", teachers=3, teacher_epochs=1))
    assert losses.shape == (members, 3, num_rows) and np.isfinite(losses).all()
    assert all(np.abs(losses[:, i] - losses[:, j]).max() > 1e-3 for i, j in ((0, 1), (1, 2), (0, 2)))
    assert len(list(inputs.runner.folder.iterdir())) == 1


IMAGES, LABELS = np.random.default_rng(1).random((4, 8, 8, 1), np.float32), np.arange(4, dtype=np.int32)


@partial(jax.jit, static_argnames="loss_cap")
def gradient_of(weight, loss_cap=0.0):
    """The gradient of the mean weighted loss of four rows."""
    variables = tiny_variables(0)
    targets, objective = {"labels": jnp.asarray(LABELS), "weight": weight}, weighted_cross_entropy(TINY, loss_cap)

    def mean(params):
        return jnp.mean(objective(params, variables, jnp.asarray(IMAGES), targets, jax.random.key(0)).losses)

    return jax.grad(mean)(variables["params"])


@jax.jit
def row_gradients():
    """The gradient of each row's cross-entropy, leaves [4, ...]."""
    variables = tiny_variables(0)

    def loss(params):
        output = TINY.apply({**variables, "params": params}, jnp.asarray(IMAGES), train=True)
        return losses.cross_entropy(output.logits, jnp.asarray(LABELS))

    return jax.jacrev(loss)(variables["params"])


def assert_weighted(gradient, weight):
    expected = jax.tree.map(lambda rows: np.tensordot(np.array(weight), rows, 1) / 4, row_gradients())
    chex.assert_trees_all_close(gradient, expected, atol=1e-6)


def test_rows_of_weight_zero_have_no_gradient_and_negative_ones_ascend():
    assert_weighted(gradient_of(jnp.array([0.0, 0.0, 1.0, -0.5])), [0.0, 0.0, 1.0, -0.5])
    gradient = gradient_of(jnp.zeros(4))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_cap_ends_the_ascent_of_the_rows_above_it():
    variables = tiny_variables(0)
    output = TINY.apply(variables, jnp.asarray(IMAGES), train=True)
    rows = np.asarray(losses.cross_entropy(output.logits, jnp.asarray(LABELS)))
    cap = float(np.sort(rows)[1:3].mean())
    weight = np.float32([-1.0, -0.5, -2.0, -1.0])
    assert (rows > cap).sum() == 2
    assert_weighted(gradient_of(jnp.asarray(weight), loss_cap=cap), np.where(rows > cap, 0, weight))


def test_a_cap_ends_the_ascent_but_not_the_descent():
    gradient = gradient_of(-jnp.ones(4), loss_cap=1e-6)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert_weighted(gradient_of(jnp.ones(4), loss_cap=1e-6), np.ones(4))


def test_above_clean_mean_counts_poisons_only():
    row_losses = np.array([1.0, 3.0, 2.5, 0.1, 5.0])
    assert above_clean_mean(row_losses, np.array([False, False, True, True, True])) == 2


def test_loss_history_keeps_every_row_of_every_epoch(tmp_path):
    inputs = tiny_inputs(tmp_path)
    recipe = dataclasses.replace(inputs.recipe, batch_size=48)  # 320 rows are six batches and two thirds
    inputs = dataclasses.replace(inputs, recipe=recipe, make_model=lambda name: LINEAR)
    history = loss_history(inputs, None, 2)
    members, num_rows = inputs.index.shape
    assert history.shape == (members, 2, num_rows)
    seen = np.isfinite(history)
    batch = inputs.recipe.batch_size
    assert (seen.sum(axis=2) == num_rows // batch * batch).all() and num_rows % batch
    assert np.nanmean(history[:, 1]) < np.nanmean(history[:, 0])
    # The first batch's losses are those of fresh weights, near to log K; later ones are not all alike.
    assert np.nanmax(history[:, 0]) > np.log(10) > np.nanmin(history[:, 1])
