"""From attacks to backdoored networks: make each trigger, poison, train all victims, and put the triggers to the test.

Every attack and every seed is one victim. Victims that train alike are members of one ensemble, whatever their attacks:
those of data attacks on as many rows, those that are fine-tuned on as many rows, and those of each attacker who controls
the training, since there every attack minimises something else.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import CleanModel, Knowledge, settings_for
from bdjax.attacks.label_rules import make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by_several, pooled, select_rows, trigger_all
from bdjax.attacks.registry import find_attack
from bdjax.errors import InputError
from bdjax.metrics import AttackMetrics, measure_attack
from bdjax.training import ensemble
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Dataset, Key, Model, PoisonedDataset, PyTree, TrainTest


class Plan(NamedTuple):
    """What one victim is attacked with: one attack, or several whose triggers share a training set (a hybrid)."""

    name: str
    """"badnets", "badnets+sig" """
    parts: tuple[ConfiguredAttack, ...]

    @property
    def control(self):
        """How the attacker trains, if it does; a hybrid is made of data attacks."""
        return self.parts[0].attack.control

    @property
    def starts_from_clean_model(self) -> bool:
        return self.parts[0].attack.starts_from_clean_model

    @property
    def title(self) -> str:
        return " + ".join(part.attack.title for part in self.parts)


def make_plan(
    name: str,
    dataset: Dataset,
    target: int,
    *,
    label_rule: str | None = None,
    poison_rate: float | None = None,
    changes: Mapping[str, Mapping[str, Any]] = {},
    like: str | None = None,
) -> Plan:
    """Settle what an attack is on a dataset.

    Args:
        name: of an attack, or of several with + between them.
        dataset: the training set, whose images decide on the defaults.
        target: the attacker's class.
        label_rule: a key of `LABEL_RULES`; None for each attack's own default.
        poison_rate: share of all rows, for each part; None for each attack's own default.
        changes: attack -> setting -> value.
        like: the named set whose settings are adopted; see `settings_for`.

    Raises:
        InputError: no such attack, rule, setting or class; a rate that the set does not allow; or parts that cannot share
          a training set.
    """
    parts = []
    for part_name in name.split("+"):
        attack = find_attack(part_name)
        rule_name = label_rule or attack.label_rules[0]
        if rule_name not in attack.label_rules:
            raise InputError(
                f"attack {part_name} goes with the label rules {', '.join(attack.label_rules)}, not {rule_name}"
            )
        own = dict(changes.get(part_name, {}))
        if poison_rate is not None:
            own["poison_rate"] = poison_rate
        rule = make_rule(rule_name, target, dataset.num_classes)
        parts.append(ConfiguredAttack(attack, settings_for(attack, dataset, own, like=like), rule))
    if len(parts) > 1 and any(part.attack.control or part.attack.starts_from_clean_model for part in parts):
        raise InputError(f"attack {name}: only attacks that poison data for a training from scratch can share a set")
    for part in parts:
        if not part.attack.control:  # rates that cannot be show before anything is trained
            select_rows(jax.random.key(0), dataset.labels, part.settings.poison_rate, part.rule)
    return Plan(name, tuple(parts))


class Prepared(NamedTuple):
    """A victim to be."""

    plan: Plan
    seed: int
    """which, from 0"""
    params: tuple[PyTree, ...]
    """of each part's trigger; those of a controlled attack are not final before training"""
    poisoned: PoisonedDataset | None
    """None if poisoning happens inside the training"""
    poisoned_by: tuple[np.ndarray, ...]
    """of each part: int32 [n], rows of `poisoned`"""


class Victim(NamedTuple):
    """A backdoored network."""

    prepared: Prepared
    model: Model
    variables: PyTree
    """of this one network"""
    params: tuple[PyTree, ...]
    """of each part's trigger, final"""
    history: Mapping[str, np.ndarray]
    """name -> float32 [epochs]"""


def key_of(key: Key, name: str) -> Key:
    """A key of an attack's own, which does not depend on what other attacks it is run with."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) >> 1)


def prepare(key: Key, plan: Plan, train: Dataset, target: int, seed: int, clean_model: CleanModel) -> Prepared:
    """Make a plan's triggers, and poison the training set with them unless the attacker does so in training.

    Args:
        key: of the seed.
        plan: what to do.
        train: the clean training set.
        target: the attacker's class.
        seed: which, from 0.
        clean_model: what attackers have who need one.

    Raises:
        InputError: rates that do not fit the set, an attack that does not fit the images, or a trigger that changes nothing.
    """
    make_key, poison_key = jax.random.split(key_of(key, plan.name))
    params = []
    for number, part in enumerate(plan.parts):
        has_model = part.attack.needs_clean_model or part.attack.starts_from_clean_model
        knowledge = Knowledge(train, target, clean_model if has_model else None)
        params.append(part.attack.make_params(jax.random.fold_in(make_key, number), knowledge, part.settings))
    if plan.control:
        return Prepared(plan, seed, tuple(params), None, ())
    poisoned, rows = poison_by_several(poison_key, train, plan.parts, params)
    for part, own in zip(plan.parts, rows, strict=True):
        is_in_place = part.attack.changes_images and not part.attack.adds_rows
        if is_in_place and np.array_equal(poisoned.images[own], train.images[own]):
            raise InputError(
                f"attack {part.attack.name}: its trigger changes no pixel of the {len(own)} rows it is put on"
            )
    return Prepared(plan, seed, tuple(params), poisoned, tuple(rows))


def train_victims(
    key: Key,
    runner: StageRunner,
    prepared: Sequence[Prepared],
    train: Dataset,
    clean: Nets,
    from_scratch: TrainConfig,
    fine_tuning: TrainConfig,
    controlled: TrainConfig,
) -> list[Victim]:
    """Train every victim, those that train alike as one ensemble.

    Args:
        key: for weights and shuffles.
        runner: keeps what is trained.
        prepared: of all attacks and seeds.
        train: the clean training set.
        clean: one clean network for each seed.
        from_scratch: how victims of data attacks train.
        fine_tuning: how those train that start from the clean network.
        controlled: how those of attackers train who control the training from scratch.

    Returns:
        The victims, in the order of `prepared`.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for number, one in enumerate(prepared):
        if one.plan.control:
            group = (one.plan.name, len(train))
        else:
            kind = "fine-tuned victims" if one.plan.starts_from_clean_model else "victims"
            group = (kind, len(one.poisoned))
        groups.setdefault(group, []).append(number)
    victims: dict[int, Victim] = {}
    for (kind, num_rows), numbers in groups.items():
        ones = [prepared[number] for number in numbers]
        name = kind if num_rows == len(train) else f"{kind}, {num_rows} rows"
        keys = jnp.stack([jax.random.fold_in(key_of(key, one.plan.name), one.seed) for one in ones])
        pool, rows = _pool(train, ones)
        if ones[0].plan.control:
            trained = _train_controlled(name, runner, ones, keys, pool, rows, clean, fine_tuning, controlled)
        elif ones[0].plan.starts_from_clean_model:
            start = ensemble.members(clean.variables, np.array([one.seed for one in ones]))
            nets = runner.from_variables(name, clean.model, fine_tuning, start, keys, 1, pool, rows)
            trained = [(ensemble.members(nets.variables, i), one.params, nets.history) for i, one in enumerate(ones)]
        else:
            none = jax.tree.map(lambda leaf: leaf[:, :0], rows)
            nets = runner.from_scratch(name, clean.model, from_scratch, keys, 1, pool, rows, none)
            trained = [(ensemble.members(nets.variables, i), one.params, nets.history) for i, one in enumerate(ones)]
        for i, (number, (variables, params, history)) in enumerate(zip(numbers, trained, strict=True)):
            own = {metric: values[i] for metric, values in history.items()}
            victims[number] = Victim(prepared[number], clean.model, variables, tuple(params), own)
    return [victims[number] for number in range(len(prepared))]


def _pool(train: Dataset, ones: Sequence[Prepared]) -> tuple[jax.Array, Rows]:
    pool, index, labels = pooled(train, [one.poisoned for one in ones])
    return jnp.asarray(pool), Rows(jnp.asarray(index), {"labels": jnp.asarray(labels)})


def _train_controlled(
    name: str,
    runner: StageRunner,
    ones: Sequence[Prepared],
    keys: Key,
    pool: jax.Array,
    rows: Rows,
    clean: Nets,
    fine_tuning: TrainConfig,
    controlled: TrainConfig,
) -> list[tuple[PyTree, tuple[PyTree, ...], Mapping[str, np.ndarray]]]:
    part, control = ones[0].plan.parts[0], ones[0].plan.control
    model, num_classes = clean.model, clean.model.num_classes
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    if part.attack.starts_from_clean_model:
        classifiers = ensemble.members(clean.variables, np.array([one.seed for one in ones]))
    else:
        classifiers = ensemble.init_members(lambda key: model.init(key, runner.image_shape), split[:, 0])
    params = ensemble.stack([one.params[0] for one in ones])
    variables = ensemble.init_members(control.begin, split[:, 1], classifiers, params)
    wanted = jnp.asarray(part.rule.relabel(np.arange(num_classes, dtype=np.int32)))
    objective = control.objective(model, part.settings, wanted)
    config = fine_tuning if part.attack.starts_from_clean_model else controlled
    nets = runner.from_variables(name, model, config, variables, split[:, 2], 1, pool, rows, objective)
    ended = [control.end(ensemble.members(nets.variables, i)) for i in range(len(ones))]
    return [(classifier, (params,), nets.history) for classifier, params in ended]


class Trial(NamedTuple):
    """One victim under one of its triggers."""

    victim: Victim
    part: ConfiguredAttack
    metrics: AttackMetrics
    clean_model: AttackMetrics
    """the clean network of the same seed under the same trigger"""
    cover_accuracy: float | None
    """of victim rows under what cover rows carry, predicted as their true label"""
    triggered: np.ndarray
    """uint8 [N, H, W, C]: the test images with the trigger"""


def evaluate_victims(
    key: Key, runner: StageRunner, victims: Sequence[Victim], clean: Nets, data: TrainTest, batch_size: int
) -> Iterator[list[Trial]]:
    """Measure the victims of one plan after the other, each under each of its triggers, and the clean network with them.

    Args:
        key: for triggers that are random per image: the same test images for every victim of a seed.
        runner: lays the members out.
        victims: of all plans and seeds; those of one plan follow each other.
        clean: one clean network for each seed.
        data: the test set is used.
        batch_size: images at once.

    Yields:
        For each plan, what was measured: all seeds of the first part, then of the second.
    """
    test = data.test
    plans: dict[str, list[int]] = {}
    for position, victim in enumerate(victims):
        plans.setdefault(victim.prepared.plan.name, []).append(position)
    clean_predictions = np.argmax(runner.predict(clean.model, clean.variables, test.images, batch_size), -1)
    stacked = ensemble.stack([victim.variables for victim in victims])
    victim_predictions = np.argmax(runner.predict(clean.model, stacked, test.images, batch_size), -1)
    for positions in plans.values():
        members, tested = [victims[position] for position in positions], []
        own = ensemble.stack([victim.variables for victim in members])
        references = ensemble.members(clean.variables, np.array([victim.prepared.seed for victim in members]))
        both = ensemble.join([own, references])
        for number, part in enumerate(members[0].prepared.plan.parts):
            views = np.stack(
                [
                    trigger_all(
                        jax.random.fold_in(key, victim.prepared.seed), test, part.attack.apply, victim.params[number]
                    )
                    for victim in members
                ]
            )
            answers = np.argmax(runner.predict_own(clean.model, both, np.concatenate([views, views]), batch_size), -1)
            cover = _cover_accuracy(key, runner, members, own, part, number, test, batch_size)
            rows, wanted = part.rule.victims(test.labels), part.rule.wanted(test.labels)
            for i, (position, victim) in enumerate(zip(positions, members, strict=True)):
                against = test.labels, rows, wanted
                measured = measure_attack(victim_predictions[position], answers[i], *against)
                reference = measure_attack(clean_predictions[victim.prepared.seed], answers[len(members) + i], *against)
                tested.append(Trial(victim, part, measured, reference, cover[i], views[i]))
        yield tested


def _cover_accuracy(
    key: Key,
    runner: StageRunner,
    members: Sequence[Victim],
    variables: PyTree,
    part: ConfiguredAttack,
    number: int,
    test: Dataset,
    batch_size: int,
) -> list[float | None]:
    """Whether the backdoor stays shut for what the attacker taught the model to ignore: another's trigger, a noisy one."""
    apply = part.attack.apply_to_cover
    if apply is None or not part.settings.cover_rate:
        return [None] * len(members)
    views = [trigger_all(jax.random.fold_in(key, v.prepared.seed), test, apply, v.params[number]) for v in members]
    answers = np.argmax(runner.predict_own(members[0].model, variables, np.stack(views), batch_size), -1)
    rows = part.rule.victims(test.labels)
    return [float(np.mean((answers[i] == test.labels)[rows])) for i in range(len(members))]
