"""Floating-point operations of a network, counted from its shapes without running it."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.models import make_model

STEP_PER_FORWARD = 3
"""A training step costs three forward passes: the backward pass has one product for the inputs and one for the weights."""


def forward_operations(name: str, num_classes: int, width: int, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward pass: two for each multiplication of a convolution or product.

    Normalisation, activations and pooling are not counted, as is customary. Multiplications with zero padding are counted. The
    count is for the native lowering: extra arithmetic of another lowering is not useful work.
    """
    model = make_model(name, num_classes, width, "native")
    variables = jax.eval_shape(lambda key: model.init(key, image_shape), jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    traced = jax.make_jaxpr(lambda variables, image: model.apply(variables, image, train=False).logits)(
        variables, image
    )
    return 2 * sum(_multiplications(equation) for equation in _equations(traced.jaxpr))


def training_operations(name: str, num_classes: int, width: int, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one training step, per image."""
    return STEP_PER_FORWARD * forward_operations(name, num_classes, width, image_shape)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)  # a ClosedJaxpr holds a Jaxpr
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _multiplications(equation: Any) -> int:
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // features)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    return 0
