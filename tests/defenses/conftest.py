"""Two small suspects that the tests of all defenses share: digits with BadNets, and the same digits clean."""

import itertools
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.datasets.digits import load_digits
from bdjax.evaluation.measure import make_views
from bdjax.evaluation.suspects import make_defense_input, make_suspect, suspect_keys
from bdjax.evaluation.variants import read_attack
from bdjax.models.layers import normalise_batch
from bdjax.training.member import TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, GroupEnd, Key, Model, ModelOutput, PyTree

ROWS, CLEAN_ROWS, TEST_ROWS, TARGET = 320, 64, 64, 0
RECIPE = TrainConfig(
    epochs=6, batch_size=32, evaluation_batch_size=64, learning_rate=1e-2, schedule="cosine", keep_last_batch=False
)
CHANNELS = (4, 8, 16)


def _apply(variables: PyTree, images: jax.Array, *, train: bool, edits=None) -> ModelOutput:
    """Taps, groups and batch normalisation as in a ResNet-10 of width 4, but one convolution in each stage.

    In plain JAX, since tracing and compiling take nearly all the time of these tests.
    """

    def edit(name: str, x: jax.Array) -> jax.Array:
        return edits[name](x) if edits and name in edits else x

    x, features, groups, statistics = images, {}, {}, {}
    for number in range(1, len(CHANNELS) + 1):
        layer, running = variables["params"][f"stage{number}_norm"], variables["batch_stats"][f"stage{number}_norm"]
        kernel = variables["params"][f"stage{number}_conv"]["kernel"]
        stride = (1, 1) if number == 1 else (2, 2)
        x = jax.lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if train:
            x, mean, variance = normalise_batch(x, layer["scale"], layer["bias"], 3, 1e-5)
            new = {"mean": mean, "var": variance}
            running = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * jax.lax.stop_gradient(new), running, new)
        else:
            factor = layer["scale"] * jax.lax.rsqrt(running["var"] + 1e-5)
            offset = layer["bias"] - running["mean"] * factor
            x = x * factor[None, None, None] + offset[None, None, None]
        statistics[f"stage{number}_norm"] = running
        x = edit(f"group{number}", x)
        groups[f"group{number}"] = GroupEnd(x, x, layer["bias"], jnp.abs(layer["scale"]))
        x = features[f"stage{number}"] = edit(f"stage{number}", jax.nn.relu(x))
    classifier = variables["params"]["classifier"]
    logits = jnp.mean(x, axis=(1, 2)) @ classifier["kernel"] + classifier["bias"][None]
    return ModelOutput(logits, features, {**variables, "batch_stats": statistics}, groups)


def _init(num_classes: int, key: Key, image_shape: tuple[int, int, int]) -> PyTree:
    """Normal kernels, from one draw: each call of a generator takes long to compile."""
    inputs = (image_shape[-1], *CHANNELS)
    shapes = [(3, 3, *pair) for pair in itertools.pairwise(inputs)] + [(CHANNELS[-1], num_classes)]
    *ends, total = np.cumsum([math.prod(shape) for shape in shapes])
    *kernels, classifier = (
        part.reshape(shape) * math.sqrt(2 / math.prod(shape[:-1]))
        for part, shape in zip(jnp.split(jax.random.normal(key, (total,)), ends), shapes, strict=True)
    )
    params, statistics = {"classifier": {"kernel": classifier, "bias": jnp.zeros(num_classes)}}, {}
    for number, (kernel, width) in enumerate(zip(kernels, CHANNELS, strict=True), start=1):
        params[f"stage{number}_conv"] = {"kernel": kernel}
        params[f"stage{number}_norm"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        statistics[f"stage{number}_norm"] = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
    return {"params": params, "batch_stats": statistics}


def small_model(name: str | None = None, num_classes: int | None = None) -> Model:
    """The tests' network, whatever the name: one object for each number of classes, so that it is compiled once."""
    del name
    return _small_model(num_classes or 10)


@cache
def _small_model(num_classes: int) -> Model:
    return Model(partial(_init, num_classes), _apply, num_classes, "small network")


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
