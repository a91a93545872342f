import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.attention import attention_loss, attention_map, distillation_loss

RANDOM = np.random.default_rng(0)


def features(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


compiled_map = jax.jit(attention_map)
compiled_loss = jax.jit(attention_loss)
compiled_distillation = jax.jit(distillation_loss, static_argnums=(2, 3))


def test_attention_is_the_normalised_sum_of_powers():
    one = np.array([[[[3.0, 0.0]], [[0.0, -4.0]]]], np.float32)  # two pixels, two channels: a = (9, 16)
    np.testing.assert_allclose(compiled_map(one, 2.0)[0, :, 0], np.array([9, 16]) / np.sqrt(337), rtol=1e-6)
    np.testing.assert_allclose(compiled_map(one, 1.0)[0, :, 0], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(compiled_loss(one, one[:, ::-1], 1.0), [0.04], rtol=1e-5)  # (0.2² + 0.2²) / 2


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_depends_neither_on_the_order_of_channels_nor_on_the_scale(power):
    one = features(3, 4, 5, 6)
    expected = compiled_map(one, power)
    np.testing.assert_allclose(np.sum(np.square(expected), (1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(compiled_map(one[..., [4, 2, 0, 5, 1, 3]], power), expected, rtol=1e-5)
    scale = np.array([2.0, 5.0, 9.0], np.float32)[:, None, None, None]  # for each image
    np.testing.assert_allclose(compiled_map(scale * one, power), expected, rtol=1e-4)
    assert np.any(np.abs(compiled_map(one[:, ::-1], power) - expected) > 0.01)


def test_a_map_of_one_pixel_has_no_loss():
    one, other = 10.0 * features(5, 1, 1, 7), 10.0 * features(5, 1, 1, 3)
    np.testing.assert_allclose(compiled_map(one, 2.0), 1, atol=1e-5)
    np.testing.assert_allclose(compiled_loss(one, other, 2.0), 0, atol=1e-9)


def test_equal_features_have_no_loss_and_different_ones_do():
    one, other = features(4, 3, 3, 2), features(4, 3, 3, 2)
    np.testing.assert_array_equal(compiled_loss(one, one, 2.0), 0)
    assert (compiled_loss(one, other, 2.0) > 1e-3).all()


def test_an_image_without_features_has_a_gradient():
    def loss(dead):
        return jnp.sum(attention_loss(dead, features(1, 2, 2, 3), 2.0))

    assert np.isfinite(jax.jit(jax.grad(loss))(np.zeros((1, 2, 2, 3), np.float32))).all()
    np.testing.assert_array_equal(compiled_map(np.zeros((1, 2, 2, 3), np.float32), 2.0), 0)


def test_betas_belong_to_the_last_maps_and_pooled_taps_are_left_out():
    student = [features(4, size, size, 2) for size in (8, 4, 2, 1)]
    teacher = [features(4, size, size, 2) for size in (8, 4, 2, 1)]
    tap_losses = [compiled_loss(a, b, 2.0) for a, b in zip(student, teacher, strict=True)]
    two = compiled_distillation(student, teacher, (10.0, 100.0), 2.0)
    np.testing.assert_allclose(two, 10 * tap_losses[1] + 100 * tap_losses[2], rtol=1e-5)
    more = compiled_distillation(student, teacher, (1e6, 1.0, 10.0, 100.0), 2.0)
    np.testing.assert_allclose(more, tap_losses[0] + 10 * tap_losses[1] + 100 * tap_losses[2], rtol=1e-5)
    np.testing.assert_array_equal(compiled_distillation(student, teacher, (), 2.0), 0)
