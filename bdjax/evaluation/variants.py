"""Attacks and defenses as the command line names them: "badnets:poison_rate=0.05:target=4", "fine_tuning:epochs=5+fkd"."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from bdjax.attacks.label_rules import LABEL_RULES
from bdjax.attacks.victims import Plan, make_plan
from bdjax.defenses import chain, contract
from bdjax.defenses.contract import Defense, Facts, settings_for
from bdjax.defenses.registry import find_defense
from bdjax.errors import InputError
from bdjax.settings import LARGEST, NotNegative, Share, check_choice, mistake, read_variant, shown
from bdjax.types import Dataset, Model

NO_ATTACK = "none"
"""No attack: the training set unchanged, to count false alarms or because it is third-party; for models, a clean model."""
NOT_TESTED = "could not be tested"
"""What reports say of a defense that could not have found anything, in the place of its numbers."""
CLEAN_TEACHER = "clean teacher"
"""Title of NO_ATTACK where the suspects are models."""


class AttackVariant(NamedTuple):
    """One way to poison a training set, as the command line names it."""

    name: str
    """"badnets:poison_rate=0.05", "badnets+sig", "none" """
    plan: Plan | None
    """None for NO_ATTACK"""
    target: int
    suppression: float
    """alpha of an attacker who weakens its backdoor while the defender trains; 0 for no suppression"""
    label_noise: float = 0.0
    """share of the rows that get a random wrong label before the attack, unrelated to it"""
    label: str = ""
    """title in tables; empty for a title made from the name"""

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
    """Parse an attack as written on the command line.

    Args:
        text: a name, or several joined by +, and then settings: "sig:amplitude=0.3:target=4". Besides the attack's own
            settings there are `target`, `label_rule`, `suppression` and `label_noise` (the only one that "none" has); the
            settings of a hybrid apply to each of its parts.
        train: the training set.
        target: the target class if the text does not name one.
        like: the named dataset whose settings are used; see `bdjax.attacks.contract.settings_for`.
        defender_gets: a training set, or a model without one. For a model, attacks that control its training or start from a
            clean model are allowed; `suppression` and `label_noise`, which concern the defender's training, are not.

    Raises:
        InputError: no such attack or setting, or an attack that gives the defender no training set where a set is needed.
    """
    name, changes = read_variant(text)
    for setting in ("label_noise", "suppression"):
        if defender_gets == "model" and setting in changes:
            raise InputError(f"{shown(text)}: {setting} applies to training sets only; here the defender gets a model")
    noise = changes.pop("label_noise", 0.0)
    if mistake(Share, noise):
        raise InputError(f"{shown(text)}: label_noise {shown(noise)} should be a share from 0 to 1")
    if name == NO_ATTACK:
        if changes:
            settings = "" if defender_gets == "model" else " except label_noise"
            raise InputError(f"{shown(text)}: {NO_ATTACK} has no settings{settings}")
        return AttackVariant(text, None, target, 0.0, float(noise), CLEAN_TEACHER if defender_gets == "model" else "")
    target, rule = changes.pop("target", target), changes.pop("label_rule", None)
    suppression = changes.pop("suppression", 0.0)
    if type(target) is not int or not 0 <= target < train.num_classes:
        raise InputError(f"{shown(text)}: target {shown(target)} is not a class; classes are {train.class_range}")
    if rule is not None:
        check_choice(f"{shown(text)}: label rule", rule, LABEL_RULES)
    if mistake(NotNegative, suppression):
        raise InputError(f"{shown(text)}: suppression {shown(suppression)} should be a number from 0 to {LARGEST:g}")
    part_changes = dict.fromkeys(name.split("+"), changes) if changes else {}
    plan = make_plan(name, train, target, label_rule=rule, changes=part_changes, like=like)
    if defender_gets == "model":
        # Variants of an attack have names of their own, so that each is trained separately.
        return AttackVariant(text, plan._replace(name=text), target, 0.0)
    if plan.control:
        raise InputError(f"attack {name} controls the training itself: it leaves no training set to defend")
    if any(part.attack.starts_from_clean_model for part in plan.parts):
        raise InputError(
            f"attack {name} fine-tunes a clean model: its training set does not poison a network that is trained from scratch"
        )
    if suppression and any(part.attack.adds_rows for part in plan.parts):
        raise InputError(
            f"attack {name}: suppression needs a clean version of each row, which the rows that it adds do not have"
        )
    return AttackVariant(text, plan, target, float(suppression), float(noise))


class DefenseVariant(NamedTuple):
    """One defense with its settings, as the command line names it."""

    name: str
    """"lfd", "lfd:alpha=0.5", "fine_tuning:epochs=5+fkd" """
    defense: Defense
    settings: Any
    label: str = ""
    """title in tables; empty for a title made from the name"""

    @property
    def title(self) -> str:
        if self.label:
            return self.label
        if chain.LINK in self.name:  # a chain's title already has the settings of each part
            return self.defense.title
        _, changes = read_variant(self.name)
        shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changes.items())
        return self.defense.title + (f" ({shown})" if shown else "")


def read_defense(text: str, preset: str, like: str | None, common: Mapping[str, Any] = {}) -> DefenseVariant:
    """Parse a defense as written on the command line.

    Args:
        text: a name and then settings: "lfd:alpha=0.5"; or several joined by +, each of which gets the models that the one
            before it made: "fine_tuning:epochs=5+fkd".
        preset: the run's preset.
        like: the named dataset whose settings are used; see `bdjax.defenses.contract.settings_for`.
        common: settings of the run for every defense that has them, unless its text sets them.

    Raises:
        InputError: no such defense or setting, a value that the setting cannot have, or parts that cannot follow each other.
    """
    parts = []
    for part_text in text.split(chain.LINK):
        name, changes = read_variant(part_text)
        defense = find_defense(name)
        fields = {field.name for field in dataclasses.fields(defense.settings)}
        shared = {setting: value for setting, value in common.items() if setting in fields}
        settings = settings_for(defense, preset, like, {**shared, **changes})
        if defense.check:
            defense.check(settings)
        parts.append(DefenseVariant(part_text, defense, settings))
    if len(parts) == 1:
        return parts[0]
    linked = chain.make_chain([chain.ChainLink(part.defense, part.settings, part.title) for part in parts])
    return DefenseVariant(text, linked, linked.settings)


def compatible_defenses(
    variants: Sequence[DefenseVariant],
    attacked: Model,
    make_model: Callable[..., Model],
    image_shape: tuple[int, int, int],
    *,
    is_all: bool,
) -> tuple[list[DefenseVariant], dict[str, str]]:
    """The defenses that can be run on a network, and the others -> why they cannot.

    Args:
        variants: the defenses.
        attacked: the network that they are to be run on.
        make_model: see `DefenseInput`.
        image_shape: (H, W, C).
        is_all: whether the run is of all defenses; if they were named, one that cannot be run is an error.

    Raises:
        InputError: a defense that was named cannot be run on the network.
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


def without_untestable(variants: Sequence[DefenseVariant], facts: Facts) -> tuple[list[DefenseVariant], dict[str, str]]:
    """The defenses that can find anything in rows as few as these, and the others -> why they cannot.

    Args:
        variants: the defenses.
        facts: of the rows before any attack.
    """
    testable, left_out = [], {}
    for variant in variants:
        limits = contract.not_tested(variant.defense, variant.settings, [facts])
        if limits and limits[0].reason:
            left_out[variant.name] = f"{NOT_TESTED}: {limits[0].reason}"
        else:
            testable.append(variant)
    return testable, left_out


def facts_of(train: Dataset | None, clean: Dataset | None, num_classes: int) -> Facts:
    """The facts of rows that are no suspects yet; None for a part that the defender does not have."""
    parts = (np.bincount(part.labels if part is not None else [], minlength=num_classes) for part in (train, clean))
    return Facts(*parts)
