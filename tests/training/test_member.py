import itertools
import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.losses import cross_entropy
from bdjax.training.augmentation import augment
from bdjax.training.member import (
    HISTORY,
    Rows,
    TrainConfig,
    as_float,
    evaluate_loss,
    init_state,
    make_epoch,
    no_rows,
    over_batches,
    resume_from,
)
from bdjax.training.plateau import init_plateau, plateau_step
from bdjax.types import Model, ModelOutput

SHAPE = (4, 4, 1)
POOL = jnp.asarray(np.random.default_rng(0).integers(0, 256, (20, *SHAPE)), jnp.uint8)
CLASSES = jnp.asarray(np.random.default_rng(1).integers(0, 3, 20), jnp.int32)


def loss(logits, targets):
    return cross_entropy(logits, targets["labels"])


def rows_of(index):
    index = np.asarray(index, int)
    return Rows(jnp.asarray(index, jnp.int32), {"labels": CLASSES[index]})


TRAIN = rows_of([3, 17, 0, 8, 11, 5, 19, 2, 14, 7])
VALIDATION = rows_of([1, 4, 6, 9, 10, 12, 13])
NOTHING = rows_of([])


@cache
def compiled(model, config):
    return jax.jit(make_epoch(model, loss, config))


@cache
def fresh(model, config, shape=SHAPE):
    return jax.jit(lambda key: init_state(key, model, shape, config))


def run(model, config, *, epochs=None, train=TRAIN, validation=VALIDATION, pool=POOL, key=7):
    state = fresh(model, config, pool.shape[1:])(jax.random.key(key))
    for _ in range(config.epochs if epochs is None else epochs):
        state = compiled(model, config)(state, train, validation, pool)
    return state


# ---- Which rows -----------------------------------------------------------------------------------------------------

NUM = 10
ONE_HOT = jnp.asarray(255 * np.eye(NUM, dtype=np.uint8).reshape(NUM, NUM, 1, 1))


def _record(variables, images, *, train, edits=None):
    flat = images.reshape(images.shape[0], -1)
    stats = variables["batch_stats"]
    if train:
        batch = jnp.arange(NUM) == stats["batches"]
        stats = {
            "visits": stats["visits"] + jnp.sum(flat, axis=0)[None] * batch[:, None].astype(jnp.float32),
            "batches": stats["batches"] + 1,
        }
    return ModelOutput(flat @ variables["params"]["kernel"], {}, {**variables, "batch_stats": stats})


RECORDER = Model(
    lambda key, shape: {
        "params": {"kernel": jnp.zeros((NUM, 3))},
        "batch_stats": {"visits": jnp.zeros((NUM, NUM)), "batches": jnp.int32(0)},
    },
    _record,
    3,
    "notes which rows each batch held",
)


def visits(batch_size, keep_last_batch, epochs=1, key=7):
    """How often each batch saw each row."""
    config = TrainConfig(epochs=2, batch_size=batch_size, keep_last_batch=keep_last_batch)
    every = Rows(jnp.arange(NUM), {"labels": CLASSES[:NUM]})
    state = run(RECORDER, config, epochs=epochs, train=every, validation=every, pool=ONE_HOT, key=key)
    seen = np.asarray(state.variables["batch_stats"]["visits"])
    return seen[: int(state.variables["batch_stats"]["batches"])]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 64])
def test_an_epoch_visits_every_row_once(batch_size):
    seen = visits(batch_size, keep_last_batch=True)
    np.testing.assert_allclose(seen.sum(axis=0), 1)
    sizes = [batch_size] * (NUM // batch_size) + [NUM % batch_size] * (NUM % batch_size > 0)
    np.testing.assert_allclose(seen.sum(axis=1), sizes)


@pytest.mark.parametrize(("batch_size", "left_out"), [(4, 2), (5, 0), (64, 0)])
def test_the_incomplete_last_batch_can_be_left_out(batch_size, left_out):
    seen = visits(batch_size, keep_last_batch=False)
    rows = seen.sum(axis=0)
    np.testing.assert_allclose(sorted(rows), [0] * left_out + [1] * (NUM - left_out))
    np.testing.assert_allclose(seen.sum(axis=1), min(batch_size, NUM))


def test_every_epoch_and_every_key_shuffles_anew():
    two = visits(4, keep_last_batch=True, epochs=2)
    first, second = two[:3], two[3:]
    np.testing.assert_allclose(second.sum(axis=0), 1)
    assert np.any(first != second)
    np.testing.assert_array_equal(first, visits(4, keep_last_batch=True))
    assert np.any(first != visits(4, keep_last_batch=True, key=8))


# ---- What an epoch computes -----------------------------------------------------------------------------------------


def by_hand(model, config, epochs):
    """The same training, written out: PyTorch's Adam in NumPy, a Python loop over the batches."""
    state = fresh(model, config)(jax.random.key(7))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.variables["params"])
    stats = state.variables["batch_stats"]
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    count, history = 0, []

    @jax.jit
    def augmented(epoch_key, number, images):
        return augment(jax.random.fold_in(epoch_key, number), images, config.augmentation)

    @jax.jit
    def evaluate(params, stats, images, labels):
        def objective(params):
            output = model.apply({"params": params, "batch_stats": stats}, images, train=True)
            return jnp.mean(cross_entropy(output.logits, labels)), output

        return jax.value_and_grad(objective, has_aux=True)(params)

    for epoch in range(epochs):
        epoch_key = jax.random.fold_in(state.key, epoch)
        order = np.asarray(jax.random.permutation(epoch_key, len(TRAIN.index)))
        losses, hits = [], 0
        for number, start in enumerate(range(0, len(order), config.batch_size)):
            where = order[start : start + config.batch_size]
            if len(where) < config.batch_size and not config.keep_last_batch:
                continue
            labels = TRAIN.targets["labels"][where]
            images = augmented(epoch_key, number, POOL[TRAIN.index[where]])
            single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
            (value, output), gradient = evaluate(
                single, stats, np.asarray(images, np.float32) / np.float32(255), labels
            )
            stats = output.variables["batch_stats"]
            losses += [float(value)] * len(where)
            hits += int(np.sum(np.argmax(output.logits, axis=1) == labels))
            count += 1

            gradient = jax.tree.map(lambda g, p: np.asarray(g) + config.weight_decay * p, gradient, params)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)

            def update(p, m, v, count=count):
                direction = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
                return p - config.learning_rate * direction

            params = jax.tree.map(update, params, first, second)
        history.append((np.mean(losses), hits / len(losses)))
    return params, stats, history


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(epochs=3, batch_size=4, keep_last_batch=False, weight_decay=0.1),
        TrainConfig(epochs=3, batch_size=4, augmentation="crop_flip"),
    ],
    ids=["dropped and decayed", "kept and augmented"],
)
def test_epochs_are_a_loop_over_a_shuffle(linear, config):
    state = run(linear, config)
    params, stats, history = by_hand(linear, config, 3)
    chex.assert_trees_all_close(state.variables["params"], params, atol=2e-5)
    chex.assert_trees_all_close(state.variables["batch_stats"], stats, atol=1e-5)
    losses, accuracies = zip(*history, strict=True)
    np.testing.assert_allclose(state.history["loss"], losses, atol=2e-5)
    np.testing.assert_allclose(state.history["accuracy"], accuracies, atol=1e-6)
    assert int(state.epoch) == 3


def test_an_epoch_is_a_pure_function_of_its_arguments(linear):
    config = TrainConfig(epochs=3, batch_size=4, augmentation="crop_flip")
    epoch = compiled(linear, config)
    state = fresh(linear, config)(jax.random.key(0))
    before = jax.tree.map(np.array, state._replace(key=jax.random.key_data(state.key)))
    once, again = (epoch(state, TRAIN, VALIDATION, POOL) for _ in range(2))
    chex.assert_trees_all_equal(once, again)
    chex.assert_trees_all_equal(state._replace(key=jax.random.key_data(state.key)), before)
    chex.assert_trees_all_equal_shapes_and_dtypes(once, state)


def test_two_epochs_are_one_trace(linear):
    config = TrainConfig(epochs=2, batch_size=4)
    epoch = jax.jit(chex.assert_max_traces(make_epoch(linear, loss, config), n=1))
    state = fresh(linear, config)(jax.random.key(0))
    for _ in range(2):
        state = epoch(state, TRAIN, VALIDATION, POOL)
    assert int(state.epoch) == 2


# ---- Validation, rates, history -------------------------------------------------------------------------------------


def test_the_validation_loss_uses_the_running_statistics_after_the_epoch(linear):
    config = TrainConfig(epochs=3, batch_size=4, evaluation_batch_size=3)
    state = run(linear, config, epochs=1)
    output = linear.apply(state.variables, as_float(POOL[VALIDATION.index]), train=False)
    expected = jnp.mean(loss(output.logits, VALIDATION.targets))
    assert float(state.history["validation_loss"][0]) == pytest.approx(float(expected), abs=1e-6)
    for batch_size in (2, 128):
        direct = jax.jit(partial(evaluate_loss, linear, loss, batch_size=batch_size))(state.variables, POOL, VALIDATION)
        assert float(direct) == pytest.approx(float(expected), abs=1e-6)


def replay(values, config):
    """The rates before each epoch and the last state of the plateau rule over these losses."""
    step = jax.jit(
        partial(
            plateau_step,
            factor=config.plateau_factor,
            patience=config.plateau_patience,
            threshold=config.plateau_threshold,
        )
    )
    state, rates = init_plateau(config.learning_rate), []
    for value in values:
        rates.append(state.learning_rate)
        state = step(state, value)
    return rates, state


@pytest.mark.parametrize("validation", [VALIDATION, NOTHING], ids=["validation rows", "none"])
def test_the_plateau_rule_follows_each_epoch(linear, validation):
    # A threshold that few epochs reach, so that the rate is cut several times.
    config = TrainConfig(epochs=6, batch_size=4, plateau_patience=0, plateau_threshold=0.1, plateau_factor=0.25)
    state = run(linear, config, validation=validation)
    judged = "validation_loss" if len(validation.index) else "loss"
    rates, plateau = replay(state.history[judged], config)
    np.testing.assert_allclose(state.history["learning_rate"], rates)
    chex.assert_trees_all_close(state.plateau, plateau)
    assert len(set(np.asarray(rates).tolist())) > 1
    if judged == "loss":
        chex.assert_trees_all_equal(state.history["validation_loss"], state.history["loss"])
    else:
        assert np.all(state.history["validation_loss"] != state.history["loss"])


def test_half_a_cosine_over_the_epochs(linear):
    config = TrainConfig(epochs=4, batch_size=4, learning_rate=0.02, schedule="cosine")
    state = run(linear, config)
    expected = [0.02 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert expected[0] == 0.02
    np.testing.assert_allclose(state.history["learning_rate"], expected, rtol=1e-5)
    # It is the rate that was trained with: the fourth epoch moves less than the first, one at the end of the cosine nothing.
    kernels = [run(linear, config, epochs=epochs).variables["params"]["kernel"] for epochs in (0, 1, 3, 4, 5)]
    moved = [float(np.abs(after - before).max()) for before, after in itertools.pairwise(kernels)]
    assert moved[0] > 2 * moved[2] > 0.001
    assert moved[3] < 1e-7


def test_history_fills_epoch_by_epoch(linear):
    config = TrainConfig(epochs=3, batch_size=4)
    state = run(linear, config, epochs=2)
    assert set(state.history) == set(HISTORY)
    for name, values in state.history.items():
        chex.assert_shape(values, (3,))
        assert np.all(values[:2] > 0), name
        assert values[2] == 0, name


# ---- States ---------------------------------------------------------------------------------------------------------


def test_a_member_comes_from_its_key_alone(linear):
    config = TrainConfig(epochs=2)
    one, same, other = (fresh(linear, config)(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, same)
    assert np.any(one.variables["params"]["kernel"] != other.variables["params"]["kernel"])
    assert np.any(jax.random.key_data(one.key) != jax.random.key_data(other.key))
    assert np.any(jax.random.key_data(one.key) != jax.random.key_data(jax.random.key(0)))


def test_fine_tuning_starts_from_the_weights_with_a_fresh_optimiser(linear):
    config = TrainConfig(epochs=3, batch_size=4)
    trained = run(linear, config)
    tuned = resume_from(trained.variables, jax.random.key(1), config)
    chex.assert_trees_all_equal(tuned.variables, trained.variables)
    chex.assert_trees_all_equal(tuned.optimiser, fresh(linear, config)(jax.random.key(0)).optimiser)
    assert int(tuned.epoch) == 0
    assert all(np.all(values == 0) for values in tuned.history.values())


def test_images_become_floats_in_the_unit_interval():
    floats = as_float(jnp.asarray([0, 51, 255], jnp.uint8))
    chex.assert_type(floats, jnp.float32)
    np.testing.assert_allclose(floats, [0, 0.2, 1], rtol=1e-6)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 4), (7, 3), (6, 3), (5, 5)])
def test_batches_change_nothing(num_rows, batch_size):
    random = np.random.default_rng(0)
    rows = {
        "x": jnp.asarray(random.standard_normal((num_rows, 2, 3)), jnp.float32),
        "y": jnp.asarray(random.integers(0, 9, num_rows), jnp.int32),
    }

    def function(batch):
        assert batch["y"].shape[0] == min(batch_size, num_rows)
        return jnp.sum(batch["x"], axis=1) * batch["y"][:, None].astype(jnp.float32), batch["y"] + 1

    batched = jax.jit(partial(over_batches, function, batch_size=batch_size))(rows)
    x, y = np.asarray(rows["x"]), np.asarray(rows["y"])
    expected = (x.sum(axis=1) * y[:, None].astype(np.float32), y + 1)
    chex.assert_trees_all_close(batched, expected, rtol=1e-5, atol=1e-6)


def test_no_rows_have_the_targets_of_others():
    rows = Rows(
        np.zeros((2, 5, 3), np.int32), {"labels": np.zeros((2, 5), np.int32), "weight": np.zeros((2, 5), np.float32)}
    )
    none = no_rows(rows)
    assert none.index.shape == (2, 0, 3) and none.index.dtype == np.int32
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in none.targets.items()} == {
        "labels": ((2, 0), np.int32),
        "weight": ((2, 0), np.float32),
    }
