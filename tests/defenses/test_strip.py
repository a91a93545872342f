import dataclasses
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses import contract
from bdjax.defenses.contract import PoolRows
from bdjax.defenses.strip import (
    STRIP,
    StripSettings,
    check,
    choose_overlays,
    mix,
    mixed_entropies,
    run,
    with_rejection,
)
from bdjax.errors import InputError
from bdjax.types import Model, ModelOutput
from tests.defenses.tiny import TINY, tiny_inputs

SETTINGS = StripSettings(num_overlays=8, false_rejection_rate=0.05)
CLASSES = 4


def images_of(seed, rows=6, side=5):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(rows, side, side, 1)).astype(np.float32))


def toy(logits):
    """A network whose logits are a function of the images, and whose only tap is the images."""

    def apply(variables, images, *, train, edits=None):
        del train
        taps = {"stage1": images if edits is None else edits["stage1"](images)}
        return ModelOutput(logits(taps["stage1"]) + variables["params"]["bias"][None], taps, variables)

    return Model(lambda key, shape: {"params": {"bias": np.zeros(CLASSES, np.float32)}}, apply, CLASSES, "toy")


def by_corner(images):
    """Class 0, whatever else is in the image, if the corner is at least half bright; else by the mean of the rest."""
    rest = jnp.mean(images, axis=(1, 2, 3))
    spread = 40.0 * rest[:, None] * jnp.arange(1, 1 + CLASSES, dtype=jnp.float32)[None] * jnp.array([[1, -1, 1, -1.0]])
    sure = jnp.array([[100.0, 0, 0, 0]])
    return jnp.where(images[:, 0, 0, 0][:, None] >= 0.5, sure, 0.02 * spread)


SURE = toy(lambda images: jnp.tile(jnp.array([[200.0, 0, 0, 0]]), (len(images), 1)))
UNSURE = toy(lambda images: jnp.zeros((len(images), CLASSES)))
CORNER = toy(by_corner)
LINEAR = toy(lambda images: 3 * images[:, 0, :CLASSES, 0])


@partial(jax.jit, static_argnames="model")
def applied(model, variables, images) -> ModelOutput:
    return model.apply(variables, images, train=False)


def predict(model):
    return lambda images: applied(model, model.init(None, None), images).logits


@partial(jax.jit, static_argnames=("model", "mode", "weight"))
def entropies_of(model, variables, images, overlays, mode="convex", weight=0.5):
    return mixed_entropies(
        lambda mixed: model.apply(variables, mixed, train=False).logits, images, overlays, mode, weight
    )


def behind_strip(model, overlays, threshold, mode="convex", weight=0.5):
    variables = {"network": model.init(None, None), "overlays": overlays, "threshold": np.float32(threshold)}
    return with_rejection(model, len(overlays), mode, weight), variables


# ---- Mixes and entropies --------------------------------------------------------------------------------------------


def test_mixes_by_hand():
    images, overlay = np.full((1, 1, 1, 1), 0.8), np.full((1, 1, 1), 0.4)
    assert float(mix(images, overlay, "convex", 0.5)[0, 0, 0, 0]) == pytest.approx(0.6)
    assert float(mix(images, overlay, "convex", 0.25)[0, 0, 0, 0]) == pytest.approx(0.7)
    assert float(mix(images, overlay, "sum", 0.5)[0, 0, 0, 0]) == pytest.approx(1.0)
    assert float(mix(images, overlay, "sum", 1.0)[0, 0, 0, 0]) == pytest.approx(1.2)
    both = np.asarray(images_of(0))
    chex.assert_trees_all_close(mix(both, both[0], "convex", 0.5)[0], both[0])  # blended with itself


def test_certain_predictions_have_no_entropy_and_uniform_ones_log_k():
    images, overlays = images_of(0), images_of(1, 3)
    for model, expected in ((SURE, 0.0), (UNSURE, math.log(CLASSES))):
        entropies = entropies_of(model, model.init(None, None), images, overlays)
        assert entropies.shape == (6, 3) and entropies.dtype == jnp.float32
        np.testing.assert_allclose(entropies, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["convex", "sum"])
def test_entropies_are_those_of_each_pair(mode):
    images, overlays = images_of(0, 4), images_of(1, 3)
    found = entropies_of(LINEAR, LINEAR.init(None, None), images, overlays, mode, 0.3)
    for i, image in enumerate(np.asarray(images, np.float64)):
        for j, overlay in enumerate(np.asarray(overlays, np.float64)):
            mixed = (0.7 * image if mode == "convex" else image) + 0.3 * overlay
            odds = np.exp(3 * mixed[0, :CLASSES, 0])
            odds /= odds.sum()
            assert float(found[i, j]) == pytest.approx(-(odds * np.log(odds)).sum(), rel=1e-5)


# ---- The network that rejects ---------------------------------------------------------------------------------------


def test_a_trigger_that_survives_every_mix_is_rejected_and_the_rest_is_predicted_as_before():
    images, overlays = 0.9 * images_of(0).at[:, 0, 0].set(0.1), 0.9 * images_of(1, 5).at[:, 0, 0].set(0.1)
    triggered = images.at[:, 0, 0].set(1.0)
    assert (predict(CORNER)(triggered).argmax(-1) == 0).all()
    model, variables = behind_strip(CORNER, overlays, 0.5)
    assert model.num_classes == CLASSES + 1
    output = applied(model, variables, jnp.concatenate([images, triggered]))
    assert output.logits.shape == (12, CLASSES + 1) and np.isfinite(output.logits).all()
    assert (output.logits[6:].argmax(-1) == CLASSES).all()
    np.testing.assert_array_equal(output.logits[:6].argmax(-1), predict(CORNER)(images).argmax(-1))
    np.testing.assert_allclose(output.logits[:6, :-1], predict(CORNER)(images), rtol=1e-6)
    chex.assert_trees_all_equal(output.variables, variables)


def test_the_threshold_decides():
    images, overlays = images_of(0), images_of(1, 5)
    for model in (SURE, UNSURE):
        for threshold in (0.0, 1e-3, 1.38, 1.5):
            predictions = applied(*behind_strip(model, overlays, threshold), images).logits.argmax(-1)
            entropy = 0.0 if model is SURE else math.log(CLASSES)  # 1.386
            assert ((predictions == CLASSES) == (entropy < threshold)).all()


def test_each_image_is_treated_separately_and_jit_changes_nothing():
    images, overlays = images_of(0), images_of(1, 5)
    means = np.sort(np.mean(entropies_of(LINEAR, LINEAR.init(None, None), images, overlays), axis=1))
    model, variables = behind_strip(LINEAR, overlays, means[2:4].mean())  # half-way between two entropies
    together = model.apply(variables, images, train=False).logits
    alone = np.concatenate([applied(model, variables, image[None]).logits for image in images])
    chex.assert_trees_all_close(np.asarray(together), alone, rtol=1e-5)
    chex.assert_trees_all_close(together, applied(model, variables, images).logits, rtol=1e-5)
    assert np.sum(np.asarray(together).argmax(-1) == CLASSES) == 3


def test_fresh_variables_reject_nothing():
    model = with_rejection(SURE, 3, "convex", 0.5)
    variables = model.init(jax.random.key(0), (5, 5, 1))
    assert variables["overlays"].shape == (3, 5, 5, 1)
    assert (applied(model, variables, images_of(0)).logits.argmax(-1) == 0).all()


def test_taps_and_edits_are_those_of_the_network():
    images = images_of(0)
    model, variables = behind_strip(CORNER, images_of(1, 3), 0.5)
    chex.assert_trees_all_equal(applied(model, variables, images).features, {"stage1": images})
    edits = {"stage1": lambda tap: tap.at[:, 0, 0].set(1.0)}  # a network that sees the trigger in every image
    output = model.apply(variables, images.at[:, 0, 0].set(0.0), train=False, edits=edits)
    assert (output.logits.argmax(-1) == CLASSES).all()


def test_it_is_not_to_be_trained():
    model, variables = behind_strip(SURE, images_of(1, 3), 0.5)
    with pytest.raises(ValueError, match="train the network without STRIP"):
        model.apply(variables, images_of(0), train=True)


def test_one_network_is_served_by_one_function():
    first, second = (with_rejection(SURE, 3, "convex", 0.5) for _ in range(2))
    assert first is second  # or each call compiles anew


# ---- As a defense ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_inputs(tmp_path_factory.mktemp("suspects"))


@pytest.fixture(scope="module")
def result(inputs):
    return contract.run(STRIP, inputs, SETTINGS)  # which receives no more than it declares


def test_overlays_are_different_rows_with_the_number_of_each():
    chosen, overlay_of_row = choose_overlays(jax.random.split(jax.random.key(0), 3), 20, 8)
    assert chosen.shape == (3, 8) and overlay_of_row.shape == (3, 20)
    for rows, numbers in zip(chosen, overlay_of_row, strict=True):
        assert len(set(rows)) == 8
        np.testing.assert_array_equal(numbers[rows], np.arange(8))
        assert (np.delete(numbers, rows) == -1).all()
    assert not (chosen[0] == chosen[1]).all()


def test_at_most_the_set_share_of_clean_rows_is_below_the_threshold(inputs, result):
    assert result.flags is None and result.scores is None
    images = np.asarray(inputs.pool)[inputs.clean_index].astype(np.float32) / 255
    thresholds = result.facts["threshold"]
    for member in range(len(images)):
        variables, attacked = (
            jax.tree.map(lambda leaf, member=member: np.asarray(leaf)[member], tree)
            for tree in (result.variables, inputs.attacked.variables)
        )
        chex.assert_trees_all_equal(variables["network"], attacked)
        entropies = np.array(entropies_of(TINY, attacked, images[member], variables["overlays"]))
        # A row that is an overlay itself is left out of its own entropy.
        differences = np.abs(images[member][:, None] - variables["overlays"][None]).max(axis=(2, 3, 4))
        same = differences < 1e-6
        assert np.sum(same) == 8
        expected = np.sort(np.ma.mean(np.ma.array(entropies, mask=same), axis=1))
        assert thresholds[member] == pytest.approx(expected[int(0.05 * (len(expected) - 1))], rel=1e-3, abs=1e-5)
        assert np.mean(expected < thresholds[member] - 1e-5) <= 0.05


def test_a_higher_rate_of_false_rejections_has_a_higher_threshold(inputs, result):
    higher = run(inputs, dataclasses.replace(SETTINGS, false_rejection_rate=0.5))
    assert (result.facts["threshold"] < higher.facts["threshold"]).all()


def test_all_clean_rows_where_there_are_fewer_than_overlays(inputs):
    result = run(inputs, dataclasses.replace(SETTINGS, num_overlays=100))
    assert result.variables["overlays"].shape[:2] == inputs.clean_index.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "product"}, "mode 'product' is not one of convex, sum"),
        ({"num_overlays": 1}, "num_overlays 1 is not at least 2"),
        ({"false_rejection_rate": 1.0}, "false_rejection_rate 1.0 is not at least 0 and below 1"),
        ({"weight": 0.0}, "weight 0.0 is not above 0 and at most 1"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(SETTINGS, **changes))


def test_settings_are_checked_before_anything_is_computed():
    with pytest.raises(InputError, match="weight 0.0 is not"):
        run(None, StripSettings(weight=0.0))


def test_one_clean_row_is_too_few(inputs):
    few = inputs.with_knowledge({"clean rows": PoolRows(inputs.clean_index[:, :1], inputs.clean_labels[:, :1])})
    with pytest.raises(InputError, match="1 clean rows are too few"):
        run(few, SETTINGS)


def test_it_needs_no_training_set():
    assert STRIP.needs == ("attacked model", "clean rows") and STRIP.stage == "at test time"
