"""What the experiments on suspect models share: one command from the data to the report.

Somebody hands over a network, a *teacher*, and nothing else; the defender has clean images, and wants a small clean network,
a *student*. A run has some attacks, some seeds and some methods. Each attack and seed gives one suspect teacher, which the
attacker may have trained in any way; or the teacher is the user's own, read from a folder. Every method is tried on each, all
teachers at once. `experiments/robust_kd.py` adds its presets and its studies.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from bdjax.datasets import splits
from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.registry import DEFENSES
from bdjax.defenses.undefended import UNDEFENDED
from bdjax.errors import InputError
from bdjax.evaluation import teachers as teachers_io
from bdjax.evaluation.measure import Comparison, TriggeredViews, defend, make_views
from bdjax.evaluation.suspects import suspect_keys
from bdjax.evaluation.teachers import Teachers, control, make_defense_input, make_recipes, take_teachers, train_teachers
from bdjax.evaluation.variants import NO_ATTACK, DefenseVariant, compatible_defenses, read_attack, read_defense
from bdjax.models import make_model
from bdjax.reporting import suspect_model_report, suspect_model_results
from bdjax.reporting.defense_report import file_name
from bdjax.reporting.report import Section
from bdjax.reporting.tables import to_rich
from bdjax.run import config as run_config
from bdjax.run.config import IGNORED, check_ranges, choose_engine, load, open_folder
from bdjax.run.folder import RunFolder, to_plain
from bdjax.run.log import StageLog
from bdjax.training import ensemble, processes
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Model, PoisonedDataset, TrainTest
from bdjax.workflows import poisoned_sets
from bdjax.workflows.poisoned_sets import Study

Preset = Literal["quick", "paper"]
OF_TRAINING_SETS = ("training set", "number of poisons")
"""What some defenses need, and nobody has of a model."""


@dataclass(frozen=True, kw_only=True)
class Config(poisoned_sets.ComparisonConfig):
    """Every setting of a run; `--preset` and `--dataset` decide what the others default to."""

    preset: Preset = "paper"
    """quick: minutes on two cores; paper: the paper's networks and schedule, for a GPU"""
    attacks: str = "ckd,latent_backdoor,none"
    """attacks on the teacher with commas between them, each with settings of its own after colons: ckd:poison_rate=0.05. none
    is a clean teacher, which the others are held against"""
    defenses: str = "fkd"
    """methods likewise: fkd,robust_kd:layers=1; or all that a model can be put before; + between two runs
    one after the other: fine_tuning+fkd"""
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
    optimiser: poisoned_sets.Optimiser = "sgd"
    """of teachers"""
    learning_rate: float = 0.1
    """of teachers, at first"""
    fine_tuning_learning_rate: float = 0.008
    """of attacked teachers that start from the clean one, on half a cosine"""
    schedule: poisoned_sets.Schedule = "cosine"
    """of teachers that are trained from scratch"""
    steps: tuple[tuple[int, float], ...] = ()
    """of the schedule steps: epoch and learning rate from it on"""
    weight_decay: float = 5e-4
    """of teachers: L2, as PyTorch has it"""
    augmentation: poisoned_sets.Augmentation = "none"
    """of all training rows, after they were poisoned"""
    clean_share: float = 1.0
    """the defender's clean rows: a share of the training rows of each class, as they were before any attack. With 1 students
    learn from the same images as the teachers, as in the paper"""
    clean_data: str = ""
    """clean rows from elsewhere: a dataset's name or path"""
    save_models: bool = True
    """write the first seed's teachers and students"""


class Context(NamedTuple):
    """What a run has when its results are in, for figures of an experiment's own."""

    config: Config
    folder: RunFolder
    data: TrainTest
    teachers: Teachers
    given: DefenseInput
    views: TriggeredViews
    comparisons: Sequence[Comparison]
    results: Mapping[str, Any]
    log: StageLog


class Experiment(NamedTuple):
    """What an experiment adds."""

    name: str  # "robust_kd": of the script and of the folder below runs/
    title: str  # of the report
    own: str  # the method that it is about
    plain: str  # the method that hands backdoors on, which that is held against
    default: Callable[[str, str], Config]  # (preset, dataset) -> what flags start from
    studies: Mapping[str, Study]
    sections: Callable[[Context], Sequence[Section]]


def run_from_flags(
    one: Experiment, about: str, arguments: Sequence[str] | None = None, log: StageLog | None = None
) -> dict[str, Any]:
    """Read the flags of an experiment and run it.

    Args:
        one: the experiment.
        about: one line on it, for --help, which tells of its studies as well.
        arguments: the command line; None for that of the process.
        log: where progress goes; by default the terminal.

    Returns:
        What results.json holds.

    Raises:
        InputError: as `run`.
    """
    return run(poisoned_sets.read_flags(one, about, arguments), one, log)


def run(config: Config, one: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Run methods on suspect models from the data to the report.

    Args:
        config: all settings.
        one: the experiment.
        log: where progress goes; by default the terminal.

    Returns:
        What results.json holds.

    Raises:
        InputError: if the data, an attack, a method, the teacher or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config, one)
    attack_texts, texts = poisoned_sets.chosen(config, one)
    variants, left_out = read_methods(config, texts)
    data = load(config, log)
    train, test = data
    clean = clean_rows(config, train)
    default = one.default(config.preset, config.dataset)
    output = run_config.output_folder(one.name, config, default, config.preset)
    members = config.seeds * (1 if config.teacher else len(attack_texts))
    engine = choose_engine(config, train.image_shape, config.width, config.batch_size, members, output, log)

    def make_network(name: str, num_classes: int | None = None) -> Model:
        classes = num_classes or train.num_classes
        return make_model(name, classes, config.width, engine.lowering, config.compute_dtype)

    # Whatever can be wrong with the settings has shown by the time that the folder is opened.
    found = attacks = None
    if config.teacher:
        found = teachers_io.read_folder(config.teacher, train, config.target, engine.lowering, config.compute_dtype)
        model = found.model
    else:
        attacks = [read_attack(text, train, config.target, hands_over="model") for text in attack_texts]
        model = make_network(config.teacher_model)
    variants, not_fitting = compatible_defenses(
        variants, model, make_network, train.image_shape, is_all=config.defenses == poisoned_sets.ALL
    )
    left_out |= not_fitting
    if found is not None and found.suspects[0].attack.plan is None:
        check_oracles(variants)
    folder = open_folder(one.name, output, config, engine)
    runner = StageRunner(folder.checkpoints, train.image_shape, engine.layout, log, config.member_group or None)
    teacher_key, suspect_key, view_key = jax.random.split(jax.random.key(config.seed), 3)
    recipes = make_recipes(
        poisoned_sets.train_config(config),
        config.fine_tuning_epochs,
        config.fine_tuning_learning_rate,
        config.controlled_epochs,
    )
    if found is not None:
        teachers = take_teachers(teacher_key, found, config.seeds, recipes, runner, train)
    else:
        how = config.seed, config.seeds, model, recipes, runner, train, log
        teachers = train_teachers(teacher_key, attacks, *how)
    given = make_defense_input(teachers, suspect_keys(suspect_key, teachers.suspects), clean, make_network, runner)
    with log.stage("triggered test images") as stage:
        views = make_views(view_key, teachers.suspects, test)
        stage.detail = f"{len(teachers.suspects)} teachers × {len(test):,} test rows"
    comparisons, controls = [], []
    for variant in variants:
        with log.stage(f"method {variant.name}") as stage:
            result, tried = defend(given, teachers.suspects, variant, views)
            comparisons.append(Comparison(variant, result, tried))
            controls.append(control(given, teachers, comparisons[-1], views))
            stage.detail = poisoned_sets.told(tried)
    networks = suspect_model_results.Networks(model, train.image_shape)
    results = suspect_model_results.summarise(comparisons, controls, networks, len(test), config.seed, left_out)
    folder.write_json("results.json", results)
    if config.save_models:
        save_models(folder, teachers, comparisons, views, train)
    # Figures may need networks of their own, which all processes train.
    extra = one.sections(Context(config, folder, data, teachers, given, views, comparisons, results, log))
    if not processes.is_primary():
        return results
    settings = {name: value for name, value in to_plain(config).items() if name not in IGNORED} | engine._asdict()
    suspect_model_report.write(
        folder,
        settings,
        results,
        comparisons,
        log.timings,
        data,
        run_config.command(one.name, config, default, dataset=config.dataset, preset=config.preset),
        title=f"{one.title} on {train.name}",
        own=one.own,
        plain=one.plain,
        extra_sections=extra,
    )
    log.console.print(to_rich(suspect_model_results.main_table(results)))
    log.console.print(f"report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    return results


def check(config: Config, one: Experiment) -> None:
    """Refuse settings that no data could be right for.

    Raises:
        InputError: naming the flag.
    """
    poisoned_sets.check(config, one)
    counts = ("fine_tuning_epochs", "controlled_epochs")
    check_ranges(
        config,
        at_least=dict.fromkeys(counts, 1),
        above_zero=("fine_tuning_learning_rate", "clean_share"),
        shares=("clean_share",),
    )
    if config.teacher and config.attacks != one.default(config.preset, config.dataset).attacks:
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
                UNDEFENDED, title="teacher itself", needs=(), paper="as it was handed over", stage="after training"
            )
            variants.append(DefenseVariant(text, itself, itself.settings))
            continue
        variant = read_defense(text, config.preset, config.dataset, {"student": config.student})
        missing = [need for need in variant.defense.needs_with(variant.settings) if need in OF_TRAINING_SETS]
        if not missing:
            variants.append(variant)
        elif config.defenses == poisoned_sets.ALL:
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
        return poisoned_sets.load_clean_data(config.clean_data, config.data_dir, train)
    if config.clean_share == 1:
        return train
    _, own = splits.stratified_split(jax.random.key(0), train.labels, config.clean_share)
    if len(own) < train.num_classes:
        raise InputError(f"--clean-share {config.clean_share} of {len(train)} rows is {len(own)}: too few")
    return splits.take(train, np.sort(own))


def save_models(
    folder: RunFolder,
    teachers: Teachers,
    comparisons: Sequence[Comparison],
    views: TriggeredViews,
    train: Dataset,
) -> None:
    """Write the first seed's teachers to teachers/<attack>, and what methods made of them to models/<method>/<attack>, each
    with its trigger where that is of the one form that can be handed over. Any of them may be a `--teacher` again."""
    for number, suspect in enumerate(teachers.suspects):
        if suspect.seed:
            continue
        trigger = teachers_io.trigger_of(suspect, views.test, views.triggered[number])
        name, what = file_name(suspect.attack.name), (train.image_shape, trigger, suspect.attack.target)
        own = ensemble.members(teachers.variables, np.array([number]))
        teachers_io.write_folder(folder.path / "teachers" / name, teachers.model, own, *what)
        for variant, result, _ in comparisons:
            if variant.defense.name != NO_ATTACK and result.model.num_classes == train.num_classes:
                place = folder.path / "models" / file_name(variant.name) / name
                teachers_io.write_folder(
                    place, result.model, ensemble.members(result.variables, np.array([number])), *what
                )
