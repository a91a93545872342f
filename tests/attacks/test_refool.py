import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import refool
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.refool import (
    REFOOL,
    Draw,
    RefoolSettings,
    apply,
    draw_picture,
    draw_reflection,
    make_reflections,
    reflect,
    window,
)
from bdjax.errors import InputError
from bdjax.types import Dataset

SHAPES = [(28, 28, 1), (32, 32, 3), (8, 8, 1)]

reflected, doubled, blurred = jax.jit(reflect), jax.jit(refool.doubled), jax.jit(refool.blurred)


def make(shape, **settings):
    changes = {"least_offset": 1, "most_offset": 3, **settings}
    data = Dataset(np.zeros((2, *shape), np.uint8), np.zeros(2, np.int32), 2, "none", "none")
    return make_reflections(jax.random.key(0), Knowledge(data, 0), RefoolSettings(**changes))


def drawn(strength=0.3, *, is_ghost=True, offsets=(2, 3), ghost=0.7, blur=2.0):
    numbers = [jnp.float32(value) for value in (strength, ghost, blur)]
    return Draw(numbers[0], jnp.asarray(is_ghost), jnp.asarray(offsets, jnp.int32), *numbers[1:], jnp.float32(1.1))


@pytest.mark.parametrize("is_ghost", [True, False])
def test_without_a_reflection_the_image_is_only_darker(is_ghost):
    image = jnp.asarray(np.random.default_rng(1).random((32, 32, 3), np.float32))
    dark = reflected(image, jnp.zeros_like(image), drawn(0.3, is_ghost=is_ghost))
    np.testing.assert_allclose(dark, image * 0.7 ** (1 / 2.2), atol=1e-5)
    black = reflected(jnp.zeros_like(image), jnp.zeros_like(image), drawn(0.3, is_ghost=is_ghost))
    np.testing.assert_array_equal(black, jnp.zeros_like(image))


def test_a_ghost_of_no_strength_is_the_image():
    image, picture = jnp.asarray(np.random.default_rng(1).random((2, 32, 32, 3), np.float32))
    np.testing.assert_allclose(reflected(image, picture, drawn(0.0)), image, atol=1e-5)


def test_reflections_can_be_seen_and_stay_in_range():
    shape = (32, 32, 3)
    params = make(shape)
    images = jax.random.uniform(jax.random.key(1), (24, *shape))
    keys = jax.random.split(jax.random.key(2), 24)
    run = jax.jit(jax.vmap(apply, in_axes=(None, 0, None, 0)))
    triggered = run(params, images, None, keys)
    assert triggered.min() >= 0 and triggered.max() <= 1
    assert 0.05 <= np.abs(triggered - images).mean() <= 0.35
    # Each image gets a different reflection.
    same = run(params, jnp.broadcast_to(images[:1], images.shape), None, keys)
    assert np.abs(np.diff(same, axis=0)).mean() > 0.01


def test_draws_fill_their_ranges():
    params = make((32, 32, 3))
    draws = jax.jit(jax.vmap(draw_reflection, in_axes=(None, 0)))(params, jax.random.split(jax.random.key(0), 2000))
    for values, low, high in [(draws.strength, 0.05, 0.45), (draws.blur, 1, 5), (draws.excess, 1.08, 1.18)]:
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
    np.testing.assert_array_equal(np.unique(draws.offsets), [1, 2, 3])
    np.testing.assert_allclose(draws.is_ghost.mean(), 0.49, atol=0.05)
    ghost = np.asarray(draws.ghost)
    assert (((ghost >= 0.15) & (ghost <= 0.5)) | ((ghost >= 0.5) & (ghost <= 0.85))).all()
    np.testing.assert_allclose(ghost.mean(), 0.5, atol=0.03)


def test_a_ghost_is_the_picture_twice():
    picture = jnp.asarray(draw_picture(jax.random.key(3), (16, 12, 3)))
    np.testing.assert_allclose(doubled(picture, jnp.asarray([0, 0]), jnp.float32(0.3)), picture, atol=1e-6)
    for offsets in [(1, 3), (3, 2)]:
        rows, columns = 16 - offsets[0], 12 - offsets[1]
        overlap = 0.7 * np.asarray(picture)[offsets[0] :, offsets[1] :] + 0.3 * np.asarray(picture)[:rows, :columns]
        stretched = jax.image.resize(overlap.astype(np.float32), (16, 12, 3), "linear")
        result = doubled(picture, jnp.asarray(offsets), jnp.float32(0.7))
        np.testing.assert_allclose(result, stretched, atol=1e-5)


@pytest.mark.parametrize("deviation", [1.0, 2.3, 5.0])
def test_the_blur_is_the_cut_off_gaussian(deviation):
    point = jnp.zeros((41, 41, 1)).at[20, 20].set(1.0)
    result = np.asarray(blurred(point, jnp.float32(deviation)))[..., 0]
    tap = np.arange(-20, 21)
    kernel = np.exp(-0.5 * (tap / deviation) ** 2) * (np.abs(tap) <= np.ceil(2 * deviation))
    np.testing.assert_allclose(result, np.outer(kernel, kernel) / kernel.sum() ** 2, atol=1e-6)
    flat = jnp.full((8, 9, 1), 0.4)
    np.testing.assert_allclose(blurred(flat, jnp.float32(deviation)), flat, atol=1e-6)


def test_the_window_of_32_pixels():
    values = np.asarray(window(32, 32))
    assert values.max() == 1.0
    np.testing.assert_allclose([values[0, 0], values[0, 16], values.mean()], [0.011, 0.10, 0.31], atol=0.006)


def test_the_gradient_is_finite_on_black():
    picture = jnp.asarray(draw_picture(jax.random.key(3), (8, 8, 1)))
    gradient = jax.jit(jax.grad(lambda image: reflect(image, picture * 0, drawn()).sum()))(jnp.zeros((8, 8, 1)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_differ_and_use_the_whole_range(shape):
    pictures = np.asarray(make(shape).pictures)
    assert pictures.shape == (20, *shape)
    np.testing.assert_allclose(pictures.min(axis=(1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(pictures.max(axis=(1, 2, 3)), 1, atol=1e-6)
    assert np.abs(pictures[1:] - pictures[:-1]).mean(axis=(1, 2, 3)).min() > 0.03


@pytest.mark.parametrize(
    "wrong",
    [
        {"pictures": 0},
        {"most_strength": 1.5},
        {"least_strength": 0.5},
        {"ghost_share": 2.0},
        {"most_offset": 8},
        {"least_blur": 0.0},
        {"most_blur": 6.0},
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match="refool"):
        make((8, 8, 1), **wrong)


def test_clean_labels_are_the_default_rule():
    assert REFOOL.label_rules[0] == "clean_label"
