"""A tiny network and two suspects with it, for tests of what a defense computes whatever the network is."""

import math
import pathlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.label_rules import all_to_one
from bdjax.datasets.digits import load_digits
from bdjax.defenses.contract import AttackerTriggers, DefenseInput, PoolRows
from bdjax.run.log import StageLog
from bdjax.training import ensemble
from bdjax.training.member import TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import GroupEnd, Model, ModelOutput

SHAPE = (8, 8, 1)
ROWS, CLEAN_ROWS = 320, 64
RECIPE = TrainConfig(
    epochs=6, batch_size=32, evaluation_batch_size=64, learning_rate=1e-2, schedule="cosine", keep_last_batch=False
)
WIDTHS = {1: (4, 8), 2: (8, 8), 3: (32, 16)}
"""Input and output channels of each layer; layers 1 and 3 see blocks of 2x2 pixels."""


def in_blocks(images):
    """[N, h, w, C] -> [N, h / 2, w / 2, 4 C]."""
    count, height, width, channels = images.shape
    blocks = images.reshape(count, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(count, height // 2, width // 2, 4 * channels)


def unchanged(features):
    return features


def apply(variables, images, *, train, edits=None):
    """Three pixelwise layers with batch normalisation and ReLU, and a linear classifier."""
    params, statistics, edits = variables["params"], {}, edits or {}
    features, groups, hidden = {}, {}, images
    for number in WIDTHS:
        layer, running = params[f"layer{number}"], variables["batch_stats"][f"layer{number}"]
        hidden = hidden if number == 2 else in_blocks(hidden)
        output = edits.get(f"group{number}", unchanged)(hidden @ layer["kernel"])
        mean, variance = running["mean"], running["variance"]
        if train:
            mean, variance = output.mean((0, 1, 2)), output.var((0, 1, 2))
        statistics[f"layer{number}"] = {
            "mean": 0.9 * running["mean"] + 0.1 * jax.lax.stop_gradient(mean) if train else running["mean"],
            "variance": 0.9 * running["variance"] + 0.1 * jax.lax.stop_gradient(variance)
            if train
            else running["variance"],
        }
        factor = layer["scale"] * jax.lax.rsqrt(variance + 1e-5)
        normalised = (output - mean[None, None, None]) * factor[None, None, None] + layer["bias"][None, None, None]
        hidden = edits.get(f"stage{number}", unchanged)(jax.nn.relu(normalised))
        features[f"stage{number}"] = hidden
        groups[f"group{number}"] = GroupEnd(output, normalised, layer["bias"], jnp.abs(layer["scale"]))
    flat = hidden.reshape(len(images), -1)
    logits = flat @ params["classifier"]["kernel"] + params["classifier"]["bias"][None]
    return ModelOutput(logits, features, {**variables, "batch_stats": statistics}, groups)


@cache
def tiny_network(num_classes: int = 10) -> Model:
    """The network for 8x8 grey images; it has the taps and the groups of a ResNet."""

    def init(key, image_shape):
        assert tuple(image_shape) == SHAPE
        shapes = [*WIDTHS.values(), (64, num_classes)]
        *ends, total = np.cumsum([math.prod(shape) for shape in shapes])
        # One draw for all weights: each call of a generator takes long to compile.
        *kernels, classifier = (
            part.reshape(shape) * math.sqrt(2 / shape[0])
            for part, shape in zip(jnp.split(jax.random.normal(key, (total,)), ends), shapes, strict=True)
        )
        params = {
            f"layer{number}": {"kernel": kernel, "scale": jnp.ones(width), "bias": jnp.zeros(width)}
            for (number, (_, width)), kernel in zip(WIDTHS.items(), kernels, strict=True)
        }
        params["classifier"] = {"kernel": classifier, "bias": jnp.zeros(num_classes)}
        statistics = {
            f"layer{number}": {"mean": jnp.zeros(width), "variance": jnp.ones(width)}
            for number, (_, width) in WIDTHS.items()
        }
        return {"params": params, "batch_stats": statistics}

    return Model(init, apply, num_classes, "tiny network")


def apply_linear(variables, images, *, train, edits=None):
    logits = images.reshape(len(images), -1) @ variables["params"]["classifier"]["kernel"]
    statistics = {"mean": images.mean((0, 1, 2))} if train else variables["batch_stats"]
    return ModelOutput(logits, {}, {**variables, "batch_stats": statistics})


LINEAR = Model(
    lambda key, shape: {
        "params": {"classifier": {"kernel": 0.1 * jax.random.normal(key, (math.prod(shape), 10))}},
        "batch_stats": {"mean": jnp.zeros(shape[-1])},
    },
    apply_linear,
    10,
    "linear network",
)
"""For what takes long to compile; it remembers the mean of the last batch that it was trained on."""
TINY = tiny_network()


def make_tiny(name: str | None = None, num_classes: int | None = None) -> Model:
    """For `DefenseInput.make_model`: the tiny network, whatever the name."""
    return tiny_network(num_classes or 10)


@jax.jit
def tiny_variables(seed: int):
    """Variables of one tiny network whose statistics are not those of a fresh network."""
    variables = TINY.init(jax.random.key(seed), SHAPE)
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.abs(jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape))), variables
    )


def stamp_corner(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The trigger of the first suspect's attacker: a white square in the lower right corner."""
    stamped = images.copy()
    stamped[:, -3:, -3:] = 255
    return stamped


def tiny_inputs(folder: pathlib.Path, attacked: Model = TINY) -> DefenseInput:
    """Two suspects of the same digits: the first has the trigger on every fifth row, the second is clean.

    Their attacked networks are not trained.
    """
    train = load_digits((), False).train
    images, labels = train.images[: ROWS + CLEAN_ROWS], train.labels[: ROWS + CLEAN_ROWS]
    poisoned = np.arange(0, ROWS, 5, dtype=np.int32)
    pool = np.concatenate([images, stamp_corner(images[poisoned], labels[poisoned])])
    index, suspect_labels = np.tile(np.arange(ROWS, dtype=np.int32), (2, 1)), np.tile(labels[:ROWS], (2, 1))
    index[0, poisoned], suspect_labels[0, poisoned] = len(images) + np.arange(len(poisoned)), 0
    clean = np.tile(np.arange(ROWS, ROWS + CLEAN_ROWS, dtype=np.int32), (2, 1))
    keys = jax.random.split(jax.random.key(2), 2)
    if attacked is TINY:
        variables = ensemble.stack([tiny_variables(seed) for seed in range(2)])
    else:
        variables = ensemble.init_members(lambda key: attacked.init(key, SHAPE), keys)
    return DefenseInput(
        pool=jnp.asarray(pool),
        num_classes=10,
        keys=keys,
        make_model=make_tiny,
        recipe=RECIPE,
        runner=StageRunner(folder, SHAPE, "map", StageLog(), group_size=64),  # no estimate of the memory
        knowledge={
            "training set": PoolRows(index, suspect_labels.astype(np.int32)),
            "clean rows": PoolRows(clean, labels[clean].astype(np.int32)),
            "attacked model": Nets(attacked, variables, 1, {}),
            "number of poisons": np.array([len(poisoned), 0]),
            "attacker's trigger": AttackerTriggers((stamp_corner, None), (all_to_one(0), None)),
        },
    )
