"""Wraps Flax modules as pure pairs `Model(init, apply)`, so that callers do not depend on Flax."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bdjax.models.layers import BatchNorm, Convolution, layout_of
from bdjax.types import Model, ModelOutput, PyTree


def as_model(
    module: nn.Module, num_classes: int, description: str, prepare: Callable[[PyTree, jax.Array], PyTree] | None = None
) -> Model:
    """Wrap a module whose call is `(images, *, train, edits) -> (logits, Recorded)`; for `prepare` see `Model`."""

    # Traced once for each shape of images, although shapes are asked for often.
    @partial(jax.jit, static_argnums=1, inline=True)
    def traced_init(key: jax.Array, image_shape: tuple[int, int, int]) -> PyTree:
        # A network without normalisation has no "batch_stats".
        return {"batch_stats": {}, **module.init(key, jnp.zeros((1, *image_shape), jnp.float32), train=False)}

    def init(key: jax.Array, image_shape: tuple[int, int, int]) -> PyTree:
        return traced_init(key, tuple(image_shape))

    def apply(variables: PyTree, images: jax.Array, *, train: bool, edits=None) -> ModelOutput:
        if not train:
            logits, recorded = module.apply(variables, images, train=False, edits=edits)
            return ModelOutput(logits, recorded.features, variables, recorded.groups)
        (logits, recorded), updated = module.apply(variables, images, train=True, edits=edits, mutable=["batch_stats"])
        return ModelOutput(logits, recorded.features, {**variables, **updated}, recorded.groups)

    def convolutions(
        variables: PyTree, images: jax.Array, offsets: Mapping[str, jax.Array] = {}
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs: dict[str, jax.Array] = {}

        def record(call: Callable[..., jax.Array], args: tuple, options: dict, context: Any) -> Any:
            y, layer = call(*args, **options), context.module
            if not isinstance(layer, Convolution) or context.method_name != "__call__":
                return y
            name, layout = "/".join(layer.path), layout_of(layer.lowering)
            outputs[name] = layout.to_nhwc(y).astype(jnp.float32)
            if name in offsets:
                outputs[name] += offsets[name]
                y = layout.from_nhwc(outputs[name]).astype(y.dtype)
            return y

        # Around every layer, so that no network has to name its convolutions.
        with nn.intercept_methods(record):
            logits, _ = module.apply(variables, images, train=False)
        return logits, outputs

    return Model(init, apply, num_classes, description, prepare, convolutions)


def count_parameters(model: Model, image_shape: tuple[int, int, int]) -> int:
    """The number of trainable parameters (without running statistics); nothing is allocated."""
    shapes = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def embedding(features: Mapping[str, jax.Array]) -> jax.Array:
    """The input of a network's last layer: its last tap, averaged over the pixels.

    Args:
        features: from `Model.apply`, in the order of the network.

    Returns:
        float32 [N, d].
    """
    return jnp.mean(list(features.values())[-1], axis=(1, 2))


def last_tap(model: Model, variables: PyTree, image_shape: tuple[int, int, int]) -> str:
    """The name of the tap that feeds the last layer; nothing is computed.

    Args:
        model: a network.
        variables: the variables of one member.
        image_shape: (H, W, C).
    """
    return list(_shapes(model, variables, image_shape)[0])[-1]


def tap_shapes(model: Model, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    """The taps of a network in order, with their shapes (h, w, C); nothing is computed.

    Args:
        model: a network.
        image_shape: (H, W, C).
    """
    return _shapes(model, None, image_shape)[0]


def convolution_shapes(model: Model, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    """The convolutions of a network in order, with the shapes (h, w, C) of their outputs; nothing is computed.

    The result is empty for a model of other making. The first layer of VBD's simple networks, which is fused on a CPU, is
    not among them.

    Args:
        model: a network.
        image_shape: (H, W, C).
    """
    shapes: dict[str, tuple[int, int, int]] = {}
    if model.convolutions is None:
        return shapes

    def call(variables: PyTree, images: jax.Array) -> None:
        outputs = model.convolutions(variables, images)[1]
        shapes.update({name: output.shape[1:] for name, output in outputs.items()})

    variables = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    jax.eval_shape(call, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return shapes


def normalised_convolutions(model: Model, image_shape: tuple[int, int, int]) -> tuple[tuple[str, str], ...]:
    """Pairs (convolution, batch normalisation) of paths in `variables["params"]`, in the order of the network.

    A normalisation is paired with the last convolution that was computed before it, whatever lies between them (a max-pool, a
    sum with a shortcut), as in the code of channel Lipschitz pruning; a convolution that none follows is in no pair. Nothing is
    computed.

    Args:
        model: a network.
        image_shape: (H, W, C).
    """
    pairs, latest = [], ""

    def record(call: Callable[..., jax.Array], args: tuple, options: dict, context: Any) -> Any:
        nonlocal latest
        y, layer = call(*args, **options), context.module
        if context.method_name == "__call__" and isinstance(layer, Convolution):
            latest = "/".join(layer.path)
        elif context.method_name == "__call__" and isinstance(layer, BatchNorm) and latest:
            pairs.append((latest, "/".join(layer.path)))
            latest = ""
        return y

    variables = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda variables, images: model.apply(variables, images, train=False).logits,
            variables,
            jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
        )
    return tuple(pairs)


def group_shapes(model: Model, image_shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The groups of a network in order, each with the shapes (h, w, C) of its output and of its `before_relu`.

    Nothing is computed. The result is empty for a network without groups.

    Args:
        model: a network.
        image_shape: (H, W, C).
    """
    return _shapes(model, None, image_shape)[1]


def _shapes(model: Model, variables: PyTree | None, image_shape: tuple[int, int, int]) -> tuple[dict, dict]:
    # JAX sorts the dictionaries that a traced function returns, so record the network's order inside.
    taps, groups = {}, {}

    def call(variables: PyTree, images: jax.Array) -> None:
        output = model.apply(variables, images, train=False)
        taps.update({name: tap.shape[1:] for name, tap in output.features.items()})
        groups.update({name: (end.output.shape[1:], end.before_relu.shape[1:]) for name, end in output.groups.items()})

    if variables is None:
        variables = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    jax.eval_shape(call, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return taps, groups
