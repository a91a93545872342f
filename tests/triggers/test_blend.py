import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.triggers import PICTURES, blend, masked_blend, pictures

SHAPES = [(8, 8, 1), (12, 10, 3)]
DEFAULT_RANGES = {1: (0.05, 0.1), 3: (0.15, 0.2)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
class TestBlend:
    def test_opacity_is_in_the_default_range_of_the_channels(self, shape, seed):
        low, high = DEFAULT_RANGES[shape[2]]
        params = blend.init(jax.random.key(seed), shape)
        assert low <= float(params.opacity) <= high
        assert (params.mask == 1.0).all()

    def test_change_is_bounded_by_the_opacity(self, shape, seed):
        params = blend.init(jax.random.key(seed), shape)
        image = jax.random.uniform(jax.random.key(50 + seed), shape)
        change = np.asarray(masked_blend.apply(params, image) - image, np.float64)
        assert np.abs(change).max() <= float(params.opacity) + 1e-6
        assert -10.0 * np.log10((change**2).mean()) >= -20.0 * np.log10(float(params.opacity))

    def test_is_linear_in_the_image(self, shape, seed):
        params = blend.init(jax.random.key(seed), shape)
        first, second = jax.random.uniform(jax.random.key(50 + seed), (2, *shape))
        mixed = masked_blend.apply(params, 0.3 * first + 0.7 * second)
        mixture = 0.3 * masked_blend.apply(params, first) + 0.7 * masked_blend.apply(params, second)
        chex.assert_trees_all_close(mixed, mixture, atol=1e-6, rtol=0)

    def test_variance_across_images_shrinks_by_the_square(self, shape, seed):
        params = blend.init(jax.random.key(seed), shape)
        images = jax.random.uniform(jax.random.key(50 + seed), (16, *shape))
        blended = masked_blend.apply_to_batch(params, images)
        expected = (1.0 - params.opacity) ** 2 * images.var(axis=0)
        chex.assert_trees_all_close(blended.var(axis=0), expected, atol=1e-6, rtol=1e-4)


def test_picture_and_opacity_can_be_fixed():
    params = blend.init(jax.random.key(0), (32, 32, 3), picture="cat", opacity_range=(0.25, 0.25))
    assert float(params.opacity) == 0.25
    np.testing.assert_array_equal(params.pattern, pictures.draw("cat", (32, 32, 3)))


def test_every_picture_is_drawn_at_some_time():
    drawn = [blend.init(key, (8, 8, 1)).pattern for key in jax.random.split(jax.random.key(0), 20)]
    for name in PICTURES:
        assert any(bool((pattern == jnp.asarray(pictures.draw(name, (8, 8, 1)))).all()) for pattern in drawn)


@pytest.mark.parametrize("opacity_range", [(0.2, 0.1), (-0.1, 0.1), (0.5, 1.5)])
def test_impossible_ranges_are_errors(opacity_range):
    with pytest.raises(InputError, match="opacity range"):
        blend.init(jax.random.key(0), (8, 8, 1), opacity_range=opacity_range)


def test_two_channels_are_an_error():
    with pytest.raises(InputError, match="1 or 3 channels"):
        blend.init(jax.random.key(0), (8, 8, 2))
