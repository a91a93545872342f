"""Two small suspects that the tests of all defenses share: digits with BadNets, and the same digits clean."""

import jax
import pytest

from bdjax.defenses.contract import DefenseInput
from bdjax.testing.defenses import Suspects
from bdjax.testing.small_network import small_model
from tests.defenses.tiny import tiny_inputs
from tests.progress import without_progress

_init_small = jax.jit(lambda key: small_model().init(key, (8, 8, 1)))


def init_small(seed: int):
    """Initial variables of `small_model()` for images of 8x8x1."""
    return _init_small(jax.random.key(seed))


@pytest.fixture(scope="module", autouse=True)
def no_progress():
    with without_progress():
        yield


@pytest.fixture(scope="session")
def suspects(tmp_path_factory) -> Suspects:
    with without_progress():
        return Suspects(tmp_path_factory.mktemp("suspects"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> DefenseInput:
    """As many rows and poisons, and a network that compiles faster; it is not trained."""
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))
