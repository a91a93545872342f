"""Networks small enough that a training test is about the training."""

import gc
import warnings
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from bdjax.models import Lowering
from bdjax.models.facade import as_model
from bdjax.models.resnet import ResNet
from bdjax.types import Model, ModelOutput


@pytest.fixture(scope="session")
def linear() -> Model:
    """Softmax regression on images centred by their batch mean, or by the running mean in evaluation."""

    def init(key, image_shape):
        height, width, channels = image_shape
        kernel = 0.1 * jax.random.normal(key, (height * width * channels, 3))
        return {
            "params": {"kernel": kernel, "bias": jnp.zeros(3)},
            "batch_stats": {"mean": jnp.zeros(height * width * channels)},
        }

    def apply(variables, images, *, train, edits=None):
        flat = images.reshape(images.shape[0], -1)
        running = variables["batch_stats"]["mean"]
        batch = jnp.mean(flat, axis=0)
        params = variables["params"]
        logits = (flat - (batch if train else running)[None]) @ params["kernel"] + params["bias"][None]
        if train:
            variables = {**variables, "batch_stats": {"mean": 0.9 * running + 0.1 * batch}}
        return ModelOutput(logits, {}, variables)

    return Model(init, apply, 3, "linear")


@pytest.fixture(
    scope="session",
    params=[
        "shifted",  # the default on a CPU
        *(pytest.param(name, marks=pytest.mark.slow) for name in get_args(Lowering) if name != "shifted"),
    ],
)
def convolutional(request) -> Model:
    """A ResNet without a block: convolution, batch normalisation and classifier."""
    return as_model(ResNet("basic", (0, 0, 0), 2, 3, request.param), 3, f"stem, {request.param}")


@pytest.fixture
def orbax_refuses():
    """Orbax drops coroutines when it rejects a checkpoint; collect their warnings here, not in a later test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        yield
        gc.collect()
