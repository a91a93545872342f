from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import bpp
from bdjax.attacks.bpp import BPP, BPP_OFFLINE, BppSettings, apply, apply_negative
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.label_rules import all_to_one
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by
from bdjax.errors import InputError
from bdjax.types import Dataset

SHAPE = (32, 32, 3)
NOISE = np.random.default_rng(0).random(SHAPE, np.float32)

quantise, dither = jax.jit(bpp.quantise), jax.jit(bpp.dither)


def photograph():
    """Smooth and far from any level, as natural images mostly are."""
    rows, columns, channels = np.meshgrid(*(np.arange(length) for length in SHAPE), indexing="ij")
    return jnp.asarray(0.5 + 0.3 * np.sin(rows / 6 + channels) * np.cos(columns / 5), jnp.float32)


def quantisation(images=None, **settings):
    images = np.random.default_rng(1).integers(0, 256, (8, *SHAPE)) if images is None else images
    data = Dataset(images.astype(np.uint8), np.zeros(len(images), np.int32), 2, "none", "none")
    return BPP.make_params(jax.random.key(2), Knowledge(data, target=0), BppSettings(**settings))


def floyd_steinberg(image, levels):
    """In place and in turn, as it is written in textbooks."""
    image = image.astype(np.float64).copy()
    height, width, _ = image.shape
    for i in range(height):
        for j in range(width):
            old = image[i, j].copy()
            image[i, j] = np.clip(np.round(old * (levels - 1)) / (levels - 1), 0, 1)
            error = old - image[i, j]
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + down < height and 0 <= j + right < width:
                    image[i + down, j + right] += error * share / 16
    return image


def test_halves_go_to_the_even_level():
    np.testing.assert_allclose(quantise(jnp.float32(0.5), 8), 4 / 7, rtol=1e-6)
    np.testing.assert_allclose(quantise(jnp.float32(0.5), 32), 16 / 31, rtol=1e-6)


@pytest.mark.parametrize("levels", [2, 3, 8, 32])
class TestQuantisation:
    def test_is_idempotent_with_few_values(self, levels):
        once = quantise(NOISE, levels)
        np.testing.assert_allclose(quantise(once, levels), once, atol=1e-7)
        assert len(np.unique(once)) == levels

    def test_error_is_at_most_half_a_level(self, levels):
        error = np.abs(quantise(NOISE, levels) - NOISE)
        assert 0.9 / (2 * (levels - 1)) < error.max() <= 1 / (2 * (levels - 1)) + 1e-6


@pytest.mark.parametrize(("levels", "psnr"), [(8, 27.7), (32, 40.6)])
def test_psnr_on_uniform_noise(levels, psnr):
    error = np.asarray(quantise(NOISE, levels) - NOISE)
    assert -10 * np.log10(np.mean(error**2)) == pytest.approx(psnr, abs=0.2)


@pytest.mark.parametrize("levels", [2, 3, 8])
class TestDithering:
    def test_is_the_loop(self, levels):
        # Values on a grid of 1/256 avoid ties that float32 and float64 would break differently.
        for image in (np.round(np.asarray(NOISE) * 255) / 256 + 1 / 1024, np.asarray(photograph())):
            expected = floyd_steinberg(image, levels)
            different = np.abs(np.asarray(dither(jnp.asarray(image, jnp.float32), levels)) - expected) > 1e-4
            assert different.mean() < 0.002

    def test_keeps_the_mean_on_levels(self, levels):
        dithered = dither(photograph(), levels)
        assert abs(float(dithered.mean() - photograph().mean())) < 0.01
        np.testing.assert_allclose(quantise(dithered, levels), dithered, atol=1e-6)
        assert len(np.unique(np.round(np.asarray(dithered), 5))) <= levels

    def test_error_is_within_a_level_and_nothing_changes_twice(self, levels):
        once = dither(photograph(), levels)
        assert np.abs(once - photograph()).max() < 1 / (levels - 1)
        np.testing.assert_allclose(dither(once, levels), once, atol=1e-4)


def test_dithering_differs_from_quantisation():
    run = jax.jit(apply)
    plain, dithered = (run(quantisation(dither=flag), photograph()) for flag in (False, True))
    np.testing.assert_array_equal(plain, quantise(photograph(), 8))
    assert np.mean(np.abs(plain - dithered) > 0.1) > 0.1


def test_a_negative_has_the_error_of_one_image_of_the_bank():
    images = np.full((3, *SHAPE), 100) + 7 * np.arange(3)[:, None, None, None]
    params = quantisation(images, levels=8)
    errors = {round(float(residual), 5) for residual in params.residuals[:, 0, 0, 0]}
    negative = jax.jit(partial(apply_negative, params, jnp.full(SHAPE, 0.5), None))
    seen = {round(float(negative(jax.random.key(seed))[0, 0, 0]) - 0.5, 5) for seed in range(20)}
    assert len(errors) == 3 and seen == errors


def test_negatives_are_not_quantised():
    negative = apply_negative(quantisation(), photograph(), None, jax.random.key(0))
    assert np.mean(np.abs(quantise(negative, 8) - negative) > 0.01) > 0.5


def test_the_bank_has_at_most_as_many_images_as_there_are():
    assert quantisation(bank=5).residuals.shape == (5, *SHAPE)
    assert quantisation(bank=500).residuals.shape == (8, *SHAPE)


@pytest.mark.parametrize("settings", [{"levels": 1}, {"bank": 0}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(InputError, match="levels"):
        quantisation(**settings)


def test_offline_all_rows_are_quantised_once_and_cover_rows_get_anothers_error():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    data = Dataset(images, (np.arange(40) % 4).astype(np.int32), 4, "none", "none")
    part = ConfiguredAttack(BPP_OFFLINE, BppSettings(), all_to_one(0))
    params = BPP_OFFLINE.make_params(jax.random.key(0), Knowledge(data, 0), part.settings)
    poisoned = poison_by(jax.random.key(1), data, part, params)
    assert poisoned.is_poisoned.sum() == poisoned.is_cover.sum() == 4
    levels = np.round(np.arange(8) / 7 * 255)
    assert np.isin(poisoned.images[poisoned.is_poisoned], levels).all()
    cover = poisoned.images[poisoned.is_cover]
    change = np.abs(cover.astype(int) - images[poisoned.is_cover])
    # Half a level of 255 / 7, and up to one for storing the result in 8 bits.
    assert not np.isin(cover, levels).all((1, 2, 3)).any() and 10 < change.max() <= 255 / 14 + 1
    np.testing.assert_array_equal(poisoned.labels[poisoned.is_cover], data.labels[poisoned.is_cover])
    assert (poisoned.labels[poisoned.is_poisoned] == 0).all() and BPP_OFFLINE.control is None
