"""The contract of a network."""

from collections.abc import Callable
from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bdjax.models import as_model, embedding
from bdjax.plugins import NAME
from bdjax.testing.failure import promised, require
from bdjax.types import Array, Model, PyTree

CLASSES, WIDTH = 3, 2
SHAPES = ((8, 8, 1), (28, 28, 1), (32, 32, 3))
"""Of the digits, MNIST and CIFAR-10."""


def check_model(name: str, make: Callable[..., Any]) -> None:
    """Check all that bdjax relies on: taps, edits of taps, the last layer, and that networks can be members of one call.

    Args:
        name: of the network.
        make: the entry: (number of classes, width, lowering, dtype) -> Flax module.

    Raises:
        ContractError: it breaks a promise.
    """
    title = f"model {name}"
    require(NAME.fullmatch(name), f"{title}: the name has only a to z, 0 to 9 and _")
    model = as_model(make(CLASSES, WIDTH, "native", "float32"), CLASSES, f"{name} width {WIDTH}")
    for shape in SHAPES:
        check_shapes(title, model, shape)
    check_members(title, model, [variables_of(model, SHAPES[0], seed) for seed in range(2)], images_of(SHAPES[0]))


def images_of(shape: tuple[int, int, int]) -> Array:
    """Three random images: float32 [3, H, W, C] in [0, 1]."""
    return jnp.asarray(np.random.default_rng(0).random((3, *shape)), jnp.float32)


def variables_of(model: Model, shape: tuple[int, int, int], seed: int = 0) -> PyTree:
    """Random parameters and statistics of a sensible size, so that nothing is neutral.

    Args:
        model: the network.
        shape: (H, W, C) of its images.
        seed: of the numbers.
    """
    shapes = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    random = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        kind = path[-1].key
        noise = random.standard_normal(leaf.shape)
        if kind == "kernel":
            noise *= (2 / np.prod(leaf.shape[:-1])) ** 0.5
        elif kind in ("scale", "variance", "var"):
            noise = np.exp(0.3 * noise)
        else:
            noise *= 0.3
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def check_shapes(title: str, model: Model, shape: tuple[int, int, int]) -> None:
    """Shapes and dtypes in training and in evaluation; traced, not run.

    Args:
        title: of the network, for messages.
        model: the network.
        shape: (H, W, C) of its images.

    Raises:
        ContractError: one is wrong.
    """
    size = "x".join(map(str, shape))
    variables = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    images = jax.ShapeDtypeStruct((5, *shape), jnp.float32)
    is_right = {"params"} <= set(variables) <= {"params", "batch_stats"}
    require(is_right, f"{title}: its variables are params, and batch_stats if it has statistics")
    for train in (True, False):
        output = jax.eval_shape(
            lambda variables, images, train=train: model.apply(variables, images, train=train), variables, images
        )
        is_right = output.logits.shape == (5, model.num_classes) and output.logits.dtype == jnp.float32
        require(is_right, f"{title} on images of {size}: logits are float32 [N, K]")
        names = [f"stage{number + 1}" for number in range(len(output.features))]
        require(names and list(output.features) == names, f"{title}: its taps are stage1, stage2, ... in their order")
        is_right = all(tap.ndim == 4 and tap.shape[0] == 5 for tap in output.features.values())
        require(is_right, f"{title} on images of {size}: taps are [N, h, w, C]")
        with promised(f"{title} on images of {size}: it returns its variables with the same shapes"):
            chex.assert_trees_all_equal_shapes_and_dtypes(output.variables, variables)


@cache
def run_members(model: Model) -> Callable[..., tuple[Array, dict[str, Array], PyTree]]:
    """(stacked variables, images, factors of the taps) -> logits, features and variables of each member, in one call."""

    def run_member(variables: PyTree, images: Array, factors: dict[str, Array]) -> tuple[Array, Any, PyTree]:
        edits = {tap: lambda x, tap=tap: factors[tap] * x for tap in factors}
        output = model.apply(variables, images, train=False, edits=edits)
        return output.logits, output.features, output.variables

    return jax.jit(jax.vmap(run_member, in_axes=(0, None, None)))


def check_members(title: str, model: Model, members: list[PyTree], images: Array) -> None:
    """Two networks as members of one call: taps, edits of taps, the last layer, and no change of variables at test time.

    Args:
        title: of the network, for messages.
        model: the network.
        members: variables of each.
        images: float32 [N, H, W, C] in [0, 1].

    Raises:
        ContractError: it breaks a promise.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    first = jax.eval_shape(lambda variables: model.apply(variables, images, train=False), members[0])
    ones = {tap: jnp.float32(1.0) for tap in first.features}
    logits, features, after = run_members(model)(stacked, images, ones)
    with promised(f"{title}: its variables do not change at test time"):
        chex.assert_trees_all_equal(after, stacked)
    shape = (len(members), len(images), model.num_classes)
    require(logits.shape == shape and logits.dtype == jnp.float32, f"{title}: logits are float32 [N, K]")
    for each in (logits, *features.values()):
        require(
            np.all(np.isfinite(each)) and np.ptp(each) > 0.01, f"{title}: logits and taps are finite, and not constant"
        )

    for i, member in enumerate(members):
        last = member["params"].get("classifier", {})
        require("kernel" in last, f'{title}: the last layer is params["classifier"] with a kernel [d, K]')
        seen = embedding(jax.tree.map(lambda each, i=i: each[i], features))
        expected = np.asarray(seen, np.float64) @ np.asarray(last["kernel"]) + np.asarray(last.get("bias", 0))
        with promised(f"{title}: the last tap, averaged over its pixels, is the input of the last layer"):
            np.testing.assert_allclose(logits[i], expected, rtol=1e-4, atol=1e-4)

    *_, last = ones
    silent, *_ = run_members(model)(stacked, images, {**ones, last: jnp.float32(0.0)})
    bias = np.asarray(stacked["params"]["classifier"].get("bias", np.zeros((len(members), model.num_classes))))
    with promised(f"{title}: an edit of the last tap reaches the last layer"):
        np.testing.assert_allclose(silent, np.broadcast_to(bias[:, None], silent.shape), atol=1e-6)
    _, changed, _ = run_members(model)(stacked, images, {**ones, "stage1": jnp.float32(2.0)})
    with promised(f"{title}: an edit of a tap is what its features are"):
        np.testing.assert_allclose(changed["stage1"], 2 * features["stage1"], rtol=1e-5, atol=1e-6)
    reached = all(np.abs(changed[tap] - features[tap]).max() > 1e-4 for tap in list(ones)[1:])
    require(reached, f"{title}: an edit of the first tap reaches every tap after it")
