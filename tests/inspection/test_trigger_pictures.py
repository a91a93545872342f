import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.inspection.trigger_pictures import (
    PICTURES,
    magnified_difference,
    picture_rows,
    trigger_picture,
    trigger_pictures,
)
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend

HEIGHT, WIDTH = 6, 5


def random_image(seed: int, channels: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (HEIGHT, WIDTH, channels))


def patch(channels: int) -> MaskedBlend:
    mask = jnp.zeros((HEIGHT, WIDTH, 1)).at[1:3, 2:4].set(1.0)
    return MaskedBlend(mask, random_image(7, channels), jnp.float32(1.0))  # a pattern where the mask is 0, too


def faint(channels: int) -> MaskedBlend:
    return MaskedBlend(jnp.ones((HEIGHT, WIDTH, 1)), random_image(8, channels), jnp.float32(0.05))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [patch, faint])
def test_identities(make, channels):
    params, image = make(channels), random_image(0, channels)
    pictures = {name: np.asarray(picture) for name, picture in trigger_picture(params, image).items()}
    assert tuple(pictures) == PICTURES
    for name, picture in pictures.items():
        assert picture.shape == (HEIGHT, WIDTH, 1 if name == "mask" else channels)
        assert picture.dtype == np.float32
        assert picture.min() >= 0
        assert picture.max() <= 1
    outside = np.broadcast_to(pictures["mask"] == 0, image.shape)
    assert not pictures["difference"][outside].any()
    assert not pictures["trigger"][outside].any()
    np.testing.assert_array_equal(pictures["triggered"][outside], np.asarray(image)[outside])
    np.testing.assert_array_equal(pictures["image"], image)
    np.testing.assert_array_equal(pictures["triggered"], masked_blend.apply(params, image))
    np.testing.assert_array_equal(pictures["trigger"][~outside], np.asarray(params.pattern)[~outside])
    expected = np.minimum(10 * np.abs(pictures["triggered"] - pictures["image"]), 1)
    np.testing.assert_allclose(pictures["difference"], expected, atol=1e-6)


def test_a_trigger_that_does_nothing_makes_no_difference():
    pictures = trigger_picture(masked_blend.identity((HEIGHT, WIDTH, 3)), random_image(0, 3))
    np.testing.assert_array_equal(pictures["difference"], np.zeros((HEIGHT, WIDTH, 3)))
    np.testing.assert_array_equal(pictures["triggered"], pictures["image"])


def test_difference_is_magnified_and_cut_at_1():
    image = jnp.array([0.5, 0.5, 0.5, 0.5])[None, None]
    triggered = jnp.array([0.5, 0.51, 0.47, 0.9])[None, None]
    np.testing.assert_allclose(magnified_difference(image, triggered), [[[0.0, 0.1, 0.3, 1.0]]], atol=1e-5)
    np.testing.assert_allclose(magnified_difference(image, triggered, 1.0), [[[0.0, 0.01, 0.03, 0.4]]], atol=1e-6)


def test_several_triggers_are_a_loop_and_a_row_each():
    triggers, image = [patch(3), faint(3), masked_blend.identity((HEIGHT, WIDTH, 3))], random_image(0, 3)
    pictures = trigger_pictures(masked_blend.stack(triggers), image)
    assert tuple(pictures) == PICTURES
    rows = picture_rows(pictures)
    assert [len(row) for row in rows] == [5, 5, 5]
    for index, params in enumerate(triggers):
        expected = trigger_picture(params, image)
        for drawn, name in zip(rows[index], PICTURES, strict=True):
            np.testing.assert_allclose(drawn, expected[name], atol=1e-6)
    outside = np.asarray(triggers[0].mask[..., 0]) == 0
    assert not np.asarray(pictures["difference"][0])[outside].any()  # exactly, compiled or not
    assert not np.asarray(pictures["difference"][2]).any()


def test_the_pictures_to_lay_out_may_be_chosen():
    pictures = trigger_pictures(masked_blend.stack([patch(1), faint(1)]), random_image(0, 1))
    rows = picture_rows(pictures, ("triggered", "mask"))
    np.testing.assert_array_equal(rows[1][0], pictures["triggered"][1])
    np.testing.assert_array_equal(rows[0][1], pictures["mask"][0])
