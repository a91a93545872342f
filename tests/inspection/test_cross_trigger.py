import numpy as np
import pytest

from bdjax import metrics
from bdjax.inspection.cross_trigger import cross_trigger_matrices, off_diagonal_summary


def test_golden():
    labels = np.array([0, 1, 1, 2, 2])  # the target is 0: four rows count
    predictions = np.array(
        [
            [[0, 0, 0, 0, 0], [1, 0, 1, 2, 1]],
            [[0, 1, 1, 2, 2], [0, 0, 0, 0, 2]],
            [[0, 1, 1, 2, 1], [0, 2, 2, 1, 1]],
        ]
    )
    asr, r_acc = cross_trigger_matrices(predictions, labels, target=0)
    np.testing.assert_array_equal(asr, [[1.0, 0.25], [0.0, 0.75], [0.0, 0.0]])
    np.testing.assert_array_equal(r_acc, [[0.0, 0.5], [1.0, 0.25], [0.75, 0.0]])


@pytest.mark.parametrize("include_target", [False, True])
def test_entries_are_the_metrics(include_target):
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, 3, (4, 3, 50)), rng.integers(0, 3, 50)
    asr, r_acc = cross_trigger_matrices(predictions, labels, 1, include_target=include_target)
    assert asr.shape == r_acc.shape == (4, 3)
    assert asr.dtype == r_acc.dtype == np.float64
    for index in np.ndindex(4, 3):
        arguments = (predictions[index], labels, 1)
        assert asr[index] == metrics.attack_success_rate(*arguments, include_target=include_target)
        assert r_acc[index] == metrics.robust_accuracy(*arguments, include_target=include_target)
    if not include_target:
        assert np.all(asr + r_acc <= 1)


def test_models_and_triggers_may_be_permuted():
    rng = np.random.default_rng(1)
    predictions, labels = rng.integers(0, 3, (4, 3, 50)), rng.integers(0, 3, 50)
    models, triggers = [2, 0, 3, 1], [1, 2, 0]
    for plain, permuted in zip(
        cross_trigger_matrices(predictions, labels, 0),
        cross_trigger_matrices(predictions[models][:, triggers], labels, 0),
        strict=True,
    ):
        np.testing.assert_array_equal(permuted, plain[models][:, triggers])


@pytest.mark.parametrize("shape", [(3, 50), (2, 3, 49), (1, 2, 3, 50)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"with 50 labels it should be \(models, triggers, 50\)"):
        cross_trigger_matrices(np.zeros(shape, int), np.ones(50, int), 0)


def test_summary_leaves_the_diagonal_out():
    asr = np.array([[1.0, 0.1, 0.2], [0.3, 0.9, 0.8], [0.0, 0.4, 1.0]])
    summary = off_diagonal_summary(asr)
    assert summary.mean == pytest.approx(1.8 / 6)
    assert (summary.maximum, summary.model, summary.trigger) == (0.8, 1, 2)
    np.testing.assert_allclose(summary.trigger_means, [0.15, 0.25, 0.5])
    unchanged = off_diagonal_summary(np.where(np.eye(3, dtype=bool), 0.0, asr))
    assert unchanged.mean == pytest.approx(summary.mean)
    assert unchanged[1:4] == summary[1:4]


def test_summary_of_triggers_that_work_nowhere_else():
    summary = off_diagonal_summary(np.eye(2))
    assert summary[:4] == (0.0, 0.0, 0, 1)  # an entry off the diagonal even so


def test_summary_needs_the_rows_of_several_teachers():
    with pytest.raises(ValueError, match=r"shape \(8, 7\); it should be square"):
        off_diagonal_summary(np.zeros((8, 7)))
    with pytest.raises(ValueError, match="asr has one teacher; the summary needs at least two"):
        off_diagonal_summary(np.ones((1, 1)))
