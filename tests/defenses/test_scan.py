import dataclasses

import numpy as np
import pytest

from bdjax.defenses.scan import (
    SCAnSettings,
    anomaly_index,
    check,
    decompose,
    detect,
    find_poisons,
    principal_directions,
    split_class,
    towards_second,
    whitening,
)
from bdjax.errors import InputError
from tests.defenses.tiny import tiny_inputs

SETTINGS = SCAnSettings()
CLASSES, ROWS, CLEAN, DIMENSIONS = 10, 120, 20, 20


def planted(poisoned, seed=0, share=0.3, scale=1.0, clean_rows=CLEAN, apart=8.0):
    """Rows of classes with different means and one spread, some of which have a share of rows so many standard deviations
    apart; clean rows; which rows are poisoned."""
    random = np.random.default_rng(seed)
    mixing = np.eye(DIMENSIONS) + 0.3 * random.standard_normal((DIMENSIONS, DIMENSIONS))
    means = 8 * random.standard_normal((CLASSES, DIMENSIONS))

    def draw(count):
        labels = np.repeat(np.arange(CLASSES, dtype=np.int32), count)
        return means[labels] + random.standard_normal((len(labels), DIMENSIONS)) @ mixing, labels

    (rows, labels), (clean, clean_labels) = draw(ROWS), draw(clean_rows)
    is_poisoned = np.zeros(len(rows), bool)
    for label in poisoned:
        shifted = np.flatnonzero(labels == label)[: round(share * ROWS)]
        shift = random.standard_normal(DIMENSIONS)
        rows[shifted] += apart * shift / np.linalg.norm(shift) @ mixing
        is_poisoned[shifted] = True
    order = random.permutation(len(rows))
    rows, clean = (scale * values.astype(np.float32) for values in (rows, clean))
    return rows[order], labels[order], clean, clean_labels, is_poisoned[order]


# ---- One poisoned class is found, all of them are not ---------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_one_poisoned_class_of_ten_is_found_whichever_side_is_larger(seed, share):
    *inputs, is_poisoned = planted([4], seed, share)
    found = find_poisons(*inputs, SETTINGS)
    assert np.flatnonzero(found.index > SETTINGS.threshold).tolist() == [4]
    assert found.index.max() > 40
    np.testing.assert_array_equal(found.flags, is_poisoned)
    assert found.scores[is_poisoned].mean() > 1 > 0 > found.scores[(inputs[1] == 4) & ~is_poisoned].mean()


def test_ten_poisoned_classes_of_ten_are_not():
    """The method's known weakness: where most classes are poisoned, the median is that of poisoned ones."""
    for seed in range(5):
        found = find_poisons(*planted(range(CLASSES), seed)[:-1], SETTINGS)
        assert not found.flags.any() and found.index.max() < 5


def test_nothing_is_flagged_where_nothing_is_poisoned():
    for seed in range(5):
        found = find_poisons(*planted([], seed)[:-1], SETTINGS)
        assert not found.flags.any()


def test_classes_below_the_median_are_flagged_only_if_two_sided():
    *inputs, is_poisoned = planted(range(1, CLASSES), clean_rows=200, apart=20.0)
    assert not find_poisons(*inputs, SETTINGS).flags.any()
    # Among nine poisoned classes the clean one sticks out.
    found = find_poisons(*inputs, dataclasses.replace(SETTINGS, two_sided=True))
    assert np.unique(inputs[1][found.flags]).tolist() == [0] and not is_poisoned[found.flags].any()


def test_a_common_factor_does_not_matter():
    """So the sum over the pixels, as in public code, flags the same rows as their mean."""
    small, large = (find_poisons(*planted([4], scale=scale)[:-1], SETTINGS) for scale in (1.0, 64.0))
    np.testing.assert_array_equal(small.flags, large.flags)
    np.testing.assert_allclose(small.scores, large.scores, rtol=1e-3, atol=1e-3)


def test_the_order_of_the_rows_does_not_matter():
    rows, labels, clean, clean_labels, _ = planted([4])
    order = np.random.default_rng(1).permutation(len(rows))
    found = find_poisons(rows, labels, clean, clean_labels, SETTINGS)
    again = find_poisons(rows[order], labels[order], clean, clean_labels, SETTINGS)
    np.testing.assert_array_equal(again.flags, found.flags[order])
    np.testing.assert_allclose(again.scores, found.scores[order], rtol=1e-3, atol=1e-3)


def test_the_poisoned_side_is_that_with_fewer_clean_rows_or_else_the_smaller():
    rows, labels, clean, clean_labels, is_poisoned = planted([4], share=0.7)
    # Clean rows in the larger group mean that the smaller group is poisoned.
    moved = clean.copy()
    moved[clean_labels == 4] = rows[is_poisoned][:CLEAN]
    found = find_poisons(rows, labels, moved, clean_labels, SETTINGS)
    assert found.flags[(labels == 4) & ~is_poisoned].mean() > 0.9 and found.flags[is_poisoned].mean() < 0.1
    # With as many clean rows in each group, the smaller group is.
    halves = clean.copy()
    halves[clean_labels == 4] = np.concatenate(
        [rows[is_poisoned][: CLEAN // 2], rows[(labels == 4) & ~is_poisoned][: CLEAN // 2]]
    )
    found = find_poisons(rows, labels, halves, clean_labels, SETTINGS)
    assert found.flags[(labels == 4) & ~is_poisoned].mean() > 0.9 and found.flags[is_poisoned].mean() < 0.1


def test_without_clean_rows_of_a_class_nothing_shows_which_of_its_groups_is_poisoned():
    rows, labels, clean, clean_labels, _ = planted([4], share=0.7)
    kept = clean_labels != 4
    found = find_poisons(rows, labels, clean[kept], clean_labels[kept], SETTINGS)
    assert found.index[4] > SETTINGS.threshold and not found.flags.any()


def test_a_direction_that_clean_rows_do_not_use_is_not_ignored():
    """A pseudo-inverse of the clean rows' covariance has no weight there."""
    rows, labels, clean, clean_labels, _ = planted([])
    rows, clean = (np.concatenate([values, np.zeros((len(values), 1), np.float32)], axis=1) for values in (rows, clean))
    is_poisoned = (labels == 7) & (np.random.default_rng(0).random(len(rows)) < 0.3)
    rows[is_poisoned, -1] = 5.0
    found = find_poisons(rows, labels, clean, clean_labels, SETTINGS)
    np.testing.assert_array_equal(found.flags, is_poisoned)


def test_many_classes_and_few_clean_rows_of_many_dimensions():
    """More dimensions than clean rows, and classes that have no row at all."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(0, 80, 2, dtype=np.int32), 30)
    clean_labels = np.repeat(np.arange(0, 80, 2, dtype=np.int32), 4)
    means = 5 * random.standard_normal((80, 200))
    rows, clean = (means[of] + random.standard_normal((len(of), 200)) for of in (labels, clean_labels))
    poisoned = np.flatnonzero(labels == 20)[:10]
    rows[poisoned] += 2.0 * random.standard_normal(200)
    found = find_poisons(rows.astype(np.float32), labels, clean.astype(np.float32), clean_labels, SETTINGS)
    assert len(found.index) == 40 and np.flatnonzero(found.flags).tolist() == poisoned.tolist()


# ---- Its parts ------------------------------------------------------------------------------------------------------


def test_the_decomposition_finds_the_covariances_that_rows_were_drawn_with():
    random = np.random.default_rng(0)
    within, between = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[4.0, -1.0], [-1.0, 3.0]])
    labels = np.repeat(np.arange(400), 20)
    means = random.multivariate_normal(np.zeros(2), between, 400)
    rows = 50 + means[labels] + random.multivariate_normal(np.zeros(2), within, len(labels))
    found_between, found_within = decompose(rows, labels)
    np.testing.assert_allclose(found_within, within, atol=0.15)
    np.testing.assert_allclose(found_between, between, atol=0.6)


def test_the_decomposition_is_a_fixed_point():
    """Of the two steps, written out class by class with the inverse of each."""
    *_, rows, labels, _ = planted([])
    rows, keep = rows[:, :4].astype(np.float64), np.ones(len(rows), bool)
    keep[:3] = False  # classes of two sizes
    rows, labels = rows[keep], labels[keep]
    between, within = decompose(rows, labels)
    centred = rows - rows.mean(axis=0)
    means = np.zeros_like(rows)
    for label in np.unique(labels):
        is_class = labels == label
        gain = is_class.sum() * between @ np.linalg.inv(is_class.sum() * between + within)
        means[is_class] = gain @ centred[is_class].mean(axis=0)
    np.testing.assert_allclose(np.cov(means.T), between, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.cov((centred - means).T), within, rtol=1e-3, atol=1e-3)


def test_whitened_distances_are_those_of_the_inverse():
    random = np.random.default_rng(0)
    root = random.standard_normal((5, 5))
    white = whitening(root @ root.T, 1e-12)
    np.testing.assert_allclose(white @ white.T, np.linalg.inv(root @ root.T), rtol=1e-6)
    # A floor of the mean: every direction is at least as wide as the mean one.
    np.testing.assert_allclose(np.linalg.eigvalsh(whitening(np.diag([0.0, 2.0]), 1.0).T ** 2).max(), 1.0)


def test_principal_directions_are_those_of_the_singular_values():
    rows = np.random.default_rng(0).standard_normal((50, 6)) * [5, 1, 4, 2, 0, 3] + 100
    directions = principal_directions(rows, 3)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    _, _, expected = np.linalg.svd(rows - rows.mean(axis=0))
    np.testing.assert_allclose(np.abs(expected[:3] @ directions), np.eye(3), atol=1e-9)
    assert principal_directions(rows, 64).shape == (6, 5)  # a channel that is the same for all is no direction
    assert principal_directions(np.ones((4, 3)), 2).shape == (3, 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_class_is_split_where_its_two_groups_are(seed):
    random = np.random.default_rng(seed)
    side = random.random(200) < 0.3
    rows = random.standard_normal((200, 12)) + np.outer(side, np.full(12, 2.0))
    split = split_class(rows, 5, np.random.default_rng(0))
    agree = np.mean(split.is_second == side)
    assert max(agree, 1 - agree) > 0.98
    for number in (0, 1):
        np.testing.assert_allclose(split.means[number], rows[split.is_second == bool(number)].mean(axis=0))
    # The ratio by its definition.
    to_centre = np.sum((rows - rows.mean(axis=0)) ** 2, axis=1)
    to_own = np.sum((rows - split.means[split.is_second.astype(int)]) ** 2, axis=1)
    assert split.ratio == pytest.approx(np.mean(to_centre - to_own))
    # A fixed point: every row is on the side that it is closer to.
    np.testing.assert_array_equal(towards_second(rows, split.means) > 0, split.is_second)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rows_that_are_all_alike_are_one_side(count):
    split = split_class(np.full((count, 3), 0.1), 4, np.random.default_rng(0))
    assert split.ratio == pytest.approx(0, abs=1e-12)
    assert np.isfinite(towards_second(np.full((count, 3), 0.1), split.means)).all()


def test_closeness_is_one_at_the_means():
    means = np.array([[0.0, 1.0], [4.0, 1.0]])
    rows = np.array([[0, 1], [4, 9], [2, 0], [1, 1]], float)
    np.testing.assert_allclose(towards_second(rows, means), [-1, 1, 0, -0.5])


def test_the_index_of_a_hand_counted_example():
    # Median 3, deviations 2 1 0 1 17 of median 1.
    np.testing.assert_allclose(anomaly_index(np.array([1, 2, 3, 4, 20])), np.array([-2, -1, 0, 1, 17]) / 1.4826)
    np.testing.assert_allclose(anomaly_index(np.array([0.1, 0.2, 0.3, 0.4, 2.0]))[4], 17 / 1.4826)
    assert not anomaly_index(np.full(5, 2.0)).any() and not anomaly_index(np.zeros(3)).any()
    index = anomaly_index(np.array([1.0, 1, 1, 1, 5]))
    assert index[4] > SETTINGS.threshold and np.isfinite(index).all()


# ---- As a defense ---------------------------------------------------------------------------------------------------


def test_the_suspects_embeddings_and_those_of_their_clean_rows_are_compared(tmp_path):
    inputs = tiny_inputs(tmp_path)
    found = detect(inputs, SETTINGS)
    network = inputs.attacked
    rows, clean = (
        inputs.embeddings(network.model, network.variables, of) for of in (inputs.all_rows(), inputs.clean_rows())
    )
    for i in range(2):
        expected = find_poisons(rows[i], inputs.labels[i], clean[i], inputs.clean_labels[i], SETTINGS)
        np.testing.assert_array_equal(found.flags[i], expected.flags)
        np.testing.assert_allclose(found.scores[i], expected.scores, rtol=1e-5)
        assert found.facts["largest anomaly index"][i] == pytest.approx(expected.index.max())
        assert found.facts["flagged classes"][i] == np.sum(expected.index > SETTINGS.threshold)
    assert found.flags.dtype == bool and found.scores.dtype == np.float32


def test_too_few_clean_rows_are_refused_in_one_line():
    rows, labels, clean, clean_labels, _ = planted([4])
    few = np.flatnonzero(np.arange(len(clean)) % CLEAN == 0)
    with pytest.raises(InputError, match=r"^defense scan: 10 clean rows are too few; [^\n]+$"):
        find_poisons(rows, labels, clean[few], clean_labels[few], SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimensions": 0}, "dimensions 0 is not at least 1"),
        ({"floor": 0.0}, "floor 0.0 is not above 0 and at most 1"),
        ({"starts": 0}, "starts 0 is not at least 1"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(SETTINGS, **changes))


def test_settings_are_checked_before_anything_is_computed():
    with pytest.raises(InputError, match="starts 0 is not at least 1"):
        detect(None, SCAnSettings(starts=0))
