"""Optimisers, learning rates, and several views of a row."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.losses import cross_entropy
from bdjax.training import memory
from bdjax.training.augmentation import augment
from bdjax.training.member import (
    Outcome,
    Rows,
    TrainConfig,
    as_float,
    learning_rate_at,
    make_epoch,
    make_optimiser,
    resume_from,
    supervised,
)
from bdjax.types import Model, ModelOutput

SHAPE = (4, 4, 1)
RANDOM = np.random.default_rng(0)
POOL = jnp.asarray(RANDOM.integers(0, 256, (9, *SHAPE)), jnp.uint8)
CLASSES = RANDOM.integers(0, 3, 9)
NOTHING = Rows(jnp.zeros(0, jnp.int32), {"labels": jnp.zeros(0, jnp.int32)})


def loss(logits, targets):
    return cross_entropy(logits, targets["labels"])


@cache
def variables(seed=1):
    random = np.random.default_rng(seed)
    kernel, bias = random.standard_normal((16, 3)), random.standard_normal(3)
    return {
        "params": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)},
        "batch_stats": {},
    }


def _apply(variables, images, *, train, edits=None):
    params = variables["params"]
    return ModelOutput(images.reshape(len(images), -1) @ params["kernel"] + params["bias"][None], {}, variables)


LINEAR = Model(lambda key, shape: variables(), _apply, 3, "softmax regression")


def rows(index):
    return Rows(jnp.asarray(index, jnp.int32), {"labels": jnp.asarray(CLASSES[np.asarray(index)], jnp.int32)})


def train(config, train_rows, epochs, objective=None):
    state = resume_from(variables(), jax.random.key(3), config)
    epoch = jax.jit(make_epoch(LINEAR, loss, config, objective))
    for _ in range(epochs):
        state = epoch(state, train_rows, NOTHING, POOL)
    return state


# ---- SGD ------------------------------------------------------------------------------------------------------------


def softmax_gradient(params, index):
    """Of the mean cross-entropy of these rows, by hand."""
    images = np.asarray(POOL, np.float64)[index].reshape(len(index), -1) / 255
    logits = images @ params["kernel"] + params["bias"]
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = (error / error.sum(axis=1, keepdims=True) - np.eye(3)[CLASSES[index]]) / len(index)
    return {"kernel": images.T @ error, "bias": error.sum(axis=0)}


def torch_sgd(config, index, steps):
    """The algorithm in the documentation of `torch.optim.SGD`, dampening 0, all rows in one batch."""
    params = {name: np.asarray(leaf, np.float64) for name, leaf in variables()["params"].items()}
    buffer = None
    for _ in range(steps):
        gradient = softmax_gradient(params, index)
        gradient = {name: gradient[name] + config.weight_decay * params[name] for name in params}
        if config.momentum:
            kept = buffer or {name: np.zeros_like(leaf) for name, leaf in params.items()}
            buffer = {name: config.momentum * kept[name] + gradient[name] for name in params}
            ahead = {name: gradient[name] + config.momentum * buffer[name] for name in params}
            gradient = ahead if config.nesterov else buffer
        params = {name: params[name] - config.learning_rate * gradient[name] for name in params}
    return params


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"),
    [(0.0, False, 0.0), (0.9, False, 0.0), (0.9, False, 0.1), (0.8, True, 0.1)],
)
def test_sgd_is_pytorchs(momentum, nesterov, weight_decay):
    config = TrainConfig(
        epochs=4,
        batch_size=9,
        learning_rate=0.5,
        schedule="constant",
        optimiser="sgd",
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )
    index = np.asarray([3, 1, 4, 0, 5, 8])
    state = train(config, rows(index), 4)
    chex.assert_trees_all_close(state.variables["params"], torch_sgd(config, index, 4), atol=1e-5)
    moved = np.abs(state.variables["params"]["kernel"] - variables()["params"]["kernel"]).max()
    assert moved > 0.1


def test_an_unknown_optimiser_or_schedule_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="'lion' is not one of 'adam', 'sgd'"):
        make_optimiser(TrainConfig(optimiser="lion"))
    state = resume_from(variables(), jax.random.key(0), TrainConfig(epochs=1))
    with pytest.raises(ValueError, match="'linear' is not one of 'plateau', 'cosine', 'constant', 'steps'"):
        learning_rate_at(state, TrainConfig(schedule="linear"))


# ---- Rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("constant", (), [0.1] * 5),
        ("constant", ((1, 9.0),), [0.1] * 5),  # steps are those of the other schedule
        ("steps", ((2, 0.01), (4, 0.5)), [0.1, 0.1, 0.01, 0.01, 0.5]),
        ("steps", ((0, 0.02),), [0.02] * 5),
        ("steps", (), [0.1] * 5),
    ],
)
def test_rates_of_every_epoch(schedule, steps, expected):
    # A plateau rule would have cut the rate in each epoch.
    config = TrainConfig(
        epochs=5,
        batch_size=9,
        learning_rate=0.1,
        optimiser="sgd",
        momentum=0.0,
        schedule=schedule,
        steps=steps,
        plateau_patience=0,
        plateau_threshold=1.0,
    )
    state = resume_from(variables(), jax.random.key(3), config)
    rate_of = jax.jit(lambda epoch: learning_rate_at(state._replace(epoch=epoch), config))
    rates = [float(rate_of(jnp.int32(epoch))) for epoch in range(5)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_the_rate_of_a_step_is_what_its_epoch_trains_with():
    config = TrainConfig(
        epochs=3,
        batch_size=9,
        learning_rate=0.5,
        optimiser="sgd",
        momentum=0.0,
        schedule="steps",
        steps=((1, 0.25), (2, 0.0)),
    )
    index = np.arange(5)
    states = [train(config, rows(index), epochs) for epochs in (1, 2, 3)]
    params = {name: np.asarray(leaf, np.float64) for name, leaf in variables()["params"].items()}
    for state, rate in zip(states, (0.5, 0.25, 0.0), strict=True):
        gradient = softmax_gradient(params, index)
        params = {name: params[name] - rate * gradient[name] for name in params}
        chex.assert_trees_all_close(state.variables["params"], params, atol=1e-5)
    np.testing.assert_allclose(states[-1].history["learning_rate"], [0.5, 0.25, 0.0])


# ---- Views ----------------------------------------------------------------------------------------------------------


def views_objective(params, variables, images, targets, key):
    """Records the images it is given, in the place of statistics; changes no weight."""
    assert images.shape == (4, 2, *SHAPE)
    losses = jnp.sum(params["kernel"]) * jnp.zeros(4)
    seen = {"images": images, "labels": targets["labels"]}
    return Outcome(losses, jnp.zeros((4, 3)), targets["labels"], {**variables, "seen": seen})


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
def test_an_objective_gets_all_views_of_its_rows_augmented_alike(augmentation):
    index = np.stack([[0, 3, 6, 7], [1, 3, 8, 2]], axis=1)  # the second row is twice the same image
    two = Rows(jnp.asarray(index, jnp.int32), {"labels": jnp.arange(4)})
    config = TrainConfig(epochs=1, batch_size=4, augmentation=augmentation)
    empty = {"images": jnp.zeros((4, 2, *SHAPE)), "labels": jnp.zeros(4, jnp.int32)}
    state = resume_from({**variables(), "seen": empty}, jax.random.key(3), config)
    no_views = Rows(jnp.zeros((0, 2), jnp.int32), {"labels": jnp.zeros(0, jnp.int32)})
    seen = jax.jit(make_epoch(LINEAR, loss, config, views_objective))(state, two, no_views, POOL).variables["seen"]

    order = np.asarray(seen["labels"])
    assert sorted(order) == [0, 1, 2, 3]
    epoch_key = jax.random.fold_in(state.key, 0)
    batch_key = jax.random.fold_in(epoch_key, 0)
    np.testing.assert_array_equal(order, jax.random.permutation(epoch_key, 4))
    # Each view is augmented as if it were the only one: by the same crop and the same flip.
    alone_of = jax.jit(lambda key, images: as_float(augment(key, images, augmentation)))
    for view in range(2):
        alone = alone_of(batch_key, POOL[index[order, view]])
        np.testing.assert_allclose(seen["images"][:, view], alone, rtol=1e-6)
    twice = int(np.flatnonzero(order == 1)[0])
    np.testing.assert_array_equal(seen["images"][twice, 0], seen["images"][twice, 1])
    is_moved = np.abs(seen["images"][:, 0] - np.asarray(POOL, np.float32)[index[order, 0]] / 255).max() > 0.01
    assert is_moved == (augmentation != "none")


def test_memory_is_estimated_for_rows_of_several_views():
    config = TrainConfig(epochs=1, batch_size=4)

    def objective(params, variables, images, targets, key):
        assert images.shape[0] == 4
        flat = images.reshape(4, -1, *SHAPE)
        inner = {**variables, "params": params}
        outcomes = [
            supervised(LINEAR, loss)(params, inner, flat[:, view], targets, key) for view in range(flat.shape[1])
        ]
        return outcomes[0]._replace(losses=sum(outcome.losses for outcome in outcomes))

    def need(*views):
        shape = jax.ShapeDtypeStruct
        states = jax.eval_shape(
            jax.vmap(lambda key: resume_from(variables(), key, config)), jax.random.split(jax.random.key(0), 3)
        )
        train_rows = Rows(shape((3, 8, *views), jnp.int32), {"labels": shape((3, 8), jnp.int32)})
        none = Rows(shape((3, 0, *views), jnp.int32), {"labels": shape((3, 0), jnp.int32)})
        return memory.estimate(objective, config, states, POOL, train_rows, none)

    single, double = need(), need(2)
    image = 4 * int(np.prod(SHAPE))
    assert double.shared == single.shared == memory.count_bytes(POOL)
    assert double.member - single.member == 4 * 8  # an index more for each row
    # The backward pass keeps the other view of each image of the batch too.
    assert double.working - single.working >= 4 * image
