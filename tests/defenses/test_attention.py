import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.attention import attention_loss, attention_map, distillation_loss

RANDOM = np.random.default_rng(0)


def features(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def test_attention_is_the_normalised_sum_of_powers():
    one = jnp.array([[[[3.0, 0.0]], [[0.0, -4.0]]]])  # two pixels, two channels: a = (9, 16)
    np.testing.assert_allclose(attention_map(one, 2.0)[0, :, 0], np.array([9, 16]) / np.sqrt(337), rtol=1e-6)
    np.testing.assert_allclose(attention_map(one, 1.0)[0, :, 0], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(attention_loss(one, one[:, ::-1], 1.0), [0.04], rtol=1e-5)  # (0.2² + 0.2²) / 2


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_asks_neither_for_the_order_of_channels_nor_for_the_scale(power):
    one = features(3, 4, 5, 6)
    expected = attention_map(one, power)
    np.testing.assert_allclose(jnp.sum(jnp.square(expected), (1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(attention_map(one[..., jnp.array([4, 2, 0, 5, 1, 3])], power), expected, rtol=1e-5)
    scale = jnp.array([2.0, 5.0, 9.0])[:, None, None, None]  # of each image on its own
    np.testing.assert_allclose(attention_map(scale * one, power), expected, rtol=1e-4)
    assert np.any(np.abs(attention_map(one[:, ::-1], power) - expected) > 0.01)


def test_a_map_of_one_pixel_says_nothing():
    one, other = 10.0 * features(5, 1, 1, 7), 10.0 * features(5, 1, 1, 3)
    np.testing.assert_allclose(attention_map(one, 2.0), 1, atol=1e-5)
    np.testing.assert_allclose(attention_loss(one, other, 2.0), 0, atol=1e-9)


def test_one_network_twice_has_no_loss_and_different_ones_do():
    one, other = features(4, 3, 3, 2), features(4, 3, 3, 2)
    np.testing.assert_array_equal(attention_loss(one, one, 2.0), 0)
    assert (attention_loss(one, other, 2.0) > 1e-3).all()


def test_an_image_without_features_has_a_gradient():
    def loss(dead):
        return jnp.sum(attention_loss(dead, features(1, 2, 2, 3), 2.0))

    assert np.isfinite(jax.grad(loss)(jnp.zeros((1, 2, 2, 3)))).all()
    np.testing.assert_array_equal(attention_map(jnp.zeros((1, 2, 2, 3)), 2.0), 0)


def test_betas_belong_to_the_last_maps_and_pooled_taps_are_left_out():
    student = [features(4, size, size, 2) for size in (8, 4, 2, 1)]
    teacher = [features(4, size, size, 2) for size in (8, 4, 2, 1)]
    each = [attention_loss(a, b, 2.0) for a, b in zip(student, teacher, strict=True)]
    two = distillation_loss(student, teacher, (10.0, 100.0), 2.0)
    np.testing.assert_allclose(two, 10 * each[1] + 100 * each[2], rtol=1e-5)
    more = distillation_loss(student, teacher, (1e6, 1.0, 10.0, 100.0), 2.0)
    np.testing.assert_allclose(more, each[0] + 10 * each[1] + 100 * each[2], rtol=1e-5)
    np.testing.assert_array_equal(distillation_loss(student, teacher, (), 2.0), 0)
