import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.trained_blend import Descent, random_soft_blend, train_blend
from bdjax.errors import InputError
from bdjax.triggers import masked_blend

SHAPE = (6, 5, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (9, *SHAPE)).astype(np.uint8)


def to_a_picture(picture, images, triggered):
    return jnp.mean(jnp.square(triggered - picture[None]))


def descent(**changes):
    return Descent(
        **{"steps": 150, "batch_size": 4, "learning_rate": 0.1, "mask_bound": 0.5, "mask_is_trained": True} | changes
    )


def distance(trigger, picture):
    images = jnp.asarray(IMAGES, jnp.float32) / 255
    return float(to_a_picture(picture, images, masked_blend.apply_to_batch(trigger, images)))


@pytest.mark.parametrize(("bound", "mean"), [(0.5, 0.375), (0.2, 0.18)])
def test_first_mask_is_uniform_and_cut_off(bound, mean):
    start = random_soft_blend(jax.random.key(0), (256, 256, 1), bound)
    assert start.mask.max() == jnp.float32(bound) and start.mask.min() >= 0
    np.testing.assert_allclose(start.mask.mean(), mean, atol=0.004)  # 6 standard deviations
    np.testing.assert_allclose(jnp.mean(start.mask == jnp.float32(bound)), 1 - bound, atol=0.02)
    np.testing.assert_allclose(start.pattern.mean(), 0.5, atol=0.01)


@pytest.mark.parametrize("mask_is_trained", [True, False])
def test_loss_falls_and_the_trigger_stays_in_range(mask_is_trained):
    picture = jnp.asarray(2 * np.random.default_rng(1).random(SHAPE, np.float32) - 0.5)  # partly out of reach
    start = random_soft_blend(jax.random.key(0), SHAPE, 0.5)
    settings = descent(mask_is_trained=mask_is_trained)
    trained = train_blend(jax.random.key(2), IMAGES, start, to_a_picture, picture, settings)
    assert trained.mask.min() >= 0 and trained.mask.max() <= 0.5
    assert trained.pattern.min() >= 0 and trained.pattern.max() <= 1
    assert distance(trained, picture) < 0.8 * distance(start, picture)
    assert bool(jnp.all(trained.mask == start.mask)) is not mask_is_trained
    assert trained.mask.shape == (6, 5, 1) and trained.pattern.shape == SHAPE and trained.opacity == 1.0


def test_pattern_is_found_where_the_mask_is_and_stays_elsewhere():
    picture = jnp.full(SHAPE, 0.8)
    mask = jnp.zeros((6, 5, 1)).at[:3].set(1.0)
    start = random_soft_blend(jax.random.key(0), SHAPE, 1.0)._replace(mask=mask)
    start = start._replace(pattern=jnp.clip(start.pattern, 0.02, 0.98))
    trained = train_blend(
        jax.random.key(2), IMAGES, start, to_a_picture, picture, descent(mask_bound=1.0, mask_is_trained=False)
    )
    np.testing.assert_allclose(trained.pattern[:3], 0.8, atol=0.02)
    np.testing.assert_allclose(trained.pattern[3:], start.pattern[3:], atol=1e-5)


def test_no_steps_leave_the_start():
    start = random_soft_blend(jax.random.key(0), SHAPE, 0.5)
    assert train_blend(jax.random.key(2), IMAGES, start, to_a_picture, start.pattern, descent(steps=0)) is start


def test_what_cannot_be_is_refused():
    start = random_soft_blend(jax.random.key(0), SHAPE, 0.5)
    with pytest.raises(InputError, match="no images"):
        train_blend(jax.random.key(0), IMAGES[:0], start, to_a_picture, start.pattern, descent())
    with pytest.raises(InputError, match="learning rate 0 "):
        train_blend(jax.random.key(0), IMAGES, start, to_a_picture, start.pattern, descent(learning_rate=0.0))
    with pytest.raises(InputError, match="mask bound 1.5"):
        random_soft_blend(jax.random.key(0), SHAPE, 1.5)
