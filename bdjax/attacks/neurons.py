"""Penultimate-layer neurons of the attacker's network, for triggers that are optimised to excite some of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import CleanModel, Knowledge
from bdjax.datasets.splits import permutation
from bdjax.errors import InputError
from bdjax.models import embedding
from bdjax.training.member import as_float, over_batches
from bdjax.types import Array, Key, Model, PyTree

IMAGES_TO_LOOK_AT = 2000
"""Number of clean images, at most, that clean activations are measured on."""


def activations(model: Model, variables: PyTree, images: Array) -> Array:
    """The penultimate activations: the last tap's features, averaged over the pixels.

    Args:
        model: any network.
        variables: its variables.
        images: float32 [N, H, W, C] in [0, 1].

    Returns:
        float32 [N, d], at least 0.
    """
    return embedding(model.apply(variables, images, train=False).features)


def clean_model_of(knowledge: Knowledge, attack: str) -> CleanModel:
    """The attacker's clean network.

    Raises:
        InputError: there is none.
    """
    if knowledge.clean_model is None:
        raise InputError(f"attack {attack} optimises its trigger on a clean model, but none was supplied")
    return knowledge.clean_model


def clean_activations(key: Key, knowledge: Knowledge, attack: str) -> np.ndarray:
    """The clean network's penultimate activations on up to `IMAGES_TO_LOOK_AT` clean images.

    Args:
        key: draws the images.
        knowledge: the clean rows and the network.
        attack: the name to use in errors.

    Returns:
        float32 [n, d].
    """
    model, variables = clean_model_of(knowledge, attack)
    rows = permutation(key, len(knowledge.train))[:IMAGES_TO_LOOK_AT]
    return np.asarray(_of_rows(model, variables, knowledge.train.images[rows]))


@partial(jax.jit, static_argnames="model")
def _of_rows(model: Model, variables: PyTree, images: Array) -> Array:
    return over_batches(lambda batch: activations(model, variables, as_float(batch)), images, 256)


def strongest(scores: np.ndarray, clean: np.ndarray, count: int, attack: str) -> np.ndarray:
    """The neurons with the highest scores, among those that some clean image excites.

    Dead neurons are excluded: they have weights like any other, but a trigger might not be able to excite them.

    Args:
        scores: float [d].
        clean: float [n, d], clean activations.
        count: number of neurons; fewer are returned if fewer are alive.
        attack: the name to use in errors.

    Returns:
        int32 [count], highest score first.

    Raises:
        InputError: no neuron is alive, or the count is below 1.
    """
    alive = np.flatnonzero(clean.max(axis=0) > 0.0)
    if count < 1 or len(alive) == 0:
        raise InputError(
            f"attack {attack}: neurons {count} must be at least 1, and some must react to clean images; {len(alive)} do"
        )
    return alive[np.argsort(-scores[alive], kind="stable")[:count]].astype(np.int32)


def classifier_kernel(variables: PyTree) -> np.ndarray:
    """The last layer's weights, float32 [d, K]."""
    return np.asarray(variables["params"]["classifier"]["kernel"])


def check_reaction(largest_gradient: Array, attack: str) -> None:
    """Check that the network reacted to the trigger during its optimisation.

    Args:
        largest_gradient: float32 [], the largest absolute gradient over all steps.
        attack: the name to use in the error.

    Raises:
        InputError: the gradient is 0 or NaN.
    """
    if not float(largest_gradient) > 0.0:
        raise InputError(f"attack {attack}: the network does not react to the trigger: its gradient was 0 or NaN")


def capped(delta: Array, largest_norm: Array | float) -> Array:
    """Scale a perturbation down to a largest L2 norm.

    Args:
        delta: float32 of any shape.
        largest_norm: above 0.

    Returns:
        float32 of the same shape. The gradient is finite at 0 too.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(delta)) + 1e-12)
    # Selected, since the derivative of a minimum depends on how it is rounded: see `bdjax/selection.py`.
    return delta * jnp.where(norm > largest_norm, largest_norm / norm, 1.0)


def scaled_norm(norm_at_cifar: float, image_shape: tuple[int, int, int]) -> float:
    """Convert an L2 norm for 32 x 32 x 3 pixels to another image size, keeping the mean square."""
    return norm_at_cifar * float(np.sqrt(np.prod(image_shape) / 3072))
