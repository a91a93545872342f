"""Settings that every experiment has, and what follows from them: data, layout and lowering, the run's folder."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from bdjax import datasets, extras
from bdjax.datasets import splits
from bdjax.errors import InputError
from bdjax.extras import Export
from bdjax.models import MODELS, ComputeDtype, Lowering
from bdjax.run import clock, command_line
from bdjax.run.folder import RunFolder, default_name, open_run
from bdjax.run.log import StageLog
from bdjax.run.text import printable
from bdjax.settings import (
    Amount,
    Count,
    ImageSide,
    LearningRate,
    Members,
    NotNegative,
    NumRows,
    Seed,
    Steps,
    Width,
    check_choice,
    mistakes,
    shown,
)
from bdjax.training import ensemble, probe, recipes
from bdjax.training.augmentation import Augmentation
from bdjax.training.member import Optimiser, Recipe, Schedule, TrainConfig
from bdjax.types import TrainTest, Unread

PATHS = ("dataset", "clean_data", "teacher")
"""Fields of text that may be paths."""
SEVERAL_PATHS = ("teachers",)
"""Fields of texts that may be paths."""
LONGEST_PATH, LONGEST_NAME = 3000, 255
"""Bytes; the system's own limit of a path, usually 4096, is for the files in a run's folder too."""
IGNORED = ("data_dir", "output", "teacher_batch", "query_batch", "probe_seconds", "export", "tensorboard", "evidence")
"""Fields that do not influence any number."""
IN_CONTENTS = ("outputs",)
"""Fields that matter only to the content of a path, whose digest has them."""
ALL = "all"
"""The value of `--defenses` that stands for the whole registry."""
ENGINE_FILE = "engine.json"
"""The file with the run's layout and lowering, which a resumed run keeps."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The settings that every experiment has; each adds its own."""

    dataset: str = "digits"
    """a named dataset (digits, mnist, cifar10, ...; an unknown name prints the whole list), tfds:NAME, or the path of an image
    folder, .npz, parquet, tar shards or COCO's annotations"""
    seeds: Members = 3
    """number of seeds, trained as members of the same calls; tables show mean and standard deviation"""
    seed: Seed = 0
    """the first seed"""
    data_dir: pathlib.Path | None = None
    """folder with the datasets; by default BDJAX_DATA_DIR, else a cache that they are downloaded into"""
    output: pathlib.Path | None = None
    """the run's folder; by default runs/<experiment>/<dataset>-<preset>"""
    train_rows: NumRows = 0
    """number of training rows to use, drawn once; 0 for all"""
    test_rows: NumRows = 0
    """number of test rows to use, drawn once; 0 for all"""
    like: str = ""
    """a named dataset whose settings attacks and defenses use; by default that of --dataset if it is a name, and none if it is
    a path"""
    skip_unreadable: bool = False
    """leave out files of a folder that cannot be read, and list them in the report; by default the run ends with an error"""
    allow_empty_classes: bool = False
    """accept a folder or an .npz with classes that have no rows"""
    image_size: ImageSide | None = None
    """height and width that all images are scaled to, without cropping; by default they keep their size, and the run ends with
    an error if a folder has several sizes"""
    image_column: str = ""
    """the column (or member of a tar) with the images, in data that has columns; by default image, img or the like"""
    label_column: str = ""
    """the column (or member of a tar) with the classes; by default label, class or the like"""
    target: Amount = 0
    """the attacker's class"""

    layout: ensemble.Layout | Literal["auto"] = "auto"
    """how members are laid out in a compiled call; auto measures once which is fastest on this machine"""
    lowering: Lowering | Literal["auto"] = "auto"
    """how convolutions are computed; auto measures once which is fastest on this machine"""
    compute_dtype: ComputeDtype = "float32"
    """dtype of activations and products; parameters, statistics and losses are always float32"""
    probe_seconds: NotNegative = probe.DEFAULT_SECONDS
    """time limit of that measurement, whose result is kept for later runs on this machine"""
    member_group: Amount = 0
    """most members that train in one call; 0 for as many as fit into memory"""
    tensorboard: bool = False
    """write each stage's curves to tensorboard/ in the run's folder, as scalars for TensorBoard (with the extra grid)"""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The setting of every run that leaves networks in models/."""

    export: tuple[Export, ...] = ()
    """further forms of the networks in models/, beside model.safetensors: stablehlo, onnx (with the extra onnx)"""


@dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """The setting of every audit and of every run of defenses."""

    evidence: bool = False
    """write evidence/: verdict.json, findings.sarif, bom.cdx.json, model_card.md and SHA256SUMS; see docs/evidence.md"""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a run trains the networks that no attack and no defense trains in its own way; see `train_config`."""

    width: Width = 64
    """channels of the first stage: 64 is the papers' size, other values scale all channels"""
    epochs: Count = 80
    """epochs of undefended or clean training, and of training from scratch in defenses without a setting of their own"""
    batch_size: Count = 128
    """batch size of every training"""
    recipe: Recipe = ""
    """named recipe of this training, in place of optimiser, learning rate, schedule and weight decay: speedrun"""
    optimiser: Optimiser = "adam"
    """optimiser of this training"""
    learning_rate: LearningRate = 1e-3
    """initial learning rate of this training"""
    schedule: Schedule = "cosine"
    """learning-rate schedule of this training"""
    steps: Steps = ()
    """for schedule steps: pairs of an epoch and the learning rate from it on"""
    weight_decay: NotNegative = 0.0
    """L2 penalty, added to the gradient as in PyTorch"""
    augmentation: Augmentation = "none"
    """augmentation of training rows, after poisoning"""
    evaluation_batch_size: Count = 250
    """batch size of evaluation"""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(TrainingConfig, ExperimentConfig):
    """The settings of every run that compares defenses, on training sets or on models."""

    preset: Literal["quick", "paper", "strong"] = "paper"
    """quick: minutes on two cores; paper: the paper's networks and schedule, for a GPU; strong: our own settings, same threat
    model"""
    attacks: str = "badnets,blended,sig,none"
    """attacks separated by commas, each with its settings after colons: badnets:poison_rate=0.05:target=4. none is the
    unchanged training set. Third-party data, at a path, is not attacked by default"""
    defenses: str = "none"
    """defenses separated by commas, each with its settings: abl,lfd:alpha=0.5; or all, the whole registry; joined by +, the
    second runs on the first one's models: fine_tuning+nad"""
    study: str = ""
    """a table or figure of the paper to run, in place of --attacks and --defenses"""


@dataclass(frozen=True, kw_only=True)
class SuspectConfig(ComparisonConfig):
    """The settings of every run on suspect training sets; `--preset` and `--dataset` decide the defaults of the others."""

    model: str = "resnet18_cifar"
    """architecture of the network that is trained on the suspect rows"""


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def check_ranges(config: Any) -> None:
    """Refuse flags whose values cannot be right, whatever the data: out of the range in the field's type, networks that do not
    exist, paths that no file can have, and evidence whose SOURCE_DATE_EPOCH is no time.

    Args:
        config: the settings of any experiment, a dataclass.

    Raises:
        InputError: naming the flag or the variable.
    """
    for name, wrong in mistakes(config).items():
        raise InputError(f"{flag(name)} {shown(getattr(config, name))} {wrong}")
    for name, value in vars(config).items():
        paths = value if name in SEVERAL_PATHS and value else (value,)
        if isinstance(value, pathlib.Path) or (name in PATHS + SEVERAL_PATHS and value):
            for path in paths:
                check_path(flag(name), path)
        if (name == "model" or name.endswith("_model") or name == "student") and isinstance(value, str):
            check_choice(flag(name), value, MODELS)
    if isinstance(config, ExportConfig) and config.export:
        if not getattr(config, "save_models", True):
            raise InputError("--export needs the networks that --no-save-models leaves out; leave out one of the two")
        if "onnx" in config.export:
            extras.onnx()
    if isinstance(config, EvidenceConfig) and config.evidence:
        clock.now()
    if isinstance(config, ExperimentConfig):
        if config.tensorboard:
            extras.tensorboard()
        if not config.dataset:
            raise InputError(f"{flag('dataset')} is empty; give the name or the path of a dataset")
        if config.seed + config.seeds > 2**31:
            raise InputError(f"{flag('seed')} {shown(config.seed)} with {config.seeds} seeds is not below 2**31")


def check_path(where: str, path: str | pathlib.Path) -> None:
    """Refuse a path that no file can have; whether there is a file is not looked up.

    Args:
        where: for the error message: "--output".
        path: a path, which may start with ~.

    Raises:
        InputError: naming the flag.
    """
    text = str(path)
    try:
        encoded = os.fsencode(pathlib.Path(text).expanduser())
    except RuntimeError:
        raise InputError(
            f"{where} {shown(text)}: there is no home folder of this name; write the path in full"
        ) from None
    except UnicodeEncodeError:
        raise InputError(f"{where} {shown(text)} has characters that no file name can have") from None
    if b"\0" in encoded:
        raise InputError(f"{where} {shown(text)} has a zero byte, which no file name can have")
    longest = max(map(len, encoded.split(b"/")))
    if len(encoded) > LONGEST_PATH or longest > LONGEST_NAME:
        raise InputError(
            f"{where} {shown(text)} is too long: {len(encoded):,} bytes, the longest name in it {longest:,}; at most "
            f"{LONGEST_PATH:,} and {LONGEST_NAME} are possible"
        )


def check_output(folder: pathlib.Path) -> None:
    """Refuse a run's folder that cannot be made, without making it.

    Raises:
        InputError: a file is in its place or above it, or nothing can be written there.
    """
    path = folder.expanduser().absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
        is_folder, is_writable = there.is_dir(), os.access(there, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"{folder} cannot be used ({error.strerror or error}); choose another --output") from None
    if not is_folder:
        what = f"{folder}" if there == path else f"{folder}: {there}"
        raise InputError(f"{what} is a file, not a folder; choose another --output")
    if not is_writable:
        raise InputError(f"{folder} cannot be written to; choose another --output")


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
