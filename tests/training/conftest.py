"""Networks small enough that a training test is about the training."""

import gc
import warnings

import pytest

from bdjax.models.facade import as_model
from bdjax.models.layers import EXACT_LOWERINGS
from bdjax.models.resnet import ResNet
from bdjax.types import Model
from tests.training.linear_network import linear_network


@pytest.fixture(scope="session")
def linear() -> Model:
    return linear_network()


@pytest.fixture(
    scope="session",
    params=[
        "shifted",  # the default on a CPU
        *(pytest.param(name, marks=pytest.mark.slow) for name in EXACT_LOWERINGS if name != "shifted"),
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
