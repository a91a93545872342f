"""From attacks to backdoored networks: make each trigger, poison, train all victims, and evaluate the triggers.

There is one victim for every attack and seed. Victims that are trained in the same way form one ensemble: victims of data
attacks with the same number of rows, fine-tuned victims with the same number of rows, and the victims of each attacker who
controls the training, since each of these attacks has a different objective.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import CleanModel, Knowledge, settings_for
from bdjax.attacks.label_rules import check_target, make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, check_rows, poison_by_several, pooled, trigger_all
from bdjax.attacks.registry import find_attack
from bdjax.errors import InputError
from bdjax.metrics import AttackMetrics, measure_attack
from bdjax.settings import nearest
from bdjax.training import ensemble, stages
from bdjax.training.member import Rows, TrainConfig, no_rows
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Dataset, Key, Model, PoisonedDataset, PyTree, TrainTest


class Plan(NamedTuple):
    """What a victim is attacked with: one attack, or several that poison the same training set (a hybrid)."""

    name: str
    """"badnets", "badnets+sig" """
    parts: tuple[ConfiguredAttack, ...]

    @property
    def control(self):
        """The attacker's control of the training, if any; a hybrid consists of data attacks."""
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
    """Configure an attack, or a hybrid, for a dataset.

    Args:
        name: an attack, or several joined by +.
        dataset: the training set; its images determine the defaults.
        target: the target class.
        label_rule: a key of `LABEL_RULES`; None for each attack's default.
        poison_rate: share of all rows, for each attack; None for each attack's default.
        changes: attack -> setting -> value.
        like: the named dataset whose settings are used; see `settings_for`.

    Raises:
        InputError: there is no such attack, rule, setting or class; the class has no rows; a rate or a setting does not fit the
          dataset; or the attacks cannot share a training set.
    """
    parts = []
    for part_name in name.split("+"):
        attack = find_attack(part_name)
        rule_name = label_rule or attack.label_rules[0]
        if rule_name not in attack.label_rules:
            raise InputError(
                f"attack {part_name}: label rule {rule_name} is not one of {', '.join(attack.label_rules)}"
                + nearest(rule_name, attack.label_rules)
            )
        part_changes = dict(changes.get(part_name, {}))
        if poison_rate is not None:
            part_changes["poison_rate"] = poison_rate
        rule = make_rule(rule_name, target, dataset.num_classes)
        parts.append(ConfiguredAttack(attack, settings_for(attack, dataset, part_changes, like=like), rule))
    if len(parts) > 1 and any(part.attack.control or part.attack.starts_from_clean_model for part in parts):
        raise InputError(
            f"attack {name}: only data attacks whose victims are trained from scratch can be combined with +"
        )
    check_target(target, dataset)
    for part in parts:
        if part.attack.check:
            part.attack.check(dataset, target, part.settings)
    if not any(part.attack.control for part in parts):
        check_rows(dataset.labels, parts)
    return Plan(name, tuple(parts))


def try_out(key: Key, plan: Plan, train: Dataset, target: int) -> None:
    """Poison the training set if the plan's triggers are cheap to make, so that what does not fit is reported before anything
    is trained or written. Costly triggers have `Attack.check`, which `make_plan` calls.

    Args:
        key: the seed's key.
        plan: the attacks.
        train: the clean training set.
        target: the target class.

    Raises:
        InputError: as `prepare`.
    """
    attacks = [part.attack for part in plan.parts]
    if not any(attack.needs_clean_model or attack.trigger_is_trained for attack in attacks):
        prepare(key, plan, train, target, 0, None)


class Prepared(NamedTuple):
    """A victim before its training."""

    plan: Plan
    seed: int
    """number of the seed, from 0"""
    params: tuple[PyTree, ...]
    """trigger parameters of each attack; if the attacker controls the training, they are final only after it"""
    poisoned: PoisonedDataset | None
    """the poisoned training set; None if poisoning happens inside the training"""
    poisoned_by: tuple[np.ndarray, ...]
    """for each attack, int32 [n]: the rows of `poisoned` that it poisoned"""


class Victim(NamedTuple):
    """A backdoored network."""

    prepared: Prepared
    model: Model
    variables: PyTree
    """the network's variables"""
    params: tuple[PyTree, ...]
    """final trigger parameters of each attack"""
    history: Mapping[str, np.ndarray]
    """metric -> float32 [epochs]"""


def key_of(key: Key, name: str) -> Key:
    """A key derived from an attack's name, so that it does not depend on the other attacks of the run."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) >> 1)


def prepare(key: Key, plan: Plan, train: Dataset, target: int, seed: int, clean_model: CleanModel | None) -> Prepared:
    """Make a plan's triggers, and poison the training set unless the attacker does so during training.

    Args:
        key: the seed's key.
        plan: the attacks.
        train: the clean training set.
        target: the target class.
        seed: number of the seed, from 0.
        clean_model: the clean model, for attacks that need one.

    Raises:
        InputError: a rate does not fit the dataset, an attack does not fit the images, or a trigger changes nothing.
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
    for part, part_rows in zip(plan.parts, rows, strict=True):
        is_in_place = part.attack.changes_images and not part.attack.adds_rows
        if is_in_place and np.array_equal(poisoned.images[part_rows], train.images[part_rows]):
            raise InputError(
                f"attack {part.attack.name}: its trigger changes no pixel of the {len(part_rows)} poisoned rows"
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
    """Train every victim; victims that are trained in the same way form one ensemble.

    Args:
        key: draws weights and shuffles.
        runner: trains the networks and keeps checkpoints.
        prepared: the victims of all attacks and seeds.
        train: the clean training set.
        clean: one clean network per seed.
        from_scratch: recipe for victims of data attacks.
        fine_tuning: recipe for victims that start from the clean network.
        controlled: recipe for attackers who control the training and start from scratch.

    Returns:
        The victims, in the order of `prepared`.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for number, victim in enumerate(prepared):
        if victim.plan.control:
            group = (victim.plan.name, len(train))
        else:
            kind = "fine-tuned victims" if victim.plan.starts_from_clean_model else "victims"
            group = (kind, len(victim.poisoned))
        groups.setdefault(group, []).append(number)
    victims: dict[int, Victim] = {}
    for (kind, num_rows), numbers in groups.items():
        members = [prepared[number] for number in numbers]
        plan = members[0].plan
        name = kind if num_rows == len(train) else f"{kind}, {num_rows} rows"
        keys = jnp.stack([jax.random.fold_in(key_of(key, member.plan.name), member.seed) for member in members])
        pool, rows = _pool(train, members)
        if plan.control:
            nets = _train_controlled(name, runner, members, keys, pool, rows, clean, fine_tuning, controlled)
        elif plan.starts_from_clean_model:
            start = ensemble.members(clean.variables, np.array([member.seed for member in members]))
            nets = runner.from_variables(name, clean.model, fine_tuning, start, keys, 1, pool, rows)
        else:
            nets = runner.from_scratch(name, clean.model, from_scratch, keys, 1, pool, rows, no_rows(rows))
        for i, number in enumerate(numbers):
            variables, params = ensemble.members(nets.variables, i), members[i].params
            if plan.control:
                variables, final_params = plan.control.end(variables)
                params = (final_params,)
            history = {metric: values[i] for metric, values in nets.history.items()}
            victims[number] = Victim(prepared[number], clean.model, variables, params, history)
    return [victims[number] for number in range(len(prepared))]


def _pool(train: Dataset, members: Sequence[Prepared]) -> tuple[jax.Array, Rows]:
    pool, index, labels = pooled(train, [member.poisoned for member in members])
    return jnp.asarray(pool), Rows(jnp.asarray(index), {"labels": jnp.asarray(labels)})


def _train_controlled(
    name: str,
    runner: StageRunner,
    members: Sequence[Prepared],
    keys: Key,
    pool: jax.Array,
    rows: Rows,
    clean: Nets,
    fine_tuning: TrainConfig,
    controlled: TrainConfig,
) -> Nets:
    part, control = members[0].plan.parts[0], members[0].plan.control
    model, num_classes = clean.model, clean.model.num_classes
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    if part.attack.starts_from_clean_model:
        classifiers = ensemble.members(clean.variables, np.array([member.seed for member in members]))
    else:
        classifiers = ensemble.init_networks(model, runner.image_shape, split[:, 0])
        classifiers = stages.prepare(model, classifiers, pool, rows.index)
    params = ensemble.stack([member.params[0] for member in members])
    variables = ensemble.init_members(control.begin, split[:, 1], classifiers, params)
    wanted = jnp.asarray(part.rule.relabel(np.arange(num_classes, dtype=np.int32)))
    objective = control.objective(model, part.settings, wanted)
    config = fine_tuning if part.attack.starts_from_clean_model else controlled
    return runner.from_variables(name, model, config, variables, split[:, 2], 1, pool, rows, objective)


class Trial(NamedTuple):
    """Results of one victim with one of its triggers."""

    victim: Victim
    part: ConfiguredAttack
    metrics: AttackMetrics
    clean_model: AttackMetrics
    """results of the clean network of the same seed with the same trigger"""
    cover_accuracy: float | None
    """accuracy on the test rows that are attacked, changed as cover rows are; None without cover rows"""
    triggered: np.ndarray
    """uint8 [N, H, W, C]: the test images with the trigger"""


def evaluate_victims(
    key: Key, runner: StageRunner, victims: Sequence[Victim], clean: Nets, data: TrainTest, batch_size: int
) -> Iterator[list[Trial]]:
    """Evaluate the victims plan by plan, with each of their triggers, next to the clean network.

    Args:
        key: for triggers that are random per image; all victims of a seed get the same test images.
        runner: runs the networks.
        victims: of all plans and seeds, grouped by plan.
        clean: one clean network per seed.
        data: its test set is used.
        batch_size: images per batch.

    Yields:
        The results of each plan: all seeds of the first attack, then of the second.
    """
    test = data.test
    plans: dict[str, list[int]] = {}
    for position, victim in enumerate(victims):
        plans.setdefault(victim.prepared.plan.name, []).append(position)
    clean_predictions = np.argmax(runner.predict(clean.model, clean.variables, test.images, batch_size), -1)
    stacked = ensemble.stack([victim.variables for victim in victims])
    victim_predictions = np.argmax(runner.predict(clean.model, stacked, test.images, batch_size), -1)
    for positions in plans.values():
        members, trials = [victims[position] for position in positions], []
        variables = ensemble.stack([victim.variables for victim in members])
        references = ensemble.members(clean.variables, np.array([victim.prepared.seed for victim in members]))
        both = ensemble.join([variables, references])
        for number, part in enumerate(members[0].prepared.plan.parts):
            views = np.stack(
                [
                    trigger_all(
                        jax.random.fold_in(key, victim.prepared.seed), test, part.attack.apply, victim.params[number]
                    )
                    for victim in members
                ]
            )
            logits = runner.predict_own(clean.model, both, np.concatenate([views, views]), batch_size)
            predictions = np.argmax(logits, -1)
            cover = _cover_accuracy(key, runner, members, variables, part, number, test, batch_size)
            rows, wanted = part.rule.victims(test.labels), part.rule.wanted(test.labels)
            for i, (position, victim) in enumerate(zip(positions, members, strict=True)):
                truth = test.labels, rows, wanted
                measured = measure_attack(victim_predictions[position], predictions[i], *truth)
                of_clean = clean_predictions[victim.prepared.seed], predictions[len(members) + i]
                trials.append(Trial(victim, part, measured, measure_attack(*of_clean, *truth), cover[i], views[i]))
        yield trials


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
    """Accuracy on images changed as cover rows are, to which the model must not react: say with another image's trigger."""
    apply = part.attack.apply_to_cover
    if apply is None or not part.settings.cover_rate:
        return [None] * len(members)
    views = [trigger_all(jax.random.fold_in(key, v.prepared.seed), test, apply, v.params[number]) for v in members]
    predictions = np.argmax(runner.predict_own(members[0].model, variables, np.stack(views), batch_size), -1)
    rows = part.rule.victims(test.labels)
    return [float(np.mean((predictions[i] == test.labels)[rows])) for i in range(len(members))]
