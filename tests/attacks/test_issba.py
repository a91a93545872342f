from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import datasets
from bdjax.attacks.contract import Knowledge, settings_for
from bdjax.attacks.issba import ISSBA, perceptual_difference, structural_similarity
from bdjax.attacks.poisoning import trigger_all
from bdjax.errors import InputError
from bdjax.inspection.similarity import psnr, ssim
from bdjax.models import steganography


@cache
def digits():
    return datasets.load("digits")


@cache
def trained():
    """A trigger of the digits, from smaller networks and fewer steps than by default."""
    small = {"num_bits": 6, "width": 8, "stages": 1, "steps": 300, "learning_rate": 0.004}
    settings = settings_for(ISSBA, digits().train, small, like="digits")
    return ISSBA.make_params(jax.random.key(0), Knowledge(digits().train, target=0), settings)


def held_out():
    return np.asarray(digits().test.images, np.float32) / 255


@cache
def triggered():
    """The held-out images with the trigger, as stored in 8 bits."""
    return trigger_all(jax.random.key(1), digits().test, ISSBA.apply, trained()).astype(np.float32) / 255


@jax.jit
def decoded(images):
    params = trained()
    return steganography.decode(params.networks, params.decoder, images) > 0


def bit_accuracy(images, bits):
    return np.mean(np.asarray(decoded(jnp.asarray(images))) == (np.asarray(bits) > 0))


@jax.jit
def hide(images, bits):
    params = trained()
    return jnp.clip(images + steganography.encode(params.networks, params.encoder, images, bits), 0.0, 1.0)


@pytest.mark.slow
def test_bits_are_read_from_held_out_images_stored_in_8_bits():
    params = trained()
    assert bit_accuracy(hide(held_out(), jnp.broadcast_to(params.bits, (len(held_out()), 6))), params.bits) >= 0.98
    assert bit_accuracy(triggered(), params.bits) >= 0.95


@pytest.mark.slow
def test_any_string_can_be_hidden_and_only_that_one_is_read():
    others = jax.random.bernoulli(jax.random.key(2), 0.5, (len(held_out()), 6)).astype(jnp.float32)
    images = hide(held_out(), others)
    assert bit_accuracy(images, others) >= 0.95
    assert 0.4 < bit_accuracy(images, trained().bits) < 0.6


@pytest.mark.slow
def test_images_hardly_change_and_each_in_a_way_of_its_own():
    images = held_out()
    assert psnr(images, triggered()).mean() >= 18.0
    residuals = (triggered() - images).reshape(len(images), -1)
    residuals /= np.linalg.norm(residuals, axis=1, keepdims=True)
    cosines = residuals @ residuals.T
    count = len(images)
    assert (cosines.sum() - np.trace(cosines)) / (count * (count - 1)) < 0.95


@pytest.mark.parametrize("shape", [(14, 10, 3), (6, 6, 1)])
def test_ssim_is_scikit_images(shape):
    images, noise = np.random.default_rng(0).random((2, 3, *shape), np.float32)
    others = np.float32(0.8) * images + np.float32(0.2) * noise
    np.testing.assert_allclose(jax.jit(structural_similarity)(images, others), ssim(images, others), atol=1e-4)


def test_perceptual_difference_of_a_known_change():
    images = jnp.full((1, 8, 8, 1), 0.5)
    both = jax.jit(lambda others: (perceptual_difference(images, others), structural_similarity(images, others)))
    np.testing.assert_allclose(both(images)[0], [0.0], atol=1e-6)
    # Columns alternate by 0.1: each step across is 0.1, each step down 0.
    others = images + 0.1 * (jnp.arange(8) % 2).astype(jnp.float32)[None, None, :, None]
    difference, similarity = both(others)
    np.testing.assert_allclose(difference, 0.1 + 1.0 - similarity, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 0}, "num_bits 0 is not at least 1"),
        ({"steps": 0}, "steps 0 is not at least 1"),
        ({"ramp": 0.0}, "ramp 0.0 is not above 0"),
        ({"stages": 4}, "8x8 pixels are too small to be halved 4 times"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        settings = settings_for(ISSBA, digits().train, changes, like="digits")
        ISSBA.make_params(jax.random.key(0), Knowledge(digits().train, target=0), settings)
