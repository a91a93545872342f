import dataclasses

import numpy as np
import pytest

from bdjax.defenses.spectral_signatures import (
    SpectralSignaturesSettings,
    check,
    detect,
    find_poisons,
    most_suspicious,
    run,
    spectral_scores,
)
from bdjax.errors import InputError
from tests.defenses.tiny import tiny_inputs

PERCENTILE = SpectralSignaturesSettings()
RATE = SpectralSignaturesSettings(rule="poison_rate", poison_rate=0.05)


def planted(seed, rows=200, dimensions=24, apart=15.0):
    """A class of which a tenth is shifted, far from the origin, and which rows those are."""
    random = np.random.default_rng(seed)
    shifted = random.permutation(rows) < rows // 10
    shift = random.standard_normal(dimensions)
    shift *= apart / np.linalg.norm(shift)
    embeddings = 30.0 + random.standard_normal((rows, dimensions)) + np.outer(shifted, shift)
    return embeddings.astype(np.float32), shifted


def test_a_hand_counted_example():
    # Mean (2, 1): centred first coordinates -2, -1, 0, 3; all second ones 0.
    rows = np.array([[0, 1], [1, 1], [2, 1], [5, 1]], np.float32)
    np.testing.assert_allclose(spectral_scores(rows), [4, 1, 0, 9], atol=1e-12)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_the_direction_is_the_first_right_singular_vector_of_either_sign(shape):
    rows = np.random.default_rng(0).standard_normal(shape)
    _, _, directions = np.linalg.svd(rows - rows.mean(axis=0))
    for sign in (1, -1):
        expected = ((rows - rows.mean(axis=0)) @ (sign * directions[0])) ** 2
        np.testing.assert_allclose(spectral_scores(rows), expected, atol=1e-9)
    # Mirrored embeddings turn the vector around, and nothing else.
    np.testing.assert_allclose(spectral_scores(-rows), spectral_scores(rows), atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("settings", [PERCENTILE, RATE])
def test_a_tenth_that_is_shifted_is_found_entirely(seed, settings):
    rows, shifted = planted(seed)
    scores = spectral_scores(rows)
    assert scores[shifted].min() > scores[~shifted].max()
    flags = most_suspicious(scores, 400, settings)  # 0.05 of 400 rows are these 20
    assert flags[shifted].all()
    assert flags.sum() == 30  # 1.5 times the poisons, which the 85th percentile leaves out of 200 as well


def test_embeddings_that_are_not_centred_would_miss_them():
    rows, shifted = planted(0)
    _, _, directions = np.linalg.svd(rows - rows.mean(axis=0))
    uncentred = (rows @ directions[0]) ** 2
    # The fault of public code: the score is the norm, and which end scores high is the sign of a singular vector.
    caught = [
        most_suspicious((rows @ (sign * directions[0]) + 40.0) ** 2, 400, RATE)[shifted].all() for sign in (1, -1)
    ]
    assert caught.count(True) == 1
    np.testing.assert_allclose(spectral_scores(rows + 100.0), spectral_scores(rows), rtol=1e-3, atol=1e-3)
    assert not np.allclose(uncentred, spectral_scores(rows), rtol=0.1)


def test_the_order_of_the_rows_does_not_matter():
    rows, _ = planted(3)
    labels = (np.arange(len(rows)) % 3).astype(np.int32)
    order = np.random.default_rng(0).permutation(len(rows))
    flags, scores, largest = find_poisons(rows, labels, PERCENTILE)
    again, again_scores, again_largest = find_poisons(rows[order], labels[order], PERCENTILE)
    np.testing.assert_array_equal(again, flags[order])
    np.testing.assert_allclose(again_scores, scores[order], rtol=1e-5)
    assert largest == pytest.approx(again_largest)


def test_every_class_loses_its_share_and_no_more():
    rows = np.random.default_rng(1).standard_normal((260, 6)).astype(np.float32)
    labels = np.array([0] * 200 + [3] * 40 + [7] * 20, np.int32)
    flags, scores, largest = find_poisons(rows, labels, PERCENTILE)
    assert flags.dtype == bool and scores.dtype == np.float32 and scores.min() >= 0 and 0 < largest < 1
    assert [int(flags[labels == label].sum()) for label in (0, 3, 7)] == [30, 6, 3]
    # A count, 1.5 * 0.05 * 260 = 19.5, where the class is large enough, and never more than half of it.
    flags, _, _ = find_poisons(rows, labels, RATE)
    assert [int(flags[labels == label].sum()) for label in (0, 3, 7)] == [19, 19, 10]


def test_rows_that_are_all_alike_are_kept():
    for settings in (PERCENTILE, RATE):
        flags, scores, largest = find_poisons(np.ones((21, 4), np.float32), np.array([0] * 20 + [1]), settings)
        assert not flags.any() and not scores.any() and largest == 0


def test_nothing_is_flagged_where_nothing_is_assumed():
    scores = spectral_scores(planted(0)[0])
    assert not most_suspicious(scores, 200, dataclasses.replace(RATE, poison_rate=0.0)).any()
    assert not most_suspicious(scores, 200, dataclasses.replace(PERCENTILE, percentile=100.0)).any()


def test_the_variance_in_one_direction_is_that_of_the_first_principal_component():
    rows = np.zeros((4, 3), np.float32)
    rows[:, 0], rows[:, 2] = [3, -3, 3, -3], [1, 1, -1, -1]  # variances 9 and 1
    assert find_poisons(rows, np.zeros(4, np.int32), PERCENTILE)[2] == pytest.approx(0.9)


def test_flags_and_scores_are_those_of_the_attacked_networks_embeddings(tmp_path):
    inputs = tiny_inputs(tmp_path)
    result = detect(inputs, PERCENTILE)
    embeddings = inputs.embeddings(inputs.attacked.model, inputs.attacked.variables, inputs.all_rows())
    flags, scores, _ = find_poisons(embeddings[1], inputs.labels[1], PERCENTILE)
    np.testing.assert_array_equal(result.flags[1], flags)
    np.testing.assert_allclose(result.scores[1], scores)
    assert (result.facts["rows left out"] == result.flags.sum(axis=1)).all()
    # On a clean set it raises its nominal share of false alarms, a class's rounded up by one row at most.
    assert 0.1 <= result.flags[1].mean() <= 0.15 + 10 / len(flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "top"}, "rule 'top' is not one of percentile, poison_rate"),
        ({"percentile": 101.0}, "percentile 101.0 is not at least 0 and at most 100"),
        ({"poison_rate": 1.0}, "poison_rate 1.0 is not at least 0 and below 1"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(PERCENTILE, **changes))


def test_settings_are_checked_before_anything_is_trained():
    with pytest.raises(InputError, match="percentile 101.0 is not"):
        run(None, SpectralSignaturesSettings(percentile=101.0))
