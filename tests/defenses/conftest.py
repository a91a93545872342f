"""Two small suspects that the tests of all defenses share: digits with BadNets, and the same digits clean."""

from functools import cache

import jax
import numpy as np
import pytest
from flax import linen as nn

from bdjax.datasets.digits import load_digits
from bdjax.evaluation.measure import make_views
from bdjax.evaluation.suspects import make_defense_input, make_suspect, suspect_keys
from bdjax.evaluation.variants import read_attack
from bdjax.models.facade import as_model
from bdjax.models.layers import BatchNorm, Classifier, Conv, Lowering, Taps, layout_of, relu
from bdjax.training.member import TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Model

ROWS, CLEAN_ROWS, TEST_ROWS, TARGET = 320, 64, 64, 0
RECIPE = TrainConfig(
    epochs=6, batch_size=32, evaluation_batch_size=64, learning_rate=1e-2, schedule="cosine", keep_last_batch=False
)
WIDTH = 4


class SmallNetwork(nn.Module):
    """Taps, groups and batch normalisation as in a ResNet-10 of this width, but one convolution in each stage instead of two to
    four, and in XLA's own form: it traces and compiles in a small part of the time."""

    width: int
    num_classes: int
    lowering: Lowering

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, edits=None):
        taps = Taps(self.lowering, edits)
        x = layout_of(self.lowering).from_nhwc(images)
        for stage in range(3):
            name = f"stage{stage + 1}"
            x = Conv(self.width * 2**stage, 3, 2 if stage else 1, self.lowering, name=f"{name}_conv")(x)
            norm = BatchNorm(self.lowering, name=f"{name}_norm")
            x = taps.group(f"group{stage + 1}", norm(x, train=train))
            taps.before_relu(f"group{stage + 1}", x, norm)
            x = taps(name, relu(x))
        return Classifier(self.num_classes, self.lowering, name="classifier")(x), taps.finish()


def small_model(name: str | None = None, num_classes: int | None = None) -> Model:
    """The tests' network, whatever the name: one object for each number of classes, so that it is compiled once."""
    del name
    return _small_model(num_classes or 10)


@cache
def _small_model(num_classes: int) -> Model:
    return as_model(SmallNetwork(WIDTH, num_classes, "native"), num_classes, f"small width {WIDTH}")


_init_small = jax.jit(lambda key: small_model().init(key, (8, 8, 1)))


def init_small(seed: int):
    """Initial variables of `small_model()` for images of 8x8x1."""
    return _init_small(jax.random.key(seed))


def _rows(data: Dataset, start: int, stop: int) -> Dataset:
    return Dataset(data.images[start:stop], data.labels[start:stop], data.num_classes, data.name, data.source)


class Suspects:
    """What `bdjax.evaluation.suspects` makes of two attacks on a few digits."""

    def __init__(self, folder):
        data = load_digits((), False)
        train, clean = _rows(data.train, 0, ROWS), _rows(data.train, ROWS, ROWS + CLEAN_ROWS)
        self.test = _rows(data.test, 0, TEST_ROWS)
        attacks = [read_attack(text, train, TARGET) for text in ("badnets:poison_rate=0.2", "none")]
        self.suspects = [make_suspect(jax.random.key(1), attack, train, 0, None, True) for attack in attacks]
        # The group size saves an estimate of memory, which traces every objective once more.
        runner = StageRunner(folder, train.image_shape, "map", group_size=16)
        keys = suspect_keys(jax.random.key(2), self.suspects)
        self.inputs = make_defense_input(self.suspects, keys, train, clean, small_model, RECIPE, runner)
        self.views = make_views(jax.random.key(3), self.suspects, self.test)
        self.is_poisoned = np.stack([suspect.is_poisoned for suspect in self.suspects])


@pytest.fixture(scope="session")
def suspects(tmp_path_factory) -> Suspects:
    return Suspects(tmp_path_factory.mktemp("suspects"))


@pytest.fixture(scope="session")
def inputs(suspects):
    return suspects.inputs
