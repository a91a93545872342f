import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bdjax.reporting.progress import StageLog
from bdjax.training import checkpoint, ensemble
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import Nets, StageRunner, predict_groups

SHAPE = (4, 4, 1)
RANDOM = np.random.default_rng(0)
POOL = jnp.asarray(RANDOM.integers(0, 256, (20, *SHAPE)), jnp.uint8)
INDEX = np.stack([RANDOM.permutation(20) for _ in range(4)]).astype(np.int32)
LABELS = RANDOM.integers(0, 3, 20).astype(np.int32)
CONFIG = TrainConfig(epochs=2, batch_size=4)


def rows(part):
    return Rows(jnp.asarray(INDEX[:, part]), {"labels": jnp.asarray(LABELS[INDEX[:, part]])})


@pytest.fixture
def runner(tmp_path):
    return StageRunner(tmp_path, SHAPE, "map", StageLog(Console(file=io.StringIO(), width=200)))


def said(runner):
    return runner.log.console.file.getvalue().splitlines()


def from_scratch(runner, model, name="clean model"):
    keys = jax.random.split(jax.random.key(0), 4)
    return runner.from_scratch(name, model, CONFIG, keys, 2, POOL, rows(slice(0, 12)), rows(slice(12, 20)))


def test_a_stage_is_trained_saved_and_read_back(linear, runner):
    nets = from_scratch(runner, linear)
    assert (nets.model, nets.per_seed) == (linear, 2)
    chex.assert_tree_shape_prefix(nets.variables, (4,))
    assert all(values.shape == (4, 2) for values in nets.history.values())
    assert np.all(nets.history["loss"] > 0)
    folder = runner.folder / "clean-model"
    assert checkpoint.about(folder) == {
        "model": "linear",
        "num_classes": 3,
        "image_shape": [4, 4, 1],
        "members": 4,
        "epochs": 2,
        "per_seed": 2,
    }
    again = from_scratch(runner, linear)
    chex.assert_trees_all_equal(again.variables, nets.variables)
    chex.assert_trees_all_equal(again.history, nets.history)
    first, second = said(runner)
    assert "4 × linear, 2 epochs" in first
    assert "done before" not in first
    assert "done before" in second
    assert "checkpoints/clean-model" in first


def test_a_stage_that_broke_off_goes_on(linear, runner, monkeypatch):
    expected = from_scratch(runner, linear, "straight")
    epochs = []

    def interrupt(self, steps=1, message=""):
        epochs.append(message)
        self.done += steps
        if len(epochs) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("bdjax.reporting.progress.StageProgress.advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_scratch(runner, linear, "broken off")
    assert not checkpoint.is_complete(runner.folder / "broken-off")
    nets = from_scratch(runner, linear, "broken off")
    chex.assert_trees_all_equal(nets.variables, expected.variables)
    chex.assert_trees_all_equal(nets.history, expected.history)
    assert len(epochs) == 2  # the first epoch was not run again
    assert epochs[1] == f"loss {expected.history['loss'][:, 1].mean():.3f}"


def test_predictions_are_the_members_logits(linear, runner):
    keys = jax.random.split(jax.random.key(0), 3)
    variables = ensemble.init_members(lambda key: linear.init(key, SHAPE), keys)
    images = np.asarray(POOL[:7])
    logits = runner.predict(linear, variables, images, 4)
    assert isinstance(logits, np.ndarray)
    for member in range(3):
        own = linear.apply(ensemble.members(variables, member), jnp.asarray(images, jnp.float32) / 255, train=False)
        np.testing.assert_allclose(logits[member], own.logits, rtol=1e-4, atol=1e-5)


def test_roles_of_one_architecture_are_predicted_in_one_call(linear):
    other = linear._replace(description="other")

    def nets(model, per_seed, start):
        # Two seeds; a member is known by its number.
        return Nets(model, {"number": jnp.arange(start, start + 2 * per_seed)}, per_seed, {})

    calls = []

    def predict(model, variables):
        calls.append(model.description)
        return np.asarray(variables["number"])[:, None]

    groups = {"teachers": nets(linear, 3, 0), "student": nets(other, 1, 10), "ta": nets(linear, 1, 20)}
    for seed, expected in (
        (0, {"teachers": [0, 1, 2], "student": [10], "ta": [20]}),
        (1, {"teachers": [3, 4, 5], "student": [11], "ta": [21]}),
    ):
        calls.clear()
        found = predict_groups(groups, seed, predict)
        assert {name: logits[:, 0].tolist() for name, logits in found.items()} == expected
        assert sorted(calls) == ["linear", "other"]
