"""A network that compiles in a second, for tests that do not depend on how well it learns."""

import jax
import jax.numpy as jnp

from bdjax.types import Model, ModelOutput

CHANNELS = 4


def make_tiny(num_classes: int) -> Model:
    """One 1x1 convolution, a scale and a bias for each channel, ReLU, and a linear layer on the mean over the pixels."""

    def init(key, image_shape):
        first, last = jax.random.split(key)
        return {
            "params": {
                "convolution": {"kernel": jax.random.normal(first, (image_shape[2], CHANNELS))},
                "normalisation": {"scale": jnp.ones(CHANNELS), "bias": jnp.zeros(CHANNELS)},
                "classifier": {
                    "kernel": jax.random.normal(last, (CHANNELS, num_classes)),
                    "bias": jnp.zeros(num_classes),
                },
            },
            "batch_stats": {},
        }

    def apply(variables, images, *, train, edits=None):
        params = variables["params"]
        channels = jnp.einsum("nhwc,cd->nhwd", images, params["convolution"]["kernel"])
        scale, bias = (params["normalisation"][name][None, None, None, :] for name in ("scale", "bias"))
        tap = jax.nn.relu(channels * scale + bias)
        tap = (edits or {}).get("stage1", lambda features: features)(tap)
        logits = jnp.mean(tap, (1, 2)) @ params["classifier"]["kernel"] + params["classifier"]["bias"][None, :]
        return ModelOutput(logits, {"stage1": tap}, variables)

    return Model(init, apply, num_classes, "tiny width 1")
