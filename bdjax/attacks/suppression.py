"""A deliberately weak backdoor: images with the trigger stay close, in feature space, to the same images without it.

ABM uses this twice. Its verification network contains a backdoor planted by the defender, which must be weaker than the
attacker's (NBAB, Chen et al. 2024, equation 2); and its adaptive attacker weakens the attacker's backdoor in the same way, so
that this no longer holds (section V-H, appendix E). `h` is the input of the last layer:

    CE(f(x), y)                                 on an unchanged row
    CE(f(x'), y') + alpha |h(x') - h(x)|^2      on a row with the trigger, paired with the same row without it

The square is a mean over features, so that alpha does not depend on the network's width, and no gradient flows through
h(x): otherwise the features of clean images could collapse to minimise the term.

The paper does not say in which batch h(x) is normalised. Either the partners are a batch of their own, or they join the batch
of the learnt images, so that both features of a pair have the same statistics.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp

from bdjax import losses
from bdjax.models import embedding
from bdjax.training.member import Objective, Outcome
from bdjax.types import Array, Key, Model, PyTree


def most_pairs(batch_size: int, share: float) -> int:
    """How many rows of a batch are suppressed at most, but for one batch in 10^8: six standard deviations above the mean.

    Args:
        batch_size: rows of a batch.
        share: of all rows that are suppressed, in [0, 1].
    """
    spread = math.sqrt(batch_size * share * (1 - share))
    return min(batch_size, math.ceil(batch_size * share + 6 * spread))


@cache
def suppressed_cross_entropy(model: Model, smoothing: float = 0.0, pairs: int = 0) -> Objective:
    """The loss above, for rows with two views: the one that is learned, and its partner without the trigger.

    Args:
        model: the network.
        smoothing: label smoothing, see `losses.cross_entropy`.
        pairs: 0 for partners in a batch of their own, which does not change the running statistics; otherwise the number of
            rows of a batch, those of the largest suppression, whose partners join it. Further rows are not suppressed: see
            `most_pairs`.

    Returns:
        An objective of images [N, 2, H, W, C] and the targets "labels" int32 [N] and "suppression" float32 [N], which is
        alpha for rows with a trigger and 0 for other rows.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        variables = {**variables, "params": params}
        if pairs:
            return together(variables, images, targets)
        output = model.apply(variables, images[:, 0], train=True)
        partner = model.apply(jax.lax.stop_gradient(variables), images[:, 1], train=True)
        distance = jnp.mean(jnp.square(embedding(output.features) - embedding(partner.features)), axis=1)
        loss = losses.cross_entropy(output.logits, targets["labels"], smoothing) + targets["suppression"] * distance
        return Outcome(loss, output.logits, targets["labels"], output.variables)

    def together(variables: PyTree, images: Array, targets: dict[str, Array]) -> Outcome:
        count = len(images)
        suppression, rows = jax.lax.top_k(targets["suppression"], min(pairs, count))
        output = model.apply(variables, jnp.concatenate([images[:, 0], images[rows, 1]]), train=True)
        features = embedding(output.features)
        apart = features[rows] - jax.lax.stop_gradient(features[count:])
        loss = losses.cross_entropy(output.logits[:count], targets["labels"], smoothing)
        loss = loss.at[rows].add(suppression * jnp.mean(jnp.square(apart), axis=1))
        return Outcome(loss, output.logits[:count], targets["labels"], output.variables)

    return objective
