from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.contract import labelled
from bdjax.defenses.fine_pruning import (
    FinePruningSettings,
    cumulative_masks,
    last_good,
    prune,
    pruned_counts,
    pruned_model,
    row_hits,
    run,
    split_rows,
)
from bdjax.errors import InputError
from bdjax.types import Model, ModelOutput

SMALL = FinePruningSettings(held_out=0.25, epochs=2, batch_size=32, learning_rate=0.05)


RANDOM = np.random.default_rng(0)
CHANNELS = 6
IMAGES = jnp.asarray(RANDOM.random((12, 4, 4, 1)), jnp.float32)
LABELS = jnp.asarray(RANDOM.integers(0, 3, 12), jnp.int32)


def _apply(variables, images, *, train, edits=None):
    """Two layers with a tap each and the mean of batch normalisation; the last tap does not come last by name."""
    edits, params = edits or {}, variables["params"]
    hidden = images @ params["first"]
    mean = hidden.mean((0, 1, 2)) if train else variables["batch_stats"]["mean"]
    first = edits.get("zebra", lambda x: x)(jax.nn.relu(hidden - mean[None, None, None]))
    second = edits.get("apple", lambda x: x)(jax.nn.relu(first @ params["second"]))
    logits = second.mean((1, 2)) @ params["out"]
    return ModelOutput(
        logits, {"zebra": first, "apple": second}, {**variables, "batch_stats": {"mean": mean}} if train else variables
    )


def _init(key, shape):
    shapes = {"first": (1, 4), "second": (4, CHANNELS), "out": (CHANNELS, 3)}
    params = {name: jnp.asarray(RANDOM.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return {"params": params, "batch_stats": {"mean": 0.1 * jnp.ones(4)}}


MODEL = Model(_init, _apply, 3, "two layers")
VARIABLES = _init(None, None)


def generators(members):
    return [np.random.default_rng(number) for number in range(len(members))]


# ---- The split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_rows_are_used_for_the_ordering_or_held_out_but_never_both(share):
    labels = np.random.default_rng(0).integers(0, 10, (3, 70)).astype(np.int32)
    ordering, held = split_rows(labels, share, generators(labels))
    assert ordering.shape == (3, 70 - round(share * 70)) and held.shape == (3, round(share * 70))
    for pair in zip(ordering, held, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate(pair)), np.arange(70))
    assert np.any(held[0] != held[1])


def test_the_held_out_rows_are_a_share_of_each_class():
    labels = np.repeat(np.arange(10), 7)[None]
    ordering, held = split_rows(labels, 0.2, generators(labels))
    counts = np.bincount(labels[0, held[0]], minlength=10)
    assert counts.sum() == 14 and counts.min() == 1 and counts.max() == 2
    assert np.unique(labels[0, ordering[0]]).size == 10


def test_a_class_of_one_row_is_not_held_out():
    labels = np.array([[0] * 9 + [1] + [2] * 10])
    ordering, held = split_rows(labels, 0.2, generators(labels))
    assert 1 in labels[0, ordering[0]] and set(labels[0, held[0]]) == {0, 2}


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_a_split_without_rows_on_one_side_is_refused(share):
    with pytest.raises(InputError, match="of 10 clean rows is .* rows: at least 1 must be held out"):
        split_rows(np.zeros((1, 10), np.int32), share, generators([0]))


# ---- What is pruned and when it stops -------------------------------------------------------------------------------------


def test_a_step_is_one_percent_of_the_channels_but_at_least_one():
    np.testing.assert_array_equal(pruned_counts(32, 0.01), np.arange(32))
    np.testing.assert_array_equal(pruned_counts(512, 0.01), np.arange(0, 512, 5))
    np.testing.assert_array_equal(pruned_counts(8, 0.5), [0, 4])


def test_exactly_the_counted_channels_are_pruned_and_the_least_active_first():
    masks = cumulative_masks(np.array([0.3, 0.0, 2.0, 0.1]), np.array([0, 1, 2, 3]))
    np.testing.assert_array_equal(masks, [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]])
    assert masks.dtype == np.float32
    ties = cumulative_masks(np.zeros(5), np.arange(5))
    np.testing.assert_array_equal((ties == 0).sum(axis=1), np.arange(5))


@pytest.mark.parametrize(
    "accuracy, tolerance, step",
    [
        ([1.0, 1.0, 0.9, 0.89, 0.2], 0.1, 2),
        ([1.0, 0.8, 1.0, 1.0], 0.1, 0),  # it stops although the accuracy would recover
        ([0.5, 0.45, 0.44], 0.1, 1),  # relative to the first
        ([0.7, 0.63, 0.62], 0.1, 1),  # 0.9 times 0.7 is not exact
        ([0.9, 0.9, 0.9], 0.0, 2),
    ],
)
def test_the_last_step_within_the_tolerance_is_kept(accuracy, tolerance, step):
    assert last_good(np.array(accuracy), tolerance) == step


# ---- The mask -------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("train", "edits"))
def _masked(variables, train, edits):
    return pruned_model(MODEL, "apple").apply(variables, IMAGES, train=train, edits=dict(edits))


def masked(mask, variables=VARIABLES, train=False, **edits):
    return _masked({**variables, "mask": jnp.asarray(mask, jnp.float32)}, train, tuple(edits.items()))


plain_network = jax.jit(lambda variables, train: MODEL.apply(variables, IMAGES, train=train), static_argnames="train")


@pytest.mark.parametrize("train", [False, True])
def test_a_mask_of_ones_is_the_network_itself(train):
    pruned, plain = masked(jnp.ones(CHANNELS), train=train), plain_network(VARIABLES, train=train)
    chex.assert_trees_all_close((pruned.logits, pruned.features), (plain.logits, plain.features), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pruned.variables["mask"], np.ones(CHANNELS))
    network = {name: value for name, value in pruned.variables.items() if name != "mask"}
    chex.assert_trees_all_close(network, plain.variables, rtol=1e-5, atol=1e-6)


def test_a_new_pruned_network_has_all_channels():
    fresh = pruned_model(MODEL, "apple").init(jax.random.key(0), (4, 4, 1))
    np.testing.assert_array_equal(fresh["mask"], np.ones(CHANNELS))


def test_pruning_a_dead_channel_changes_no_logit_and_a_live_one_does():
    params = {**VARIABLES["params"], "second": VARIABLES["params"]["second"].at[:, 3].set(-1.0)}
    variables = {**VARIABLES, "params": params}
    plain = masked(np.ones(CHANNELS), variables)
    activation = np.asarray(plain.features["apple"]).mean((0, 1, 2))
    assert activation[3] == 0 < activation.max()
    dead = np.ones(CHANNELS, np.float32)
    dead[3] = 0
    np.testing.assert_array_equal(masked(dead, variables).logits, plain.logits)
    live = np.ones(CHANNELS, np.float32)
    live[int(np.argmax(activation))] = 0
    assert np.abs(masked(live, variables).logits - plain.logits).max() > 1e-3


def test_the_mask_sits_on_the_features_and_other_edits_see_them_masked():
    mask = np.array([0, 1, 1, 1, 1, 0], np.float32)
    features = np.asarray(plain_network(VARIABLES, train=False).features["apple"]) * mask
    pruned = masked(mask)
    np.testing.assert_allclose(pruned.features["apple"], features, rtol=1e-5)
    doubled = masked(mask, apple=lambda f: 2 * f)
    np.testing.assert_allclose(doubled.features["apple"], 2 * features, rtol=1e-5)
    other = masked(mask, zebra=jnp.zeros_like)
    np.testing.assert_array_equal(other.logits, 0)


def test_no_gradient_reaches_a_pruned_channel():
    mask = np.array([1, 1, 0, 1, 1, 1], np.float32)

    def total(params):
        return jnp.sum(jnp.square(masked(mask, {**VARIABLES, "params": params}, train=True).logits))

    gradient = jax.jit(jax.grad(total))(VARIABLES["params"])
    np.testing.assert_array_equal(gradient["second"][:, 2], 0)
    np.testing.assert_array_equal(gradient["out"][2], 0)
    assert (np.abs(gradient["out"]).max(1) > 0).sum() >= 2


def test_hits_under_each_mask_are_those_of_the_pruned_network():
    masks = cumulative_masks(RANDOM.random(CHANNELS), np.arange(CHANNELS))
    variables = {"network": VARIABLES, "masks": jnp.asarray(masks)}
    hits = jax.jit(row_hits(MODEL, "apple"))(variables, IMAGES, {"labels": LABELS})
    assert hits.shape == (len(IMAGES), CHANNELS)
    for number, mask in enumerate(masks):
        np.testing.assert_array_equal(hits[:, number], np.argmax(masked(mask).logits, 1) == LABELS)
    assert 0 < hits.mean() < 1


# ---- All of it ------------------------------------------------------------------------------------------------------


def test_pruning_stops_before_the_held_out_accuracy_is_gone(inputs):
    masks, before, after = prune(inputs, SMALL)
    _, held = split_rows(inputs.clean_labels, SMALL.held_out, inputs.generators("fine-pruning: held-out rows"))
    rows = labelled(*(np.take_along_axis(array, held, 1) for array in (inputs.clean_index, inputs.clean_labels)))
    model = pruned_model(inputs.attacked.model, "stage3")
    activation = inputs.embeddings(inputs.attacked.model, inputs.attacked.variables, inputs.clean_rows()).mean(1)
    for number in range(2):
        assert 0 < (masks[number] == 0).sum() < 16
        # The order was computed from other rows, so it is only nearly the same.
        assert activation[number][masks[number] == 0].mean() < activation[number][masks[number] == 1].mean()
    logits = inputs.logits(model, {**inputs.attacked.variables, "mask": jnp.asarray(masks)}, rows)
    accuracy = (np.argmax(logits, -1) == np.asarray(rows.targets["labels"])).mean(axis=1)
    np.testing.assert_allclose(after, accuracy)
    assert (after >= 0.9 * before - 1e-9).all()


def test_without_fine_tuning_the_last_good_network_is_returned(inputs):
    settings = FinePruningSettings(held_out=0.25, epochs=0)
    result = run(inputs, settings)
    masks, _, _ = prune(inputs, settings)
    np.testing.assert_array_equal(result.variables["mask"], masks)
    network = {name: value for name, value in result.variables.items() if name != "mask"}
    jax.tree.map(np.testing.assert_array_equal, network, inputs.attacked.variables)
    np.testing.assert_array_equal(result.facts["weight change"], 0)


def test_fine_tuning_keeps_the_mask(inputs):
    result = run(inputs, SMALL)
    masks, _, _ = prune(inputs, SMALL)
    np.testing.assert_array_equal(result.variables["mask"], masks)
    np.testing.assert_array_equal(result.facts["channels pruned"], (masks == 0).sum(axis=1))
    assert (result.facts["weight change"] > 0).all()
    embeddings = inputs.embeddings(result.model, result.variables, inputs.clean_rows())
    for member_embeddings, mask in zip(embeddings, masks, strict=True):
        assert np.abs(member_embeddings[:, mask == 0]).max() == 0 < member_embeddings[:, mask == 1].max()
