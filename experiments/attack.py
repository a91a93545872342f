"""Attacks: poison a training set, train victims on it, and show whether the backdoor is there.

    python experiments/attack.py                                    # BadNets on the digits
    python experiments/attack.py --attack=badnets,sig --dataset=mnist
    python experiments/attack.py --attack=badnets+sig               # a hybrid: both in one training set
    python experiments/attack.py --attack=all --dataset=mnist       # every attack, one table
    python experiments/attack.py --attack=sig --change amplitude=0.3 --poison-rate=0.05 --label-rule=all_to_one

Victims of several attacks and seeds train as one ensemble. The same command continues a run that was cut off, and ends at
the same numbers. Everything is written to one folder (`--output`, by default below `runs/attack/`): report.html, table.md,
the gallery, and each poisoned training set as an .npz with images, labels, is_poisoned, original_labels and is_cover.
"""

import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks import outsourcing
from bdjax.attacks.contract import CleanModel
from bdjax.attacks.registry import ATTACKS
from bdjax.attacks.victims import Plan, Prepared, evaluate_victims, make_plan, prepare, train_victims
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.reporting import attack_report, attack_results
from bdjax.reporting.tables import to_rich
from bdjax.run import command_line
from bdjax.run import config as run_config
from bdjax.run.config import IGNORED, ExperimentConfig, check_ranges, choose_engine, load, open_folder
from bdjax.run.folder import RunFolder, to_plain
from bdjax.run.log import StageLog
from bdjax.settings import read_value
from bdjax.training import ensemble, processes
from bdjax.training.augmentation import Augmentation
from bdjax.training.member import Schedule, TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset

Preset = Literal["quick", "paper"]

HYBRIDS = ("badnets+blended", "badnets+composite", "badnets+sig", "badnets+refool")
"""What `--attack=all` runs beside the registry: ABM's four hybrids."""


@dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """Every setting of an attack run; `--preset` and `--dataset` decide what the others default to."""

    attack: str = "badnets"
    """one attack, several with commas between them, a hybrid (badnets+sig), or all"""
    preset: Preset = "paper"
    """quick: minutes on two cores; paper: ResNet-18 of width 64 for 80 epochs, as LfD trains, for a GPU"""
    label_rule: str | None = None
    """who is relabelled to what: all_to_one, all_to_all, clean_label, ...; by default each attack's own"""
    poison_rate: float | None = None
    """share of all training rows, of each trigger; by default each attack's own"""
    change: tuple[str, ...] = ()
    """settings of an attack, as name=value, or attack.name=value where several are run"""
    costly_seeds: int = 0
    """how many of the seeds attacks get whose trigger is trained or whose attacker trains; 0 for all"""
    save_poisoned: bool = True
    """write the first seed's poisoned training sets"""

    model: str = "resnet18"
    """the victims, the clean reference, and the clean model that some attackers have"""
    width: int = 64
    """channels of its first stage"""
    epochs: int = 80
    """of the clean reference and of victims that are trained from scratch on poisoned data"""
    controlled_epochs: int = 100
    """of victims whose attacker controls the training from scratch"""
    fine_tuning_epochs: int = 8
    """of victims that start from the clean model"""
    batch_size: int = 128
    """of every training"""
    learning_rate: float = 1e-3
    """Adam's"""
    fine_tuning_learning_rate: float = 1e-4
    """Adam's, of victims that start from the clean model"""
    schedule: Schedule = "cosine"
    """half a cosine, or the plateau rule on the training loss"""
    weight_decay: float = 0.0
    """L2, as PyTorch's Adam has it"""
    augmentation: Augmentation = "none"
    """of training rows, after they were poisoned"""
    evaluation_batch_size: int = 250
    """images at once in tests"""


FLIPPABLE = ("cifar10", "cifar100")
"""Sets of natural images, where a mirrored picture is of the same class."""

_QUICK = {"model": "resnet10", "width": 8, "batch_size": 64, "learning_rate": 3e-3, "fine_tuning_learning_rate": 1e-3}
QUICK: dict[str, dict[str, Any]] = {
    "digits": _QUICK | {"batch_size": 32, "epochs": 20, "controlled_epochs": 40, "fine_tuning_epochs": 10},
    "mnist": _QUICK
    | {
        "train_rows": 4000,
        "test_rows": 1000,
        "epochs": 8,
        "controlled_epochs": 16,
        "fine_tuning_epochs": 5,
        "costly_seeds": 1,
    },
    "cifar10": _QUICK
    | {
        "train_rows": 6000,
        "test_rows": 1000,
        "epochs": 10,
        "controlled_epochs": 12,
        "fine_tuning_epochs": 4,
        "seeds": 1,
    },
}


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Raises:
        InputError: if there is no such preset.
    """
    on_cpu = jax.default_backend() == "cpu"
    preset = preset or ("quick" if on_cpu else "paper")
    dataset = dataset or "digits"
    if preset not in ("quick", "paper"):
        raise InputError(f"--preset {preset!r} is not one of quick, paper")
    like = {"fashion_mnist": "mnist", "cifar100": "cifar10", "gtsrb": "cifar10"}.get(dataset, dataset)
    if preset == "quick":
        changes = QUICK.get(like, QUICK["cifar10"])
    else:
        changes = {"augmentation": "crop_flip" if dataset in FLIPPABLE else "crop"}
    base = Config(dataset=dataset, preset=preset, compute_dtype="float32" if on_cpu else "bfloat16")
    return dataclasses.replace(base, **changes)


def run(config: Config, log: StageLog | None = None) -> dict[str, Any]:
    """Run attacks from the data to the report.

    Args:
        config: all settings.
        log: where progress goes; by default the terminal.

    Returns:
        What results.json holds.

    Raises:
        InputError: if the data, an attack or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config)
    data = load(config, log)
    train, test = data
    plans, left_out = make_plans(config, train)
    output = output_folder(config)
    seeds_of = {plan.name: num_seeds(config, plan) for plan in plans}
    members = sum(seeds_of.values())
    engine = choose_engine(config, train.image_shape, config.width, config.batch_size, members, output, log)
    model = make_model(config.model, train.num_classes, config.width, engine.lowering, config.compute_dtype)
    clean_key, attack_key, victim_key, test_key = jax.random.split(jax.random.key(config.seed), 4)
    keys = [jax.random.fold_in(attack_key, config.seed + s) for s in range(config.seeds)]
    folder = open_folder("attack", output, config, engine)
    runner = StageRunner(folder.checkpoints, train.image_shape, engine.layout, log, config.member_group or None)
    from_scratch = train_config(config, config.epochs, config.learning_rate)

    rows = outsourcing.split_rows([clean_key] * config.seeds, train.labels, 0.0)
    clean_keys = jax.random.split(clean_key, config.seeds)
    clean = runner.from_scratch("clean", model, from_scratch, clean_keys, 1, jnp.asarray(train.images), *rows)
    prepared: list[Prepared] = []
    with log.stage("triggers", total=members, unit="victims") as stage:
        known = [CleanModel(model, ensemble.members(clean.variables, s)) for s in range(config.seeds)]
        for plan in plans:
            try:
                for s in range(seeds_of[plan.name]):
                    prepared.append(prepare(keys[s], plan, train, config.target, s, known[s]))
                    stage.advance(1, plan.name)
            except InputError as error:
                if config.attack != "all":
                    raise
                left_out[plan.name] = str(error)
        stage.detail = left_out_text(left_out)
    fine_tuning = train_config(config, config.fine_tuning_epochs, config.fine_tuning_learning_rate)
    controlled = train_config(config, config.controlled_epochs, config.learning_rate)
    victims = train_victims(victim_key, runner, prepared, train, clean, from_scratch, fine_tuning, controlled)
    with log.stage("test", total=len(plans), unit="attacks") as stage:
        tested = []
        for one in evaluate_victims(test_key, runner, victims, clean, data, config.evaluation_batch_size):
            tested.append(one)
            stage.advance(1, one[0].victim.prepared.plan.name)
    results = attack_results.summarise(tested, test.images, test.labels, config.seed, left_out)
    folder.write_json("results.json", results)
    if not processes.is_primary():
        return results
    if config.save_poisoned:
        with log.stage("poisoned sets") as stage:
            stage.detail = save_poisoned(folder, prepared)
            stage.wrote("poisoned")
    settings = {name: value for name, value in to_plain(config).items() if name not in IGNORED} | engine._asdict()
    attack_report.write(folder, settings, results, tested, log.timings, data, command(config))
    log.console.print(to_rich(attack_results.attack_table(results, train.name)))
    log.console.print(f"report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    return results


def make_plans(config: Config, train: Dataset) -> tuple[list[Plan], dict[str, str]]:
    """Every attack of the run, in the order of the registry or of the command line.

    Returns:
        The plans; and for `--attack=all`, which attacks the dataset does not allow -> why.

    Raises:
        InputError: if an attack that was named cannot be run, or a change is of none that is.
    """
    is_all = config.attack == "all"
    names = [*ATTACKS, *HYBRIDS] if is_all else list(dict.fromkeys(config.attack.split(",")))
    changes = read_changes(config.change, names)
    plans, left_out = [], {}
    how = {"label_rule": config.label_rule, "poison_rate": config.poison_rate, "changes": changes}
    for name in names:
        try:
            plans.append(make_plan(name, train, config.target, **how))
        except InputError as error:
            if not is_all:
                raise
            left_out[name] = str(error)
    if not plans:
        raise InputError(f"no attack fits: {left_out_text(left_out)}")
    return plans, left_out


def read_changes(texts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read attack.name=value, or name=value where one attack is run: attack -> name -> value.

    Raises:
        InputError: if a text is neither, or of an attack that is not run.
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        attack, _, setting = name.rpartition(".")
        if not equals or not setting or (not attack and (len(names) > 1 or "+" in names[0])):
            raise InputError(f"--change {text!r} is not name=value, or attack.name=value where several attacks are run")
        changes.setdefault(attack or names[0], {})[setting] = read_value(value)
    run = {part for name in names for part in name.split("+")}
    if unknown := sorted(changes.keys() - run):
        raise InputError(f"--change of {unknown[0]}: that attack is not among those that are run")
    return changes


def left_out_text(left_out: Mapping[str, str]) -> str:
    """One line on the attacks that the dataset does not allow."""
    return "; ".join(f"{name} left out: {reason}" for name, reason in left_out.items())


def num_seeds(config: Config, plan: Plan) -> int:
    """How many seeds an attack is run with."""
    is_costly = any(part.attack.trigger_is_trained or part.attack.control for part in plan.parts)
    return min(config.seeds, config.costly_seeds or config.seeds) if is_costly else config.seeds


def check(config: Config) -> None:
    """Refuse settings that no data could be right for.

    Raises:
        InputError: naming the flag.
    """
    counts = ("width", "epochs", "controlled_epochs", "fine_tuning_epochs", "batch_size", "evaluation_batch_size")
    rates = ("learning_rate", "fine_tuning_learning_rate")
    check_ranges(config, at_least={**dict.fromkeys(counts, 1), "weight_decay": 0, "costly_seeds": 0}, above_zero=rates)


def train_config(config: Config, epochs: int, learning_rate: float) -> TrainConfig:
    """How networks of this run train. Incomplete last batches are left out: their own shape would double compiling."""
    return TrainConfig(
        epochs,
        config.batch_size,
        config.evaluation_batch_size,
        learning_rate,
        config.weight_decay,
        schedule=config.schedule,
        keep_last_batch=False,
        augmentation=config.augmentation,
    )


def save_poisoned(folder: RunFolder, prepared: Sequence[Prepared]) -> str:
    """Write the first seed's poisoned training sets as .npz, for any framework; returns what was left out."""
    (folder.path / "poisoned").mkdir(exist_ok=True)
    inside = []
    for one in prepared:
        if one.seed:
            continue
        if one.poisoned is None:
            inside.append(one.plan.name)
            continue
        buffer = io.BytesIO()
        names = ("images", "labels", "is_poisoned", "original_labels", "is_cover")
        arrays = {name: getattr(one.poisoned, name) for name in names}
        np.savez_compressed(buffer, **arrays, num_classes=one.poisoned.num_classes)
        folder.write_bytes(f"poisoned/{one.plan.name}.npz", buffer.getvalue())
    return f"none of {', '.join(inside)}: the attacker poisons inside the training" if inside else ""


def output_folder(config: Config) -> pathlib.Path:
    """`--output`, or a name that the same settings always give."""
    return run_config.output_folder("attack", config, preset(config.preset, config.dataset), config.preset)


def command(config: Config) -> str:
    """The command that makes this run again, wherever its data lies."""
    chosen = {"attack": config.attack, "dataset": config.dataset, "preset": config.preset}
    return run_config.command("attack", config, preset(config.preset, config.dataset), **chosen)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the flags and run."""
    choosers = {"preset": None, "dataset": None}
    return run(command_line.parse(preset, choosers, arguments, prog="attack.py", description=__doc__.splitlines()[0]))


if __name__ == "__main__":
    command_line.run(main)
