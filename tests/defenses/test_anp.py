"""ANP: which leaves are channels, what a perturbation is, masks that stay in [0, 1], and pruning at its limits."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import losses
from bdjax.defenses.anp import (
    AnpSettings,
    change_channels,
    channel_scales,
    check,
    clipped,
    draw_noise,
    highest_thresholds,
    learn_masks,
    mask_objective,
    prune,
    run,
)
from bdjax.errors import InputError
from bdjax.testing.small_network import small_model
from bdjax.training.member import Outcome, TrainConfig, make_optimiser, make_step
from tests.defenses.conftest import init_small

MODEL = small_model()


@pytest.fixture(scope="module")
def network():
    variables = init_small(0)
    # Scales and biases of a trained network are not ones and zeros.
    generator = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: (leaf + 0.2 * generator.normal(size=leaf.shape)).astype(np.float32),
        jax.device_get(variables["params"]),
    )
    return {**variables, "params": params}


@pytest.fixture(scope="module")
def batch():
    labels = np.arange(12, dtype=np.int32) % 10
    return np.random.default_rng(2).random((12, 8, 8, 1), np.float32), {"labels": labels}


def ones_like_scales(network):
    return jax.tree.map(np.ones_like, channel_scales(network["params"]))


def test_every_channel_of_batch_normalisation_has_a_mask(network):
    means = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(network["batch_stats"]) if "mean" in str(path)]
    scales = channel_scales(network["params"])
    assert sorted(scales) == ["stage1_norm", "stage2_norm", "stage3_norm"] and len(means) == 3
    assert [leaf.size for leaf in scales.values()] == [leaf.size for leaf in means] == [4, 8, 16]


def test_layers_inside_of_blocks_are_named_by_their_path():
    nested = {"stage1_block1": {"BatchNorm_0": {"scale": np.ones(2), "bias": np.ones(2)}}, "classifier": {"bias": 1}}
    assert list(channel_scales(nested)) == ["stage1_block1/BatchNorm_0"]
    changed = change_channels(nested, *({"stage1_block1/BatchNorm_0": np.full(2, by)} for by in (2, 3)))
    np.testing.assert_array_equal(changed["stage1_block1"]["BatchNorm_0"]["scale"], [2, 2])
    np.testing.assert_array_equal(changed["stage1_block1"]["BatchNorm_0"]["bias"], [3, 3])


def test_changing_channels_changes_their_scales_and_biases_alone(network):
    ones = ones_like_scales(network)
    chex.assert_trees_all_equal(change_channels(network["params"], ones, ones), network["params"])
    twice, thrice = (jax.tree.map(lambda leaf, by=by: by * leaf, ones) for by in (2.0, 3.0))
    changed, params = change_channels(network["params"], twice, thrice), network["params"]
    np.testing.assert_allclose(changed["stage1_norm"]["scale"], 2 * params["stage1_norm"]["scale"])
    np.testing.assert_allclose(changed["stage1_norm"]["bias"], 3 * params["stage1_norm"]["bias"])
    chex.assert_trees_all_equal(changed["classifier"], params["classifier"])
    chex.assert_trees_all_equal(changed["stage1_conv"], params["stage1_conv"])


@jax.jit
def _mask_losses(masks, network, batch, epsilon, alpha, key):
    objective = mask_objective.__wrapped__(MODEL, epsilon, alpha)  # traced numbers cannot be cached

    def loss(masks):
        outcome = objective(masks, {"network": network}, *batch, key)
        return outcome.losses.mean(), outcome.variables

    return jax.value_and_grad(loss, has_aux=True)(masks)


def mask_losses(epsilon, alpha, network, batch, seed=0):
    """The mean loss for masks of ones, its gradient, and the variables afterwards."""
    numbers = np.float32(epsilon), np.float32(alpha)
    (loss, variables), gradient = _mask_losses(
        ones_like_scales(network), network, batch, *numbers, jax.random.key(seed)
    )
    return loss, gradient, variables


def test_without_noise_the_gradient_is_that_of_cross_entropy(network, batch):
    ones = ones_like_scales(network)

    def entropy(masks):
        variables = {**network, "params": change_channels(network["params"], masks, ones)}
        return losses.cross_entropy(MODEL.apply(variables, batch[0], train=True).logits, batch[1]["labels"]).mean()

    expected = jax.jit(jax.value_and_grad(entropy))(ones)
    chex.assert_trees_all_close(mask_losses(0.0, 0.2, network, batch)[:2], expected, rtol=1e-3, atol=1e-5)


def test_noise_is_adversarial_and_drawn_anew(network, batch):
    clean = mask_losses(0.4, 1.0, network, batch)[0]
    noisy = mask_losses(0.4, 0.0, network, batch)[0]
    other = mask_losses(0.4, 0.0, network, batch, seed=1)[0]
    mixed = mask_losses(0.4, 0.25, network, batch)[0]
    assert noisy > clean + 0.1 and other > clean + 0.1 and noisy != other
    np.testing.assert_allclose(mixed, 0.25 * clean + 0.75 * noisy, rtol=1e-4)
    small = mask_losses(0.02, 0.0, network, batch)[0]
    assert clean < small < noisy


def test_noise_is_uniform_and_different_for_each_layer():
    noise = draw_noise(jax.random.key(0), {"a": jnp.ones(500), "b": jnp.ones(500)}, 0.4)
    assert all(-0.4 <= leaf.min() < -0.38 and 0.38 < leaf.max() <= 0.4 for leaf in noise.values())
    assert not np.array_equal(noise["a"], noise["b"])


def test_statistics_do_not_change(network, batch):
    chex.assert_trees_all_equal(mask_losses(0.4, 0.2, network, batch)[2], {"network": network})


def test_clipping_is_that_after_each_step_of_sgd_with_momentum():
    config = TrainConfig(optimiser="sgd", momentum=0.9, learning_rate=0.2, schedule="constant")

    def objective(params, variables, images, targets, key):
        # Pulls of changing sign, so that parameters reach both bounds and come back.
        per_row = jnp.sum(params["p"] * targets["pull"], axis=1) + 0.1 * jnp.sum(params["p"] ** 2)
        return Outcome(per_row, jnp.zeros((2, 2)), jnp.zeros(2, jnp.int32), variables)

    pulls = np.random.default_rng(0).standard_normal((40, 2, 3)) + np.sin(np.arange(40) / 4)[:, None, None]
    pulls = pulls.astype(np.float32)
    step = jax.jit(make_step(clipped(lambda p, *rest: objective({"p": p["p"][None]}, *rest), 0.2, 0.9), config))
    start, key = jnp.ones(3), jax.random.key(0)
    carry = ({"params": {"p": start}, "outside": {"p": jnp.zeros(3)}}, make_optimiser(config).init({"p": start}))
    expected, velocity, visited = np.ones(3), np.zeros(3), []
    for pull in pulls:
        batch = np.zeros((2, 1), np.float32), {"pull": pull}, np.float32(0.2), key
        carry, _ = step(*carry, *batch)
        velocity = 0.9 * velocity + pull.mean(0) + 0.2 * expected
        expected = np.clip(expected - 0.2 * velocity, 0, 1)
        visited.append(expected)
        np.testing.assert_allclose(np.clip(carry[0]["params"]["p"], 0, 1), expected, atol=1e-4)
    visited = np.array(visited)
    assert all(np.any(where) for where in (visited == 0, visited == 1, (visited > 0) & (visited < 1)))


def stacked_masks(network):
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), network["params"])
    generator = np.random.default_rng(3)
    scales = channel_scales(stacked)
    return stacked, {layer: generator.random(leaf.shape).astype(np.float32) for layer, leaf in scales.items()}


def test_pruning_at_its_limits(network):
    params, masks = stacked_masks(network)
    none = prune(params, masks, np.array([-0.1, -0.1], np.float32), False)
    chex.assert_trees_all_equal(none, params)
    one_of_two = prune(params, masks, np.array([-0.1, 1.0], np.float32), False)
    for layer, scale in channel_scales(one_of_two).items():
        np.testing.assert_array_equal(scale[0], channel_scales(params)[layer][0])
        assert not scale[1].any()
    np.testing.assert_array_equal(one_of_two["stage1_norm"]["bias"], params["stage1_norm"]["bias"])
    both = prune(params, masks, np.array([1.0, 1.0], np.float32), True)
    assert not both["stage1_norm"]["bias"].any() and both["classifier"]["bias"].any()
    half = prune(params, masks, np.array([0.5, 0.5], np.float32), False)
    np.testing.assert_array_equal(np.asarray(half["stage1_norm"]["scale"]) == 0, masks["stage1_norm"] <= 0.5)


def test_highest_threshold_that_keeps_the_accuracy():
    falls = np.array([0.31, 2.0, -1.0])  # where each member's accuracy falls
    got = highest_thresholds(lambda t: np.where(t < falls, 0.95, 0.5), np.full(3, 1.0), 0.1)
    np.testing.assert_allclose(got, [0.3, 0.9, -1.0])


def test_masks_of_all_suspects_are_learned_and_pruned(suspects):
    """On trained networks, whose normalisations are layers of their own."""
    inputs = suspects.inputs
    settings = AnpSettings(iterations=8, batch_size=32, threshold=0.97)
    masks = learn_masks(inputs, settings)
    kappa = np.concatenate(list(masks.values()), axis=1)
    assert kappa.min() >= 0 and kappa.max() == 1 and kappa.min() < 0.97
    result = run(inputs, settings)
    np.testing.assert_array_equal(result.facts["channels pruned"], (kappa <= 0.97).sum(axis=1))
    chex.assert_trees_all_equal(result.variables["batch_stats"], inputs.attacked.variables["batch_stats"])
    kept = run(inputs, dataclasses.replace(settings, threshold=-0.1))
    chex.assert_trees_all_equal(kept.variables, inputs.attacked.variables)
    careful = run(inputs, dataclasses.replace(settings, accuracy_loss=0.05))
    rows = inputs.clean_rows()
    before, after = (
        (inputs.logits(inputs.attacked.model, variables, rows).argmax(-1) == inputs.clean_labels).mean(1)
        for variables in (inputs.attacked.variables, careful.variables)
    )
    assert np.all(after >= before - 0.05)


def test_invalid_settings_are_refused(inputs):
    for change in ({"iterations": 0}, {"epsilon": -0.1}, {"alpha": 2.0}):
        with pytest.raises(InputError, match=f"defense anp: {next(iter(change))} "):
            check(dataclasses.replace(AnpSettings(), **change))
    with pytest.raises(InputError, match="defense anp: alpha "):
        run(inputs, AnpSettings(alpha=2.0))
