from dataclasses import replace
from functools import cache
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.choices import Layout
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.models.facade import as_model
from bdjax.models.resnet import ResNet
from bdjax.training import checkpoint, ensemble
from bdjax.training.member import Rows, TrainConfig, init_state, make_epoch, supervised

SHAPE = (6, 6, 1)
POOL = jnp.asarray(np.random.default_rng(0).integers(0, 256, (30, *SHAPE)), jnp.uint8)
CLASSES = np.random.default_rng(1).integers(0, 3, 30).astype(np.int32)
CONFIG = TrainConfig(epochs=2, batch_size=4, evaluation_batch_size=3)
LAYOUTS = get_args(Layout)


def loss(logits, targets):
    return cross_entropy(logits, targets["labels"])


def draw_rows(seed, num_members, num_rows):
    """Other rows for each member."""
    random = np.random.default_rng(seed)
    index = np.stack([random.permutation(30)[:num_rows] for _ in range(num_members)])
    return Rows(jnp.asarray(index, jnp.int32), {"labels": jnp.asarray(CLASSES[index])})


def fresh(model, seeds, config=CONFIG):
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return ensemble.init_states(model, SHAPE, config, keys)


def fit(model, seeds, train, validation, layout, config=CONFIG, **where):
    return ensemble.fit(
        model, loss, config, fresh(model, seeds, config), POOL, train, validation, layout=layout, **where
    )


def words(states):
    """Typed keys as their words, which NumPy can compare."""
    return states._replace(key=jax.random.key_data(states.key))


ROWS = draw_rows(2, 3, 10), draw_rows(3, 3, 5)
ROWS_OF_TWO = draw_rows(2, 2, 8), draw_rows(3, 2, 3)


# ---- Stacking -------------------------------------------------------------------------------------------------------


def tree(seed):
    random = np.random.default_rng(seed)
    return {"a": jnp.asarray(random.random((2, 3)), jnp.float32), "b": (jnp.int32(seed), jax.random.key(seed))}


def plain(tree):
    return {**tree, "b": (tree["b"][0], jax.random.key_data(tree["b"][1]))}


def test_stacking_and_back():
    trees = [tree(seed) for seed in range(3)]
    stacked = ensemble.stack(trees)
    chex.assert_tree_shape_prefix(plain(stacked), (3,))
    assert ensemble.num_members(stacked) == 3
    for member, original in enumerate(trees):
        chex.assert_trees_all_equal(plain(ensemble.members(stacked, member)), plain(original))


def test_joining_puts_stacks_one_after_another():
    trees = [tree(seed) for seed in range(5)]
    joined = ensemble.join([ensemble.stack(trees[:2]), ensemble.stack(trees[2:])])
    chex.assert_trees_all_equal(plain(joined), plain(ensemble.stack(trees)))
    chex.assert_trees_all_equal(plain(ensemble.members(joined, slice(1, 4))), plain(ensemble.stack(trees[1:4])))
    picked = ensemble.members(joined, np.array([4, 0]))
    chex.assert_trees_all_equal(plain(picked), plain(ensemble.stack([trees[4], trees[0]])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mapping_a_function_over_members(layout):
    def function(member, scale, shift):
        assert member["x"].shape == (3,)  # one member
        return {"y": member["x"] * scale + shift}

    stacked = {"x": jnp.arange(12.0).reshape(4, 3)}
    scales, shift = jnp.arange(4.0), jnp.asarray([1.0, 2.0, 3.0])
    mapped = jax.jit(ensemble.map_members(function, layout, num_shared=1))(stacked, scales, shift)
    expected = np.asarray(stacked["x"]) * np.arange(4)[:, None] + np.asarray(shift)
    chex.assert_trees_all_close(mapped, {"y": expected})
    doubled = ensemble.map_members(lambda x: 2 * x, layout)(scales)
    chex.assert_trees_all_close(doubled, 2 * scales)


def test_an_unknown_layout_is_an_error():
    with pytest.raises(ValueError, match="layout 'pmap' is not one of 'vmap', 'map', 'unrolled'"):
        ensemble.map_members(lambda x: x, "pmap")
    assert ensemble.default_layout() in LAYOUTS


def test_a_member_is_initialised_by_its_own_key_alone(linear):
    stacked = fresh(linear, [4, 5, 6])
    chex.assert_tree_shape_prefix(words(stacked), (3,))
    for member, seed in enumerate((4, 5, 6)):
        alone = init_state(jax.random.key(seed), linear, SHAPE, CONFIG)
        chex.assert_trees_all_close(words(ensemble.members(stacked, member)), words(alone), rtol=1e-6)
    chex.assert_trees_all_equal(words(ensemble.members(fresh(linear, [9, 5]), 1)), words(ensemble.members(stacked, 1)))


# ---- Several devices ------------------------------------------------------------------------------------------------

several_devices = pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices; conftest.py makes them")


@pytest.mark.parametrize("count", range(1, 8))
def test_members_are_dealt_out_evenly(count):
    devices = len(jax.devices())
    spread = ensemble.spread_members(count)
    assert 0 <= spread.padding < spread.mesh.size <= min(count, devices)
    assert (count + spread.padding) % spread.mesh.size == 0
    assert (count + spread.padding) // spread.mesh.size == -(-count // devices)  # no device waits for another
    tree = {"x": jnp.arange(3.0 * count).reshape(count, 3), "key": jax.random.split(jax.random.key(0), count)}
    placed = spread.place(tree)
    assert len(placed["x"].devices()) == spread.mesh.size
    assert placed["x"].shape == (count + spread.padding, 3)
    back = spread.gather(placed)
    chex.assert_trees_all_equal(back["x"], tree["x"])
    chex.assert_trees_all_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
    assert back["x"].devices() == {jax.devices()[0]}


@pytest.mark.slow
@several_devices
def test_padding_never_shows(linear, tmp_path):
    """`test_devices.py` compares every layout on four devices, with padding, with one device."""
    layout = "map"
    devices = len(jax.devices())
    count = devices + 1
    rows = draw_rows(2, count, 6), draw_rows(3, count, 4)
    seen = []
    states = fit(
        linear, range(count), *rows, layout, progress_folder=tmp_path, on_epoch=lambda s: seen.append(s.epoch.shape)
    )
    assert seen == [(count,)] * 2
    chex.assert_tree_shape_prefix(words(states), (count,))
    chex.assert_trees_all_equal(words(checkpoint.load_progress(tmp_path, states)), words(states))
    last = np.array([count - 1])
    alone = fit(linear, [count - 1], ensemble.members(rows[0], last), ensemble.members(rows[1], last), layout)
    chex.assert_trees_all_close(words(ensemble.members(states, last)), words(alone), rtol=1e-5, atol=1e-6)
    logits = ensemble.make_predict(linear, layout, 4)(states.variables, POOL[:6])
    chex.assert_shape(logits, (count, 6, 3))
    np.testing.assert_allclose(
        logits[-1:], ensemble.make_predict(linear, layout, 4)(alone.variables, POOL[:6]), atol=1e-5
    )


# ---- Training -------------------------------------------------------------------------------------------------------


def test_layouts_agree_with_each_other_and_with_training_alone(convolutional):
    train, validation = ROWS_OF_TWO
    together = {layout: fit(convolutional, [0, 1], train, validation, layout) for layout in LAYOUTS}
    for states in together.values():
        chex.assert_tree_shape_prefix(words(states), (2,))
    chex.assert_trees_all_close(words(together["vmap"]), words(together["map"]), rtol=1e-4, atol=2e-5)

    epoch = jax.jit(make_epoch(convolutional, loss, CONFIG))
    start = fresh(convolutional, [0, 1])
    for member in range(2):
        state = ensemble.members(start, member)
        for _ in range(CONFIG.epochs):
            state = epoch(state, ensemble.members(train, member), ensemble.members(validation, member), POOL)
        for states in together.values():
            found = ensemble.members(states, member)
            chex.assert_trees_all_close(words(found), words(state), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_every_layout_and_lowering_trains_to_the_same_numbers():
    """A stem, a block with a stride and its shortcut, and the classifier: each layout and each lowering once.

    The test above has all nine combinations, of the stem alone.
    """
    config = replace(CONFIG, learning_rate=1e-3)  # training multiplies differences of rounding
    ends = []
    for lowering, layout in (("native", "vmap"), ("patches", "map"), ("shifted", "unrolled")):
        model = as_model(ResNet("basic", (0, 1, 0), 2, 3, lowering), 3, lowering)
        ends.append(fit(model, [0, 1], ROWS_OF_TWO[0], draw_rows(3, 2, 0), layout, config))
    for end in ends[1:]:
        chex.assert_trees_all_close(words(end), words(ends[0]), rtol=1e-3, atol=1e-4)


@cache
def trained(model, layout):
    return fit(model, [0, 1, 2], *ROWS, layout)


@pytest.mark.slow
def test_members_in_another_order_are_the_same_members(linear):
    """The tests above and below compare a member with its training alone, and with its training beside others."""
    states, (train, validation) = trained(linear, "map"), ROWS
    order = np.array([2, 0, 1])
    permuted = fit(linear, [2, 0, 1], ensemble.members(train, order), ensemble.members(validation, order), "map")
    chex.assert_trees_all_close(words(permuted), words(ensemble.members(states, order)), rtol=1e-5, atol=1e-6)
    kernels = states.variables["params"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2


def test_a_members_rows_affect_no_other_member(linear):
    """`test_devices.py` shows it for every layout."""
    states, (train, validation) = trained(linear, "map"), ROWS
    other = draw_rows(9, 3, 10)
    changed = jax.tree.map(lambda old, new: np.concatenate([old[:1], new[1:2], old[2:]]), train, other)
    after = fit(linear, [0, 1, 2], changed, validation, "map")
    others = np.array([0, 2])
    chex.assert_trees_all_equal(words(ensemble.members(after, others)), words(ensemble.members(states, others)))
    before, now = (fitted.variables["params"]["kernel"][1] for fitted in (states, after))
    assert np.abs(before - now).max() > 1e-3


def test_training_needs_no_validation_rows(linear):
    states = fit(linear, [0, 1], draw_rows(2, 2, 10), draw_rows(3, 2, 0), "map")
    chex.assert_trees_all_equal(states.history["validation_loss"], states.history["loss"])
    assert np.all(states.history["loss"] > 0)


def test_members_and_epochs_share_one_trace(linear):
    traces, after_epoch = [], []

    def counted(logits, targets):
        traces.append(logits.shape)
        return loss(logits, targets)

    ensemble.fit(
        linear,
        counted,
        TrainConfig(epochs=3, batch_size=4, evaluation_batch_size=3),
        fresh(linear, [0, 1, 2], TrainConfig(epochs=3)),
        POOL,
        *ROWS,
        layout="map",
        on_epoch=lambda _: after_epoch.append(len(traces)),
    )
    assert set(traces) == {(4, 3), (2, 3), (3, 3)}  # full batches, the last one, and validation: one member each
    assert after_epoch[0] == after_epoch[1] == after_epoch[2]


# ---- Going on after an interruption ---------------------------------------------------------------------------------

FOUR = TrainConfig(epochs=4, batch_size=5, plateau_patience=0, plateau_threshold=0.5)


@pytest.mark.slow
def test_an_interrupted_run_ends_where_it_would_have_ended(linear, tmp_path):
    """`test_stages.py` resumes a stage; `test_devices.py` and `test_interruptions.py` resume with the layout "vmap"."""
    layout, config = "map", replace(FOUR, augmentation="crop")
    straight = fit(linear, [0, 1, 2], *ROWS, layout, config)
    assert np.any(straight.plateau.learning_rate < 0.01)
    seen = []

    def interrupt(states):
        seen.append(int(states.epoch[0]))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(linear, [0, 1, 2], *ROWS, layout, config, progress_folder=tmp_path, on_epoch=interrupt)
    resumed = fit(linear, [0, 1, 2], *ROWS, layout, config, progress_folder=tmp_path, on_epoch=interrupt)
    assert seen == [1, 2, 3, 4]
    chex.assert_trees_all_equal(words(resumed), words(straight))

    # A finished stage is read, not run.
    again = fit(linear, [0, 1, 2], *ROWS, layout, config, progress_folder=tmp_path, on_epoch=interrupt)
    assert seen == [1, 2, 3, 4]
    chex.assert_trees_all_equal(words(again), words(straight))


def test_progress_of_another_run_is_an_error(linear, tmp_path):
    fit(linear, [0, 1, 2], *ROWS, "map", CONFIG, progress_folder=tmp_path)
    with pytest.raises(InputError, match="progress-000002: not the progress of this run"):
        fit(linear, [0, 1, 2], *ROWS, "map", FOUR, progress_folder=tmp_path)
    with pytest.raises(InputError, match="progress-000002: not the progress of this run"):
        two = draw_rows(2, 2, 10), draw_rows(3, 2, 5)
        fit(linear, [0, 1], *two, "map", CONFIG, progress_folder=tmp_path)


def test_a_stage_is_trained_once(linear, tmp_path):
    folder = tmp_path / "stage"
    like = ensemble.trained_like(linear, SHAPE, 3, CONFIG.epochs)
    calls = []

    def train(progress):
        calls.append(progress)
        return fit(linear, [0, 1, 2], *ROWS, "map", CONFIG, progress_folder=progress)

    first, is_restored = ensemble.fit_once(folder, {"model": "linear"}, like, train)
    assert not is_restored
    chex.assert_trees_all_equal_shapes_and_dtypes(first, like)
    chex.assert_tree_shape_prefix(first, (3,))
    assert not list(folder.glob("progress-*"))
    assert checkpoint.about(folder) == {"model": "linear"}
    second, is_restored = ensemble.fit_once(folder, {"model": "linear"}, like, train)
    assert is_restored
    assert len(calls) == 1
    chex.assert_trees_all_equal(second, first)
    with pytest.raises(InputError, match="stage: the checkpoint does not fit"):
        ensemble.fit_once(folder, {}, ensemble.trained_like(linear, SHAPE, 2, CONFIG.epochs), train)


# ---- Predicting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_are_the_models_own(convolutional, layout):
    keys = jax.random.split(jax.random.key(0), 2)
    variables = ensemble.init_members(lambda key: convolutional.init(key, SHAPE), keys)
    # Off the neutral start: predictions must come from running statistics.
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])
    images = POOL[:7].astype(jnp.float32) / 255
    predict = ensemble.make_predict(convolutional, layout, batch_size=3)
    logits = predict(variables, images)
    chex.assert_shape(logits, (2, 7, 3))
    for member in range(2):
        own = jax.jit(lambda one: convolutional.apply(one, images, train=False).logits)(
            ensemble.members(variables, member)
        )
        np.testing.assert_allclose(logits[member], own, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predict(variables, POOL[:7]), logits, rtol=1e-5, atol=1e-6)  # 8-bit images


# ---- Groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (1, [[0], [1], [2], [3], [4]]),
        (2, [[0, 1], [2, 3], [4, 4]]),
        (3, [[0, 1, 2], [3, 4, 4]]),
        (4, [[0, 1, 2], [3, 4, 4]]),
        (5, [[0, 1, 2, 3, 4]]),
        (9, [[0, 1, 2, 3, 4]]),
    ],
)
def test_groups_are_of_one_length(size, groups):
    assert [group.tolist() for group in ensemble._groups(5, size)] == groups


@pytest.mark.slow
@pytest.mark.parametrize(("group_size", "layout"), [(3, "vmap"), (1, "map")])
def test_members_in_groups_end_where_they_end_together(linear, layout, group_size, tmp_path):
    rows = draw_rows(2, 5, 10), draw_rows(3, 5, 5)
    together = fit(linear, range(5), *rows, layout, group_size=5)
    seen = []
    grouped = fit(
        linear,
        range(5),
        *rows,
        layout,
        group_size=group_size,
        progress_folder=tmp_path,
        on_epoch=lambda states: seen.append(states.epoch.shape),
    )
    assert seen == [(5,), (5,)]
    chex.assert_trees_all_close(words(grouped), words(together), rtol=1e-5, atol=1e-6)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(grouped))
    # What was kept of the grouped run is a run's progress like any other.
    again = fit(linear, range(5), *rows, layout, group_size=5, progress_folder=tmp_path)
    chex.assert_trees_all_equal(words(again), words(grouped))


def test_members_that_do_not_fit_are_split_with_a_log_line(linear, tmp_path, monkeypatch):
    rows = draw_rows(2, 5, 10), draw_rows(3, 5, 5)
    states = fresh(linear, range(5))
    need = ensemble.memory.estimate(supervised(linear, loss), CONFIG, states, POOL, *rows)
    calls, lines = [], []
    compile_epoch = ensemble.compile_epoch

    def watched(model, loss, config, layout, spread):
        calls.append(spread.count)
        return compile_epoch(model, loss, config, layout, spread)

    monkeypatch.setattr(ensemble, "compile_epoch", watched)
    monkeypatch.setattr(ensemble.memory, "available", lambda: need.total(1, 1))  # one on each of two devices
    seen = []
    watch = {"progress_folder": tmp_path, "on_epoch": lambda states: seen.append(states.epoch.shape)}
    split = fit(linear, range(5), *rows, "map", report=lines.append, **watch)
    assert calls == [2] and seen == [(5,), (5,)]
    (line,) = lines
    assert line.startswith("5 members in groups of 2: one member takes about ")
    monkeypatch.undo()
    chex.assert_trees_all_close(words(split), words(fit(linear, range(5), *rows, "map")), rtol=1e-5, atol=1e-6)
    # What was kept of the run in groups is a run's progress like any other.
    chex.assert_trees_all_equal(words(checkpoint.load_progress(tmp_path, states)), words(split))


def test_a_device_that_runs_out_of_memory_is_an_error_with_advice(linear, monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(ensemble, "compile_epoch", lambda *arguments: fail)
    with pytest.raises(InputError, match="the device ran out of memory: use a smaller --batch-size"):
        fit(linear, range(3), *ROWS, "map")


def test_other_errors_of_a_device_are_passed_on(linear, monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(ensemble, "compile_epoch", lambda *arguments: fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fit(linear, range(3), *ROWS, "map")
