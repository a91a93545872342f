import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.inspection import scaling

min_max = jax.jit(scaling.min_max, static_argnames="axes")


def test_each_slice_reaches_from_0_to_1():
    values = np.array([[[1.0, 3.0], [2.0, 5.0]], [[-4.0, 0.0], [-3.0, -1.0]]], np.float32)
    expected = [[[0.0, 0.5], [0.25, 1.0]], [[0.0, 1.0], [0.25, 0.75]]]
    np.testing.assert_allclose(min_max(values, axes=(1, 2)), expected)
    np.testing.assert_allclose(min_max(values[0], axes=(0,)), [[0.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, np.nan, np.inf])
def test_a_constant_or_unusable_slice_is_0_and_leaves_the_others_alone(value):
    values = np.stack([np.full((2, 2), value), np.arange(4.0).reshape(2, 2)]).astype(np.float32)
    scaled = min_max(values, axes=(1, 2))
    np.testing.assert_array_equal(scaled[0], np.zeros((2, 2)))
    np.testing.assert_allclose(scaled[1].ravel(), np.arange(4) / 3, rtol=1e-6)


def test_rounding_is_not_scaled_up():
    values = np.float32(0.3) + np.float32(3e-8) * np.arange(4, dtype=np.float32)
    assert np.unique(values).size > 1
    np.testing.assert_array_equal(min_max(values, axes=(0,)), np.zeros(4))


def test_scaling_does_not_see_gain_or_offset():
    values = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    scaled, again = min_max(values, axes=(1, 2)), min_max(5 * values + 2, axes=(1, 2))
    np.testing.assert_allclose(again, scaled, atol=1e-6)


def test_rounding_does_not_lead_out_of_the_range():
    values = jnp.asarray(np.random.default_rng(1).uniform(0.1, 3.0, (500, 7)), jnp.float32)  # as written, and compiled
    for scaled in (scaling.min_max(values, (1,)), min_max(values, axes=(1,))):
        assert scaled.min() == 0
        assert scaled.max() <= 1
        np.testing.assert_allclose(scaled.max(1), 1, atol=1e-6)
