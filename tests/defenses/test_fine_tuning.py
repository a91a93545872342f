import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.fine_tuning import FineTuningSettings, cosine_sgd, run, weight_change
from bdjax.training.member import learning_rate_at, resume_from

SMALL = FineTuningSettings(epochs=3, batch_size=32, learning_rate=0.05)


def elsewhere(inputs, folder):
    """The same suspects without checkpoints."""
    return dataclasses.replace(inputs, runner=dataclasses.replace(inputs.runner, folder=folder))


def test_no_epochs_change_nothing(inputs):
    result = run(inputs, FineTuningSettings(epochs=0))
    jax.tree.map(np.testing.assert_array_equal, result.variables, inputs.attacked.variables)
    np.testing.assert_array_equal(result.facts["weight change"], 0)


def test_the_clean_rows_are_learned_and_nothing_else_is_read(inputs, tmp_path):
    result = run(inputs, SMALL)
    rows = inputs.clean_rows()
    before = inputs.losses(inputs.attacked.model, inputs.attacked.variables, rows).mean(axis=1)
    after = inputs.losses(result.model, result.variables, rows).mean(axis=1)
    assert (after < before).all()
    assert (result.facts["weight change"] > 0).all()
    alone = elsewhere(inputs.restricted_to("fine_tuning", ("attacked model", "clean rows")), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run(alone, SMALL).variables, result.variables)


def test_without_clean_rows_it_does_not_start(inputs):
    with pytest.raises(ValueError, match="needs the clean rows, which these inputs do not have"):
        run(dataclasses.replace(inputs, knowledge={"attacked model": inputs.attacked}), SMALL)


def test_the_recipe_is_sgd_with_half_a_cosine_and_otherwise_that_of_the_run(inputs):
    augmented = dataclasses.replace(inputs, recipe=dataclasses.replace(inputs.recipe, augmentation="crop_flip"))
    config = cosine_sgd(
        augmented, FineTuningSettings(epochs=100, batch_size=256, learning_rate=0.01, weight_decay=5e-4)
    )
    assert (config.optimiser, config.momentum, config.nesterov) == ("sgd", 0.9, False)
    assert (config.epochs, config.batch_size, config.weight_decay) == (100, 256, 5e-4)
    assert (config.augmentation, config.keep_last_batch) == ("crop_flip", inputs.recipe.keep_last_batch)
    state = resume_from({"params": jnp.ones(2)}, jax.random.key(0), config)
    rates = [learning_rate_at(state._replace(epoch=jnp.asarray(epoch)), config) for epoch in (0, 50, 100)]
    np.testing.assert_allclose(rates, [0.01, 0.005, 0], atol=1e-8)


def test_weight_change_is_relative_and_separate_for_each_member():
    before = {"a": jnp.array([[3.0, 0.0], [1.0, 0.0]]), "b": jnp.array([[[4.0]], [[0.0]]])}
    after = {"a": jnp.array([[3.0, 6.0], [1.0, 0.0]]), "b": jnp.array([[[-4.0]], [[0.0]]])}
    np.testing.assert_allclose(weight_change(before, after), [2.0, 0.0])
