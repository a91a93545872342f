import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from bdjax.defenses.agpd import (
    AGPD,
    AgpdSettings,
    ClassGradients,
    anomaly_indices,
    best_split,
    check,
    choose_clean,
    closeness,
    cosines,
    detect,
    find_poisons,
    find_targets,
    grow,
    js_distance,
    last_round,
    layers_of,
    measure_class,
    measure_layer,
    passes,
    row_gradients,
    run,
)
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.training import ensemble
from bdjax.training.stages import Nets
from bdjax.types import Model, ModelOutput

SETTINGS = AgpdSettings()
TAPS = ("stage1", "stage2", "stage3")
CLASSES, CHANNELS = 10, 24
ROWS, CLEAN_ROWS = 320, 64  # of the suspects


def spread(random, direction, rows, noise=0.15):
    """Gradients of different lengths around one direction."""
    directions = direction + noise * random.standard_normal((rows, len(direction)))
    return (random.uniform(0.5, 2.0, (rows, 1)) * directions).astype(np.float32)


def planted(seed=0, target=3, rows=150, poisons=60, channels=CHANNELS):
    """Ten classes of one direction each, the target class with a second direction; and clean rows of every class."""
    random = np.random.default_rng(seed)
    gradients, labels, is_poisoned, clean = [], [], [], []
    for label in range(CLASSES):
        direction, other = random.uniform(0.2, 1.0, channels), random.uniform(-1.0, 1.0, channels)
        gradients.append(spread(random, direction, rows))
        clean.append(spread(random, direction, 10))
        labels += [label] * rows
        is_poisoned += [False] * rows
        if label == target:
            gradients.append(spread(random, other, poisons))
            labels += [label] * poisons
            is_poisoned += [True] * poisons
    order = random.permutation(len(labels))
    clean_rows = {label: np.arange(10) + 10 * label for label in range(CLASSES)}
    return (
        np.concatenate(gradients)[order],
        np.array(labels, np.int32)[order],
        np.array(is_poisoned)[order],
        np.concatenate(clean),
        clean_rows,
    )


def found_in(gradients, labels, clean, clean_rows, **changes):
    return found_at([gradients], labels, [clean], clean_rows, dataclasses.replace(SETTINGS, **changes))


def found_at(gradients, labels, clean, clean_rows, settings):
    """Flags, scores and facts from the gradients at all layers."""
    layers = [
        measure_layer(at_layer, labels, clean_at_layer, clean_rows, settings.base_share)
        if at_layer.shape[1] >= settings.narrowest
        else []
        for at_layer, clean_at_layer in zip(gradients, clean, strict=True)
    ]
    return find_poisons(layers, lambda layer: gradients[layer], labels, clean_rows, settings)


# ---- Gradients ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_networks(inputs):
    """Predictions [M, n + c] and, for each tap, gradients [M, n + c, channels] of all rows and the clean rows."""
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), inputs.all_rows(), inputs.clean_rows())
    return inputs.per_row(row_gradients(inputs.attacked.model, TAPS, True), inputs.attacked.variables, rows)


def test_gradients_are_those_of_the_labelled_logit_by_finite_differences(inputs, of_networks):
    predictions, gradients = of_networks
    assert [tap.shape for tap in gradients] == [(2, ROWS + CLEAN_ROWS, channels) for channels in (8, 8, 16)]
    assert all(tap.dtype == np.float32 for tap in gradients)
    member, model, count = 1, inputs.attacked.model, 6
    variables = jax.tree.map(lambda leaf: leaf[member], inputs.attacked.variables)
    images = inputs.pool[inputs.index[member, :count]].astype(jnp.float32) / 255
    labels = jnp.asarray(inputs.labels[member, :count])

    @jax.jit
    def forward(step):
        edits = {"stage3": lambda tap: tap + jnp.where(tap > 0, step[None, None, None], 0.0)}
        output = model.apply(variables, images, train=False, edits=edits)
        return output.logits, output.features["stage3"]

    logits, features = forward(jnp.zeros(16))
    np.testing.assert_array_equal(predictions[member, :count], logits.argmax(-1))
    # After the last tap the network is linear, so that a large step is exact.
    for channel in (0, 5, 15):
        change = forward(0.1 * jax.nn.one_hot(channel, 16))[0] - logits
        expected = change[jnp.arange(count), labels] / 0.1 / (features.shape[1] * features.shape[2])
        np.testing.assert_allclose(gradients[2][member, :count, channel], expected, rtol=1e-2, atol=1e-4)


CURVED = Model(
    init=lambda key, shape: {"params": {}, "batch_stats": {}},
    apply=lambda variables, images, *, train, edits=None: _curved(images, edits or {}),
    num_classes=3,
    description="a curved toy",
)


def _curved(images, edits):
    same = lambda tap: tap  # noqa: E731
    first = edits.get("stage1", same)(images - 0.5)  # of both signs, so not a ReLU's output
    second = edits.get("stage10", same)(jax.nn.relu(first) ** 2)
    last = edits.get("stage2", same)(jnp.sin(second))
    return ModelOutput(
        jnp.mean(last, axis=(1, 2)) ** 3 * 1000, {"stage1": first, "stage10": second, "stage2": last}, {}
    )


CURVED_TAPS = ("stage1", "stage10", "stage2")  # in the order of the network
CURVED_GRADIENTS = jax.jit(row_gradients(CURVED, CURVED_TAPS, True))


@partial(jax.jit, static_argnames="tap")
def shifted_logits(images, tap, shift):
    return _curved(images, {tap: lambda features: features + shift}).logits


def curved_features(images):
    """The taps of `CURVED` in NumPy, in the order of the network."""
    first = images - np.float32(0.5)
    second = np.maximum(first, 0) ** 2
    return {"stage1": first, "stage10": second, "stage2": np.sin(second)}


def test_gradients_by_finite_differences_where_nothing_is_linear_and_taps_in_the_order_of_the_network():
    images = np.random.default_rng(0).random((4, 5, 5, 3), np.float32)
    labels = np.array([0, 2, 1, 2], np.int32)
    _, gradients = CURVED_GRADIENTS({}, images, {"labels": labels})
    features, step = curved_features(images), np.float32(1e-2)
    for number, tap in enumerate(features):
        passed = np.ones_like(features[tap]) if tap == "stage1" else (features[tap] > 0).astype(np.float32)
        for channel in range(3):
            shift = step * passed * np.eye(3, dtype=np.float32)[channel]
            up, down = (np.asarray(shifted_logits(images, tap, sign * shift))[np.arange(4), labels] for sign in (1, -1))
            expected = (up - down) / (2 * step) / 25
            np.testing.assert_allclose(gradients[number][:, channel], expected, rtol=0.05, atol=2e-3)
    assert np.abs(gradients[0]).max() > 0.05


def test_pixels_that_do_not_pass_the_relu_do_not_count():
    images = np.full((4, 5, 5, 3), 0.9, np.float32)
    images[1, :2] = 0.1  # cut off in two fifths of the second row's pixels
    _, gradients = CURVED_GRADIENTS({}, images, {"labels": np.zeros(4, np.int32)})
    plain = 1000 * 3 * curved_features(images)["stage2"].mean(axis=(1, 2)) ** 2 / 25
    np.testing.assert_allclose(gradients[2][0, 0], plain[0, 0], rtol=1e-4)
    np.testing.assert_allclose(gradients[2][1, 0], plain[1, 0] * 3 / 5, rtol=1e-4)
    np.testing.assert_array_equal(gradients[2][:, 1:], 0)  # the logit of class 0 is that of channel 0


def test_gradients_do_not_depend_on_other_rows():
    images, labels = np.random.default_rng(1).random((4, 5, 5, 3), np.float32), np.array([1, 2, 0, 1], np.int32)
    together = CURVED_GRADIENTS({}, images, {"labels": labels})
    alone = CURVED_GRADIENTS({}, np.repeat(images[2:3], 4, axis=0), {"labels": np.repeat(labels[2:3], 4)})
    first, third = (jax.tree.map(lambda leaf, row=row: leaf[row], tree) for tree, row in ((alone, 0), (together, 2)))
    chex.assert_trees_all_close(first, third, rtol=1e-4, atol=1e-6)
    # Another function object would be compiled again.
    assert row_gradients(CURVED, CURVED_TAPS, True) is row_gradients(CURVED, CURVED_TAPS, True)


def test_layers_are_all_convolutions_with_the_gradients_of_their_outputs():
    model = make_model("resnet10", 4, width=2, lowering="native")
    layers = layers_of(model, (8, 8, 1))
    assert len(layers.channels) == 9 and not layers.are_taps
    assert list(layers.channels.values()) == [
        2,
        2,
        2,
        4,
        4,
        4,
        8,
        8,
        8,
    ]  # stem, then two and a shortcut where the shape changes
    variables, random = jax.jit(model.init, static_argnums=1)(jax.random.key(3), (8, 8, 1)), np.random.default_rng(0)
    images, labels = random.random((3, 8, 8, 1), np.float32), np.array([0, 3, 1], np.int32)
    names = ("stem_conv", "stage2_block1/shortcut_conv", "stage3_block1/Conv_1")
    predictions, gradients = jax.jit(row_gradients(model, names))(variables, images, {"labels": labels})
    logits = jax.jit(model.convolutions)

    for number, name in enumerate(names):
        shape = logits(variables, images)[1][name].shape
        step = 1e-2 * random.standard_normal(shape[-1]).astype(np.float32)
        offset = np.broadcast_to(step, shape)
        up, down = (logits(variables, images, {name: sign * offset})[0][np.arange(3), labels] for sign in (1, -1))
        expected = (up - down) / 2 / (shape[1] * shape[2])
        np.testing.assert_allclose(gradients[number] @ step, expected, rtol=0.05, atol=2e-5)
    np.testing.assert_array_equal(predictions, logits(variables, images)[0].argmax(-1))


def test_the_convolutions_of_a_network_are_examined(tiny_attacked):
    found = detect(tiny_attacked, dataclasses.replace(SETTINGS, narrowest=1, anomaly=0.5))
    # An untrained network finds no more than a few digits; the flags come from a layer beyond the three taps.
    assert found.flags.any() and 3 < found.facts["layer"].max() <= 9


@pytest.fixture(scope="module")
def tiny_attacked(inputs):
    """The suspects with an untrained ResNet instead of their own network."""
    model = make_model("resnet10", 10, width=2)
    variables = ensemble.init_members(lambda key: model.init(key, (8, 8, 1)), jax.random.split(jax.random.key(0), 2))
    return inputs.with_knowledge({"attacked model": Nets(model, variables, 1, {})})


def test_a_pass_for_each_layer_gives_the_same_as_one_pass(inputs, monkeypatch):
    settings = dataclasses.replace(SETTINGS, anomaly=0.5, narrowest=4)
    together = detect(inputs, settings)
    counted, real = [], type(inputs).per_row
    monkeypatch.setattr(type(inputs), "per_row", lambda *arguments: counted.append(0) or real(*arguments))
    monkeypatch.setattr("bdjax.defenses.agpd.MOST_BYTES", 1)
    apart = detect(inputs, settings)
    assert 3 <= len(counted) <= 5  # one for each layer, and again for those that are chosen
    np.testing.assert_array_equal(apart.flags, together.flags)
    np.testing.assert_allclose(apart.scores, together.scores, atol=1e-5)
    assert apart.facts.keys() == together.facts.keys()


def test_layers_share_a_pass_as_long_as_they_fit(monkeypatch):
    monkeypatch.setattr("bdjax.defenses.agpd.MOST_BYTES", 4 * 10 * 30)
    assert passes({"a": 10, "b": 20, "c": 1, "d": 100, "e": 5}, 10) == [("a", "b"), ("c",), ("d",), ("e",)]
    assert passes({}, 10) == [()]  # predictions are needed all the same


# ---- Which classes --------------------------------------------------------------------------------------------------


def test_cosines_by_hand_and_of_zero_vectors():
    rows = np.array([[3, 4], [-1, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(cosines(rows, np.array([2.0, 0.0])), [0.6, -1, 0])
    assert not cosines(rows, np.zeros(2)).any()


def test_gap_by_hand():
    # Cosines with r = (1, 0): 1, 0.6, 0; with b = (0, 2): 0, 0.8. So the differences are 1 and -0.2, of three rows.
    gradients, clean = np.array([[1, 0], [3, 4], [0, 2]], np.float32), np.array([[2, 1], [2, -1]], np.float32)
    measured = measure_class(5, np.array([10, 11, 12]), gradients, clean)
    assert measured.base == 2 and measured.gap == pytest.approx(np.sqrt(1.04 / 3))
    # With two rows for b, their mean is (1.5, 3), and only the first row remains.
    measured = measure_class(5, np.array([10, 11, 12]), gradients, clean, 0.7)
    assert measured.base == 2 and measured.gap == pytest.approx((1 - 1.5 / np.sqrt(11.25)) / np.sqrt(3))


def test_rows_without_a_gradient_are_ignored():
    gradients = np.array([[0, 0], [1, 0], [3, 4], [0, 2]], np.float32)
    measured = measure_class(0, np.array([4, 5, 6, 7]), gradients, np.array([[1, 0]], np.float32))
    np.testing.assert_array_equal(measured.rows, [5, 6, 7])
    assert measured.base == 2 and measured.gap == pytest.approx(np.sqrt(1.04 / 3))
    assert measure_class(0, np.arange(2), gradients[:2], np.array([[1, 0]], np.float32)) is None
    assert measure_class(0, np.arange(4), gradients, np.zeros((1, 2), np.float32)) is None


def test_anomaly_indices_by_hand():
    # Median 3, absolute deviations 2, 1, 0, 1, 7: MAD 1.
    np.testing.assert_allclose(anomaly_indices([1, 2, 3, 4, 10]), [0, 0, 0, 1 / 1.4826, 7 / 1.4826], rtol=1e-5)
    assert not anomaly_indices([0.4, 0.4, 0.4]).any() and not anomaly_indices([0.7]).any()


def classes_of(*gaps):
    return [ClassGradients(label, np.arange(3), np.ones(2), 0, gap) for label, gap in enumerate(gaps)]


def test_the_layer_is_that_of_the_largest_index():
    steady = (0.10, 0.11, 0.12, 0.13, 0.14)
    layers = [classes_of(*steady, 0.4), classes_of(*steady, 0.9), [], classes_of(*steady, 0.15)]
    targets = find_targets(layers, SETTINGS)
    assert targets.layer == 1 and [target.label for target in targets.classes] == [5] and not targets.by_gap
    assert targets.largest_anomaly == anomaly_indices((*steady, 0.9))[5] > np.exp(2)


def test_where_every_class_is_a_target_the_gap_decides_in_one_of_the_last_layers():
    layers = [classes_of(*(0.9,) * 4), classes_of(0.31, 0.33, 0.35, 0.2), classes_of(0.31, 0.05, 0.1, 0.2)]
    two = dataclasses.replace(SETTINGS, last_layers=2)
    targets = find_targets(layers, two)  # the first layer is not one of the last two
    assert targets.layer == 1 and [target.label for target in targets.classes] == [0, 1, 2] and targets.by_gap
    assert find_targets(layers, SETTINGS).layer == 0  # but of the last three
    assert find_targets(layers, dataclasses.replace(SETTINGS, last_layers=1)).layer == 2
    assert find_targets(layers, dataclasses.replace(SETTINGS, last_layers=7)).layer == 0
    for changes in ({"last_layers": 0}, {"wide_gap": 0.95}):
        nothing = find_targets(layers, dataclasses.replace(two, **changes))
        assert nothing.layer == -1 and not nothing.classes and not nothing.by_gap


# ---- Which rows -----------------------------------------------------------------------------------------------------


def test_closeness_is_between_0_and_1():
    random = np.random.default_rng(0)
    scores = closeness(random.uniform(-1, 1, 500), random.uniform(-1, 1, 500))
    assert scores.min() >= 0 and scores.max() <= 1
    np.testing.assert_allclose(
        closeness(np.array([1.0, 0.0, 0.5, 1.0]), np.array([0.0, 1.0, 0.5, 1.0])), [0, 1, 0.5, 0.5]
    )


def test_js_distance_is_that_of_scipy():
    random = np.random.default_rng(0)
    for _ in range(5):
        p, q = random.integers(0, 5, (2, 30))
        assert js_distance(p, q) == pytest.approx(jensenshannon(p, q), abs=1e-7)
    assert js_distance(p, 3 * p) == pytest.approx(0, abs=1e-7)
    assert js_distance(np.array([1, 0]), np.array([0, 4])) == pytest.approx(np.sqrt(np.log(2)))
    assert js_distance(p, np.zeros(30)) == 1


def grown(gradients, reference, base, tau, bins):
    """`grow` as in the paper: row by row, round by round."""

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    taken, left, distances = [[base]], [i for i in range(len(gradients)) if i != base], []

    def scores():
        centre = gradients[sum(taken, [])].mean(axis=0)
        values = []
        for i in left:
            poisoned, clean = 1 - cosine(gradients[i], centre), 1 - cosine(gradients[i], reference)
            values.append(poisoned / (poisoned + clean))
        return np.array(values)

    before = np.histogram(scores(), bins, (0, 1))[0]
    while left:
        values = scores()
        rescaled = (values - values.min()) / (np.ptp(values) or 1.0)
        taken.append([i for i, value in zip(left, rescaled, strict=True) if value <= tau])
        left = [i for i, value in zip(left, rescaled, strict=True) if value > tau]
        after = np.histogram(values[rescaled > tau], bins, (0, 1))[0]
        distances.append(jensenshannon(before, after) if left else 1.0)
        before = after
    rounds = np.zeros(len(gradients), int)
    for number, rows in enumerate(taken):
        rounds[rows] = number
    return rounds, np.array(distances)


def test_growth_is_that_of_the_paper():
    gradients, labels, _, clean, clean_rows = planted(1, rows=40, poisons=15)
    gradients, reference = gradients[labels == 3], clean[clean_rows[3]].mean(axis=0)
    base = int(np.argmin(cosines(gradients, reference)))
    rounds, distances = grow(gradients, reference, base, 0.05, 99)
    expected_rounds, expected_distances = grown(gradients.astype(np.float64), reference, base, 0.05, 99)
    np.testing.assert_array_equal(rounds, expected_rounds)
    np.testing.assert_allclose(distances, expected_distances, atol=1e-6)
    assert len(distances) > 10 and rounds.min() == 0 and rounds.max() == len(distances)
    assert (np.bincount(rounds) > 0).all() and np.sum(rounds == 0) == 1


def test_rows_of_two_directions_are_taken_one_direction_after_the_other():
    gradients = np.array([[0, 1]] * 4 + [[1, 0]] * 6, np.float32)
    rounds, distances = grow(gradients, np.array([1.0, 0.0]), 1, 0.05, 99)
    np.testing.assert_array_equal(rounds, [1, 0, 1, 1] + [2] * 6)
    # Nothing is left after the last round: the largest possible distance.
    assert len(distances) == 2 and distances[1] == 1 and 0 < distances[0] < 1
    assert best_split(gradients, np.array([1.0, 0.0]), rounds) == 1


def test_equal_rows_are_taken_in_one_round():
    rounds, distances = grow(np.ones((5, 3), np.float32), np.ones(3), 2, 0.05, 99)
    np.testing.assert_array_equal(rounds, [1, 1, 0, 1, 1])
    np.testing.assert_array_equal(distances, [1])


def test_a_single_row_is_taken_before_the_first_round():
    rounds, distances = grow(np.ones((1, 3), np.float32), np.ones(3), 0, 0.05, 99)
    np.testing.assert_array_equal(rounds, [0])
    assert last_round(distances, 10, 5.0) == 0
    assert best_split(np.ones((1, 3), np.float32), np.ones(3), rounds) == 0


def test_the_stop_is_before_the_steady_window():
    distances = np.array([0.5, 0.3, 0.6, 0.4] + [0.1] * 10 + [0.5, 1.0])
    assert last_round(distances, 10, 5.0) == 4  # the rounds 1 to 4 are before it
    # The first three have the smaller mean, but a larger spread.
    assert last_round(np.array([0.0, 0.0, 0.3, 0.2, 0.2, 0.2]), 3, 0.0) == 0
    assert last_round(np.array([0.0, 0.0, 0.3, 0.2, 0.2, 0.2]), 3, 5.0) == 3


def test_poisons_that_the_first_round_takes_are_kept():
    # Counting the first row as a round would stop there.
    assert last_round(np.array([0.6] + [0.1] * 12), 10, 5.0) == 1


def test_a_histogram_that_is_steady_from_the_start_leaves_the_first_row_alone():
    assert last_round(np.array([0.1] * 10 + [0.5, 1.0]), 10, 5.0) == 0


def test_fewer_rounds_than_a_window():
    assert last_round(np.array([0.3, 0.6, 0.1, 0.2, 1.0]), 10, 5.0) == 2  # the distance falls by 0.5 after the second
    assert last_round(np.array([0.2, 0.3, 1.0]), 10, 5.0) == 0  # it never falls
    assert last_round(np.array([1.0]), 10, 5.0) == 0
    assert last_round(np.zeros(0), 10, 5.0) == 0


def ordered_class(noise, share, rows, seed):
    """A target class of two directions; its reference, and which rows are poisoned."""
    random = np.random.default_rng(seed)
    direction, other = random.uniform(0.2, 1.0, 64), random.uniform(-1.0, 1.0, 64)
    poisons = int(share * rows)
    gradients = np.concatenate(
        [spread(random, direction, rows - poisons, noise), spread(random, other, poisons, noise)]
    )
    return gradients, spread(random, direction, 10, noise).mean(axis=0), np.arange(rows) >= rows - poisons


def f1(flags, truth):
    return 2 * np.sum(flags & truth) / (flags.sum() + truth.sum())


@pytest.mark.parametrize("seed", range(2))
def test_the_window_ends_in_the_tail_of_rows_that_a_cut_separates_and_the_split_does_not(seed):
    scores = {"best": [], "window": [], "split": []}
    for noise in (0.15, 0.5, 0.8):
        for share in (0.05, 0.1, 0.3):
            gradients, reference, truth = ordered_class(noise, share, 500, seed)
            base = int(np.argmin(cosines(gradients, reference)))
            rounds, distances = grow(gradients, reference, base, SETTINGS.tau, SETTINGS.bins)
            scores["best"].append(max(f1(rounds <= last, truth) for last in range(len(distances))))
            scores["window"].append(f1(rounds <= last_round(distances, SETTINGS.window, SETTINGS.spread_weight), truth))
            scores["split"].append(f1(rounds <= best_split(gradients, reference, rounds), truth))
    best, window, split = (np.array(values) for values in scores.values())
    np.testing.assert_array_equal(best, 1)  # growth orders the rows of all nine sets
    assert np.sum(window < 0.5) >= 3, "the paper's rule fails on a third of them or more"
    assert split.min() > 0.99


def test_the_best_split_by_hand():
    # With r = (1, 0) and the first two rows taken, s is 0 for both and 1 for the others; any other split mixes them.
    gradients = np.array([[0, 1], [0, 2], [1, 0], [3, 0]], np.float32)
    assert best_split(gradients, np.array([1.0, 0.0]), np.array([0, 1, 2, 3])) == 1
    assert best_split(np.ones((4, 2), np.float32), np.ones(2), np.array([0, 1, 1, 1])) == 0  # nothing differs


def test_the_cut_is_a_setting():
    gradients, reference, truth = ordered_class(0.8, 0.1, 500, 0)
    parts, labels = [gradients], [np.zeros(len(gradients), np.int32)]
    random = np.random.default_rng(9)
    clean = [np.repeat(reference[None], 10, axis=0).astype(np.float32)]
    for label in range(1, CLASSES):
        direction = random.uniform(0.2, 1.0, 64)
        parts.append(spread(random, direction, 100, 0.15))
        labels.append(np.full(100, label, np.int32))
        clean.append(spread(random, direction, 10))
    rows = np.concatenate(parts), np.concatenate(labels), np.concatenate(clean)
    clean_rows = {label: np.arange(10) + 10 * label for label in range(CLASSES)}
    flagged = {cut: found_in(*rows, clean_rows, cut=cut, anomaly=5.0)[0][: len(truth)] for cut in ("window", "split")}
    np.testing.assert_array_equal(flagged["split"], truth)
    assert f1(flagged["window"], truth) < 0.5
    assert AgpdSettings().cut == "window"


# ---- Together -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_class_of_two_directions_is_found_with_its_rows(seed):
    gradients, labels, is_poisoned, clean, clean_rows = planted(seed)
    flags, scores, facts = found_in(gradients, labels, clean, clean_rows)
    assert flags.dtype == bool and scores.dtype == np.float32
    assert facts["target classes"] == 1 and facts["largest J"] > np.exp(2) and facts["layer"] == 1
    assert not facts["found by its gap alone"] and not facts["classes without a clean row"]
    assert (labels[flags] == 3).all()
    assert np.mean(is_poisoned[flags]) > 0.9 and np.mean(flags[is_poisoned]) > 0.9
    assert scores[is_poisoned].min() > scores[~is_poisoned].max()
    assert scores.max() <= 1 and not scores[labels != 3].any()


def test_the_layer_with_two_directions_is_chosen():
    gradients, labels, is_poisoned, clean, clean_rows = planted()
    even = np.eye(CLASSES, CHANNELS, dtype=np.float32)[labels]  # one direction for all rows of a class
    clean_even = np.repeat(np.eye(CLASSES, CHANNELS, dtype=np.float32), 10, axis=0)
    _, _, facts = found_at([even, gradients, even], labels, [clean_even, clean, clean_even], clean_rows, SETTINGS)
    assert facts["layer"] == 2 and facts["target classes"] == 1


def test_nothing_is_flagged_in_a_set_without_poisons():
    for seed in range(4):
        gradients, labels, _, clean, clean_rows = planted(seed, target=None)
        flags, scores, facts = found_in(gradients, labels, clean, clean_rows)
        assert not flags.any() and not scores.any()
        assert facts["target classes"] == facts["layer"] == 0 and 0 < facts["largest J"] < np.exp(2)


def test_order_and_length_do_not_matter():
    gradients, labels, _, clean, clean_rows = planted()
    order = np.random.default_rng(5).permutation(len(labels))
    flags, scores, _ = found_in(gradients, labels, clean, clean_rows)
    again, again_scores, _ = found_in(8 * gradients[order], labels[order], 8 * clean, clean_rows)
    np.testing.assert_array_equal(again, flags[order])
    np.testing.assert_allclose(again_scores, scores[order], rtol=1e-4, atol=1e-6)


def test_a_class_without_a_clean_row_is_skipped_and_counted():
    gradients, labels, is_poisoned, clean, clean_rows = planted()
    rest = {label: rows for label, rows in clean_rows.items() if label != 7}
    flags, _, facts = found_in(gradients, labels, clean, rest)
    assert facts["classes without a clean row"] == 1 and facts["target classes"] == 1
    assert np.mean(is_poisoned[flags]) > 0.9
    rest = {label: rows for label, rows in clean_rows.items() if label != 3}  # the target class itself
    flags, _, facts = found_in(gradients, labels, clean, rest)
    assert not flags.any() and facts["classes without a clean row"] == 1
    flags, scores, facts = found_in(gradients, labels, clean, {})
    assert not flags.any() and not scores.any() and facts["classes without a clean row"] == CLASSES


def test_narrow_layers_are_skipped():
    gradients, labels, _, clean, clean_rows = planted()
    flags, _, facts = found_in(gradients[:, :1], labels, clean[:, :1], clean_rows)
    assert not flags.any() and facts["largest J"] == facts["layer"] == 0
    flags, _, _ = found_in(gradients[:, :1], labels, clean[:, :1], clean_rows, narrowest=1, wide_gap=0.01)
    assert np.isfinite(flags).all()  # cosines of one channel are 1 or -1: useless, but not an error


def test_clean_rows_are_classified_correctly_and_limited_in_number():
    labels = np.array([0, 0, 0, 1, 1, 2], np.int32)
    predictions = np.array([0, 1, 0, 1, 1, 0], np.int32)
    chosen = choose_clean(labels, predictions, np.array([4, 5, 2, 1, 0, 3]), 1)
    assert {label: rows.tolist() for label, rows in chosen.items()} == {0: [2], 1: [4]}
    chosen = choose_clean(labels, predictions, np.arange(6), 10)
    assert {label: rows.tolist() for label, rows in chosen.items()} == {0: [0, 2], 1: [3, 4]}


# ---- As a defense ---------------------------------------------------------------------------------------------------


def test_flags_are_those_of_each_members_own_gradients(inputs, of_networks):
    found = detect(inputs, dataclasses.replace(SETTINGS, anomaly=0.5))
    assert found.flags.shape == found.scores.shape == inputs.index.shape and found.flags.any()
    predictions, gradients = of_networks
    for member, labels in enumerate(inputs.labels):
        last_tap, clean = np.split(gradients[2][member], [ROWS])  # the taps before it have 4 and 8 channels
        # Of 64 clean digits no class has more than ten that are classified correctly: all of them count, in any order.
        correct = inputs.clean_labels[member] == predictions[member, ROWS:]
        known = np.unique(inputs.clean_labels[member][correct])
        gaps = [
            measure_class(
                label, np.flatnonzero(labels == label), last_tap[labels == label],
                clean[correct & (inputs.clean_labels[member] == label)],
            ).gap
            for label in known
        ]  # fmt: skip
        anomalies = anomaly_indices(gaps)
        assert found.facts["largest J"][member] == pytest.approx(anomalies.max(), rel=1e-4)
        assert found.facts["layer"][member] == 3
        assert found.facts["classes without a clean row"][member] == 10 - len(known)
        assert found.facts["target classes"][member] == np.sum(anomalies > 0.5)
        np.testing.assert_array_equal(np.unique(labels[found.flags[member]]), known[anomalies > 0.5])


def test_the_networks_are_trained_without_the_flagged_rows(inputs, monkeypatch):
    seen = {}

    def without(inputs, stage, flags):
        seen.update(stage=stage, flags=flags)
        return inputs.attacked

    monkeypatch.setattr("bdjax.defenses.filtering.retrain_without", without)
    result = run(inputs, SETTINGS)
    found = detect(inputs, SETTINGS)
    np.testing.assert_array_equal(seen["flags"], found.flags)
    np.testing.assert_array_equal(result.flags, found.flags)
    np.testing.assert_array_equal(result.scores, found.scores)
    before = seen["stage"]
    run(inputs, dataclasses.replace(SETTINGS, tau=0.1))
    assert seen["stage"] != before  # otherwise the first would be restored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 0.0}, "tau 0.0 is not above 0 and below 1"),
        ({"base_share": 1.0}, "base_share 1.0 is not at least 0 and below 1"),
        ({"clean_per_class": 0}, "clean_per_class 0 is not at least 1"),
        ({"window": 0}, "window 0 is not at least 1"),
        ({"bins": 1}, "bins 1 is not at least 2"),
        ({"wide_gap": 0.0}, "wide_gap 0.0 is not above 0"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(SETTINGS, **changes))


def test_detection_checks_the_settings(inputs):
    with pytest.raises(InputError, match="tau 0.0"):
        detect(inputs, dataclasses.replace(SETTINGS, tau=0.0))


def test_its_needs():
    assert AGPD.needs == ("training set", "attacked model", "clean rows") and AGPD.detect is detect
