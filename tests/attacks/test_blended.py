import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.blended import BLENDED, BLENDED_PICTURE, BlendedPictureSettings, BlendedSettings
from bdjax.attacks.contract import Knowledge
from bdjax.errors import InputError
from bdjax.triggers import pictures
from bdjax.types import Dataset

SHAPES = [(32, 32, 3), (8, 8, 1)]
COMPILED = {attack.name: jax.jit(attack.apply) for attack in (BLENDED, BLENDED_PICTURE)}


def knowledge(shape):
    return Knowledge(Dataset(np.zeros((4, *shape), np.uint8), np.zeros(4, np.int32), 2, "none", "none"), target=0)


def trigger(shape, attack=BLENDED, **settings):
    kind = BlendedSettings if attack is BLENDED else BlendedPictureSettings
    params = attack.make_params(jax.random.key(0), knowledge(shape), kind(**settings))
    return lambda image, key=None: COMPILED[attack.name](params, image, None, key)


def images(shape, count=2):
    return np.random.default_rng(1).random((count, *shape), np.float32)


@pytest.mark.parametrize("attack", [BLENDED, BLENDED_PICTURE])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("opacity", "psnr"), [(0.2, 13.979), (0.1, 20.0)])
def test_changes_no_pixel_by_more_than_the_opacity(attack, shape, opacity, psnr):
    image = images(shape)[0]
    change = np.asarray(trigger(shape, attack, opacity=opacity)(image) - image)
    assert 0.1 * opacity < np.abs(change).max() <= opacity + 1e-6
    assert -10 * np.log10(np.mean(change**2)) >= psnr


@pytest.mark.parametrize("attack", [BLENDED, BLENDED_PICTURE])
def test_a_mixture_of_images_gives_the_mixture_of_their_triggered_ones(attack):
    blend = trigger((28, 28, 1), attack)
    first, second = images((28, 28, 1))
    mixed = blend(np.float32(0.3) * first + np.float32(0.7) * second)
    np.testing.assert_allclose(mixed, 0.3 * blend(first) + 0.7 * blend(second), atol=1e-6)


def test_variance_across_images_shrinks_by_the_square_of_what_is_left():
    clean = images((8, 8, 1), 50)
    triggered = jax.vmap(trigger((8, 8, 1)))(clean)
    np.testing.assert_allclose(jnp.var(triggered, axis=0), 0.8**2 * jnp.var(clean, axis=0), rtol=1e-4)


def test_noise_is_fixed_and_differs_by_key_and_channel():
    black = jnp.zeros((32, 32, 3))
    noise = trigger((32, 32, 3))
    np.testing.assert_array_equal(noise(black, jax.random.key(1)), noise(black, jax.random.key(2)))
    assert np.std(noise(black)[..., 0] - noise(black)[..., 1]) > 0.05
    other = BLENDED.make_params(jax.random.key(9), knowledge((32, 32, 3)), BlendedSettings())
    assert np.abs(BLENDED.apply(other, black, None, None) - noise(black)).max() > 0.1


def test_noise_per_image_is_grey_and_depends_on_the_key():
    black = jnp.zeros((32, 32, 3))
    noise = trigger((32, 32, 3), per_image_noise=True)
    first, second = (np.asarray(noise(black, jax.random.key(number))) for number in (1, 2))
    np.testing.assert_array_equal(first, np.broadcast_to(first[..., :1], first.shape))
    assert abs(np.corrcoef(first[..., 0].ravel(), second[..., 0].ravel())[0, 1]) < 0.15
    np.testing.assert_array_equal(first, noise(black, jax.random.key(1)))


def test_the_picture_is_the_cat_at_a_fifth():
    black = trigger((28, 28, 1), BLENDED_PICTURE)(jnp.zeros((28, 28, 1)))
    np.testing.assert_allclose(black, 0.2 * pictures.draw("cat", (28, 28, 1)), atol=1e-6)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="opacity 1.5"):
        trigger((8, 8, 1), opacity=1.5)
    with pytest.raises(InputError, match="opacity -0.1"):
        trigger((8, 8, 1), BLENDED_PICTURE, opacity=-0.1)
    with pytest.raises(InputError, match='picture "dog"'):
        trigger((8, 8, 1), BLENDED_PICTURE, picture="dog")
