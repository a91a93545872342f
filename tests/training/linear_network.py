"""Softmax regression with running statistics: a network so small that a training test is about the training.

Without Flax, whose import takes as long as all the training of a short run.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.types import Model, ModelOutput


def linear_network() -> Model:
    """For three classes, on images centred by their batch mean, or by the running mean in evaluation."""

    def init(key, image_shape):
        size = int(np.prod(image_shape))
        return {
            "params": {"kernel": 0.1 * jax.random.normal(key, (size, 3)), "bias": jnp.zeros(3)},
            "batch_stats": {"mean": jnp.zeros(size)},
        }

    def apply(variables, images, *, train, edits=None):
        flat = images.reshape(images.shape[0], -1)
        running, params = variables["batch_stats"]["mean"], variables["params"]
        batch = jnp.mean(flat, axis=0)
        logits = (flat - (batch if train else running)[None]) @ params["kernel"] + params["bias"][None]
        if train:
            variables = {**variables, "batch_stats": {"mean": 0.9 * running + 0.1 * batch}}
        return ModelOutput(logits, {}, variables)

    return Model(init, apply, 3, "linear")
