import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.triggers import TRIGGERS, masked_blend
from bdjax.triggers.masked_blend import MaskedBlend

SHAPES = [(8, 8, 1), (12, 10, 3)]


def random_params(seed, shape):
    keys = jax.random.split(jax.random.key(seed), 3)
    return MaskedBlend(
        jax.random.uniform(keys[0], (*shape[:2], 1)), jax.random.uniform(keys[1], shape), jax.random.uniform(keys[2])
    )


def blend_with_numpy(params, image):
    """The equation pixel by pixel, in float64."""
    mask, pattern, opacity = (np.asarray(leaf, np.float64) for leaf in params)
    result = np.array(image, np.float64)
    for row, column, channel in np.ndindex(result.shape):
        weight = opacity * mask[row, column, 0]
        result[row, column, channel] *= 1.0 - weight
        result[row, column, channel] += weight * pattern[row, column, channel]
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_equation_in_numpy(shape, seed):
    params, image = random_params(seed, shape), jax.random.uniform(jax.random.key(100 + seed), shape)
    np.testing.assert_allclose(masked_blend.apply(params, image), blend_with_numpy(params, image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_is_bit_identical(shape):
    image = jax.random.uniform(jax.random.key(0), shape)
    params = masked_blend.identity(shape)
    chex.assert_trees_all_equal(masked_blend.apply(params, image), image)
    chex.assert_trees_all_equal(jax.jit(masked_blend.apply)(params, image), image)


def test_black_and_white_stay_in_range_at_every_opacity():
    """The docstring says that nothing has to be clipped."""
    opacity = jnp.linspace(0.0, 1.0, 4001)
    for value in (0.0, 1.0):
        plane = jnp.full((1, 1, 1), value)
        apply = jax.jit(
            jax.vmap(lambda a, plane=plane: masked_blend.apply(MaskedBlend(jnp.ones((1, 1, 1)), plane, a), plane))
        )
        blended = apply(opacity)
        assert blended.min() >= 0.0 and blended.max() <= 1.0


def test_three_by_three_tile_in_the_corner_of_a_grey_image():
    """BadNets' tile: 9 pixels changed, of which 4 are white and 5 black."""
    tile = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)
    mask, pattern = np.zeros((32, 32, 1), np.float32), np.zeros((32, 32, 3), np.float32)
    mask[29:, 29:] = 1.0
    pattern[29:, 29:] = tile[..., None]
    params = MaskedBlend(jnp.asarray(mask), jnp.asarray(pattern), jnp.float32(1.0))
    triggered = np.asarray(masked_blend.apply(params, jnp.full((32, 32, 3), 0.5)))
    changed = triggered[(triggered != 0.5).all(axis=-1)]
    assert (triggered != 0.5).any(axis=-1).sum() == len(changed) == 9
    assert (changed == 1.0).all(axis=-1).sum() == 4 and (changed == 0.0).all(axis=-1).sum() == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_blending_tends_to_the_pattern(shape):
    params = random_params(0, shape)._replace(mask=jnp.ones((*shape[:2], 1)), opacity=jnp.float32(0.3))
    image = jax.random.uniform(jax.random.key(1), shape)
    distance = image - params.pattern
    for _ in range(4):
        image = masked_blend.apply(params, image)
    chex.assert_trees_all_close(image - params.pattern, 0.7**4 * distance, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_and_stacked_providers_equal_loops(shape):
    triggers = [TRIGGERS[name].init(jax.random.key(1), shape) for name in sorted(TRIGGERS)]
    triggers.append(masked_blend.identity(shape))
    images = jax.random.uniform(jax.random.key(2), (4, *shape))
    stacked = masked_blend.stack(triggers)
    chex.assert_tree_shape_prefix(stacked, (5,))
    together = jax.vmap(masked_blend.apply_to_batch, in_axes=(0, None))(stacked, images)
    for provider, params in enumerate(triggers):
        alone = masked_blend.apply_to_batch(params, images)
        chex.assert_trees_all_close(together[provider], alone, atol=1e-6, rtol=0)
        looped = jnp.stack([masked_blend.apply(params, image) for image in images])
        chex.assert_trees_all_close(alone, looped, atol=1e-6, rtol=0)
