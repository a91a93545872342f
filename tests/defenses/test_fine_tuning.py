import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.fine_tuning import FineTuningSettings, cosine_sgd, run, weight_change
from bdjax.training.member import learning_rate_at, resume_from

SMALL = FineTuningSettings(epochs=3, batch_size=32, learning_rate=0.05)


def elsewhere(given, folder):
    """The same suspects, who find nothing that was trained before."""
    return dataclasses.replace(given, runner=dataclasses.replace(given.runner, folder=folder))


def test_no_epochs_change_nothing(given):
    result = run(given, FineTuningSettings(epochs=0))
    jax.tree.map(np.testing.assert_array_equal, result.variables, given.attacked.variables)
    np.testing.assert_array_equal(result.facts["weight change"], 0)


def test_the_clean_rows_are_learnt_and_nothing_else_is_looked_at(given, tmp_path):
    result = run(given, SMALL)
    rows = given.clean_rows()
    before = given.losses(given.attacked.model, given.attacked.variables, rows).mean(axis=1)
    after = given.losses(result.model, result.variables, rows).mean(axis=1)
    assert (after < before).all()
    assert (result.facts["weight change"] > 0).all()
    alone = elsewhere(given.restricted_to("fine_tuning", ("attacked model", "clean rows")), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run(alone, SMALL).variables, result.variables)


def test_without_clean_rows_it_does_not_start(given):
    with pytest.raises(ValueError, match="no clean rows"):
        run(dataclasses.replace(given, knowledge={"attacked model": given.attacked}), SMALL)


def test_the_recipe_is_sgd_on_half_a_cosine_and_else_the_run_s_own(given):
    own = dataclasses.replace(given, recipe=dataclasses.replace(given.recipe, augmentation="crop_flip"))
    config = cosine_sgd(own, FineTuningSettings(epochs=100, batch_size=256, learning_rate=0.01, weight_decay=5e-4))
    assert (config.optimiser, config.momentum, config.nesterov) == ("sgd", 0.9, False)
    assert (config.epochs, config.batch_size, config.weight_decay) == (100, 256, 5e-4)
    assert (config.augmentation, config.keep_last_batch) == ("crop_flip", given.recipe.keep_last_batch)
    state = resume_from({"params": jnp.ones(2)}, jax.random.key(0), config)
    rates = [learning_rate_at(state._replace(epoch=jnp.asarray(epoch)), config) for epoch in (0, 50, 100)]
    np.testing.assert_allclose(rates, [0.01, 0.005, 0], atol=1e-8)


def test_weight_change_is_relative_and_each_member_s_own():
    before = {"a": jnp.array([[3.0, 0.0], [1.0, 0.0]]), "b": jnp.array([[[4.0]], [[0.0]]])}
    after = {"a": jnp.array([[3.0, 6.0], [1.0, 0.0]]), "b": jnp.array([[[-4.0]], [[0.0]]])}
    np.testing.assert_allclose(weight_change(before, after), [2.0, 0.0])
