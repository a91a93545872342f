"""Poisoning inside the training step, for attackers who train the model themselves.

Batches are shuffled, so their first rows are random. Those get the trigger and the attacker's label, the next rows (cover
rows) get a harmless variant of the trigger and keep their label, and the rest stay unchanged. The poisoned rows thus
change from epoch to epoch, which an attacker who only supplies data cannot do.
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
from bdjax.types import Array, Dataset, Key, Model, PyTree


class Shares(NamedTuple):
    """How many rows of a batch are changed, counted from its start."""

    poisoned: int
    """rows that get the trigger and the attacker's label"""
    cover: int
    """the next rows: changed as well, but they keep their label"""


def shares(batch_size: int, poison_rate: float, cover_rate: float) -> Shares:
    """Divide a batch: floor(rate B) rows of each kind, but at least one if the rate is not 0.

    Args:
        batch_size: B.
        poison_rate: share of the rows that get the trigger, in [0, 1].
        cover_rate: share of the rows that keep their label, in [0, 1].

    Raises:
        InputError: a rate is negative, or they exceed 1 together.
    """
    if min(poison_rate, cover_rate) < 0 or poison_rate + cover_rate > 1 + 1e-9:
        raise InputError(
            f"poison rate {poison_rate:g} and cover rate {cover_rate:g}: each must be at least 0, their sum at most 1"
        )

    def rows(rate: float, left: int) -> int:
        # 0.29 * 100 is 28.999999999999996 in floating point, but 29 is meant.
        return min(max(math.floor(rate * batch_size + 1e-9), 1 if rate else 0), left)

    poisoned = rows(poison_rate, batch_size)
    return Shares(poisoned, rows(cover_rate, batch_size - poisoned))


def check_shares(train: Dataset, target: int, settings: Any) -> None:
    """`Attack.check`: the rows of a batch that are changed are at most all rows.

    Raises:
        InputError: the rates exceed 1 together.
    """
    del train, target
    shares(1, settings.poison_rate, settings.cover_rate)


def change_rows(function: Apply, params: PyTree, images: Array, labels: Array, key: Key) -> Array:
    """Apply a trigger to each image, with a separate key for each.

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
    """Store a fixed trigger next to the classifier's variables: `TrainingControl.begin`.

    Args:
        key: not used.
        variables: the classifier's variables.
        params: the trigger's parameters.

    Returns:
        The member's variables. The params sit in a nested dict, as networks expect of a collection.
    """
    del key
    return {**variables, "attack": {"params": params}}


def take_params(variables: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], PyTree]:
    """Inverse of `carry_params`, returns (classifier's variables, params): `TrainingControl.end`."""
    classifier = {name: values for name, values in variables.items() if name != "attack"}
    return classifier, variables["attack"]["params"]


def fixed_trigger(poison: Apply, cover: Apply) -> TrainingControl:
    """Train with a fixed trigger: cross-entropy on batches that are poisoned as described above.

    The trigger is applied after the augmentation, if there is any; the code released with WaNet and BppAttack augments
    after the trigger.

    Args:
        poison: the trigger for poisoned rows.
        cover: its variant for cover rows.

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
