"""A network as a program that runs without bdjax. `test_leaving.py` has a real one, which takes longer."""

import jax.numpy as jnp
import numpy as np
from jax import export

from bdjax.exchange.stablehlo import PLATFORMS, to_stablehlo
from bdjax.types import Model, ModelOutput


def test_weights_are_inside_and_any_number_of_images_is_taken():
    def apply(variables, images, *, train, edits=None):
        return ModelOutput(jnp.dot(images.reshape(images.shape[0], -1), variables), {}, variables)

    weights = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    model = Model(lambda key, shape: weights, apply, 3, "linear")
    program = export.deserialize(bytearray(to_stablehlo(model, weights, (2, 2, 3))))
    assert tuple(program.platforms) == PLATFORMS
    for rows in (1, 5):
        images = np.random.default_rng(rows).random((rows, 2, 2, 3)).astype(np.float32)
        np.testing.assert_allclose(program.call(images), images.reshape(rows, -1) @ weights, rtol=1e-4)
