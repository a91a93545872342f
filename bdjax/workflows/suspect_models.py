"""Runs on suspect models: attack teachers or read a third party's, make students of them, measure both.

The suspect is a network, a *teacher*, without its training set; the defender has clean images, and wants a small clean network,
a *student*. A run has some attacks, some seeds and some methods. Each attack and seed gives one suspect teacher, which the
attacker may have trained in any way; or the teacher is the user's, read from a folder. Every method is tried on each, all
teachers at once. `experiments/robust_kd.py` adds its presets and its studies.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from bdjax.datasets import splits
from bdjax.defenses.registry import DEFENSES
from bdjax.defenses.undefended import UNDEFENDED
from bdjax.errors import InputError
from bdjax.evaluation import teachers as third_party
from bdjax.evaluation.measure import Comparison, TriggeredViews, defend, make_views
from bdjax.evaluation.suspects import suspect_keys
from bdjax.evaluation.teachers import (
    SuspectTeachers,
    control,
    make_defense_input,
    make_recipes,
    take_teachers,
    train_teachers,
)
from bdjax.evaluation.variants import NO_ATTACK, DefenseVariant, compatible_defenses, read_attack, read_defense
from bdjax.reporting import students
from bdjax.reporting.sections import file_name, seconds_of
from bdjax.run.config import ALL, ComparisonConfig, adapted_to, check_ranges, load, train_config
from bdjax.run.folder import RunFolder
from bdjax.run.log import StageLog
from bdjax.training import ensemble, processes
from bdjax.training.augmentation import Augmentation
from bdjax.training.member import Optimiser, Schedule
from bdjax.types import Dataset, PoisonedDataset
from bdjax.workflows import base
from bdjax.workflows.base import Context, Experiment, Group
from bdjax.workflows.poisoned_sets import load_clean_data

OF_TRAINING_SETS = ("training set", "number of poisons")
"""What some defenses need, and nobody has of a model."""


@dataclass(frozen=True, kw_only=True)
class Config(ComparisonConfig):
    """Every setting of a run; `--preset` and `--dataset` decide what the others default to."""

    preset: Literal["quick", "paper"] = "paper"
    """quick: minutes on two cores; paper: the paper's networks and schedule, for a GPU"""
    attacks: str = "ckd,latent_backdoor,none"
    """attacks on the teacher with commas between them, each with settings of its own after colons: ckd:poison_rate=0.05. none
    is a clean teacher, the control of the others"""
    defenses: str = "fkd"
    """methods with commas between them, each with its settings: fkd,robust_kd:layers=1; or all that take a model; + between two
    runs the second on what the first gives: fine_tuning+fkd"""
    teacher: pathlib.Path | None = None
    """a suspect model of your own instead of attacks: a folder as teachers/ and models/ of a run have them"""
    teacher_model: str = "wrn_28_4"
    """the architecture of teachers that are trained here"""
    student: str = "wrn_16_2"
    """the architecture of students, for every method whose settings do not name another"""
    width: int = 64
    """of teachers that are trained here and of students: 64 is the papers' size; others scale the channels"""
    epochs: int = 200
    """of the clean teachers, and of attacked ones that are trained from scratch on poisoned data"""
    fine_tuning_epochs: int = 30
    """of attacked teachers that start from the clean one"""
    controlled_epochs: int = 200
    """of attacked teachers whose attacker controls the training from scratch"""
    batch_size: int = 128
    """of teachers"""
    optimiser: Optimiser = "sgd"
    """of teachers"""
    learning_rate: float = 0.1
    """of teachers, at first"""
    fine_tuning_learning_rate: float = 0.008
    """of attacked teachers that start from the clean one, on half a cosine"""
    schedule: Schedule = "cosine"
    """of teachers that are trained from scratch"""
    steps: tuple[tuple[int, float], ...] = ()
    """of the schedule steps: epoch and learning rate from it on"""
    weight_decay: float = 5e-4
    """of teachers: L2, as PyTorch has it"""
    augmentation: Augmentation = "none"
    """of all training rows, after they were poisoned"""
    clean_share: float = 1.0
    """the defender's clean rows: a share of the training rows of each class, as they were before any attack. With 1 students
    learn from the same images as the teachers, as in the paper"""
    clean_data: str = ""
    """clean rows from elsewhere: a dataset's name or path"""
    save_models: bool = True
    """write the first seed's teachers and students"""


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Run methods on suspect models from the data to the report.

    Args:
        config: all settings.
        experiment: its presets, its studies, what it is about.
        log: where progress goes; by default the terminal.

    Returns:
        What results.json holds.

    Raises:
        InputError: if the data, an attack, a method, the teacher or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config, experiment)
    attack_texts, texts = base.attacks_and_defenses(config, experiment)
    variants, left_out = read_methods(config, texts)
    data = load(config, log)
    train, test = data
    clean = clean_rows(config, train)
    members = config.seeds * (1 if config.teacher else len(attack_texts))
    run = base.begin(experiment, config, train.image_shape, train.num_classes, members, log)
    # Whatever can be wrong with the settings has shown by the time that the folder is opened.
    found = attacks = None
    if config.teacher:
        found = third_party.read_folder(config.teacher, train, config.target, run.engine.lowering, config.compute_dtype)
        model = found.model
    else:
        how = {"like": adapted_to(config), "defender_gets": "model"}
        attacks = [read_attack(text, train, config.target, **how) for text in attack_texts]
        model = run.make_model(config.teacher_model)
    variants, not_fitting = compatible_defenses(
        variants, model, run.make_model, train.image_shape, is_all=config.defenses == ALL
    )
    left_out |= not_fitting
    if found is not None and found.suspects[0].attack.plan is None:
        check_oracles(variants)
    folder = run.open_folder()
    runner = run.make_runner(folder.checkpoints)
    teacher_key, suspect_key, view_key = jax.random.split(jax.random.key(config.seed), 3)
    recipes = make_recipes(
        train_config(config),
        config.fine_tuning_epochs,
        config.fine_tuning_learning_rate,
        config.controlled_epochs,
    )
    if found is not None:
        teachers = take_teachers(teacher_key, found, config.seeds, recipes, runner, train)
    else:
        how = config.seed, config.seeds, model, recipes, runner, train, log
        teachers = train_teachers(teacher_key, attacks, *how)
    keys = suspect_keys(suspect_key, teachers.suspects)
    inputs = make_defense_input(teachers, keys, clean, run.make_model, runner)
    with log.stage("triggered test images") as stage:
        views = make_views(view_key, teachers.suspects, test)
        stage.detail = f"{len(teachers.suspects)} teachers × {len(test):,} test rows"
    comparisons, controls = [], []
    for variant in variants:
        with log.stage(f"method {variant.name}") as stage:
            result, measured = defend(inputs, teachers.suspects, variant, views)
            comparisons.append(Comparison(variant, result, measured))
            controls.append(control(inputs, teachers, comparisons[-1], views))
            stage.detail = base.summary_line(measured)
    networks = students.Networks(model, train.image_shape)
    results = students.summarise(comparisons, controls, networks, len(test), config.seed, left_out)
    folder.write_json("results.json", results)
    if config.save_models:
        save_models(folder, teachers, comparisons, views, train)
    group = Group(inputs, teachers.suspects, views)
    # Sections may need networks, which all processes train.
    extra = experiment.sections(Context(config, folder, data, (group,), comparisons, results, log, teachers))
    if not processes.is_primary():
        return results
    page = students.page(
        folder,
        results,
        comparisons,
        data,
        seconds=seconds_of(comparisons, log.timings),
        title=f"{experiment.title} on {train.name}",
        about=experiment.about[0],
        extra_sections=extra,
    )
    base.finish(run, folder, page, students.main_table(results), base.sources_of(data))
    return results


def check(config: Config, experiment: Experiment) -> None:
    """Refuse settings that no data could be right for.

    Raises:
        InputError: naming the flag.
    """
    base.check(config, experiment)
    counts = ("fine_tuning_epochs", "controlled_epochs")
    check_ranges(
        config,
        at_least=dict.fromkeys(counts, 1),
        above_zero=("fine_tuning_learning_rate", "clean_share"),
        shares=("clean_share",),
    )
    if config.teacher and config.attacks != base.default_of(experiment, config).attacks:
        raise InputError("--teacher is the suspect: leave out --attacks")


def read_methods(config: Config, texts: Sequence[str]) -> tuple[list[DefenseVariant], dict[str, str]]:
    """Every method of the run, the teacher as it is first; and those of `--defenses=all` that it cannot have -> why.

    Raises:
        InputError: no such method or setting, or one that defends training sets.
    """
    variants, left_out = [], {}
    for text in texts:
        if text == NO_ATTACK:
            itself = dataclasses.replace(
                UNDEFENDED, title="teacher itself", paper="as received", stage="after training"
            )
            variants.append(DefenseVariant(text, itself, itself.settings))
            continue
        variant = read_defense(text, config.preset, adapted_to(config), {"student": config.student})
        missing = [need for need in variant.defense.needs_with(variant.settings) if need in OF_TRAINING_SETS]
        if not missing:
            variants.append(variant)
        elif config.defenses == ALL:
            left_out[text] = f"needs the {missing[0]}, and a model comes without"
        else:
            able = [name for name, one in DEFENSES.items() if not set(one.needs) & set(OF_TRAINING_SETS)]
            raise InputError(
                f"defense {text} needs the {missing[0]}, and a model comes without; of a model there are {', '.join(able)}"
            )
    return variants, left_out


def check_oracles(variants: Sequence[DefenseVariant]) -> None:
    """Refuse methods that ask for a trigger that nobody knows.

    Raises:
        InputError: naming the method.
    """
    for variant in variants:
        if "attacker's trigger" in variant.defense.needs_with(variant.settings):
            raise InputError(f"defense {variant.name} needs the attacker's trigger, and --teacher comes without one")


def clean_rows(config: Config, train: Dataset) -> Dataset:
    """The defender's clean rows.

    Raises:
        InputError: the training rows are poisoned, the other set does not fit, or the share is too small.
    """
    if isinstance(train, PoisonedDataset) and train.is_poisoned.any():
        raise InputError(
            f"{train.source}: {int(train.is_poisoned.sum())} rows are poisoned; defenders of a model have clean ones"
        )
    if config.clean_data:
        return load_clean_data(config.clean_data, config.data_dir, train)
    if config.clean_share == 1:
        return train
    _, own = splits.stratified_split(jax.random.key(0), train.labels, config.clean_share)
    if len(own) < train.num_classes:
        raise InputError(f"--clean-share {config.clean_share} of {len(train)} rows is {len(own)}: too few")
    return splits.take(train, np.sort(own))


def save_models(
    folder: RunFolder,
    teachers: SuspectTeachers,
    comparisons: Sequence[Comparison],
    views: TriggeredViews,
    train: Dataset,
) -> None:
    """Write the first seed's teachers to teachers/<attack>, and what methods made of them to models/<method>/<attack>, each
    with its trigger where a model folder can hold it. Any of them may be a `--teacher` again."""
    for number, suspect in enumerate(teachers.suspects):
        if suspect.seed:
            continue
        trigger = third_party.trigger_of(suspect, views.test, views.triggered[number])
        name, what = file_name(suspect.attack.name), (train.image_shape, trigger, suspect.attack.target)
        own = ensemble.members(teachers.variables, np.array([number]))
        third_party.write_folder(folder.path / "teachers" / name, teachers.model, own, *what)
        for variant, result, _ in comparisons:
            if variant.defense.name != NO_ATTACK and result.model.num_classes == train.num_classes:
                place = folder.path / "models" / file_name(variant.name) / name
                third_party.write_folder(
                    place, result.model, ensemble.members(result.variables, np.array([number])), *what
                )
