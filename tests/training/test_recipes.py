import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.models import MODELS, make_model
from bdjax.training import recipes
from bdjax.training.member import TrainConfig, make_optimiser, parameter_kinds, triangle_at

BATCH = 512


def test_a_step_is_the_published_one_for_a_summed_loss():
    """Published: SGD with Nesterov momentum on the sum over the batch, decay over each parameter's own rate."""
    config = TrainConfig(batch_size=BATCH, **recipes.fields("speedrun", BATCH))
    kilo = 1024 * (1 + 1 / (1 - 0.85))
    rate, decay = 11.5 / kilo, 0.0153 * BATCH / kilo
    params = {"stage1_norm1": {"scale": 1.0, "bias": 0.3}, "classifier": {"kernel": -0.7, "bias": 0.2}}
    params = jax.tree.map(lambda value: jnp.asarray([value], jnp.float32), params)
    rates = {"stage1_norm1": {"scale": 0.0, "bias": 64 * rate}, "classifier": {"kernel": rate, "bias": rate}}
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    momentum = jax.tree.map(np.zeros_like, expected)
    optimiser = make_optimiser(config)
    state = optimiser.init(params)
    generator = np.random.default_rng(0)
    for schedule in (0.2, 1.0, 0.5):
        gradient = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), params)
        direction, state = optimiser.update(gradient, state, params)
        params = jax.tree.map(lambda p, d, s=schedule: p - s * config.learning_rate * d, params, direction)

        def step(p, g, m, r, schedule=schedule):
            d = BATCH * np.asarray(g, np.float64) + (decay / r * p if r else 0)
            m = 0.85 * m + d
            return p - schedule * r * (d + 0.85 * m), m

        stepped = jax.tree.map(step, expected, gradient, momentum, rates)
        expected = jax.tree.map(lambda pair: pair[0], stepped, is_leaf=lambda node: isinstance(node, tuple))
        momentum = jax.tree.map(lambda pair: pair[1], stepped, is_leaf=lambda node: isinstance(node, tuple))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5), params, expected)
    assert params["stage1_norm1"]["scale"] == 1


def test_without_a_recipe_the_optimiser_is_unchanged():
    plain = make_optimiser(TrainConfig(optimiser="sgd", weight_decay=0.1))
    assert jax.tree.structure(plain.init({"a": jnp.ones(2)})).num_leaves == 1


def test_the_triangle():
    config = TrainConfig(schedule="triangle")
    progress = jnp.asarray([0.0, 0.115, 0.23, 0.615, 1.0])
    np.testing.assert_allclose(triangle_at(progress, config), [0.2, 0.6, 1.0, 0.535, 0.07], atol=1e-6)


def test_rate_and_decay_are_proportional_to_the_batch_size():
    small, large = recipes.fields("speedrun", 64), recipes.fields("speedrun", 256)
    for name in ("learning_rate", "weight_decay"):
        assert large[name] == pytest.approx(4 * small[name])
    assert {name for name in small if small[name] != large[name]} == {"learning_rate", "weight_decay"}


def test_without_gives_the_defaults_back():
    plain = TrainConfig(epochs=3, augmentation="crop")
    named = dataclasses.replace(plain, **recipes.fields("speedrun", 64))
    assert recipes.without(plain) == plain
    assert recipes.without(named) == dataclasses.replace(plain, learning_rate=recipes.PLAIN_RATE, schedule="cosine")


@pytest.mark.parametrize("name", ["resnet10", "wrn_10_2", "vgg_s", "mobilenet_v2_s", "pyramidnet_11_24", "speedrun"])
def test_every_normalisation_is_recognised(name):
    assert name in MODELS
    model = make_model(name, 3, 2, "native")
    params = jax.eval_shape(lambda key: model.init(key, (8, 8, 1)), jax.random.key(0))["params"]
    kinds = jax.tree_util.tree_leaves_with_path(parameter_kinds(params))
    of_scales = [kind for path, kind in kinds if path[-1].key == "scale"]
    assert of_scales and set(of_scales) == {"norm scale"}
    assert [kind for _, kind in kinds].count("norm bias") == len(of_scales)
