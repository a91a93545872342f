from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.inspection.feature_maps import STAGES, channel_mean, feature_maps
from bdjax.types import Model, ModelOutput
from tests.defenses.tiny import SHAPE, TINY, tiny_variables


@pytest.fixture(scope="module")
def tiny():
    return TINY, tiny_variables(0), jax.random.uniform(jax.random.key(1), SHAPE)


def test_shapes_and_order(tiny):
    maps = feature_maps(*tiny)
    assert {tap: map.shape for tap, map in maps.items()} == {
        "stage1": (4, 4, 8),
        "stage2": (4, 4, 8),
        "stage3": (2, 2, 16),
    }
    assert all(map.dtype == jnp.float32 for map in maps.values())
    assert tuple(maps) == STAGES
    assert tuple(feature_maps(*tiny, ("stage3", "stage1"))) == ("stage3", "stage1")


def test_each_channel_reaches_from_0_to_1_or_is_0(tiny):
    for tap, maps in feature_maps(*tiny).items():
        maps = np.asarray(maps)
        np.testing.assert_allclose(maps.min((0, 1)), 0, atol=1e-6, err_msg=tap)
        greatest = maps.max((0, 1))
        np.testing.assert_allclose(greatest, np.round(greatest), atol=1e-6, err_msg=tap)
        assert set(np.round(greatest)) <= {0, 1} and np.round(greatest).any()


def test_raw_maps_are_the_features_and_scaled_ones_their_min_max(tiny):
    model, variables, image = tiny
    features = jax.jit(partial(model.apply, train=False))(variables, image[None]).features
    scaled, raw = feature_maps(*tiny), feature_maps(*tiny, scaled=False)
    for tap in STAGES:
        expected = np.asarray(features[tap][0])
        np.testing.assert_allclose(raw[tap], expected, rtol=1e-5, atol=1e-6)
        low, spread = expected.min((0, 1)), np.ptp(expected, axis=(0, 1))
        expected = np.where(spread > 0, (expected - low) / np.where(spread > 0, spread, 1), 0)
        np.testing.assert_allclose(scaled[tap], expected, atol=1e-5)


def test_a_constant_channel_is_0():
    def apply(variables, images, *, train, edits=None):
        del train, edits
        features = jnp.concatenate([images, jnp.full_like(images, 0.7)], axis=-1)
        return ModelOutput(jnp.mean(features, (1, 2)), {"only": features}, variables)

    image = jnp.array([[[0.25], [0.5]], [[0.75], [0.25]]])
    maps = feature_maps(Model(lambda key, shape: {}, apply, 2, "copy"), {}, image, ("only",))["only"]
    np.testing.assert_allclose(maps[..., 0], [[0.0, 0.5], [1.0, 0.0]])
    np.testing.assert_array_equal(maps[..., 1], np.zeros((2, 2)))
    np.testing.assert_allclose(channel_mean(maps), [[0.0, 0.25], [0.5, 0.0]])


def test_an_unknown_tap_is_named_with_the_known_ones(tiny):
    with pytest.raises(ValueError, match="no tap 'a', 'b'; this network has stage1, stage2, stage3"):
        feature_maps(*tiny, ("a", "stage1", "b"))
