"""What every experiment shares beside its stages: the settings of a run, how data and engine follow from them, its folder."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from bdjax import datasets
from bdjax.datasets import splits
from bdjax.errors import InputError
from bdjax.models import ComputeDtype, Lowering
from bdjax.run import command_line
from bdjax.run.folder import RunFolder, default_name, open_run
from bdjax.training import ensemble, probe
from bdjax.training.augmentation import Augmentation
from bdjax.training.member import Optimiser, Schedule, TrainConfig
from bdjax.training.stages import Log
from bdjax.types import TrainTest

IGNORED = ("data_dir", "output")
"""Fields that do not influence any number."""
ALL = "all"
"""The value of `--defenses` that stands for the whole registry."""
ENGINE_FILE = "engine.json"
"""The run's layout and lowering, so that it goes on with those that it began with."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The settings that every experiment has; each adds its own."""

    dataset: str = "digits"
    """a named dataset (digits, mnist, cifar10, ...; an unknown name is answered with all of them), tfds:NAME, or a path: image
    folder or .npz"""
    seeds: int = 3
    """how many seeds are trained, as members of the same calls; tables show mean and standard deviation"""
    seed: int = 0
    """the first seed"""
    data_dir: pathlib.Path | None = None
    """where datasets lie; then BDJAX_DATA_DIR, then a cache that they are fetched into"""
    output: pathlib.Path | None = None
    """the run's folder; by default runs/<experiment>/<dataset>-<preset>"""
    train_rows: int = 0
    """use only so many training rows, drawn once; 0 for all"""
    test_rows: int = 0
    """use only so many test rows, drawn once; 0 for all"""
    like: str = ""
    """a named dataset whose settings attacks and defenses adopt; by default those of --dataset itself where that is a name,
    and none where it is a path"""
    target: int = 0
    """the attacker's class"""

    layout: ensemble.Layout | Literal["auto"] = "auto"
    """how members are laid out in a compiled call; auto measures what is fastest here, once"""
    lowering: Lowering | Literal["auto"] = "auto"
    """how convolutions are computed; auto measures what is fastest here, once"""
    compute_dtype: ComputeDtype = "float32"
    """of activations and products; parameters, statistics and losses are float32 in any case"""
    member_group: int = 0
    """train at most so many members in one call; 0 for as many as fit into memory"""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(ExperimentConfig):
    """The settings of every run that compares defenses, of training sets or of models."""

    preset: Literal["quick", "paper", "strong"] = "paper"
    """quick: minutes on two cores; paper: the paper's networks and schedule, for a GPU; strong: ours, the same threat model"""
    attacks: str = "badnets,blended,sig,none"
    """attacks with commas between them, each with settings of its own after colons: badnets:poison_rate=0.05:target=4. none
    is the training set as it is. Third-party data, at a path, is not attacked by default"""
    defenses: str = "none"
    """defenses with commas between them, each with its settings: abl,lfd:alpha=0.5; or all, every one of the registry; with +
    between two, the second runs on what the first gives: fine_tuning+nad"""
    study: str = ""
    """one of the paper's tables or figures, instead of attacks and defenses"""

    width: int = 64
    """64 is the papers' size; others scale the channels"""
    epochs: int = 80
    """of plain training, and of every training from scratch that a defense does not settle itself"""
    batch_size: int = 128
    """of every training"""
    optimiser: Optimiser = "adam"
    """of plain training"""
    learning_rate: float = 1e-3
    """of plain training"""
    schedule: Schedule = "cosine"
    """of plain training"""
    steps: tuple[tuple[int, float], ...] = ()
    """of the schedule steps: epoch and learning rate from it on"""
    weight_decay: float = 0.0
    """L2, as PyTorch has it"""
    augmentation: Augmentation = "none"
    """of training rows, after they were poisoned"""
    evaluation_batch_size: int = 250
    """images at once in tests"""


@dataclass(frozen=True, kw_only=True)
class SuspectConfig(ComparisonConfig):
    """The settings of every run on suspect training sets; `--preset` and `--dataset` decide what the others default to."""

    model: str = "resnet18_cifar"
    """the network that is to be trained on the suspect rows"""


def flag(name: str) -> str:
    """What the command line calls a field."""
    return "--" + name.replace("_", "-")


def check_ranges(
    config: ExperimentConfig,
    *,
    at_least: Mapping[str, float] = {},
    above_zero: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """Refuse settings that no data could be right for: the shared ones and those named.

    Args:
        config: of any experiment.
        at_least: field -> its least value.
        above_zero: fields that must be positive.
        shares: fields from 0 to 1.

    Raises:
        InputError: naming the flag.
    """
    at_least = {"seeds": 1, "seed": 0, "train_rows": 0, "test_rows": 0, "member_group": 0, **at_least}
    for name, least in at_least.items():
        if not getattr(config, name) >= least:
            raise InputError(f"{flag(name)} {getattr(config, name)} is not at least {least}")
    for name in above_zero:
        if not getattr(config, name) > 0:
            raise InputError(f"{flag(name)} {getattr(config, name)} is not above 0")
    for name in shares:
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{flag(name)} {getattr(config, name)} is not within 0 and 1")
    if config.seed + config.seeds > 2**31:
        raise InputError(f"{flag('seed')} {config.seed} is not below 2**31")


def adapted_to(config: ExperimentConfig) -> str | None:
    """The named dataset whose settings attacks and defenses adopt: `--like`, or the run's own dataset; None for none.

    A prepared set of TensorFlow Datasets counts as the named one that it holds.

    Raises:
        InputError: if there is no such dataset.
    """
    if config.like:
        return datasets.check_like(config.like, "--like")
    name = config.dataset.removeprefix(datasets.TFDS_PREFIX)
    return name if name in datasets.DATASETS else None


def load(config: ExperimentConfig, log: Log) -> TrainTest:
    """The dataset, cut down to `train_rows` and `test_rows`; which rows stay does not depend on the seed.

    Raises:
        InputError: if it cannot be read, or the target is not one of its classes, or all its test rows are of that class;
          or as `adapted_to`.
    """
    like = adapted_to(config)
    with log.stage("data") as stage:
        loaded = datasets.load(config.dataset, config.data_dir)
        parts = []
        for number, (part, limit) in enumerate(zip(loaded, (config.train_rows, config.test_rows), strict=True)):
            if 0 < limit < len(part):
                rows = np.sort(splits.permutation(jax.random.key(number), len(part))[:limit])
                part = splits.take(part, rows)
            parts.append(part)
        train, test = parts
        if not 0 <= config.target < train.num_classes:
            raise InputError(
                f"--target {config.target} is not a class of {train.name}; classes are 0 to {train.num_classes - 1}"
            )
        if not np.any(test.labels != config.target):
            raise InputError(f"{test.name}: each of the {len(test)} test rows is of class {config.target}, the target")
        stage.detail = f"{train.name}: {len(train):,} training, {len(test):,} test rows"
        stage.detail += f", settings adapted to {like}" if like else ", settings of the papers"
    return TrainTest(train, test)


def choose_engine(
    config: ExperimentConfig,
    image_shape: tuple[int, int, int],
    width: int,
    batch_size: int,
    members: int,
    folder: pathlib.Path,
    log: Log,
) -> probe.Choice:
    """Layout and lowering: those that are set, those that the run in `folder` began with, or else the fastest ones here."""
    with log.stage("probe", detail="nothing to choose") as stage:
        return probe.choose(
            probe.Shape(image_shape, width, batch_size, members, config.compute_dtype),
            config.layout,
            config.lowering,
            choice_file=folder / ENGINE_FILE,
            report=partial(setattr, stage, "detail"),
        )


def open_folder(experiment: str, folder: pathlib.Path, config: ExperimentConfig, engine: probe.Choice) -> RunFolder:
    """Start a run, or continue the one that is there.

    Raises:
        InputError: the folder cannot be used, or holds a run with other settings.
    """
    opened = open_run(folder, config, experiment=experiment, ignore=IGNORED)
    opened.write_json(ENGINE_FILE, probe.record(engine))
    return opened


def output_folder(experiment: str, config: ExperimentConfig, default: ExperimentConfig, preset: str) -> pathlib.Path:
    """`--output`, or a name that the same settings always give.

    Args:
        experiment: its name.
        config: all settings.
        default: what its preset starts from.
        preset: the preset's name.
    """
    if config.output:
        return config.output
    changed = command_line.changed_fields(config, default, IGNORED)
    return pathlib.Path("runs") / experiment / default_name(pathlib.Path(config.dataset).stem, preset, changed)


def command(experiment: str, config: ExperimentConfig, default: ExperimentConfig, **chosen: Any) -> str:
    """The command that makes this run again, wherever its data lies.

    Args:
        experiment: its name.
        config: all settings.
        default: what its preset starts from.
        chosen: flags to print in any case, such as the preset.
    """
    changed = command_line.changed_fields(config, default, IGNORED)
    return f"python experiments/{experiment}.py " + command_line.as_flags({**chosen, **changed})


def train_config(config: ComparisonConfig) -> TrainConfig:
    """How an undefended network of this run trains. Incomplete last batches are left out: their own shape would double
    compiling."""
    return TrainConfig(
        epochs=config.epochs,
        batch_size=config.batch_size,
        evaluation_batch_size=config.evaluation_batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        optimiser=config.optimiser,
        schedule=config.schedule,
        steps=config.steps,
        keep_last_batch=False,
        augmentation=config.augmentation,
    )
