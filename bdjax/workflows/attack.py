"""Attacks from the data to the report: poison, train victims, measure them and clean networks under the same triggers."""

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks import outsourcing
from bdjax.attacks.contract import Attack, CleanModel
from bdjax.attacks.registry import ATTACKS
from bdjax.attacks.victims import Plan, Prepared, Trial, evaluate_victims, make_plan, prepare, train_victims, try_out
from bdjax.choices import Recipe
from bdjax.datasets.npz import classes_as_arrays
from bdjax.errors import InputError
from bdjax.reporting import attacks
from bdjax.reporting.sections import file_name
from bdjax.run.checks import check_ranges
from bdjax.run.config import ALL, adapted_to, check_recipe, load
from bdjax.run.configs.attack import Config
from bdjax.run.experiment import Experiment, default_of
from bdjax.run.folder import RunFolder
from bdjax.run.log import StageLog
from bdjax.settings import read_value, shown
from bdjax.training import ensemble, processes, recipes
from bdjax.training.member import TrainConfig
from bdjax.training.stages import Nets
from bdjax.types import Dataset, Key, Model
from bdjax.workflows import base

HYBRIDS = ("badnets+blended", "badnets+composite", "badnets+sig", "badnets+refool")
"""Run by `--attack=all` in addition to the registry: ABM's four hybrids."""


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Run attacks from the data to the report.

    Args:
        config: all settings.
        experiment: its presets.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: the data, an attack or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config)
    check_recipe(config, default_of(experiment, config))
    data = load(config, log)
    train, test = data
    clean_key, attack_key, victim_key, test_key = jax.random.split(jax.random.key(config.seed), 4)
    # Every error in the settings is raised before the folder is opened, and before anything is measured.
    plans, left_out = make_plans(config, train, jax.random.fold_in(attack_key, config.seed))
    members = sum(num_seeds(config, plan) for plan in plans)
    kept = members * (train.images.nbytes + test.images.nbytes)
    run = base.begin(
        experiment,
        config,
        train,
        members,
        log,
        networks=[config.model],
        kept=kept,
        plan=planned(config, plans, len(train)),
    )
    model = run.make_model(config.model)
    folder = run.open_folder()
    runner = run.make_runner(folder.checkpoints)
    from_scratch = train_config(config, config.epochs, config.learning_rate, config.recipe)
    rows = outsourcing.split_rows([clean_key] * config.seeds, train.labels, 0.0)
    clean_keys = jax.random.split(clean_key, config.seeds)
    clean = runner.from_scratch("clean", model, from_scratch, clean_keys, 1, jnp.asarray(train.images), *rows)
    prepared, impossible = prepare_all(config, plans, attack_key, train, model, clean, log)
    left_out |= impossible
    fine_tuning = train_config(config, config.fine_tuning_epochs, config.fine_tuning_learning_rate)
    controlled = train_config(config, config.controlled_epochs, config.learning_rate, config.recipe)
    victims = train_victims(victim_key, runner, prepared, train, clean, from_scratch, fine_tuning, controlled)
    with log.stage("test", total=len(plans), unit="attacks") as stage:
        trials = []
        for of_plan in evaluate_victims(test_key, runner, victims, clean, data, config.evaluation_batch_size):
            trials.append(of_plan)
            stage.advance(1, of_plan[0].victim.prepared.plan.name)
    results = attacks.summarise(trials, test.images, test.labels, config.seed, left_out, train.class_title)
    results = base.write_results(folder, results, *data)
    if not processes.is_primary():
        return results
    save_models(run, folder, trials, model, clean, train)
    if config.save_poisoned:
        with log.stage("poisoned sets") as stage:
            stage.detail = save_poisoned(folder, prepared)
            stage.wrote("poisoned")
    page = attacks.page(folder, results, trials, data)
    base.finish(run, folder, page, attacks.main_table(results, train.name), base.sources_of(data), results)
    return results


def prepare_all(
    config: Config, plans: Sequence[Plan], key: Key, train: Dataset, model: Model, clean: Nets, log: StageLog
) -> tuple[list[Prepared], dict[str, str]]:
    """Make every plan's triggers and poisoned sets, for each of its seeds.

    Returns:
        The victims to train; and for `--attack=all`, attacks that cannot be run on the dataset -> why.

    Raises:
        InputError: an attack that was named cannot be run.
    """
    prepared, left_out = [], {}
    clean_models = [CleanModel(model, ensemble.members(clean.variables, s)) for s in range(config.seeds)]
    with log.stage("triggers", total=sum(num_seeds(config, plan) for plan in plans), unit="victims") as stage:
        for plan in plans:
            try:
                for s in range(num_seeds(config, plan)):
                    seed_key = jax.random.fold_in(key, config.seed + s)
                    prepared.append(prepare(seed_key, plan, train, config.target, s, clean_models[s]))
                    stage.advance(1, plan.name)
            except InputError as error:
                if config.attack != ALL:
                    raise
                left_out[plan.name] = str(error)
        stage.detail = left_out_text(left_out)
    return prepared, left_out


def make_plans(config: Config, train: Dataset, key: Key | None = None) -> tuple[list[Plan], dict[str, str]]:
    """Every attack of the run, in the order of the registry or of the command line.

    Args:
        config: all settings.
        train: the training rows.
        key: of the first seed's triggers, which are tried out if they are cheap to make; None to try out none.

    Returns:
        The plans; and for `--attack=all`, attacks that cannot be run on the dataset -> why.

    Raises:
        InputError: an attack that was named cannot be run, or a change names an attack that is not run.
    """
    is_all = config.attack == ALL
    names = [*ATTACKS, *HYBRIDS] if is_all else list(dict.fromkeys(config.attack.split(",")))
    changes = read_changes(config.change, names)
    plans, left_out = [], {}
    options = {"label_rule": config.label_rule, "poison_rate": config.poison_rate, "changes": changes}
    for name in names:
        try:
            plan = make_plan(name, train, config.target, like=adapted_to(config), **options)
            if key is not None:
                try_out(key, plan, train, config.target)
            plans.append(plan)
        except InputError as error:
            if not is_all:
                raise
            left_out[name] = str(error)
    if not plans:
        raise InputError(f"no attack can be run: {left_out_text(left_out)}")
    return plans, left_out


def read_changes(texts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse attack.name=value, or name=value if a single attack is run: attack -> name -> value.

    Raises:
        InputError: a text has neither form, or names an attack that is not run.
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        attack, _, setting = name.rpartition(".")
        if not equals or not setting or (not attack and (len(names) > 1 or "+" in names[0])):
            raise InputError(
                f"--change {shown(text)} should be name=value, or attack.name=value if several attacks are run"
            )
        of_attack = changes.setdefault(attack or names[0], {})
        if setting in of_attack:
            raise InputError(f"--change {shown(text)}: {setting} is set twice; set it once")
        of_attack[setting] = read_value(value)
    run = {part for name in names for part in name.split("+")}
    if unknown := sorted(changes.keys() - run):
        raise InputError(
            f"--change names the attack {shown(unknown[0])}, which is not run; --attack has {', '.join(names)}"
        )
    return changes


def left_out_text(left_out: Mapping[str, str]) -> str:
    """One line on the attacks that cannot be run on the dataset."""
    return "; ".join(f"{name} left out: {reason}" for name, reason in left_out.items())


def planned(config: Config, plans: Sequence[Plan], rows: int) -> list[base.Planned]:
    """The clean networks and the victims."""
    victims = Counter()
    for plan in plans:
        fresh = config.controlled_epochs if plan.control else config.epochs
        epochs = config.fine_tuning_epochs if plan.starts_from_clean_model else fresh
        victims[epochs] += num_seeds(config, plan)
    clean = base.Planned(config.model, config.seeds, config.epochs, rows)
    return [clean, *(base.Planned(config.model, count, epochs, rows) for epochs, count in victims.items())]


def num_seeds(config: Config, plan: Plan) -> int:
    """Number of seeds that an attack is run with."""
    return seeds_of(config, [part.attack for part in plan.parts])


def seeds_of(config: Config, attacks: Sequence[Attack]) -> int:
    """Number of seeds that an attack of these parts is run with."""
    is_costly = any(attack.trigger_is_trained or attack.control for attack in attacks)
    return min(config.seeds, config.costly_seeds or config.seeds) if is_costly else config.seeds


def check(config: Config) -> None:
    """Refuse settings out of range, whatever the data.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(config)


def train_config(config: Config, epochs: int, learning_rate: float, recipe: Recipe = "") -> TrainConfig:
    """Training settings of this run's networks. Incomplete last batches are dropped: their different shape would double the
    compilation time."""
    plain = TrainConfig(
        epochs,
        config.batch_size,
        config.evaluation_batch_size,
        learning_rate,
        config.weight_decay,
        schedule=config.schedule,
        keep_last_batch=False,
        augmentation=config.augmentation,
    )
    return dataclasses.replace(plain, **recipes.fields(recipe, config.batch_size))


def save_models(
    run: base.Run, folder: RunFolder, trials: Sequence[Sequence[Trial]], model: Model, clean: Nets, train: Dataset
) -> None:
    """Write the first seed's networks: models/clean, and models/<attack> for every victim."""
    first = np.array([0])
    seed = run.config.seed
    base.leave_network(
        run, folder, "clean", model, ensemble.members(clean.variables, first), train, role="clean", seed=seed
    )
    for victim in (of_plan[0].victim for of_plan in trials if not of_plan[0].victim.prepared.seed):
        name = victim.prepared.plan.name
        made_by = {"role": "victim", "attack": name, "seed": seed}
        stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], victim.variables)
        base.leave_network(run, folder, file_name(name), victim.model, stacked, train, **made_by)


def save_poisoned(folder: RunFolder, prepared: Sequence[Prepared]) -> str:
    """Write the first seed's poisoned training sets as .npz, for any framework; returns a note on attacks without a set."""
    (folder.path / "poisoned").mkdir(exist_ok=True)
    without_set = []
    for victim in prepared:
        if victim.seed:
            continue
        if victim.poisoned is None:
            without_set.append(victim.plan.name)
            continue
        buffer = io.BytesIO()
        names = ("images", "labels", "is_poisoned", "original_labels", "is_cover")
        arrays = {name: getattr(victim.poisoned, name) for name in names}
        np.savez_compressed(buffer, **arrays, **classes_as_arrays(victim.poisoned))
        folder.write_bytes(f"poisoned/{victim.plan.name}.npz", buffer.getvalue())
    return f"no set for {', '.join(without_set)}: the attacker controls the training" if without_set else ""
