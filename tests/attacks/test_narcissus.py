import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import datasets
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.narcissus import NARCISSUS, NarcissusSettings, optimise_noise, prepare_surrogate, surrogate_rows
from bdjax.attacks.surrogate import batches
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.types import Dataset

TARGET = 3
SETTINGS = NarcissusSettings(
    surrogate_model="vbd_16p",
    surrogate_epochs=6,
    surrogate_batch_size=32,
    batch_size=64,
    **NARCISSUS.per_dataset["digits"],
)


@cache
def knowledge():
    return Knowledge(datasets.load("digits").train, TARGET)


@cache
def prepared():
    return prepare_surrogate(jax.random.key(1), knowledge(), SETTINGS)


@cache
def trigger():
    return optimise_noise(jax.random.key(2), knowledge(), prepared(), SETTINGS)


def images(of_target):
    train = knowledge().train
    return jnp.asarray(train.images[(train.labels == TARGET) == of_target][:100], jnp.float32) / 255


@cache
def surrogate():
    return jax.jit(lambda images: prepared().model.apply(prepared().variables, images, train=False).logits)


def evaluate(batch):
    """The surrogate's mean loss of the target class, and the share of images that it takes for it."""
    logits = surrogate()(batch)
    target = jnp.full(len(batch), logits.shape[1] - 1, jnp.int32)
    return float(cross_entropy(logits, target).mean()), float((logits.argmax(1) == target).mean())


def put(function, batch):
    return jax.jit(jax.vmap(function, in_axes=(None, 0, None, None)))(trigger(), batch, None, None)


@pytest.mark.slow
def test_noise_stays_within_its_bound_and_is_three_times_as_strong_at_test_time():
    params, bound = trigger(), SETTINGS.bound
    assert 0.9 * bound < np.abs(params.delta).max() <= bound + 1e-7
    grey = jnp.full((8, 8, 1), 0.5)
    in_training = np.asarray(NARCISSUS.apply_in_training(params, grey, None, None) - grey)
    at_test_time = np.asarray(NARCISSUS.apply(params, grey, None, None) - grey)
    assert np.abs(in_training).max() <= bound + 1e-6
    assert bound < np.abs(at_test_time).max() <= 3 * bound + 1e-6
    np.testing.assert_allclose(at_test_time, 3 * in_training, atol=1e-6)


def test_papers_bounds():
    assert NARCISSUS.settings.bound == pytest.approx(16 / 255)
    assert NARCISSUS.settings.bound * NARCISSUS.settings.magnification == pytest.approx(48 / 255)


def test_noise_makes_the_surrogate_more_confident_of_the_target_class():
    clean = images(True)
    assert evaluate(put(NARCISSUS.apply_in_training, clean))[0] < 0.7 * evaluate(clean)[0]


def test_noise_sends_other_classes_to_the_target_on_the_surrogate():
    others = images(False)
    before, after = evaluate(others)[1], evaluate(put(NARCISSUS.apply, others))[1]
    assert before < 0.6 and after >= 0.9


def test_the_surrogate_is_trained_on_the_target_and_half_of_the_other_classes():
    labels = np.arange(20, dtype=np.int32) % 10
    train = Dataset(np.zeros((20, 8, 8, 1), np.uint8), labels, 10, "none", "none")
    rows, new_labels = surrogate_rows(train, 7)
    np.testing.assert_array_equal(labels[rows], [0, 1, 2, 7, 8, 9] * 2)
    np.testing.assert_array_equal(new_labels, [2, 3, 4, 5, 0, 1] * 2)
    two = dataclasses.replace(train, labels=labels % 2, num_classes=2)
    np.testing.assert_array_equal(np.unique(surrogate_rows(two, 0)[1]), [0, 1])
    with pytest.raises(InputError, match="no training row of the target class 7"):
        surrogate_rows(dataclasses.replace(train, labels=labels % 5), 7)


def test_batches_are_shuffles_of_all_rows():
    order = batches(jax.random.key(0), 10, 5, 5)
    assert order.shape == (5, 5)
    for start in (0, 2):
        np.testing.assert_array_equal(np.sort(order[start : start + 2].ravel()), np.arange(10))
    assert batches(jax.random.key(0), 3, 64, 4).shape == (4, 3)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="narcissus: steps 0 is not at least 1"):
        NARCISSUS.make_params(jax.random.key(0), knowledge(), dataclasses.replace(SETTINGS, steps=0))
    model, variables = prepared()
    dead = prepared()._replace(variables=jax.tree.map(jnp.zeros_like, variables))
    with pytest.raises(InputError, match="narcissus, after a warm-up at rate 0.001: the network does not react"):
        optimise_noise(jax.random.key(2), knowledge(), dead, SETTINGS)
