"""A network with the taps, groups and batch normalisation of a ResNet that compiles in seconds."""

import itertools
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.models.layers import convolve, normalise_batch
from bdjax.types import GroupEnd, Key, Model, ModelOutput, PyTree

CHANNELS = (4, 8, 16)


def _apply(variables: PyTree, images: jax.Array, *, train: bool, edits=None) -> ModelOutput:
    """Taps, groups and batch normalisation as in a ResNet-10 of width 4, but one convolution in each stage.

    In plain JAX, since tracing and compiling take nearly all the time of tests.
    """

    def edit(name: str, x: jax.Array) -> jax.Array:
        return edits[name](x) if edits and name in edits else x

    x, features, groups, statistics = images, {}, {}, {}
    for number in range(1, len(CHANNELS) + 1):
        layer, running = variables["params"][f"stage{number}_norm"], variables["batch_stats"][f"stage{number}_norm"]
        kernel = variables["params"][f"stage{number}_conv"]["kernel"]
        # A native convolution's gradient takes 20 times as long to run on a CPU inside `lax.scan`.
        x = convolve(x, kernel, stride=1 if number == 1 else 2, padding=1, lowering="patches")
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
    """The network, whatever the name: one object for each number of classes, so that it is compiled once."""
    del name
    return _small_model(num_classes or 10)


@cache
def _small_model(num_classes: int) -> Model:
    return Model(partial(_init, num_classes), _apply, num_classes, "small network")
