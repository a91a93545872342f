import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import wanet
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.label_rules import all_to_one
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by, trigger_all
from bdjax.attacks.wanet import WANET, WANET_OFFLINE, WaNetSettings, bicubic_matrix
from bdjax.errors import InputError
from bdjax.types import Dataset

apply, apply_with_noise = jax.jit(wanet.apply), jax.jit(wanet.apply_with_noise)


def warp(shape, seed=0, **settings):
    data = Dataset(np.zeros((4, *shape), np.uint8), np.zeros(4, np.int32), 2, "none", "none")
    return WANET.make_params(jax.random.key(seed), Knowledge(data, target=0), WaNetSettings(**settings))


def random_image(shape):
    return np.random.default_rng(1).random(shape, np.float32)


def smooth_image(shape):
    rows, columns, channels = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    return (0.5 + 0.4 * np.sin(rows / 6 + channels) * np.cos(columns / 5)).astype(np.float32)


def four_taps(image, positions):
    """Bilinear look-up, written out."""
    height, width, _ = image.shape
    result = np.zeros(image.shape)
    for i in range(height):
        for j in range(width):
            row, column = np.clip(positions[i, j].astype(np.float64), 0, [height - 1, width - 1])
            top, left = int(row), int(column)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, along = row - top, column - left
            result[i, j] = (1 - down) * ((1 - along) * image[top, left] + along * image[top, right]) + down * (
                (1 - along) * image[bottom, left] + along * image[bottom, right]
            )
    return result


@pytest.mark.parametrize("shape", [(8, 8, 1), (20, 32, 3)])
class TestWarp:
    def test_strength_0_is_the_identity(self, shape):
        image = random_image(shape)
        np.testing.assert_allclose(apply(warp(shape, strength=0.0), image), image, atol=1e-5)

    def test_a_constant_image_stays(self, shape):
        for value in (0.0, 0.3, 1.0):
            np.testing.assert_array_equal(apply(warp(shape, strength=2.0), jnp.full(shape, value)), np.float32(value))

    def test_range_stays_within_the_images(self, shape):
        image = 0.2 + 0.5 * random_image(shape)
        for warped in (
            apply(warp(shape), image),
            apply_with_noise(warp(shape), image, None, jax.random.key(2)),
        ):
            assert warped.min() >= image.min() and warped.max() <= image.max()

    def test_is_four_taps(self, shape):
        image = random_image(shape)
        params = warp(shape, strength=2.0)
        positions = np.stack(np.meshgrid(*(np.arange(n) for n in shape[:2]), indexing="ij"), axis=-1) + np.asarray(
            params.field
        )
        np.testing.assert_allclose(apply(params, image), four_taps(np.asarray(image), positions), atol=1e-5)


def test_columns_follow_the_second_component():
    """A field that looks one pixel to the right moves the picture one pixel to the left."""
    params = warp((8, 8, 1))._replace(field=jnp.zeros((8, 8, 2)).at[..., 1].set(1.0))
    image = random_image((8, 8, 1))
    np.testing.assert_allclose(apply(params, image)[:, :-1], image[:, 1:], atol=1e-6)


@pytest.mark.parametrize("side", [28, 32])
def test_displacement_of_the_papers_strength(side):
    fields = np.stack([warp((side, side, 1), seed).field for seed in range(12)])
    assert 0.15 < np.abs(fields).mean() < 0.25
    assert np.abs(fields).max() < 1.0


def test_displacement_is_linear_in_the_strength():
    weak, strong = warp((32, 32, 3), strength=0.5).field, warp((32, 32, 3), strength=1.5).field
    np.testing.assert_allclose(strong, 3 * weak, rtol=1e-5, atol=1e-7)


def test_a_smooth_image_changes_little():
    image = smooth_image((32, 32, 3))
    errors = [np.mean((np.asarray(apply(warp((32, 32, 3), seed), image)) - image) ** 2) for seed in range(10)]
    assert -10 * np.log10(np.mean(errors)) > 30


@pytest.mark.parametrize(("length", "points"), [(28, 4), (32, 4), (32, 8), (8, 2)])
def test_interpolation(length, points):
    matrix = bicubic_matrix(length, points)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix[[0, -1]], np.eye(points)[[0, -1]], atol=1e-12)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-12)


def test_interpolation_goes_through_the_control_points():
    np.testing.assert_allclose(bicubic_matrix(31, 4)[::10], np.eye(4), atol=1e-12)
    # Halfway between two inner points, by Keys' kernel at 0.5 and 1.5 with a = -0.75.
    np.testing.assert_allclose(bicubic_matrix(31, 4)[15], [-0.09375, 0.59375, 0.59375, -0.09375], atol=1e-12)


def test_noise_is_at_most_half_a_pixel_more_and_differs_by_key():
    shape = (32, 32, 1)
    ramp = jnp.broadcast_to(jnp.arange(32.0)[None, :, None] / 32, shape)  # the brightness is the column's number
    params = warp(shape)
    first, second = (apply_with_noise(params, ramp, None, jax.random.key(seed)) for seed in (0, 1))
    moved = np.abs(np.asarray(first - apply(params, ramp))) * 32
    assert 0.4 < moved.max() <= 0.5
    assert np.abs(first - second).max() > 0.01


def test_one_control_point_is_refused():
    with pytest.raises(InputError, match="control_points 1"):
        warp((8, 8, 1), control_points=1)


def test_offline_all_rows_are_warped_once_and_cover_rows_with_noise():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    data = Dataset(images, (np.arange(40) % 4).astype(np.int32), 4, "none", "none")
    part = ConfiguredAttack(WANET_OFFLINE, WaNetSettings(strength=1.5), all_to_one(0))
    params = WANET_OFFLINE.make_params(jax.random.key(0), Knowledge(data, 0), part.settings)
    poisoned = poison_by(jax.random.key(1), data, part, params)
    assert poisoned.is_poisoned.sum() == 4 and poisoned.is_cover.sum() == 8
    warped = trigger_all(jax.random.key(2), data, wanet.apply, params)
    np.testing.assert_array_equal(poisoned.images[poisoned.is_poisoned], warped[poisoned.is_poisoned])
    cover = poisoned.images[poisoned.is_cover]
    assert all(
        (own != other[poisoned.is_cover]).any((1, 2, 3)).all() for own, other in ((cover, warped), (cover, images))
    )
    np.testing.assert_array_equal(poisoned.labels[poisoned.is_cover], data.labels[poisoned.is_cover])
    assert (poisoned.labels[poisoned.is_poisoned] == 0).all() and WANET_OFFLINE.control is None
