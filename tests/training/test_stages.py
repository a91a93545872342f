import contextlib
import dataclasses
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bdjax import losses
from bdjax.datasets.digits import load_digits
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.run.log import StageLog
from bdjax.training import checkpoint, ensemble
from bdjax.training.member import Outcome, Rows, TrainConfig, init_state, resume_from
from bdjax.training.stages import Nets, StageRunner, predict_groups
from bdjax.types import Model, ModelOutput

SHAPE = (3, 3, 1)
RANDOM = np.random.default_rng(0)
POOL = RANDOM.integers(0, 256, (12, *SHAPE), np.uint8)
CONFIG = TrainConfig(epochs=3, batch_size=4, evaluation_batch_size=3)


def linear(description):
    def init(key, image_shape):
        return {"params": {"kernel": jax.random.normal(key, (9, 2))}, "batch_stats": {}}

    def apply(variables, images, *, train, edits=None):
        flat = images.reshape(images.shape[0], -1)
        return ModelOutput(flat @ variables["params"]["kernel"], {}, variables)

    return Model(init, apply, 2, description)


ONE, OTHER = linear("one"), linear("other")


def rows(count, number):
    index = RANDOM.integers(0, 12, (count, number)).astype(np.int32)
    return Rows(jnp.asarray(index), {"labels": jnp.asarray(index % 2)})


TRAIN, VALIDATION = rows(4, 10), rows(4, 5)
KEYS = jax.random.split(jax.random.key(0), 4)


def variables(count, seed):
    return ensemble.init_members(lambda key: ONE.init(key, SHAPE), jax.random.split(jax.random.key(seed), count))


def runner_in(folder):
    return StageRunner(folder / "checkpoints", SHAPE, "map", StageLog(Console(file=io.StringIO(), width=200)))


@pytest.fixture
def runner(tmp_path):
    return runner_in(tmp_path)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A finished stage, which tests only read: (its runner, its networks)."""
    runner = runner_in(tmp_path_factory.mktemp("teachers"))
    return runner, from_scratch(runner)


@pytest.fixture(scope="module")
def fitted():
    """The same training without a stage."""
    return fit(layout="map")


def logged(runner):
    return runner.log.console.file.getvalue()


def from_scratch(runner, config=CONFIG):
    return runner.from_scratch("teachers", ONE, config, KEYS, 2, jnp.asarray(POOL), TRAIN, VALIDATION)


def cross_entropy(logits, targets):
    return losses.cross_entropy(logits, targets["labels"])


def fit(**where):
    states = ensemble.init_members(lambda key: init_state(key, ONE, SHAPE, CONFIG), KEYS)
    return ensemble.fit(ONE, cross_entropy, CONFIG, states, jnp.asarray(POOL), TRAIN, VALIDATION, **where)


def test_networks_from_scratch_are_trained_by_their_labels(teachers, fitted):
    runner, nets = teachers
    assert nets.model is ONE and nets.per_seed == 2
    chex.assert_trees_all_equal(nets.variables, fitted.variables)
    assert all(values.shape == (4, 3) and isinstance(values, np.ndarray) for values in nets.history.values())
    np.testing.assert_array_equal(nets.history["loss"], fitted.history["loss"])
    about = checkpoint.about(runner.folder / "teachers")
    assert about == {
        "model": "one",
        "num_classes": 2,
        "image_shape": [3, 3, 1],
        "members": 4,
        "epochs": 3,
        "per_seed": 2,
    }
    assert logged(runner).startswith("teachers         4 × one, 3 epochs")
    assert logged(runner).strip().endswith("→ checkpoints/teachers")


def test_without_a_folder_and_a_log_the_same_is_trained_in_memory(teachers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nets = from_scratch(StageRunner(None, SHAPE, "map"))
    chex.assert_trees_all_equal(nets.variables, teachers[1].variables)
    chex.assert_trees_all_equal(nets.history, teachers[1].history)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_members_of_a_seed(teachers):
    _, nets = teachers
    for seed in range(2):
        expected = jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf)[2 * seed : 2 * seed + 2], nets.variables)
        chex.assert_trees_all_equal(nets.of_seed(seed), expected)


def test_a_finished_stage_is_restored_and_not_trained(runner):
    calls = []

    def counted(**where):
        calls.append(where)
        return fit(**where)

    first = runner.train("the stage + more", ONE, CONFIG, 4, counted)
    second = runner.train("the stage + more", ONE, CONFIG, 4, counted)
    assert len(calls) == 1
    chex.assert_trees_all_equal(first, second)
    assert logged(runner).count("restored from checkpoint") == 1
    assert [path.name for path in runner.folder.iterdir()] == ["the-stage-more"]


def test_a_stage_passes_on_where_and_how_to_train(runner):
    received = {}

    def watched(*, layout, group_size, progress_folder, on_epoch, report):
        received.update(layout=layout, folder=progress_folder, group_size=group_size)
        report("in groups, say")
        done = []

        def both(state):
            done.append(sorted(path.name for path in progress_folder.glob("progress-*")))
            on_epoch(state)

        state = fit(layout=layout, progress_folder=progress_folder, on_epoch=both)
        received["progress"] = done
        return state

    runner.train("stage", ONE, CONFIG, 4, watched)
    assert (received["layout"], received["group_size"]) == ("map", None)
    assert "3 epochs; in groups, say" in logged(runner)
    assert received["folder"] == runner.folder / "stage"
    assert received["progress"] == [["progress-000001"], ["progress-000002"], ["progress-000003"]]
    assert not list(received["folder"].glob("progress-*"))  # replaced by the finished checkpoint


def test_an_interrupted_stage_is_resumed(runner, fitted):
    class CutOff(Exception):
        pass

    epochs = []

    def until_two(*, on_epoch, **where):
        def stop(state):
            epochs.append(int(state.epoch[0]))
            on_epoch(state)
            if len(epochs) == 2:
                raise CutOff

        return fit(on_epoch=stop, **where)

    with pytest.raises(CutOff):
        runner.train("stage", ONE, CONFIG, 4, until_two)
    assert "failed after" in logged(runner)
    resumed = runner.train("stage", ONE, CONFIG, 4, until_two)
    assert epochs == [1, 2, 3]
    chex.assert_trees_all_equal(resumed.variables, fitted.variables)


def test_curves_are_passed_on_from_the_first_epoch_whatever_was_restored(tmp_path):
    seen = []

    @contextlib.contextmanager
    def curves(stage):
        points = {}
        yield lambda epoch, numbers: points.setdefault(epoch, numbers)
        seen.append((stage.name, points))

    def train(**changes):
        return from_scratch(dataclasses.replace(runner_in(tmp_path), log=None, curves=curves, **changes))

    history = train().history
    train()  # restored
    train(folder=None)  # in memory: there is no place for curves
    assert [name for name, _ in seen] == ["teachers", "teachers"]
    for _, points in seen:
        assert list(points) == [1, 2, 3] and set(points[1]) == set(history)
        np.testing.assert_allclose([points[epoch]["loss"] for epoch in points], history["loss"].mean(axis=0), rtol=1e-6)


def test_a_stage_of_other_members_is_refused(teachers):
    runner, _ = teachers
    with pytest.raises(InputError, match="about.json: members is 4; should be 5; delete .* to train this stage again"):
        runner.train("teachers", ONE, CONFIG, 5, fit)


def test_predictions_do_not_depend_on_batches(runner):
    stacked = variables(3, 1)
    expected = (POOL.reshape(12, 9) / 255) @ np.asarray(stacked["params"]["kernel"], np.float64)
    for batch_size in (5, 100):
        logits = runner.predict(ONE, stacked, POOL, batch_size)
        assert isinstance(logits, np.ndarray) and logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_roles_of_one_architecture_share_a_call(runner):
    nets = {
        "clean": Nets(ONE, variables(2, 0), 1, {}),
        "student": Nets(OTHER, variables(2, 1), 1, {}),
        "teachers": Nets(ONE, variables(6, 2), 3, {}),
    }
    calls = []

    def predict(model, stacked):
        calls.append((model.description, ensemble.num_members(stacked)))
        return runner.predict(model, stacked, POOL, 5)

    for seed in range(2):
        logits = predict_groups(nets, seed, predict)
        assert logits.keys() == nets.keys()
        for role, role_nets in nets.items():
            alone = runner.predict(role_nets.model, role_nets.of_seed(seed), POOL, 5)
            assert logits[role].shape == (role_nets.per_seed, 12, 2)
            np.testing.assert_allclose(logits[role], alone, atol=1e-6)
    assert calls == [("one", 4), ("other", 1)] * 2


def test_training_continues_from_given_networks_with_other_variables(runner):
    carried = {**variables(4, 7), "attack": (jnp.arange(4.0),)}

    def objective(params, trained, images, targets, key):
        logits = ONE.apply({**trained, "params": params}, images, train=True).logits
        shift = trained["attack"][0] * jnp.float32(0.0)
        return Outcome(losses.cross_entropy(logits, targets["labels"]) + shift, logits, targets["labels"], trained)

    pool, none = jnp.asarray(POOL), jax.tree.map(lambda leaf: leaf[:, :0], TRAIN)
    nets = runner.from_variables("controlled", ONE, CONFIG, carried, KEYS, 2, pool, TRAIN, objective)
    plain = runner.from_variables("fine-tuned", ONE, CONFIG, variables(4, 7), KEYS, 2, pool, TRAIN)
    states = ensemble.init_members(lambda tree, key: resume_from(tree, key, CONFIG), variables(4, 7), KEYS)
    expected = ensemble.fit(ONE, cross_entropy, CONFIG, states, pool, TRAIN, none, layout="map")
    chex.assert_trees_all_equal(plain.variables, expected.variables)
    chex.assert_trees_all_close(nets.variables["params"], expected.variables["params"], atol=1e-6)
    np.testing.assert_array_equal(nets.variables["attack"][0], np.arange(4.0))
    again = runner.from_variables("controlled", ONE, CONFIG, carried, KEYS, 2, pool, TRAIN, objective)
    assert "restored from checkpoint" in logged(runner)
    chex.assert_trees_all_equal(again.variables, nets.variables)


def test_each_member_may_predict_images_of_its_own(runner):
    stacked = variables(3, 1)
    images = RANDOM.integers(0, 256, (3, 5, *SHAPE), np.uint8)
    own = runner.predict_own(ONE, stacked, images, batch_size=2)
    assert own.shape == (3, 5, 2)
    for i in range(3):
        shared = runner.predict(ONE, ensemble.members(stacked, slice(i, i + 1)), images[i], batch_size=2)
        np.testing.assert_allclose(own[i], shared[0], rtol=1e-6)


def test_a_function_of_every_row_of_every_member_is_a_loop_over_both(runner):
    traces = []

    def function(variables, images, targets):
        traces.append(images.shape)
        logits = ONE.apply(variables, images, train=False).logits
        return {"loss": cross_entropy(logits, targets), "pixels": images.reshape(len(images), -1)}

    stacked, pool = variables(4, 5), jnp.asarray(POOL)
    made = runner.per_row(function, stacked, TRAIN, pool, 4)
    assert all(isinstance(values, np.ndarray) and values.dtype == np.float32 for values in made.values())
    assert (made["loss"].shape, made["pixels"].shape) == ((4, 10), (4, 10, 9))
    count = len(traces)
    for i in range(4):
        index, kernel = np.asarray(TRAIN.index[i]), np.asarray(stacked["params"]["kernel"][i], np.float64)
        pixels = POOL[index].reshape(10, 9) / 255
        np.testing.assert_allclose(made["pixels"][i], pixels, rtol=1e-6)
        logits = pixels @ kernel
        expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(10), TRAIN.targets["labels"][i]]
        np.testing.assert_allclose(made["loss"][i], expected, atol=1e-5)

    # Other networks and other rows in the same shapes: nothing is traced again. Another batch size is another program.
    again = runner.per_row(function, variables(4, 6), TRAIN._replace(index=TRAIN.index[::-1]), pool, 4)
    assert len(traces) == count and set(traces) == {(4, *SHAPE)}
    assert np.abs(again["loss"] - made["loss"]).max() > 1e-3
    alone = runner.per_row(function, stacked, TRAIN, pool, 100)
    assert len(traces) > count and traces[-1] == (10, *SHAPE)
    chex.assert_trees_all_close(alone, made, atol=1e-6)


def test_a_function_of_a_row_gets_all_its_views(runner):
    def brightness(variables, images, targets):
        return jnp.mean(images, axis=(2, 3, 4))

    index = jnp.stack([TRAIN.index, TRAIN.index[:, ::-1]], axis=2)
    made = runner.per_row(brightness, variables(4, 5), TRAIN._replace(index=index), jnp.asarray(POOL), 4)
    np.testing.assert_allclose(made, POOL[np.asarray(index)].mean(axis=(3, 4, 5)) / 255, rtol=1e-5)


@pytest.mark.slow
def test_losses_with_rounded_products_agree_to_one_percent():
    """`tests/models/test_layers.py` compares each layer."""
    train = load_digits().train
    rows = Rows(jnp.arange(256)[None], {"labels": jnp.asarray(train.labels[:256])[None]})
    none = jax.tree.map(lambda leaf: leaf[:, :0], rows)
    config = TrainConfig(epochs=3, batch_size=32, learning_rate=3e-3)

    def losses_of(lowering):
        model = make_model("resnet10", 10, 4, lowering)
        runner = StageRunner(None, train.image_shape, "map")
        keys = jax.random.split(jax.random.key(0), 1)
        nets = runner.from_scratch("net", model, config, keys, 1, jnp.asarray(train.images), rows, none)
        return nets.history["loss"]

    exact, rounded = losses_of("shifted"), losses_of("shifted_bfloat16")
    assert exact[0, -1] < 0.8 * exact[0, 0] and not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0.01)
