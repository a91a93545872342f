"""Grad-CAM: which parts of an image support a class.

If a backdoor is active, the heat map is on the trigger, whatever else the image shows.
"""

from functools import partial

import jax
import jax.numpy as jnp

from bdjax.inspection.scaling import min_max
from bdjax.types import Array, Model, PyTree


@partial(jax.jit, static_argnames=("model", "tap"))
def grad_cam(
    model: Model, variables: PyTree, images: Array, classes: Array | int | None = None, *, tap: str = "stage3"
) -> tuple[Array, Array]:
    """Compute one heat map per image.

    The weight of channel c of the features F at the tap is w_c = mean_ij d z_k / d F_ijc, with z_k the logit of the class
    to explain; the map is relu(sum_c w_c F_c), resized to the image and scaled to 0..1. Compiled once per model, tap and
    shape of the images, separately with and without classes.

    Args:
        model: the network; evaluated with running statistics, so that rows do not affect each other.
        variables: its variables.
        images: float32 [N, H, W, C] in [0, 1].
        classes: int [N], the class to explain for each image, in 0..K-1; or one for all; None for the predicted classes.
        tap: which features. The paper uses those of the last stage.

    Returns:
        heat_maps: float32 [N, H, W] in [0, 1]. All 0 if nothing supports the class, if the map is constant, or if the
            network outputs NaN.
        classes: int32 [N], the classes explained.

    Raises:
        ValueError: the network has no such tap.

    References:
        Selvaraju et al. 2017, Grad-CAM, equations 1-2; Heydari et al. 2025, section 4.7, equation 12.
    """
    num_rows, height, width = images.shape[:3]
    features_shape = jax.eval_shape(lambda: _features_at(model, variables, images, tap))

    def head(offset: Array) -> tuple[Array, Array]:
        # Adding zeros does not change the features, and the gradient by the zeros is the gradient by the features.
        output = model.apply(variables, images, train=False, edits={tap: lambda features: features + offset})
        return output.logits, output.features[tap]

    logits, pull_back, features = jax.vjp(head, jnp.zeros(features_shape.shape, features_shape.dtype), has_aux=True)
    if classes is None:
        classes = jnp.argmax(logits, axis=1)
    classes = jnp.broadcast_to(jnp.asarray(classes, jnp.int32), (num_rows,))
    # The logits of a row depend on the features of that row only, so one backward pass serves all rows.
    (gradient,) = pull_back(jax.nn.one_hot(classes, logits.shape[1], dtype=logits.dtype))
    weights = jnp.mean(gradient, axis=(1, 2))  # [N, c]
    heat = jax.nn.relu(jnp.einsum("nhwc,nc->nhw", features, weights))
    heat = jax.image.resize(heat, (num_rows, height, width), "bilinear")
    return min_max(heat, axes=(1, 2)), classes


def _features_at(model: Model, variables: PyTree, images: Array, tap: str) -> Array:
    features = model.apply(variables, images, train=False).features
    if tap not in features:
        raise ValueError(f"no tap {tap!r}; this network has {', '.join(features)}")
    return features[tap]
