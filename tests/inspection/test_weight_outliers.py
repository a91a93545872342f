"""Outliers among weights: golden numbers, and a channel and a class that are made outliers."""

import numpy as np
import pytest

from bdjax.inspection import weight_outliers


def test_a_channels_bound_is_its_largest_singular_value_times_the_normalisations_factor():
    kernel = np.zeros((1, 2, 2, 2))  # channel 0: the matrix [[3, 0], [0, 4]]; channel 1: [[1, 1], [1, 1]]
    kernel[0, 0, 0, 0], kernel[0, 1, 1, 0] = 3, 4
    kernel[..., 1] = 1
    bounds = weight_outliers.lipschitz_bounds(kernel, np.array([-2.0, 1.0]), np.array([4.0, 0.25]), epsilon=0.0)
    np.testing.assert_allclose(bounds, [4.0, 4.0])


def test_a_channel_with_large_weights_is_the_outlier_of_its_layer():
    random = np.random.default_rng(0)
    kernel = random.normal(size=(3, 3, 4, 16))
    kernel[..., 5] *= 10
    norm = {"scale": np.ones(16), "bias": np.zeros(16)}
    variables = {
        "params": {"stem": {"kernel": kernel}, "block": {"norm": norm}, "constant": {"bias": np.zeros(16)}},
        "batch_stats": {"block": {"norm": {"mean": np.zeros(16), "variance": np.ones(16)}}},
    }
    (found,) = weight_outliers.channel_outliers(variables, [("stem", "block/norm"), ("constant", "block/norm")])
    assert (found.layer, found.channels, found.channel) == ("stem", 16, 5)
    assert 3 < found.deviations <= 15 / np.sqrt(16)


def test_the_class_with_the_largest_mean_weight_is_measured_by_median_deviation_and_by_dixons_q():
    kernel = np.array([[0.0, 1.0, 2.0, 3.0, 9.0], [0.0, 1.0, 2.0, 3.0, 11.0]])
    found = weight_outliers.class_outlier(kernel)
    assert found.label == 4
    assert found.deviations == pytest.approx((10 - 2) / 1.4826)
    assert found.dixon == pytest.approx(0.7)


def test_equal_weights_are_no_division_by_zero():
    found = weight_outliers.class_outlier(np.ones((3, 4)))
    assert found.deviations == 0 and found.dixon == 0
