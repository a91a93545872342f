import dataclasses
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.contract import PoolRows
from bdjax.defenses.strip import STRIP, StripSettings, choose_overlays, mix, mixed_entropies, run, with_rejection
from bdjax.errors import InputError
from bdjax.types import Model, ModelOutput

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

    return Model(lambda key, shape: {"params": {"bias": jnp.zeros(CLASSES)}}, apply, CLASSES, "toy")


def by_corner(images):
    """Class 0, whatever else is in the picture, if the corner is at least half bright; else by the mean of the rest."""
    rest = jnp.mean(images, axis=(1, 2, 3))
    spread = 40.0 * rest[:, None] * jnp.arange(1, 1 + CLASSES, dtype=jnp.float32)[None] * jnp.array([[1, -1, 1, -1.0]])
    sure = jnp.array([[100.0, 0, 0, 0]])
    return jnp.where(images[:, 0, 0, 0][:, None] >= 0.5, sure, 0.02 * spread)


SURE = toy(lambda images: jnp.tile(jnp.array([[200.0, 0, 0, 0]]), (len(images), 1)))
UNSURE = toy(lambda images: jnp.zeros((len(images), CLASSES)))
CORNER = toy(by_corner)


def predict(model):
    return partial(logits_of, model, model.init(None, None))


def logits_of(model, variables, images):
    return model.apply(variables, images, train=False).logits


def served(model, overlays, threshold, mode="convex", weight=0.5):
    rejects = with_rejection(model, len(overlays), mode, weight)
    variables = {"network": model.init(None, None), "overlays": overlays, "threshold": jnp.float32(threshold)}
    return rejects, variables


# ---- Mixes and entropies --------------------------------------------------------------------------------------------


def test_mixes_by_hand():
    images, overlay = jnp.full((1, 1, 1, 1), 0.8), jnp.full((1, 1, 1), 0.4)
    assert float(mix(images, overlay, "convex", 0.5)[0, 0, 0, 0]) == pytest.approx(0.6)
    assert float(mix(images, overlay, "convex", 0.25)[0, 0, 0, 0]) == pytest.approx(0.7)
    assert float(mix(images, overlay, "sum", 0.5)[0, 0, 0, 0]) == pytest.approx(1.0)
    assert float(mix(images, overlay, "sum", 1.0)[0, 0, 0, 0]) == pytest.approx(1.2)
    both = images_of(0)
    chex.assert_trees_all_close(mix(both, both[0], "convex", 0.5)[0], both[0])  # laid over itself


def test_one_hot_answers_have_no_entropy_and_uniform_ones_log_k():
    images, overlays = images_of(0), images_of(1, 3)
    for model, expected in ((SURE, 0.0), (UNSURE, math.log(CLASSES))):
        entropies = mixed_entropies(predict(model), images, overlays, "convex", 0.5)
        assert entropies.shape == (6, 3) and entropies.dtype == jnp.float32
        np.testing.assert_allclose(entropies, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["convex", "sum"])
def test_entropies_are_those_of_each_pair(mode):
    images, overlays = images_of(0, 4), images_of(1, 3)
    answer = predict(toy(lambda images: 3 * images[:, 0, :CLASSES, 0]))
    found = mixed_entropies(answer, images, overlays, mode, 0.3)
    for i, image in enumerate(np.asarray(images, np.float64)):
        for j, overlay in enumerate(np.asarray(overlays, np.float64)):
            mixed = (0.7 * image if mode == "convex" else image) + 0.3 * overlay
            odds = np.exp(3 * mixed[0, :CLASSES, 0])
            odds /= odds.sum()
            assert float(found[i, j]) == pytest.approx(-(odds * np.log(odds)).sum(), rel=1e-5)


# ---- The network that rejects ---------------------------------------------------------------------------------------


def test_a_trigger_that_survives_every_mix_is_rejected_and_the_rest_is_answered_as_before():
    images, overlays = 0.9 * images_of(0).at[:, 0, 0].set(0.1), 0.9 * images_of(1, 5).at[:, 0, 0].set(0.1)
    triggered = images.at[:, 0, 0].set(1.0)
    assert (predict(CORNER)(triggered).argmax(-1) == 0).all()
    model, variables = served(CORNER, overlays, 0.5)
    assert model.num_classes == CLASSES + 1
    output = model.apply(variables, jnp.concatenate([images, triggered]), train=False)
    assert output.logits.shape == (12, CLASSES + 1) and np.isfinite(output.logits).all()
    assert (output.logits[6:].argmax(-1) == CLASSES).all()
    np.testing.assert_array_equal(output.logits[:6].argmax(-1), predict(CORNER)(images).argmax(-1))
    np.testing.assert_allclose(output.logits[:6, :-1], predict(CORNER)(images), rtol=1e-6)
    chex.assert_trees_all_equal(output.variables, variables)


def test_the_threshold_is_what_decides():
    images, overlays = images_of(0), images_of(1, 5)
    for model in (SURE, UNSURE):
        for threshold in (0.0, 1e-3, 1.38, 1.5):
            rejects, variables = served(model, overlays, threshold)
            answers = rejects.apply(variables, images, train=False).logits.argmax(-1)
            entropy = 0.0 if model is SURE else math.log(CLASSES)  # 1.386
            assert ((answers == CLASSES) == (entropy < threshold)).all()


def test_each_image_is_judged_on_its_own_and_jit_says_the_same():
    images, overlays = images_of(0), images_of(1, 5)
    network = toy(lambda images: 3 * images[:, 0, :CLASSES, 0])
    threshold = np.median(np.mean(mixed_entropies(predict(network), images, overlays, "convex", 0.5), axis=1))
    model, variables = served(network, overlays, threshold)
    together = model.apply(variables, images, train=False).logits
    alone = jnp.concatenate([model.apply(variables, image[None], train=False).logits for image in images])
    compiled = jax.jit(lambda variables, images: model.apply(variables, images, train=False).logits)(variables, images)
    chex.assert_trees_all_close(together, alone, rtol=1e-5)
    chex.assert_trees_all_close(together, compiled, rtol=1e-5)
    is_rejected = np.asarray(together.argmax(-1) == CLASSES)
    assert is_rejected.sum() == 3


def test_fresh_variables_reject_nothing():
    model = with_rejection(SURE, 3, "convex", 0.5)
    variables = model.init(jax.random.key(0), (5, 5, 1))
    assert variables["overlays"].shape == (3, 5, 5, 1)
    assert (model.apply(variables, images_of(0), train=False).logits.argmax(-1) == 0).all()


def test_taps_and_edits_are_those_of_the_network():
    images = images_of(0)
    model, variables = served(CORNER, images_of(1, 3), 0.5)
    chex.assert_trees_all_equal(model.apply(variables, images, train=False).features, {"stage1": images})
    edits = {"stage1": lambda tap: tap.at[:, 0, 0].set(1.0)}  # a network that sees the trigger in every image
    output = model.apply(variables, images.at[:, 0, 0].set(0.0), train=False, edits=edits)
    assert (output.logits.argmax(-1) == CLASSES).all()


def test_it_is_not_to_be_trained():
    model, variables = served(SURE, images_of(1, 3), 0.5)
    with pytest.raises(ValueError, match="train the network without STRIP"):
        model.apply(variables, images_of(0), train=True)


def test_one_network_is_served_by_one_function():
    assert with_rejection(SURE, 3, "convex", 0.5) is with_rejection(
        SURE, 3, "convex", 0.5
    )  # or each call compiles anew


# ---- As a defense ---------------------------------------------------------------------------------------------------


def test_overlays_are_different_rows_and_each_row_knows_its_own():
    chosen, own = choose_overlays(jax.random.split(jax.random.key(0), 3), 20, 8)
    assert chosen.shape == (3, 8) and own.shape == (3, 20)
    for rows, numbers in zip(chosen, own, strict=True):
        assert len(set(rows)) == 8
        np.testing.assert_array_equal(numbers[rows], np.arange(8))
        assert (np.delete(numbers, rows) == -1).all()
    assert not (chosen[0] == chosen[1]).all()


def test_no_more_clean_rows_than_asked_for_lie_below_the_threshold(inputs):
    result = run(inputs, SETTINGS)
    assert result.flags is None and result.scores is None
    images = np.asarray(inputs.pool)[inputs.clean_index].astype(np.float32) / 255
    thresholds = result.facts["threshold"]
    for member in range(len(images)):
        own = jax.tree.map(lambda leaf, member=member: leaf[member], result.variables)
        network = own["network"]
        chex.assert_trees_all_equal(network, jax.tree.map(lambda leaf, m=member: leaf[m], inputs.attacked.variables))
        answer = jax.jit(partial(logits_of, inputs.attacked.model, network))
        entropies = np.array(mixed_entropies(answer, jnp.asarray(images[member]), own["overlays"], "convex", 0.5))
        # A row that is an overlay itself is left out of its own entropy.
        differences = np.abs(images[member][:, None] - np.asarray(own["overlays"])[None]).max(axis=(2, 3, 4))
        same = differences < 1e-6
        assert np.sum(same) == 8
        expected = np.sort(np.ma.mean(np.ma.array(entropies, mask=same), axis=1))
        assert thresholds[member] == pytest.approx(expected[int(0.05 * (len(expected) - 1))], rel=1e-3, abs=1e-5)
        assert np.mean(expected < thresholds[member] - 1e-5) <= 0.05


def test_a_higher_rate_of_false_rejections_has_a_higher_threshold(inputs):
    low, high = (
        run(inputs, dataclasses.replace(SETTINGS, false_rejection_rate=rate)).facts["threshold"] for rate in (0.0, 0.5)
    )
    assert (low < high).all()


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
def test_settings_that_cannot_be(inputs, changes, message):
    with pytest.raises(InputError, match=message):
        run(inputs, dataclasses.replace(SETTINGS, **changes))


def test_one_clean_row_is_too_few(inputs):
    few = inputs.with_knowledge({"clean rows": PoolRows(inputs.clean_index[:, :1], inputs.clean_labels[:, :1])})
    with pytest.raises(InputError, match="1 clean rows are too few"):
        run(few, SETTINGS)


def test_it_needs_no_training_set():
    assert STRIP.needs == ("attacked model", "clean rows") and STRIP.stage == "at test time"
