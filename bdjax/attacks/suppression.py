"""A backdoor made weak on purpose: images with the trigger are kept close to the same images without it, in feature space.

ABM uses this twice. Its verification network carries a backdoor of the defender's own, which must be the weaker one of two
(NBAB, Chen et al. 2024, equation 2); and its adaptive attacker weakens the real backdoor in the same way, so that the
defender's no longer is (section V-H, appendix E). `h` is what the last layer sees:

    CE(f(x), y)                                 on a row as it is
    CE(f(x'), y') + alpha |h(x') - h(x)|^2      on a row with the trigger, next to the same row without it

The square is a mean over features, so that alpha does not depend on the network's width, and no gradient flows through
h(x): otherwise the features of clean images could collapse onto each other to please it.
"""

from functools import cache

import jax
import jax.numpy as jnp

from bdjax import losses
from bdjax.models import embedding
from bdjax.training.member import Objective, Outcome
from bdjax.types import Array, Key, Model, PyTree


@cache
def suppressed_cross_entropy(model: Model) -> Objective:
    """The loss above for rows of two views: the one that is learnt, and its partner without the trigger.

    Args:
        model: the network.

    Returns:
        An objective of images [N, 2, H, W, C] and the targets "labels" int32 [N] and "suppression" float32 [N], which is
        alpha for rows with a trigger and 0 for all others.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        variables = {**variables, "params": params}
        learnt = model.apply(variables, images[:, 0], train=True)
        partner = model.apply(jax.lax.stop_gradient(variables), images[:, 1], train=True)
        distance = jnp.mean(jnp.square(embedding(learnt.features) - embedding(partner.features)), axis=1)
        loss = losses.cross_entropy(learnt.logits, targets["labels"]) + targets["suppression"] * distance
        return Outcome(loss, learnt.logits, targets["labels"], learnt.variables)

    return objective
