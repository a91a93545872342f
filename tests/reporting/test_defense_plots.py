import numpy as np
import pytest

from bdjax.reporting.defense_plots import Scores, most_suspicious, score_histograms, trade_off
from bdjax.reporting.plots import to_png


def test_trade_off_has_a_mark_for_each_attack_and_a_large_one_for_their_mean():
    accuracy = np.array([[0.9, 0.8, 0.7], [0.9, 0.9, np.nan]])
    success = np.array([[1.0, 0.8, 0.6], [0.0, 0.2, np.nan]])
    figure = trade_off(["none", "lfd"], accuracy, success)
    axes = figure.axes[0]
    drawn = [np.asarray(marks.get_offsets()) for marks in axes.collections]
    np.testing.assert_allclose(drawn[0], np.stack([success[0], accuracy[0]], -1))
    # The third attack is not one that both have, so it is in no mean.
    np.testing.assert_allclose(drawn[1], [[0.9, 0.85]])
    np.testing.assert_allclose(drawn[2], [[0.0, 0.9], [0.2, 0.9]])
    np.testing.assert_allclose(drawn[3], [[0.1, 0.9]])
    assert np.diff(axes.get_ylim())[0] >= 0.2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "lfd"]
    assert to_png(figure) == to_png(trade_off(["none", "lfd"], accuracy, success))


def test_trade_off_without_a_common_attack_has_no_means():
    figure = trade_off(["a", "b"], np.array([[0.9, np.nan], [np.nan, 0.9]]), np.array([[0.1, np.nan], [np.nan, 0.1]]))
    assert len(figure.axes[0].collections) == 2 and not figure.legends


def heights(axes):
    return [steps.get_data().values for steps in axes.patches]


def test_histograms_are_shares_of_each_group_outliers_included():
    scores = np.concatenate([np.linspace(0, 1, 300), [1e6], np.linspace(2, 3, 20)])
    is_poisoned = np.arange(321) >= 301
    figure = score_histograms([Scores("one", scores, is_poisoned), Scores("two", scores, None)], "LfD", bins=10)
    first, second = figure.axes
    assert [sum(each) for each in heights(first)] == [pytest.approx(1)] * 2 and len(first.patches) == 2
    assert first.get_xlim()[1] < 4 and len(second.patches) == 1
    assert heights(first)[1][:5].sum() == 0 and sum(heights(second)[0]) == pytest.approx(1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "poisoned", "rows"]


def test_histograms_of_scores_that_are_all_alike_and_of_clean_sets():
    panel = Scores("clean", np.ones(5), np.zeros(5, bool))
    figure = score_histograms([panel])
    assert sum(heights(figure.axes[0])[0]) == pytest.approx(1) and len(figure.axes[0].patches) == 1


def test_most_suspicious():
    flags, scores = np.array([0, 1, 0, 1, 0], bool), np.array([9.0, 1.0, 3.0, 2.0, 8.0])
    np.testing.assert_array_equal(most_suspicious(flags, scores, 4), [3, 1, 0, 4])
    np.testing.assert_array_equal(most_suspicious(None, scores, 2), [0, 4])
    np.testing.assert_array_equal(most_suspicious(flags, None, 9), [1, 3])
    np.testing.assert_array_equal(most_suspicious(np.ones(9, bool), None, 3), [0, 4, 8])
    assert len(most_suspicious(None, None, 3)) == len(most_suspicious(np.zeros(4, bool), None, 3)) == 0
