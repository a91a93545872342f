"""Two small suspects that the tests of all defenses share: digits with BadNets, and the same digits clean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.datasets.digits import load_digits
from bdjax.evaluation.measure import make_views
from bdjax.evaluation.suspects import make_defense_input, make_suspect, suspect_keys
from bdjax.evaluation.variants import read_attack
from bdjax.models import make_model
from bdjax.run.log import StageLog
from bdjax.training.member import TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset

ROWS, CLEAN_ROWS, TEST_ROWS, TARGET = 320, 64, 64, 0
RECIPE = TrainConfig(
    epochs=6, batch_size=32, evaluation_batch_size=64, learning_rate=1e-2, schedule="cosine", keep_last_batch=False
)


def _rows(data: Dataset, start: int, stop: int) -> Dataset:
    return Dataset(data.images[start:stop], data.labels[start:stop], data.num_classes, data.name, data.source)


def small_model(name: str | None = None, num_classes: int | None = None):
    """ResNet-10 of width 4, or another at that width."""
    return make_model(name or "resnet10", num_classes or 10, 4)


class Suspects:
    """What `bdjax.evaluation.suspects` makes of two attacks on a few digits."""

    def __init__(self, folder):
        data = load_digits((), False)
        train, clean = _rows(data.train, 0, ROWS), _rows(data.train, ROWS, ROWS + CLEAN_ROWS)
        self.test = _rows(data.test, 0, TEST_ROWS)
        attacks = [read_attack(text, train, TARGET) for text in ("badnets:poison_rate=0.2", "none")]
        self.suspects = [make_suspect(jax.random.key(1), one, train, 0, None, True) for one in attacks]
        runner = StageRunner(folder, train.image_shape, "map", StageLog())
        keys = suspect_keys(jax.random.key(2), self.suspects)
        self.inputs = make_defense_input(self.suspects, keys, train, clean, small_model, RECIPE, runner)
        self.views = make_views(jax.random.key(3), self.suspects, self.test)
        self.is_poisoned = np.stack([one.is_poisoned for one in self.suspects])


@pytest.fixture(scope="session")
def suspects(tmp_path_factory) -> Suspects:
    return Suspects(tmp_path_factory.mktemp("suspects"))


@pytest.fixture(scope="session")
def inputs(suspects):
    return suspects.inputs


@pytest.fixture
def ones():
    """Rows to weight alike."""
    return lambda rows: jnp.ones(rows.index.shape, jnp.float32)
