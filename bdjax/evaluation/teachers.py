"""Suspect teachers: networks that were attacked here, or third-party networks with their weights, and what defenses get.

A trained trigger may be a perturbation that fools any network, backdoored or not. So each trigger is also measured on the
clean network of the same seed, and on the student that a method makes of that network (`control`): its success there is not
due to a backdoor.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks import outsourcing
from bdjax.attacks.contract import Attack, CleanModel
from bdjax.attacks.label_rules import LABEL_RULES, LabelRule, make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, trigger_all
from bdjax.attacks.providers import ProviderTriggers
from bdjax.attacks.victims import Plan, prepare, train_victims
from bdjax.choices import ComputeDtype, Lowering
from bdjax.defenses.contract import DefenseInput, PoolRows
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, TriggeredViews, clean_members, success_on
from bdjax.evaluation.suspects import Suspect, first_triggers
from bdjax.evaluation.variants import NO_ATTACK, AttackVariant, read_attack
from bdjax.exchange import model_folder
from bdjax.exchange.opening import is_black_box, open_model
from bdjax.models import MODELS
from bdjax.training import ensemble
from bdjax.training.member import TrainConfig
from bdjax.training.recipes import without
from bdjax.training.stages import Log, Nets, StageRunner
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Dataset, Key, Model, PyTree


class Recipes(NamedTuple):
    """Training settings of the teachers."""

    from_scratch: TrainConfig
    """for clean teachers, and for attackers who poison data"""
    fine_tuning: TrainConfig
    """for attackers who start from a clean teacher"""
    controlled: TrainConfig
    """for attackers who control the training from scratch"""


class SuspectTeachers(NamedTuple):
    """M suspects: all seeds of the first attack, then of the second."""

    model: Model
    suspects: list[Suspect]
    """M; their `dataset` is the clean training set"""
    variables: PyTree
    """stacked [M, ...]"""
    clean: Nets | None
    """a clean network of the same architecture for each seed; None if no trigger is known"""
    recipes: Recipes


class ThirdPartyModels(NamedTuple):
    """Models made by a third party."""

    model: Model
    variables: PyTree
    """stacked [N, ...]"""
    suspects: list[Suspect]
    """N, for the first seed; with a plan if the trigger is known"""
    digest: str = ""
    """SHA-256 of what decides their answers"""


@dataclass(frozen=True)
class UnknownSettings:
    """Settings of an attack whose settings are unknown."""


def make_recipes(
    from_scratch: TrainConfig, fine_tuning_epochs: int, fine_tuning_learning_rate: float, controlled_epochs: int
) -> Recipes:
    """The recipes of a run. Fine-tuning follows half a cosine; a step schedule is stretched over controlled trainings.

    Args:
        from_scratch: settings of training from scratch, which the other recipes start from.
        fine_tuning_epochs: epochs of teachers that start from a clean teacher.
        fine_tuning_learning_rate: their initial learning rate.
        controlled_epochs: epochs of teachers whose attacker controls the training from scratch.
    """
    changes = {
        "epochs": fine_tuning_epochs,
        "learning_rate": fine_tuning_learning_rate,
        "schedule": "cosine",
        "steps": (),
    }
    stretch = controlled_epochs / from_scratch.epochs
    steps = tuple((round(epoch * stretch), rate) for epoch, rate in from_scratch.steps)
    return Recipes(
        from_scratch,
        dataclasses.replace(without(from_scratch), **changes),
        dataclasses.replace(from_scratch, epochs=controlled_epochs, steps=steps),
    )


def train_clean(key: Key, seeds: int, model: Model, recipe: TrainConfig, runner: StageRunner, train: Dataset) -> Nets:
    """Train a clean network for each seed: the clean teacher, which some attackers start from, and every trigger's control."""
    rows = outsourcing.split_rows([key] * seeds, train.labels, 0.0)
    keys = jnp.stack([jax.random.fold_in(key, seed) for seed in range(seeds)])
    return runner.from_scratch("clean teachers", model, recipe, keys, 1, jnp.asarray(train.images), *rows)


def train_teachers(
    key: Key,
    attacks: Sequence[AttackVariant],
    first_seed: int,
    seeds: int,
    model: Model,
    recipes: Recipes,
    runner: StageRunner,
    train: Dataset,
    log: Log,
) -> SuspectTeachers:
    """Train a clean network for each seed, and a backdoored network for each attack and seed.

    Args:
        key: key of the run.
        attacks: read with `defender_gets="model"`; the attack "none" stands for the clean network.
        first_seed: number of the first seed.
        seeds: number of seeds.
        model: the architecture.
        recipes: their training settings.
        runner: trains.
        train: the clean training set.
        log: for progress.

    Raises:
        InputError: as `bdjax.attacks.victims.prepare`.
    """
    clean_key, attack_key, victim_key = jax.random.split(key, 3)
    clean = train_clean(clean_key, seeds, model, recipes.from_scratch, runner, train)
    planned = [(attack, seed) for attack in attacks for seed in range(seeds) if attack.plan]
    prepared = []
    with log.stage("triggers", total=len(planned), unit="teachers") as stage:
        for attack, seed in planned:
            clean_model = CleanModel(model, ensemble.members(clean.variables, seed))
            seed_key = jax.random.fold_in(attack_key, first_seed + seed)
            prepared.append(prepare(seed_key, attack.plan, train, attack.target, seed, clean_model))
            stage.advance(1, attack.name)
    attacked = iter(train_victims(victim_key, runner, prepared, train, clean, *recipes))
    suspects, variables = [], []
    for attack in attacks:
        for seed in range(seeds):
            if attack.plan is None:
                suspects.append(_clean_suspect(attack, seed, train))
                variables.append(ensemble.members(clean.variables, seed))
            else:
                victim = next(attacked)
                suspects.append(Suspect(attack, seed, train, victim.params, None))
                variables.append(victim.variables)
    return SuspectTeachers(model, suspects, ensemble.stack(variables), clean, recipes)


def take_teachers(
    key: Key, found: ThirdPartyModels, seeds: int, recipes: Recipes, runner: StageRunner, train: Dataset
) -> SuspectTeachers:
    """Third-party teachers, repeated for each seed. If triggers are known, clean teachers of the same architecture are trained
    as their control.

    Args:
        key: key of the run.
        found: the teachers.
        seeds: number of seeds.
        recipes: training settings of the clean teachers.
        runner: trains.
        train: the clean training set.
    """
    suspects = [suspect._replace(seed=seed) for suspect in found.suspects for seed in range(seeds)]
    variables = ensemble.members(found.variables, np.repeat(np.arange(len(found.suspects)), seeds))
    if not any(suspect.parts for suspect in suspects):
        return SuspectTeachers(found.model, suspects, variables, None, recipes)
    clean = train_clean(key, seeds, found.model, recipes.from_scratch, runner, train)
    attack = read_attack(NO_ATTACK, train, found.suspects[0].attack.target, defender_gets="model")
    suspects += [_clean_suspect(attack, seed, train) for seed in range(seeds)]
    return SuspectTeachers(found.model, suspects, ensemble.join([variables, clean.variables]), clean, recipes)


def _clean_suspect(attack: AttackVariant, seed: int, train: Dataset) -> Suspect:
    return Suspect(attack, seed, train, (), np.zeros(len(train), bool))


def make_defense_input(
    teachers: SuspectTeachers, keys: Key, clean: Dataset | None, make_network: Callable[..., Model], runner: StageRunner
) -> DefenseInput:
    """What methods get: the teachers and clean rows, and no training set.

    Args:
        teachers: M of them.
        keys: typed [M].
        clean: the defender's clean rows; None without any.
        make_network: (name, num_classes=None) -> a network at the run's width.
        runner: trains and evaluates.
    """
    count, num_classes = len(teachers.suspects), teachers.model.num_classes

    def make_model(name: str | None = None, num_classes: int | None = None) -> Model:
        if name is None and num_classes in (None, teachers.model.num_classes):
            return teachers.model
        return make_network(name or teachers.model.description.partition(" ")[0], num_classes)

    rows = {}
    if clean is not None:
        index = np.tile(np.arange(len(clean), dtype=np.int32), (count, 1))
        rows = {"clean rows": PoolRows(index, np.tile(clean.labels, (count, 1)))}
    return DefenseInput(
        pool=jnp.zeros((0, *runner.image_shape), jnp.uint8) if clean is None else jnp.asarray(clean.images),
        num_classes=num_classes,
        keys=keys,
        make_model=make_model,
        recipe=teachers.recipes.from_scratch,
        runner=runner,
        knowledge={
            "attacked model": Nets(teachers.model, teachers.variables, 1, {}),
            **rows,
            "attacker's trigger": first_triggers(teachers.suspects),
        },
    )


def control(
    inputs: DefenseInput, teachers: SuspectTeachers, comparison: Comparison, views: TriggeredViews
) -> list[float | None]:
    """ASR of each teacher's trigger on a network without a backdoor, of the same seed.

    For the teacher itself that network is the clean teacher; for a student it is the clean teacher's student, if the run has
    a clean teacher.

    Args:
        inputs: the suspects as the method got them.
        teachers: M of them.
        comparison: the method on these teachers.
        views: the test images.

    Returns:
        M numbers; None for a teacher without a trigger, or without a control network.
    """
    if comparison.variant.defense.name == NO_ATTACK and teachers.clean is not None:
        seeds = {suspect.seed for suspect in teachers.suspects}
        of_seed = {seed: ensemble.members(teachers.clean.variables, seed) for seed in seeds}
    else:
        of_seed = clean_members(comparison)
    return success_on(inputs, comparison.result.model, of_seed, teachers.suspects, comparison.variant, views)


def open_teacher(
    text: str, train: Dataset, target: int, lowering: Lowering, compute_dtype: ComputeDtype = "float32"
) -> ThirdPartyModels:
    """Read third-party models, and their triggers if a folder has them.

    Args:
        text: a folder or a file of weights, see `bdjax.exchange.opening`.
        train: clean rows of the data that the models are for.
        target: the class that success is measured for.
        lowering: how to compute the convolutions.
        compute_dtype: dtype of the activations.

    Raises:
        InputError: as `bdjax.exchange.opening.open_model`; or the text names a black box, which has no weights.
    """
    if is_black_box(text):
        raise InputError(
            f"{text}: is a black box, and these methods need its weights: FOLDER or FILE.safetensors:ARCHITECTURE. "
            "Students of black boxes: bdjax ta-kd --teachers"
        )
    found = open_model(
        text,
        train.num_classes,
        train.image_shape,
        class_names=train.class_names,
        lowering=lowering,
        compute_dtype=compute_dtype,
        target=target,
    )
    count, suspects = ensemble.num_members(found.variables), []
    for number in range(count):
        name = f"teacher {number + 1}" if count > 1 else "teacher"
        plan, params = None, ()
        if found.triggers is not None:
            attack = Attack(
                name="third_party",
                title=found.triggers.names[number],
                paper="a third-party model with its trigger",
                threat="training",
                settings=UnknownSettings(),
                make_params=_no_params,
                apply=masked_blend.apply,
                label_rules=(found.label_rules[number],),
            )
            rule = make_rule(found.label_rules[number], target, train.num_classes)
            plan = Plan(name, (ConfiguredAttack(attack, attack.settings, rule),))
            params = (MaskedBlend(*(leaf[number] for leaf in found.triggers.params)),)
        label = f"your {name}" + (f" ({found.triggers.names[number]})" if found.triggers else "")
        suspects.append(Suspect(AttackVariant(name, plan, target, 0.0, label=label), 0, train, params, None))
    return ThirdPartyModels(found.model, found.variables, suspects, found.digest)


def _no_params(*arguments: object) -> PyTree:
    raise InputError("the trigger of a loaded model is fixed; it cannot be drawn again")


class FolderTrigger(NamedTuple):
    """A trigger in the form that a model folder stores."""

    triggers: ProviderTriggers
    """the trigger of a single provider"""
    label_rule: str
    """a key of LABEL_RULES"""


def trigger_of(suspect: Suspect, test: Dataset, triggered: Sequence[np.ndarray]) -> FolderTrigger | None:
    """A suspect's trigger as a masked blend, if a masked blend gives exactly the same test images.

    Args:
        suspect: a suspect.
        test: the test images.
        triggered: the test images under each of the suspect's triggers, uint8 [N, H, W, C].

    Returns:
        None for a suspect without a trigger, with several, or with a trigger of another form (a warp, or one that depends on
        the image).
    """
    if len(suspect.parts) != 1:
        return None
    parts = jax.tree.leaves(suspect.params[0], is_leaf=lambda leaf: isinstance(leaf, MaskedBlend))
    for blend in (part for part in parts if isinstance(part, MaskedBlend)):
        shown = trigger_all(jax.random.key(0), test, masked_blend.apply, blend)
        rule = _rule_name(suspect.parts[0].rule, suspect.attack.target, test.num_classes)
        if rule and np.array_equal(shown, triggered[0]):
            params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], blend)
            return FolderTrigger(ProviderTriggers(params, (suspect.parts[0].attack.title,), np.zeros(1, bool)), rule)
    return None


def _rule_name(rule: LabelRule, target: int, num_classes: int) -> str | None:
    """The first name in LABEL_RULES with the same rule at test time."""
    for name, make in LABEL_RULES.items():
        try:
            if make(target, num_classes).name == rule.name:
                return name
        except InputError:  # the data has too few classes for this rule
            continue
    return None


def write_folder(
    folder: pathlib.Path,
    model: Model,
    variables: PyTree,
    image_shape: tuple[int, int, int],
    trigger: FolderTrigger | None,
    target: int,
    target_name: str = "",
) -> bool:
    """Write networks as a model folder.

    Args:
        folder: where to write.
        model: their architecture, made by `bdjax.models.make_model`.
        variables: stacked [N, ...]; only "params" and "batch_stats" are written.
        image_shape: (H, W, C).
        trigger: the trigger of all N; None if there is none, or none of that form.
        target: the trigger's target class.
        target_name: its name; "" if it has none.

    Returns:
        False, and nothing is written, if the network is not one of `MODELS`.
    """
    name, _, width = model.description.rpartition(" width ")
    if name not in MODELS or not width.isdigit():
        return False
    network = {part: variables[part] for part in ("params", "batch_stats")}
    triggers, rules = trigger or (None, "")
    model_folder.write(
        folder,
        name,
        int(width),
        model.num_classes,
        image_shape,
        network,
        triggers,
        target,
        (rules,) if trigger else (),
        target_name,
    )
    return True
