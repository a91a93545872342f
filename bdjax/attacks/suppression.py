"""A deliberately weak backdoor: images with the trigger stay close, in feature space, to the same images without it.

ABM uses this twice. Its verification network contains a backdoor planted by the defender, which must be weaker than the
attacker's (NBAB, Chen et al. 2024, equation 2); and its adaptive attacker weakens the attacker's backdoor in the same way, so
that this no longer holds (section V-H, appendix E). `h` is the input of the last layer:

    CE(f(x), y)                                 on an unchanged row
    CE(f(x'), y') + alpha |h(x') - h(x)|^2      on a row with the trigger, paired with the same row without it

The square is a mean over features, so that alpha does not depend on the network's width, and no gradient flows through
h(x): otherwise the features of clean images could collapse to minimise the term.
"""

from functools import cache

import jax
import jax.numpy as jnp

from bdjax import losses
from bdjax.models import embedding
from bdjax.training.member import Objective, Outcome
from bdjax.types import Array, Key, Model, PyTree


@cache
def suppressed_cross_entropy(model: Model, smoothing: float = 0.0) -> Objective:
    """The loss above, for rows with two views: the one that is learned, and its partner without the trigger.

    Args:
        model: the network.
        smoothing: label smoothing, see `losses.cross_entropy`.

    Returns:
        An objective of images [N, 2, H, W, C] and the targets "labels" int32 [N] and "suppression" float32 [N], which is
        alpha for rows with a trigger and 0 for other rows.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        variables = {**variables, "params": params}
        output = model.apply(variables, images[:, 0], train=True)
        partner = model.apply(jax.lax.stop_gradient(variables), images[:, 1], train=True)
        distance = jnp.mean(jnp.square(embedding(output.features) - embedding(partner.features)), axis=1)
        loss = losses.cross_entropy(output.logits, targets["labels"], smoothing) + targets["suppression"] * distance
        return Outcome(loss, output.logits, targets["labels"], output.variables)

    return objective
