"""Poisoning inside the training step, for attackers who train the model themselves.

A batch comes shuffled, so its first rows are random ones: they get the trigger and the attacker's label, the next ones a
harmless relative of the trigger under their own label, and the rest is left alone. Which rows are poisoned so changes from
epoch to epoch, which no attacker who only hands over rows could do.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdjax.attacks.contract import Apply, TrainingControl
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.training.member import Objective, Outcome
from bdjax.types import Array, Key, Model, PyTree


class Shares(NamedTuple):
    """How many rows of a batch, from its start."""

    poisoned: int
    """get the trigger and the attacker's label"""
    cover: int
    """come next, are changed too and keep their label"""


def shares(batch_size: int, poison_rate: float, cover_rate: float) -> Shares:
    """How a batch is divided: floor(rate B) rows each, but one at least where the rate is not 0.

    Args:
        batch_size: B.
        poison_rate: share of the rows that get the trigger, in [0, 1].
        cover_rate: share of the rows that keep their label, in [0, 1].

    Raises:
        InputError: the rates are no shares, or more than 1 together.
    """
    if min(poison_rate, cover_rate) < 0 or poison_rate + cover_rate > 1 + 1e-9:
        raise InputError(
            f"poison rate {poison_rate:g} and cover rate {cover_rate:g}: they are shares of a batch, at most 1 together"
        )

    def rows(rate: float, left: int) -> int:
        # 0.29 * 100 is 28.999999999999996 in floating point, and means 29.
        return min(max(math.floor(rate * batch_size + 1e-9), 1 if rate else 0), left)

    poisoned = rows(poison_rate, batch_size)
    return Shares(poisoned, rows(cover_rate, batch_size - poisoned))


def change_rows(function: Apply, params: PyTree, images: Array, labels: Array, key: Key) -> Array:
    """A trigger on each of the images, with a key of its own.

    Args:
        function: a trigger's `apply`.
        params: its parameters.
        images: float32 [n, H, W, C] in [0, 1]; n may be 0.
        labels: int32 [n].
        key: split over the images.

    Returns:
        float32 [n, H, W, C].
    """
    if images.shape[0] == 0:
        return images
    keys = jax.random.split(key, images.shape[0])
    return jax.vmap(function, in_axes=(None, 0, 0, 0))(params, images, labels, keys)


def carry_params(key: Key, variables: Mapping[str, PyTree], params: PyTree) -> dict[str, PyTree]:
    """Put a trigger that is not trained further beside the classifier: `TrainingControl.begin`.

    Args:
        key: not used: nothing is drawn.
        variables: the classifier's.
        params: the trigger's.

    Returns:
        The member's variables. The params lie in a dict of their own, as networks expect of a collection.
    """
    del key
    return {**variables, "attack": {"params": params}}


def take_params(variables: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], PyTree]:
    """The inverse of `carry_params`, (classifier's variables, params): `TrainingControl.end`."""
    classifier = {name: values for name, values in variables.items() if name != "attack"}
    return classifier, variables["attack"]["params"]


def fixed_trigger(poison: Apply, cover: Apply) -> TrainingControl:
    """Train with a trigger that does not learn: cross-entropy on batches that are poisoned as described above.

    The trigger comes after the augmentation, if there is any; the code released with WaNet and BppAttack augments after
    the trigger.

    Args:
        poison: the trigger on poisoned rows.
        cover: its relative on the rows that keep their label.

    Returns:
        The control; its settings need `poison_rate` and `cover_rate`.
    """

    def objective(model: Model, settings: Any, wanted: Array) -> Objective:
        def evaluate(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
            classifier, attack = take_params(variables)
            count = shares(images.shape[0], settings.poison_rate, settings.cover_rate)
            first, second = slice(0, count.poisoned), slice(count.poisoned, count.poisoned + count.cover)
            labels = targets["labels"]
            poison_key, cover_key = jax.random.split(key)
            images = jnp.concatenate(
                [
                    change_rows(poison, attack, images[first], labels[first], poison_key),
                    change_rows(cover, attack, images[second], labels[second], cover_key),
                    images[second.stop :],
                ]
            )
            labels = jnp.concatenate([wanted[labels[first]], labels[count.poisoned :]])
            output = model.apply({**classifier, "params": params}, images, train=True)
            after = {**output.variables, "attack": variables["attack"]}
            return Outcome(cross_entropy(output.logits, labels), output.logits, labels, after)

        return evaluate

    return TrainingControl(objective, carry_params, take_params)
