"""Normalisation as a part of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.models import make_model, normalised
from bdjax.types import Model, ModelOutput

MEAN, STD = (0.25, 0.5), (0.5, 0.25)


def plain() -> Model:
    """Its logits, taps and convolutions are its images."""

    def apply(variables, images, *, train, edits=None):
        return ModelOutput(images.mean((1, 2)), {"stage1": (edits or {}).get("stage1", lambda x: x)(images)}, variables)

    def convolutions(variables, images, offsets):
        return images.mean((1, 2)), {"conv": images}

    def prepare(variables, images):
        return images

    return Model(lambda key, shape: {}, apply, 2, "plain", prepare, convolutions)


def test_every_function_sees_normalised_pixels():
    model = normalised(plain(), MEAN, STD)
    images = jnp.asarray(np.random.default_rng(0).random((3, 4, 4, 2)), jnp.float32)
    expected = (np.asarray(images) - np.float32(MEAN)) / np.float32(STD)
    output = model.apply({}, images, train=False, edits={"stage1": lambda x: 2 * x})
    np.testing.assert_allclose(output.logits, expected.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(output.features["stage1"], 2 * expected, atol=1e-6)
    np.testing.assert_allclose(model.convolutions({}, images, {})[1]["conv"], expected, atol=1e-6)
    np.testing.assert_allclose(model.prepare({}, images), expected, atol=1e-6)
    assert model.architecture is None and "normalised" in model.description


def test_the_architecture_knows_it_and_the_variables_stay():
    network = make_model("lenet", 3)
    model = normalised(network, (0.5,), (0.2,))
    assert network.architecture == ("lenet", 64, (), ()) and model.architecture == ("lenet", 64, (0.5,), (0.2,))
    shapes = [jax.eval_shape(lambda key, of=of: of.init(key, (8, 8, 1)), jax.random.key(0)) for of in (network, model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.2, 0.2), "1 means and 2 deviations"),
        ((), (), "0 means"),
        ((0.5,), (0.0,), "std positive"),
        ((float("nan"),), (1.0,), "must be finite"),
        (((0.5, 0.5),), (1.0,), "must be numbers"),
    ],
)
def test_numbers_that_cannot_be_right(mean, std, message):
    with pytest.raises(InputError, match=message):
        normalised(make_model("lenet", 3), mean, std)


def test_a_second_normalisation_is_refused():
    with pytest.raises(InputError, match="has a normalisation already"):
        normalised(normalised(make_model("lenet", 3), (0.5,), (0.2,)), (0.5,), (0.2,))
