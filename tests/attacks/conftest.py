"""Networks that several tests of attacks need."""

import jax
import jax.numpy as jnp
import pytest

from bdjax.attacks.contract import CleanModel
from bdjax.datasets.digits import load_digits
from bdjax.losses import cross_entropy
from bdjax.models import make_model
from bdjax.training import ensemble
from bdjax.training.member import Rows, TrainConfig, init_state
from bdjax.types import TrainTest


@pytest.fixture(scope="session")
def digits() -> TrainTest:
    return load_digits()


@pytest.fixture(scope="session")
def clean_digits_model(digits) -> CleanModel:
    """A small network, trained for some seconds without a backdoor."""
    train, model, config = digits.train, make_model("resnet10", 10, 4), TrainConfig(epochs=4)
    states = ensemble.stack([init_state(jax.random.key(0), model, train.image_shape, config)])
    rows = Rows(jnp.arange(len(train), dtype=jnp.int32)[None], {"labels": jnp.asarray(train.labels)[None]})
    no_rows = jax.tree.map(lambda leaf: leaf[:, :0], rows)

    def loss(logits, targets):
        return cross_entropy(logits, targets["labels"])

    trained = ensemble.fit(model, loss, config, states, jnp.asarray(train.images), rows, no_rows, layout="map")
    return CleanModel(model, ensemble.members(trained.variables, 0))
