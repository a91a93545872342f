"""What follows from the settings that every experiment has: data, layout and lowering, the run's folder."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from bdjax import datasets
from bdjax.datasets import splits
from bdjax.errors import InputError
from bdjax.run import command_line
from bdjax.run.checks import flag
from bdjax.run.configs.shared import ExperimentConfig, TrainingConfig
from bdjax.run.folder import RunFolder, default_name, open_run
from bdjax.run.log import StageLog
from bdjax.run.text import printable
from bdjax.training import probe, recipes
from bdjax.training.member import TrainConfig
from bdjax.types import TrainTest, Unread

IGNORED = ("data_dir", "output", "teacher_batch", "query_batch", "probe_seconds", "export", "tensorboard", "evidence")
"""Fields that do not influence any number."""
IN_CONTENTS = ("outputs",)
"""Fields that matter only to the content of a path, whose digest has them."""
ALL = "all"
"""The value of `--defenses` that stands for the whole registry."""
ENGINE_FILE = "engine.json"
"""The file with the run's layout and lowering, which a resumed run keeps."""


def adapted_to(config: ExperimentConfig) -> str | None:
    """The named dataset whose settings attacks and defenses use: `--like`, or the run's own dataset; None for the papers'.

    A prepared set of TensorFlow Datasets counts as the named dataset that it holds.

    Raises:
        InputError: there is no such dataset.
    """
    if config.like:
        return datasets.check_like(config.like, "--like")
    name = config.dataset.removeprefix(datasets.TFDS_PREFIX)
    return name if name in datasets.DATASETS else None


def load(config: ExperimentConfig, log: StageLog) -> TrainTest:
    """The dataset, cut down to `train_rows` and `test_rows`; which rows stay does not depend on the seed.

    Raises:
        InputError: the dataset cannot be read, the target is not one of its classes, or all its test rows are of that class;
          or as `adapted_to`.
    """
    like = adapted_to(config)
    with log.stage("data") as stage:
        loaded = datasets.load(config.dataset, config.data_dir, options=read_options(config, log))
        parts = []
        for number, (part, limit) in enumerate(zip(loaded, (config.train_rows, config.test_rows), strict=True)):
            if 0 < limit < len(part):
                rows = np.sort(splits.permutation(jax.random.key(number), len(part))[:limit])
                part = splits.take(part, rows)
            parts.append(part)
        train, test = parts
        if not 0 <= config.target < train.num_classes:
            raise InputError(
                f"--target {config.target} is not a class of {train.name}; classes are {train.class_range}"
            )
        if not np.any(test.labels != config.target):
            raise InputError(
                f"{test.name}: all {len(test)} test rows are of class {test.class_title(config.target)}, the target; use "
                "another --target"
            )
        stage.detail = f"{train.name}: {len(train):,} training, {len(test):,} test rows"
        stage.detail += f", settings adapted to {like}" if like else ", settings of the papers"
    note_unread(log, train.name, datasets.unread_of(train, test))
    return TrainTest(train, test)


def note_unread(log: StageLog, name: str, unread: Sequence[Unread]) -> None:
    """Print how much of a dataset was not read; `bdjax.workflows.base.write_results` lists all of it in a file."""
    if unread:
        files = "1 file" if len(unread) == 1 else f"{len(unread):,} files"
        log.note(
            "not read", printable(f"{files} of {name} (first: {unread[0].file} {unread[0].reason}); see not_read.csv")
        )


def read_options(config: ExperimentConfig, log: StageLog | None = None) -> datasets.ReadOptions:
    """What the run tolerates in data at a path, which columns it reads, and the size that it scales images to.

    Args:
        config: all settings.
        log: where the memory that large data takes is printed before it is read.
    """
    return datasets.ReadOptions(
        config.skip_unreadable,
        config.allow_empty_classes,
        config.image_size,
        config.image_column,
        config.label_column,
        None if log is None else partial(log.note, "memory"),
    )


def choose_engine(config: ExperimentConfig, shape: probe.Shape, folder: pathlib.Path, log: StageLog) -> probe.Choice:
    """Layout and lowering: as set, or those of the run in `folder`, or else the fastest on this machine."""
    with log.stage("probe", detail="skipped: layout and lowering are set") as stage:
        return probe.choose(
            shape,
            config.layout,
            config.lowering,
            choice_file=folder / ENGINE_FILE,
            seconds=config.probe_seconds,
            report=partial(setattr, stage, "detail"),
        )


def open_folder(
    experiment: str,
    folder: pathlib.Path,
    config: ExperimentConfig,
    engine: probe.Choice,
    contents: Mapping[str, str] = {},
) -> RunFolder:
    """Start a run, or continue the run in the folder.

    Args:
        experiment: its name.
        folder: the run's folder.
        config: all settings.
        engine: layout and lowering.
        contents: setting that is a path -> digest of what is there; see `open_run`.

    Raises:
        InputError: the folder cannot be used, or holds a run with other settings.
    """
    opened = open_run(folder, config, experiment=experiment, ignore=IGNORED + IN_CONTENTS, contents=contents)
    opened.write_json(ENGINE_FILE, probe.record(engine))
    return opened


def output_folder(experiment: str, config: ExperimentConfig, default: ExperimentConfig, preset: str) -> pathlib.Path:
    """`--output`, or a folder named after the settings, the same for the same settings.

    Args:
        experiment: its name.
        config: all settings.
        default: the configuration that its preset starts from.
        preset: the preset's name.
    """
    if config.output:
        return config.output
    changed = command_line.changed_fields(config, default, IGNORED)
    # A single folder keeps the name from when there could be no more.
    changed = {name: value[0] if name == "teachers" and len(value) == 1 else value for name, value in changed.items()}
    return pathlib.Path("runs") / experiment / default_name(pathlib.Path(config.dataset).stem, preset, changed)


def command(
    experiment: str,
    config: ExperimentConfig,
    default: ExperimentConfig,
    *,
    as_script: bool | None = None,
    **chosen: Any,
) -> str:
    """The command that repeats this run, wherever the data is stored.

    Args:
        experiment: its name.
        config: all settings.
        default: the configuration that its preset starts from.
        as_script: as for `command_line.invocation`.
        chosen: flags that are always printed, such as the preset.
    """
    changed = command_line.changed_fields(config, default, IGNORED)
    return f"{command_line.invocation(experiment, as_script=as_script)} {command_line.as_flags({**chosen, **changed})}"


def check_recipe(config: Any, default: Any, prefix: str = "") -> None:
    """Refuse flags that a recipe would override.

    Args:
        config: all settings, with a `recipe`.
        default: the configuration that its preset starts from.
        prefix: of the names of the recipe's field and of the fields that it sets.

    Raises:
        InputError: naming the flag.
    """
    changed = command_line.changed_fields(config, default)
    recipe, own = getattr(config, f"{prefix}recipe"), flag(f"{prefix}recipe")
    for name in recipes.fields(recipe, 1):
        if recipe and prefix + name in changed and name != "recipe":
            raise InputError(f"{own} {recipe} sets {flag(prefix + name)} itself; leave it out, or set {own}=")


def train_config(config: TrainingConfig) -> TrainConfig:
    """Training settings of this run's undefended networks. Incomplete last batches are dropped: their different shape would
    double the compilation time."""
    plain = TrainConfig(
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
    return dataclasses.replace(plain, **recipes.fields(config.recipe, config.batch_size))
