"""From a Flax module to the pure pair `Model(init, apply)`, so that no caller sees Flax."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from bdjax.types import Model, ModelOutput, PyTree


def as_model(module: nn.Module, num_classes: int, description: str) -> Model:
    """Wrap a module whose call is `(images, *, train, edits) -> (logits, Recorded)`."""

    def init(key: jax.Array, image_shape: tuple[int, int, int]) -> PyTree:
        # A network without normalisation has no statistics of its own.
        return {"batch_stats": {}, **module.init(key, jnp.zeros((1, *image_shape), jnp.float32), train=False)}

    def apply(variables: PyTree, images: jax.Array, *, train: bool, edits=None) -> ModelOutput:
        if not train:
            logits, recorded = module.apply(variables, images, train=False, edits=edits)
            return ModelOutput(logits, recorded.features, variables, recorded.groups)
        (logits, recorded), updated = module.apply(variables, images, train=True, edits=edits, mutable=["batch_stats"])
        return ModelOutput(logits, recorded.features, {**variables, **updated}, recorded.groups)

    return Model(init, apply, num_classes, description)


def count_parameters(model: Model, image_shape: tuple[int, int, int]) -> int:
    """The number of trainable parameters (running statistics excluded), without allocating them."""
    shapes = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def embedding(features: Mapping[str, jax.Array]) -> jax.Array:
    """What a network's last layer sees: its last tap, averaged over the pixels.

    Args:
        features: of `Model.apply`, in the order of the network.

    Returns:
        float32 [N, d].
    """
    return jnp.mean(list(features.values())[-1], axis=(1, 2))


def last_tap(model: Model, variables: PyTree, image_shape: tuple[int, int, int]) -> str:
    """The name of the tap that the classifier reads, without computing anything.

    Args:
        model: a network.
        variables: of one member.
        image_shape: (H, W, C).
    """
    return list(_shapes(model, variables, image_shape)[0])[-1]


def tap_shapes(model: Model, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    """The taps of a network in its order, each with its shape (h, w, C); nothing is computed.

    Args:
        model: a network.
        image_shape: (H, W, C).
    """
    return _shapes(model, None, image_shape)[0]


def group_shapes(model: Model, image_shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The groups of a network in its order, each with the shapes (h, w, C) of its output and of what stands before the ReLU.

    Nothing is computed; a network without groups has none.

    Args:
        model: a network.
        image_shape: (H, W, C).
    """
    return _shapes(model, None, image_shape)[1]


def _shapes(model: Model, variables: PyTree | None, image_shape: tuple[int, int, int]) -> tuple[dict, dict]:
    # Dictionaries that leave a traced function come out sorted; the order of the network is known in here only.
    taps, groups = {}, {}

    def call(variables: PyTree, images: jax.Array) -> None:
        output = model.apply(variables, images, train=False)
        taps.update({name: tap.shape[1:] for name, tap in output.features.items()})
        groups.update({name: (end.output.shape[1:], end.before_relu.shape[1:]) for name, end in output.groups.items()})

    if variables is None:
        variables = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    jax.eval_shape(call, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return taps, groups
