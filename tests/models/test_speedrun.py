import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.models import count_parameters, make_model
from bdjax.models.speedrun import (
    COLOR_CORRELATION,
    LEAST_EIGENVALUE,
    PIXEL_CORRELATION,
    PIXEL_DEVIATION,
    assumed,
    whiten,
)

SHAPE = (6, 5, 3)


def patches_of(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [patches, 4 C], ordered by row, column, channel."""
    height, width = images.shape[1] - 1, images.shape[2] - 1
    parts = [images[:, i : i + height, j : j + width] for i in range(2) for j in range(2)]
    return np.concatenate(parts, axis=-1).reshape(-1, 4 * images.shape[3])


def filtered(constants, images: np.ndarray) -> np.ndarray:
    kernel = np.asarray(constants["kernel"], np.float64)
    return patches_of(images) @ kernel.reshape(-1, kernel.shape[-1]) + np.asarray(constants["offset"], np.float64)


def smooth_images(channels: int) -> np.ndarray:
    """Neighbouring pixels and colours are alike, as in photographs."""
    generator = np.random.default_rng(0)
    steps = generator.normal(0, 0.05, (60, *SHAPE[:2], 1)).cumsum(axis=1).cumsum(axis=2)
    return np.clip(0.4 + steps + generator.normal(0, 0.02, (60, *SHAPE[:2], channels)), 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_prepared_filters_whiten_the_patches(channels):
    images = smooth_images(channels)
    before = {"params": {"x": jnp.ones(2)}, "batch_stats": {"stage1_norm1": jnp.zeros(3)}}
    after = jax.jit(whiten)(before, jnp.asarray(images, jnp.float32))
    assert after["params"] is not None and set(after["batch_stats"]) == {"stage1_norm1", "whitening"}
    values = filtered(after["batch_stats"]["whitening"], images)
    assert values.shape[1] == 8 * channels
    half = 4 * channels
    np.testing.assert_allclose(values[:, half:], -values[:, :half], atol=1e-3)
    moments = values[:, :half].T @ values[:, :half] / len(values)
    # Directions of little variance are damped: eigenvalue / (eigenvalue + the least).
    standard = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    patches = patches_of(standard)
    eigenvalues = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    np.testing.assert_allclose(np.diag(moments), eigenvalues / (eigenvalues + LEAST_EIGENVALUE), rtol=0.05)
    np.testing.assert_allclose(moments - np.diag(np.diag(moments)), 0, atol=0.05)


def test_images_without_variance_give_finite_filters():
    grey = whiten({"batch_stats": {}}, jnp.full((4, *SHAPE), 0.5))
    chex.assert_tree_all_finite(grey)


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_without_images_whiten_patches_of_the_usual_correlation(channels):
    model = make_model("speedrun", 4, 2, "native")
    constants = assumed(channels)
    shapes = jax.eval_shape(lambda key: model.init(key, (8, 8, channels)), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(dict(shapes["batch_stats"]["whitening"]), constants)
    directions = PIXEL_DEVIATION * np.asarray(constants["kernel"]).reshape(4 * channels, -1)[:, : 4 * channels]

    def correlation(size, neighbours):
        return np.full((size, size), neighbours) + (1 - neighbours) * np.eye(size)

    pixels, colors = correlation(2, PIXEL_CORRELATION), correlation(channels, COLOR_CORRELATION)
    assumed_moments = np.kron(np.kron(pixels, pixels), colors)
    moments = directions.T @ assumed_moments @ directions
    np.testing.assert_allclose(moments - np.diag(np.diag(moments)), 0, atol=1e-5)
    eigenvalues = np.linalg.eigvalsh(assumed_moments)
    np.testing.assert_allclose(sorted(np.diag(moments)), eigenvalues / (eigenvalues + LEAST_EIGENVALUE), rtol=1e-3)
    grey = np.full((1, *SHAPE[:2], channels), 0.5)
    np.testing.assert_allclose(filtered(constants, grey), 0, atol=1e-5)


def test_constants_are_neither_trained_nor_changed_by_training():
    model = make_model("speedrun", 4, 2, "native")
    images = jnp.asarray(np.random.default_rng(0).random((4, *SHAPE)), jnp.float32)
    variables = jax.jit(lambda key: model.init(key, SHAPE))(jax.random.key(0))
    assert "kernel" not in variables["params"]["whitening"]
    prepared = model.prepare(variables, images)
    after = jax.jit(lambda v: model.apply(v, images, train=True).variables)(prepared)
    chex.assert_trees_all_equal(after["batch_stats"]["whitening"], prepared["batch_stats"]["whitening"])
    assert np.any(after["batch_stats"]["stage1_norm1"]["mean"] != prepared["batch_stats"]["stage1_norm1"]["mean"])


def test_convolutions_pass_their_input_on_at_first():
    model = make_model("speedrun", 4, 16, "native")
    variables = jax.jit(lambda key: model.init(key, SHAPE))(jax.random.key(0))
    second = np.asarray(variables["params"]["stage2_conv1"]["kernel"])  # 16 to 64 channels
    identity = np.zeros((3, 3, 16, 16))
    identity[1, 1] = np.eye(16)
    np.testing.assert_array_equal(second[..., :16], identity)
    bound = (9 * 16) ** -0.5
    assert np.abs(second[..., 16:]).max() <= bound and np.abs(second[..., 16:]).std() > bound / 5
    first = np.asarray(variables["params"]["stage1_conv1"]["kernel"])  # 24 to 16 channels
    np.testing.assert_array_equal(first[1, 1, :16], np.eye(16))
    assert not first[1, 1, 16:].any()


def test_parameters_of_a_quarter_of_the_width():
    # 126,520 are trained by the recipe; the scales of normalisations, 288, stay at 1.
    assert count_parameters(make_model("speedrun", 10, 16), (32, 32, 3)) == 126_520 + 288
