"""One device or several: members get the same numbers, and a run can move from one device to others.

The number of devices is fixed when JAX starts. A process for each number trains on that many CPU devices and writes the
results, which the slow tests compare. The fast ones use the two devices of every test session.

"The same" is up to float32 rounding: members are exactly equal only if they go through the same program, which depends on
their number per device. XLA unrolls a loop over a single member, and uses other loops for eight members than for one.
"""

import pathlib
import shutil
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.choices import Layout
from bdjax.losses import cross_entropy
from bdjax.models.facade import as_model
from bdjax.models.resnet import ResNet
from bdjax.training import ensemble
from bdjax.training.member import Rows, TrainConfig, TrainState, init_state, make_epoch
from bdjax.types import Model
from tests.fixtures.forks import Fork
from tests.training.linear_network import linear_network

SHAPE = (6, 6, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (30, *SHAPE)).astype(np.uint8)
LAYOUTS = typing.get_args(Layout)
SEVERAL = 4
COUNTS = (3, 5)  # of four devices: one is left over and the others have one; three have two, one of them a copy
CONFIG = TrainConfig(epochs=2, batch_size=5, evaluation_batch_size=5)
MOVED = TrainConfig(epochs=6, batch_size=5, evaluation_batch_size=5, plateau_patience=0, plateau_threshold=0.5)
STOPS = {1: 2, SEVERAL: 4, 3: 6}  # number of devices -> the epoch after which the moving run leaves them


# ---- What a process does ---------------------------------------------------------------------------------------------


def loss(logits, targets):
    return cross_entropy(logits, targets["labels"])


def stem() -> Model:
    """A ResNet without blocks. The native convolution compiles fastest."""
    return as_model(ResNet("basic", (0, 0, 0), 2, 3, "native"), 3, "convolution, normalisation and classifier")


def draw_rows(seeds, count: int) -> Rows:
    """A member's rows come from its seed alone."""
    index = np.stack([np.random.default_rng(seed).permutation(len(IMAGES))[:count] for seed in seeds]).astype(np.int32)
    return Rows(jnp.asarray(index), {"labels": jnp.asarray(index % 3)})


def named(tree) -> dict[str, np.ndarray]:
    """Copies of all leaves by name, keys as their words."""

    def plain(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if is_key else leaf)

    return {jax.tree_util.keystr(where): plain(leaf) for where, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class Stop(Exception):
    pass


class Program:
    """Trains on a number of devices and writes the results to `folder`."""

    def __init__(self, devices: int, folder: pathlib.Path, model: Model):
        self.devices = devices
        self.folder = folder
        self.model = model

    def fit(self, seeds, config: TrainConfig, layout: str, **how) -> TrainState:
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        states = ensemble.init_members(lambda key: init_state(key, self.model, SHAPE, config), keys)
        shared = jnp.asarray(IMAGES), draw_rows(seeds, 10), draw_rows([seed + 100 for seed in seeds], 5)
        before = named((states, shared))
        fitted = ensemble.fit(self.model, loss, config, states, *shared, layout=layout, **how)
        # Only the states may have been donated; then they are deleted, not overwritten.
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(shared))
        after = named((jax.tree.map(lambda leaf: None if leaf.is_deleted() else leaf, states), shared))
        for name, values in after.items():
            assert np.array_equal(values, before[name]), f"fit wrote into its argument {name}"
        return fitted

    def move(self) -> None:
        """Resume the run from other devices, until it leaves these."""
        progress = self.folder / "moving"
        fit = partial(self.fit, range(4), MOVED, "vmap")

        def leave(state: TrainState) -> None:
            if state.epoch[0] == STOPS[self.devices]:
                raise Stop

        def copy(state: TrainState) -> None:
            if state.epoch[0] == STOPS[self.devices]:
                shutil.copytree(self.folder / "staying", progress)

        if self.devices == 1:
            self.write("stayed", fit(progress_folder=self.folder / "staying", on_epoch=copy))
        elif STOPS[self.devices] < MOVED.epochs:
            with pytest.raises(Stop):
                fit(progress_folder=progress, on_epoch=leave)
        else:
            self.write("moved", fit(progress_folder=progress))

    def compare(self, layout: str) -> None:
        predict = ensemble.make_predict(self.model, layout, 4)
        strangers = [member if member % 3 == 0 else member + 50 for member in range(COUNTS[-1])]
        runs = {str(count): range(count) for count in COUNTS}
        if self.devices > 1:
            runs["strangers"] = strangers
        for name, seeds in runs.items():
            state = self.fit(seeds, CONFIG, layout)
            logits = predict(state.variables, jnp.asarray(IMAGES[:7]))
            self.write(f"{layout}-{name}-on-{self.devices}", {"state": state, "logits": logits})

    def write(self, name: str, tree) -> None:
        np.savez(self.folder / f"{name}.npz", **named(tree))


def run_on(devices: int, folder: pathlib.Path) -> None:
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert len(jax.devices()) == devices
    Program(devices, folder, stem()).move()
    if devices != 3:
        # Only the layout "vmap" makes other convolutions of a network's.
        for layout in LAYOUTS:
            Program(devices, folder, stem() if layout == "vmap" else linear_network()).compare(layout)


# ---- The tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> pathlib.Path:
    """The files of all numbers of devices."""
    folder = tmp_path_factory.mktemp("devices")
    for devices in STOPS:
        errors = folder / "errors.txt"
        assert Fork(run_on, devices, folder, errors=errors).wait() == 0, errors.read_text()[-3000:]
    return folder


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def assert_same_but_for_rounding(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        if values.dtype == np.float32:
            scale = float(np.abs(values).max())
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5 * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_devices_equal_one(outcomes, layout, count):
    one, several = (read(outcomes / f"{layout}-{count}-on-{devices}.npz") for devices in (1, SEVERAL))
    assert one["['logits']"].shape == (count, 7, 3)
    assert len({member.tobytes() for member in one["['logits']"]}) == count  # members differ
    assert_same_but_for_rounding(several, one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_member_among_others_on_other_devices_is_the_same_member(outcomes, layout):
    among_five = read(outcomes / f"{layout}-{COUNTS[-1]}-on-{SEVERAL}.npz")
    for count in COUNTS[:-1]:
        fewer = read(outcomes / f"{layout}-{count}-on-{SEVERAL}.npz")
        assert_same_but_for_rounding({name: values[:count] for name, values in among_five.items()}, fewer)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_other_members_leave_no_trace(outcomes, layout):
    friends, strangers = (read(outcomes / f"{layout}-{name}-on-{SEVERAL}.npz") for name in (COUNTS[-1], "strangers"))
    for name, values in friends.items():  # the same program: not a bit may differ
        np.testing.assert_array_equal(strangers[name][::3], values[::3], err_msg=name)
    assert np.all(np.any(strangers["['logits']"][1::3] != friends["['logits']"][1::3], axis=(1, 2)))


@pytest.mark.slow
def test_a_run_that_moves_from_one_device_to_four_and_then_to_three_ends_where_it_would_have_ended(outcomes):
    stayed, moved = read(outcomes / "stayed.npz"), read(outcomes / "moved.npz")
    assert np.all(moved[".epoch"] == MOVED.epochs)
    assert np.all(moved[".history['loss']"] > 0)  # of all epochs, wherever they were
    assert np.any(moved[".plateau.learning_rate"] < MOVED.learning_rate)
    assert_same_but_for_rounding(moved, stayed)
    # The epochs before the move were carried over unchanged.
    for name in ("loss", "accuracy", "validation_loss", "learning_rate"):
        before = slice(0, STOPS[1])
        np.testing.assert_array_equal(moved[f".history['{name}']"][:, before], stayed[f".history['{name}']"][:, before])


def on_one_device(monkeypatch) -> None:
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_two_devices_equal_one_and_then_two(linear, monkeypatch, tmp_path):
    assert len(jax.devices()) == 2  # conftest.py makes them
    program, seeds = Program(2, tmp_path, linear), range(3)  # a copy of the third member is the fourth

    def stop(state: TrainState) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        on_one_device(patched)
        assert ensemble.spread_members(3).mesh.size == 1
        with pytest.raises(Stop):
            program.fit(seeds, CONFIG, "map", progress_folder=tmp_path, on_epoch=stop)
    assert ensemble.spread_members(3).mesh.size == 2
    moved = named(program.fit(seeds, CONFIG, "map", progress_folder=tmp_path))  # the first epoch was on one device
    assert np.all(moved[".epoch"] == CONFIG.epochs) and moved[".epoch"].shape == (3,)
    assert_same_but_for_rounding(moved, named(program.fit(seeds, CONFIG, "map")))


@pytest.mark.parametrize("donate", [True, False])
def test_an_epoch_deletes_the_placed_states_if_donated_and_nothing_else(linear, donate):
    # `Program.fit` asserts that `fit` does not change its arguments.
    model, seeds = linear, range(3)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    states = ensemble.init_members(lambda key: init_state(key, model, SHAPE, CONFIG), keys)
    spread = ensemble.spread_members(len(seeds))
    placed, train, validation = (spread.place(tree) for tree in (states, draw_rows(seeds, 10), draw_rows(seeds, 5)))
    pool = spread.replicate(jnp.asarray(IMAGES))
    before = named((states, train, validation, pool))
    epoch = make_epoch(model, loss, CONFIG)
    ensemble.compile_members(epoch, "map", spread, num_shared=1, donate=donate)(placed, train, validation, pool)
    assert {leaf.is_deleted() for leaf in jax.tree.leaves(placed)} == {donate}
    after = named((states, train, validation, pool))  # fails if one was deleted
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
