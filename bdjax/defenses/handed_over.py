"""Models in a folder (see `bdjax.attacks.suspects`) as suspects that defenses are put before, and networks as such a folder."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from bdjax.attacks import suspects
from bdjax.attacks.contract import Attack
from bdjax.attacks.label_rules import LABEL_RULES, LabelRule, make_rule
from bdjax.attacks.poisoning import Part, trigger_all
from bdjax.attacks.providers import ProviderTriggers
from bdjax.attacks.victims import Plan
from bdjax.defenses.comparison import Suspect
from bdjax.defenses.variants import AttackVariant
from bdjax.errors import InputError
from bdjax.models import MODELS, ComputeDtype, Lowering
from bdjax.training import ensemble
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Dataset, Model, PyTree


class HandedOver(NamedTuple):
    """What somebody handed over."""

    model: Model
    variables: PyTree  # stacked [N, ...]
    suspects: list[Suspect]  # N, of the first seed; with a plan where the trigger is known


@dataclass(frozen=True)
class UnknownSettings:
    """Nobody knows how the model was attacked."""


def read(
    folder: pathlib.Path, train: Dataset, target: int, lowering: Lowering, compute_dtype: ComputeDtype = "float32"
) -> HandedOver:
    """Read models that somebody handed over, and their triggers if those are beside them.

    Args:
        folder: as `bdjax.attacks.suspects` describes it.
        train: clean rows of the data that the models are for.
        target: the class that success is measured for.
        lowering: how to compute their convolutions.
        compute_dtype: of their activations.

    Raises:
        InputError: as `bdjax.attacks.suspects.read`.
    """
    found = suspects.read(folder, train.num_classes, train.image_shape, target, lowering, compute_dtype)
    count, ones = ensemble.num_members(found.variables), []
    for number in range(count):
        name = f"teacher {number + 1}" if count > 1 else "teacher"
        plan, params = None, ()
        if found.triggers is not None:
            attack = Attack(
                name="handed_over",
                title=found.triggers.names[number],
                paper="a model that was handed over with its trigger",
                threat="training",
                settings=UnknownSettings(),
                make_params=_no_params,
                apply=masked_blend.apply,
                label_rules=(found.label_rules[number],),
            )
            rule = make_rule(found.label_rules[number], target, train.num_classes)
            plan = Plan(name, (Part(attack, attack.settings, rule),))
            params = (MaskedBlend(*(leaf[number] for leaf in found.triggers.params)),)
        label = f"your {name}" + (f" ({found.triggers.names[number]})" if found.triggers else "")
        ones.append(Suspect(AttackVariant(name, plan, target, 0.0, label=label), 0, train, params, None))
    return HandedOver(found.model, found.variables, ones)


def _no_params(*arguments: object) -> PyTree:
    raise InputError("the trigger of a model that was handed over is what it is; nobody can make another one")


class Trigger(NamedTuple):
    """A trigger in the one form that can be handed over."""

    triggers: ProviderTriggers  # of one provider
    label_rule: str  # a key of LABEL_RULES


def trigger_of(suspect: Suspect, test: Dataset, triggered: Sequence[np.ndarray]) -> Trigger | None:
    """A suspect's trigger as a masked blend, if that is what it does to the test images.

    Args:
        suspect: any.
        test: the test images.
        triggered: of each of the suspect's triggers: the same with it, uint8 [N, H, W, C].

    Returns:
        None for a suspect without a trigger, with several, or with one of another form (a warp, one for each image).
    """
    if len(suspect.parts) != 1:
        return None
    parts = jax.tree.leaves(suspect.params[0], is_leaf=lambda leaf: isinstance(leaf, MaskedBlend))
    for blend in (part for part in parts if isinstance(part, MaskedBlend)):
        shown = trigger_all(jax.random.key(0), test, masked_blend.apply, blend)
        rule = _rule_name(suspect.parts[0].rule, suspect.attack.target, test.num_classes)
        if rule and np.array_equal(shown, triggered[0]):
            one = jax.tree.map(lambda leaf: np.asarray(leaf)[None], blend)
            return Trigger(ProviderTriggers(one, (suspect.parts[0].attack.title,), np.zeros(1, bool)), rule)
    return None


def _rule_name(rule: LabelRule, target: int, num_classes: int) -> str | None:
    """The first of LABEL_RULES that does the same at test time."""
    for name, make in LABEL_RULES.items():
        try:
            if make(target, num_classes).name == rule.name:
                return name
        except InputError:  # too few classes for that rule
            continue
    return None


def write(
    folder: pathlib.Path,
    model: Model,
    variables: PyTree,
    image_shape: tuple[int, int, int],
    trigger: Trigger | None,
    target: int,
) -> bool:
    """Write networks as a third party would hand them over.

    Args:
        folder: where to.
        model: their architecture, made by `bdjax.models.make_model`.
        variables: stacked [N, ...]; whatever is there beside the network's own is left out.
        image_shape: (H, W, C).
        trigger: of all of them; None where there is none, or none of that form.
        target: its class.

    Returns:
        Whether that could be: not for a network that is none of `MODELS`.
    """
    name, _, width = model.description.rpartition(" width ")
    if name not in MODELS or not width.isdigit():
        return False
    own = {part: variables[part] for part in ("params", "batch_stats")}
    triggers, rules = trigger or (None, "")
    suspects.write(
        folder, name, int(width), model.num_classes, image_shape, own, triggers, target, (rules,) if trigger else ()
    )
    return True
