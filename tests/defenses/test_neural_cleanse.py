"""Neural Cleanse: the anomaly index's printed numbers, lambda's rules, planted triggers found and nothing else unlearned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.contract import PoolRows
from bdjax.defenses.neural_cleanse import (
    NeuralCleanseSettings,
    Triggers,
    anomaly_index,
    check,
    end_epoch,
    flag_classes,
    init_params,
    init_search,
    repair,
    run,
    stamp,
    trigger_objective,
    triggers_of,
    unlearning_objective,
)
from bdjax.errors import InputError
from bdjax.training.stages import Nets
from bdjax.types import Model, ModelOutput
from tests.defenses.tiny import tiny_inputs

K, SHAPE, PLANTED = 5, (8, 8, 1), 3
SETTINGS = NeuralCleanseSettings()


def _linear(variables, images, *, train, edits=None):
    del train, edits
    flat = images.reshape(len(images), -1)
    return ModelOutput(flat @ variables["params"]["weights"], {}, variables)


LINEAR = Model(lambda key, shape: {"params": {"weights": jnp.zeros((64, K))}}, _linear, K, "linear")


def weights_with_backdoor(planted: int | None) -> jax.Array:
    """Each class has every fifth pixel; one is reached by the first pixel alone, if it is planted."""
    weights = np.tile(np.eye(K, dtype=np.float32), (13, 1))[:64]
    if planted is not None:
        weights[0, planted] = 60.0
    return weights


def test_anomaly_index_of_printed_norms():
    norms = np.array([10, 10.5, 9.5, 10, 2])
    np.testing.assert_allclose(anomaly_index(norms), [0, 0.6745, 0.6745, 0, 10.7918], atol=1e-4)
    assert flag_classes(norms, 2.0).tolist() == [False] * 4 + [True]


def test_large_norms_are_no_targets():
    assert not flag_classes(np.array([10, 10.5, 9.5, 10, 30]), 2.0).any()
    assert not flag_classes(np.full((2, 4), 7.0), 2.0).any()


def test_mask_of_zeros_changes_nothing_and_of_ones_everything():
    image, pattern = np.full((2, 2, 1), 0.3), np.full((2, 2, 1), 0.8)
    np.testing.assert_array_equal(stamp(image, np.zeros((2, 2, 1)), pattern), image)
    np.testing.assert_array_equal(stamp(image, np.ones((2, 2, 1)), pattern), pattern)


ended = jax.jit(end_epoch, static_argnames="settings")


def after_epochs(successes, norms, settings=SETTINGS, search=None):
    """A search of one class after epochs of one batch; the mask of each is filled with its number, from 1."""
    search = search or jax.tree.map(np.asarray, init_search(1, (1, 1, 1), settings.weight))
    for number, (success, norm) in enumerate(zip(successes, norms, strict=True), 1):
        full = np.full((1, 1, 1, 1), number, np.float32)
        sums = {"success": np.float32([success]), "norm": np.float32([norm]), "batches": np.int32(1)}
        search = jax.tree.map(np.asarray, ended(search._replace(**sums), Triggers(full, full), settings))
    return search


@pytest.mark.parametrize(
    ("successes", "factor"),
    [
        ([1.0] * 4, 1),
        ([1.0] * 5, 2),
        ([0.98] * 5, 2),
        ([1.0] * 10, 4),
        ([0.97] * 5, 2**-1.5),
        ([1.0] * 4 + [0.0] + [1.0] * 4, 1),
        ([1.0] * 5 + [0.0] * 5, 2**-0.5),
    ],
)
def test_lambda_follows_the_success(successes, factor):
    search = after_epochs(successes, [5.0] * len(successes))
    np.testing.assert_allclose(search.weight, 1e-3 * factor, rtol=1e-6)


def test_best_trigger_is_the_smallest_successful_one():
    search = after_epochs([1.0, 0.5, 1.0, 1.0], [5.0, 1.0, 3.0, 4.0])
    assert search.best.masks.item() == 3 and search.best_norm.item() == 3.0
    search = after_epochs([0.5, 0.9], [5.0, 6.0])
    assert search.best.masks.item() == 2 and np.isinf(search.best_norm).all()


def test_done_class_keeps_its_best():
    settings = dataclasses.replace(SETTINGS, patience=1, stop_patience=3)
    both_ways = after_epochs([1.0, 0.0, 0.0, 0.0], [5.0] * 4, settings)
    assert both_ways.is_done.item()
    assert not after_epochs([1.0] * 4, [5.0] * 4, settings).is_done.item()  # lambda only ever rose
    later = after_epochs([1.0] * 3, [1.0] * 3, settings, both_ways)
    assert later.best_norm.item() == 5.0 and later.best.masks.item() == 1
    small_gains = after_epochs([1.0, 0.0, 1.0, 1.0], [5.0, 5.0, 4.99, 4.98], settings)
    assert small_gains.is_done.item()  # gains below a hundredth are none


def some_batch(seed=0, rows=6):
    random = np.random.default_rng(seed)
    labels = jnp.asarray(random.integers(0, K, rows), jnp.int32)
    return jnp.asarray(random.random((rows, *SHAPE)), jnp.float32), {"labels": labels}


def cross_entropy(logits, labels):
    """In NumPy: float64 [N]."""
    logits = np.asarray(logits, np.float64)
    return np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(logits)), labels]


def test_objective_is_equation_3_for_every_class():
    images, targets = some_batch()
    random = np.random.default_rng(1)
    params = {
        name: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32)
        for name, leaf in init_params(K, SHAPE).items()
    }
    weights, key = weights_with_backdoor(PLANTED), jax.random.key(0)
    variables = {"network": {"params": {"weights": jnp.asarray(weights)}}, "search": init_search(K, SHAPE, 0.5)}
    objective = trigger_objective(LINEAR, SETTINGS, 2)
    compiled = jax.jit(objective)
    outcome = compiled(params, variables, images, targets, key)
    masks, patterns = (np.asarray(leaf, np.float64) for leaf in triggers_of(params))
    expected, reached = 0.0, []
    for c in range(K):
        logits = ((1 - masks[c]) * np.asarray(images) + masks[c] * patterns[c]).reshape(6, -1) @ weights
        expected += cross_entropy(logits, np.full(6, c)) + 0.5 * np.abs(masks[c]).sum()
        reached.append((logits.argmax(1) == c).mean())
    np.testing.assert_allclose(outcome.losses, expected, rtol=1e-5)
    search = outcome.variables["search"]
    np.testing.assert_allclose(search.success, reached, atol=1e-6)
    assert search.batches == 1 and np.isinf(search.best_norm).all()
    again = compiled(params, outcome.variables, images, targets, key).variables["search"]
    assert again.batches == 0 and not again.success.any()  # the epoch is over
    np.testing.assert_array_equal(again.good_epochs + again.bad_epochs, np.ones(K))


@pytest.fixture
def planted(tmp_path):
    """Linear networks in the place of the attacked ones: one with a backdoor, one without."""
    inputs = tiny_inputs(tmp_path)
    stacked = {"params": {"weights": jnp.stack([weights_with_backdoor(PLANTED), weights_with_backdoor(None)])}}
    clean = PoolRows(inputs.clean_index, inputs.clean_labels % K)
    return inputs.with_knowledge({"attacked model": Nets(LINEAR, stacked, 1, {}), "clean rows": clean})


def test_planted_trigger_is_found_where_it_is_and_unlearned_there_alone(planted):
    inputs = planted
    settings = dataclasses.replace(SETTINGS, epochs=60, batch_size=32, weight=0.1, repair_epochs=1, threshold=1e9)
    result = run(inputs, settings)
    norms = result.pictures["their masks"].sum(axis=(2, 3, 4))
    assert norms[0].argmin() == PLANTED and norms[0, PLANTED] < 0.2 * np.median(norms[0])
    assert norms[1].min() > 0.4 * np.median(norms[1])
    mask = result.pictures["their masks"][0, PLANTED, ..., 0]
    assert mask.argmax() == 0 and mask[0, 0] > 0.5 * mask.sum()
    np.testing.assert_allclose(result.facts["its anomaly index"][0], anomaly_index(norms)[0, PLANTED], rtol=1e-5)
    assert result.variables is inputs.attacked.variables  # nothing is flagged
    assert not result.facts["classes flagged"].any()
    flagged = np.zeros((2, K), bool)
    flagged[0, PLANTED] = True
    masks = result.pictures["their masks"]
    repaired = repair(inputs, Triggers(masks, np.ones((*masks.shape[:-1], 1), np.float32)), flagged, settings)
    assert repaired.keys() == inputs.attacked.variables.keys()
    weights, before = repaired["params"]["weights"], inputs.attacked.variables["params"]["weights"]
    np.testing.assert_array_equal(weights[1], before[1])
    assert np.abs(weights[0] - before[0]).max() > 0


@jax.jit
def unlearning_losses(share, flagged, images, targets):
    masks = jnp.ones((K, *SHAPE))
    patterns = jnp.broadcast_to(jnp.linspace(0, 1, K)[:, None, None, None], (K, *SHAPE))
    network = {"params": {"weights": jnp.asarray(weights_with_backdoor(PLANTED))}}
    variables = {**network, "found": (Triggers(masks, patterns), flagged)}
    objective = unlearning_objective.__wrapped__(LINEAR, share)  # the share is traced: one program for all
    return objective(network["params"], variables, images, targets, jax.random.key(1)).losses


def test_unlearning_stamps_flagged_classes_under_true_labels():
    images, targets = some_batch(rows=40)
    weights = weights_with_backdoor(PLANTED)

    def expected(images):
        return cross_entropy(np.asarray(images).reshape(40, -1) @ weights, targets["labels"])

    one, none, within = np.eye(K, dtype=np.float32)[2], np.zeros(K, np.float32), {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(unlearning_losses(0.0, one, images, targets), expected(images), **within)
    np.testing.assert_allclose(unlearning_losses(1.0, none, images, targets), expected(images), **within)
    stamped = expected(np.full(images.shape, 0.5))  # the pattern of class 2, seen through a full mask
    np.testing.assert_allclose(unlearning_losses(1.0, one, images, targets), stamped, **within)
    mixed = np.asarray(unlearning_losses(0.2, one, images, targets))
    is_stamped = np.isclose(mixed, stamped, **within) & ~np.isclose(mixed, expected(images), **within)
    assert 1 <= is_stamped.sum() <= 18
    np.testing.assert_allclose(mixed[~is_stamped], expected(images)[~is_stamped], **within)


def test_invalid_settings_are_refused():
    for change in ({"success": 0.0}, {"repair_share": 2.0}, {"weight_factor": 1.0}):
        with pytest.raises(InputError, match=f"defense neural_cleanse: {next(iter(change))} "):
            check(dataclasses.replace(SETTINGS, **change))


def test_settings_are_checked_before_anything_is_trained():
    with pytest.raises(InputError, match="defense neural_cleanse: success "):
        run(None, NeuralCleanseSettings(success=0.0))
