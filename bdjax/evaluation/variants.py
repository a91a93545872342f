"""Attacks and defenses as the command line names them: "badnets:poison_rate=0.05:target=4", "fine_tuning:epochs=5+fkd"."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from bdjax.attacks.victims import Plan, make_plan
from bdjax.defenses import chain
from bdjax.defenses.contract import Defense, settings_for
from bdjax.defenses.registry import find_defense
from bdjax.errors import InputError
from bdjax.settings import read_variant
from bdjax.types import Dataset, Model

NO_ATTACK = "none"
"""The training set as it is: a clean one for false alarms, or a third-party one. Of models, a clean one."""
CLEAN_TEACHER = "clean teacher"
"""What that is called, of models."""


class AttackVariant(NamedTuple):
    """One way to poison a training set, as the command line names it."""

    name: str
    """"badnets:poison_rate=0.05", "badnets+sig", "none" """
    plan: Plan | None
    """None for none"""
    target: int
    suppression: float
    """alpha of an attacker who weakens its backdoor where the defender trains; 0 for none"""
    label_noise: float = 0.0
    """share of the rows that have a random wrong label before anything else, by nobody's intention"""
    label: str = ""
    """what a table calls it, if its own name says too little"""

    @property
    def title(self) -> str:
        if self.label:
            return self.label
        _, changes = read_variant(self.name)
        shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changes.items())
        return (self.plan.title if self.plan else "no attack") + (f" ({shown})" if shown else "")


def read_attack(
    text: str,
    train: Dataset,
    target: int,
    *,
    like: str | None = None,
    defender_gets: Literal["training set", "model"] = "training set",
) -> AttackVariant:
    """Settle an attack as the command line writes it.

    Args:
        text: a name, or several with + between them, and then settings: "sig:amplitude=0.3:target=4". Beside the attack's
            own there are `target`, `label_rule`, `suppression` and `label_noise` (none has only this); the settings of a
            hybrid go to each of its parts.
        train: the training set.
        target: the attacker's class where the text names none.
        like: the named set whose settings are adopted; see `bdjax.attacks.contract.settings_for`.
        defender_gets: a training set, or a model without one. Where it is a model, attacks that train it, or start from a
            clean one, are allowed; and there is neither `suppression` nor `label_noise`, which are of the defender's training.

    Raises:
        InputError: no such attack or setting, or an attack that gives the defender no training set where a set is needed.
    """
    name, changes = read_variant(text)
    for setting in ("label_noise", "suppression"):
        if defender_gets == "model" and setting in changes:
            raise InputError(f"{text!r}: {setting} belongs to training sets; here the defender gets a model")
    noise = changes.pop("label_noise", 0.0)
    if type(noise) not in (int, float) or not 0 <= noise <= 1:
        raise InputError(f"{text!r}: label_noise {noise!r} is not a share from 0 to 1")
    if name == NO_ATTACK:
        if changes:
            settings = "" if defender_gets == "model" else " but label_noise"
            raise InputError(f"{text!r}: {NO_ATTACK} has no settings{settings}")
        return AttackVariant(text, None, target, 0.0, float(noise), CLEAN_TEACHER if defender_gets == "model" else "")
    own_target, rule = changes.pop("target", target), changes.pop("label_rule", None)
    suppression = changes.pop("suppression", 0.0)
    if type(own_target) is not int or not 0 <= own_target < train.num_classes:
        raise InputError(f"{text!r}: target {own_target!r} is not a class; classes are 0 to {train.num_classes - 1}")
    if type(suppression) not in (int, float) or not 0 <= suppression < math.inf:
        raise InputError(f"{text!r}: suppression {suppression!r} is not a number of at least 0")
    each = dict.fromkeys(name.split("+"), changes) if changes else {}
    plan = make_plan(name, train, own_target, label_rule=rule, changes=each, like=like)
    if defender_gets == "model":
        # Variants of one attack are attacks of their own, which are trained apart.
        return AttackVariant(text, plan._replace(name=text), own_target, 0.0)
    if plan.control:
        raise InputError(f"attack {name} poisons inside a training of its own: there is no training set to defend")
    if any(part.attack.starts_from_clean_model for part in plan.parts):
        raise InputError(f"attack {name} fine-tunes a clean model: its training set poisons no network from scratch")
    return AttackVariant(text, plan, own_target, float(suppression), float(noise))


class DefenseVariant(NamedTuple):
    """One defense with its settings, as the command line names it."""

    name: str
    """"lfd", "lfd:alpha=0.5", "fine_tuning:epochs=5+fkd" """
    defense: Defense
    settings: Any

    @property
    def title(self) -> str:
        if chain.LINK in self.name:  # its title has the settings of each part
            return self.defense.title
        _, changes = read_variant(self.name)
        shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changes.items())
        return self.defense.title + (f" ({shown})" if shown else "")


def read_defense(text: str, preset: str, like: str | None, common: Mapping[str, Any] = {}) -> DefenseVariant:
    """Settle a defense as the command line writes it.

    Args:
        text: a name and then settings: "lfd:alpha=0.5"; or several such with + between them, each of which gets what the one
            before made of the suspects: "fine_tuning:epochs=5+fkd".
        preset: of the run.
        like: the named set whose settings are adopted; see `bdjax.defenses.contract.settings_for`.
        common: settings of the run for each defense that has them, and does not say otherwise in its text.

    Raises:
        InputError: no such defense or setting, a value that the setting cannot have, or parts that cannot follow each other.
    """
    parts = []
    for one in text.split(chain.LINK):
        name, changes = read_variant(one)
        defense = find_defense(name)
        fields = {field.name for field in dataclasses.fields(defense.settings)}
        own = {setting: value for setting, value in common.items() if setting in fields}
        settings = settings_for(defense, preset, like, {**own, **changes})
        if defense.check:
            defense.check(settings)
        parts.append(DefenseVariant(one, defense, settings))
    if len(parts) == 1:
        return parts[0]
    linked = chain.make_chain([chain.ChainLink(one.defense, one.settings, one.title) for one in parts])
    return DefenseVariant(text, linked, linked.settings)


def compatible_defenses(
    variants: Sequence[DefenseVariant],
    attacked: Model,
    make_model: Callable[..., Model],
    image_shape: tuple[int, int, int],
    *,
    is_all: bool,
) -> tuple[list[DefenseVariant], dict[str, str]]:
    """The defenses that can be run on a network; and, where all there are were asked for, those that cannot -> why.

    Args:
        variants: the defenses.
        attacked: the network that they are to be run on.
        make_model: see `DefenseInput`.
        image_shape: (H, W, C).
        is_all: whether all were asked for, and none by name.

    Raises:
        InputError: a defense that was named does not fit.
    """
    fitting, left_out = [], {}
    for variant in variants:
        try:
            if variant.defense.network_after:
                variant.defense.network_after(variant.settings, attacked, make_model, image_shape)
            fitting.append(variant)
        except InputError as error:
            if not is_all:
                raise
            left_out[variant.name] = str(error)
    return fitting, left_out
