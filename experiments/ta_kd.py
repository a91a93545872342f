"""TA-KD: seven backdoored teachers, two votes, the aggregated model and the student (Heydari et al. 2025).

    python experiments/ta_kd.py                                     # digits, about 90 s on two cores
    python experiments/ta_kd.py --dataset=mnist                     # narrower nets and fewer rows than the paper's
    python experiments/ta_kd.py --dataset=cifar10 --preset=paper    # the paper to the letter: for a GPU
    python experiments/ta_kd.py --preset=strong                     # the same attack, a better defender
    python experiments/ta_kd.py --teachers=FOLDER                   # somebody's teachers instead of our own attack

The same command continues a run that was cut off, and ends at the same numbers. Everything is written to one folder
(`--output`, by default below `runs/ta_kd/`); open its report.html.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.attacks import outsourcing
from bdjax.attacks.poisoning import RateOf
from bdjax.attacks.providers import ProviderTriggers
from bdjax.datasets import splits
from bdjax.defenses import ta_kd, teachers
from bdjax.defenses.aggregation import Aggregation, Tie, VoteSpace, aggregate_logits
from bdjax.errors import InputError
from bdjax.evaluation import model_folder
from bdjax.models import count_parameters, make_model
from bdjax.reporting import ta_kd_report, ta_kd_results
from bdjax.reporting.tables import to_rich
from bdjax.run import command_line
from bdjax.run import config as run_config
from bdjax.run.config import IGNORED, ExperimentConfig, check_ranges, choose_engine, flag, load, open_folder
from bdjax.run.folder import to_plain
from bdjax.run.log import StageLog
from bdjax.training import ensemble, processes
from bdjax.training.augmentation import Augmentation
from bdjax.training.member import Schedule, TrainConfig
from bdjax.training.stages import Nets, StageRunner, predict_groups
from bdjax.types import Classifier, Dataset, Key, TrainTest

Preset = Literal["quick", "paper", "strong"]
Scale = Literal["quick", "paper"]


@dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """Every setting of a TA-KD run; `--preset` and `--dataset` decide what the others default to."""

    preset: Preset = "paper"
    """quick: minutes on two cores; paper: to the letter, for a GPU; strong: the same attack, a better defender"""
    scale: Scale = "paper"
    """the size of nets, rows and epochs that the strong preset starts from"""
    teachers: pathlib.Path | None = None
    """a checkpoint folder of stacked teachers, as a run writes to teachers/seed-0; no attack is trained then"""

    auxiliary_fraction: float = 0.1
    """the defender's clean set, as a share of the training rows"""
    validation_fraction: float = 0.2
    """what each model holds back from its rows for the learning-rate rule"""

    num_teachers: int = 7
    """providers, each with a trigger of its own"""
    provider_fraction: float = 0.4
    """each provider's share of the training rows; providers overlap"""
    poison_rate: float = 0.01
    """share of each provider's rows that it poisons"""
    poison_rate_of: RateOf = "all"
    """what the rate is a share of: all rows (the paper's text) or those outside the target class (its code)"""
    num_similar: int = 0
    """how many of the triggers are look-alikes of one; 3 in the paper's CIFAR-10 experiment"""
    similarity: float = 0.75
    """how alike those are"""
    blend_opacity: tuple[float, float] | None = None
    """range that the opacity of blended pictures is drawn from; by default 0.05 0.1 for grey, 0.15 0.2 for colour"""
    minimum_contrast: float = 0.0
    """least brightness of solid patches and least step of checkerboards; 0 is the paper's law"""

    clean_model: str = "resnet18"
    """the clean reference, trained on all rows but the validation share"""
    teacher_model: str = "resnet34"
    """the suspect models"""
    aggregated_model: str = "resnet34"
    """the Teacher-Aggregation model"""
    student_model: str = "resnet18"
    """the student"""
    width: int = 64
    """channels of the first stage of every net"""

    epochs: int = 15
    """of the clean reference and of the teachers"""
    batch_size: int = 64
    """of the clean reference and of the teachers"""
    learning_rate: float = 0.01
    """Adam's, of the clean reference and of the teachers"""
    keep_last_batch: bool = True
    """train on the incomplete last batch of an epoch too"""
    evaluation_batch_size: int = 128
    """of validation and test"""
    plateau_factor: float = 0.5
    """what a plateau of the validation loss multiplies the learning rate by"""
    plateau_patience: int = 2
    """bad epochs that are let pass before a cut"""
    plateau_threshold: float = 1e-3
    """least relative improvement of a good epoch"""

    defense_epochs: int = 15
    """of the aggregated model, the student and both baselines"""
    defense_batch_size: int = 64
    """likewise"""
    defense_learning_rate: float = 0.01
    """likewise"""
    defense_schedule: Schedule = "plateau"
    """likewise: the plateau rule, or half a cosine"""
    defense_weight_decay: float = 0.0
    """likewise: L2, as PyTorch's Adam has it"""
    temperature: float = 4.0
    """T of the distillation (not in the paper; its code's)"""
    alpha: float = 0.5
    """weight of the teachers against the clean labels (not in the paper; its code's)"""
    direction: losses.Direction = "teacher_student"
    """of the KL divergence: as the code has it, or as equation 3 prints it"""
    aggregation: Aggregation = "mean"
    """how the teachers' logits become one: mean (the paper), median, trimmed_mean"""
    trim: int = 1
    """logits left out at each end by the trimmed mean"""
    augmentation: Augmentation = "none"
    """how the further views of a clean row are changed"""
    views: int = 1
    """copies of each clean row, the first of them unchanged; the teachers are asked about every one"""
    vote_space: VoteSpace = "logits"
    """what the soft vote averages"""
    tie: Tie = "lowest"
    """who wins a tied hard vote: the lowest class (the paper's code; the target 0 wins ties), or the higher soft vote"""


# What each preset changes from the paper's settings, which are the dataclass's defaults.
PAPER = {"cifar10": {"num_similar": 3}, "cifar100": {"num_similar": 3}}

_QUICK = {
    "clean_model": "resnet10",
    "teacher_model": "resnet18",
    "aggregated_model": "resnet18",
    "student_model": "resnet10",
    "keep_last_batch": False,  # its own shape would double the time to compile
    "minimum_contrast": 0.3,
}
QUICK = {
    "digits": _QUICK
    | {
        "width": 8,
        "epochs": 20,
        "batch_size": 32,
        "poison_rate": 0.1,
        "blend_opacity": (0.2, 0.3),
        "auxiliary_fraction": 0.15,
        "plateau_patience": 4,  # an epoch has 14 steps, and 10 of the defense
        "defense_epochs": 30,
        "defense_batch_size": 16,
    },
    "mnist": _QUICK
    | {
        "width": 8,
        "train_rows": 10_000,
        "test_rows": 1000,
        "epochs": 6,
        "learning_rate": 3e-3,  # at 0.01 the plateau rule does not get to cut within so few epochs
        "poison_rate": 0.05,
        "blend_opacity": (0.15, 0.2),
        "evaluation_batch_size": 250,
    },
    "cifar10": PAPER["cifar10"]
    | _QUICK
    | {
        "width": 8,
        "train_rows": 8000,
        "test_rows": 1000,
        "epochs": 8,
        "learning_rate": 3e-3,
        "poison_rate": 0.05,
        "evaluation_batch_size": 250,
    },
}
STRONG: dict[str, Any] = {
    "aggregation": "median",
    "augmentation": "crop",
    "views": 8,
    "defense_schedule": "cosine",
}
FLIPPABLE = ("cifar10", "cifar100")
"""Sets of natural images, where a mirrored picture is of the same class."""


def preset(preset: str | None = None, dataset: str | None = None, scale: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Raises:
        InputError: if there is no such preset or scale.
    """
    on_cpu = jax.default_backend() == "cpu"
    preset = preset or ("quick" if on_cpu else "paper")
    dataset = dataset or "digits"
    if preset not in ("quick", "paper", "strong"):
        raise InputError(f"--preset {preset!r} is not one of quick, paper, strong")
    scale = scale or ("paper" if preset == "paper" or (preset == "strong" and not on_cpu) else "quick")
    if scale not in ("quick", "paper"):
        raise InputError(f"--scale {scale!r} is not one of quick, paper")
    like = {"fashion_mnist": "mnist", "cifar100": "cifar10", "gtsrb": "cifar10"}.get(dataset, dataset)
    changes = PAPER.get(dataset, {}) if scale == "paper" else QUICK.get(like, QUICK["cifar10"])
    if preset == "strong":
        changes = changes | STRONG | ({"augmentation": "crop_flip"} if dataset in FLIPPABLE else {})
    base = Config(
        dataset=dataset,
        preset=preset,
        scale=scale,
        compute_dtype="float32" if on_cpu else "bfloat16",
    )
    return dataclasses.replace(base, **changes)


def run(config: Config, classifiers: Sequence[Classifier] = (), log: StageLog | None = None) -> dict[str, Any]:
    """Run TA-KD from the data to the report.

    Args:
        config: all settings.
        classifiers: teachers as Python callables, in place of an attack of our own; see `bdjax.types.Classifier`.
        log: where progress goes; by default the terminal.

    Returns:
        What results.json holds.

    Raises:
        InputError: if the data, the teachers or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config)
    train, test = load(config, log)
    output = output_folder(config)
    members = config.num_teachers * config.seeds
    engine = choose_engine(config, train.image_shape, config.width, config.batch_size, members, output, log)
    models = {
        role: make_model(
            getattr(config, f"{role}_model"), train.num_classes, config.width, engine.lowering, config.compute_dtype
        )
        for role in ("clean", "teacher", "aggregated", "student")
    }
    handed_over = None
    if config.teachers:
        handed_over = model_folder.read(
            config.teachers,
            train.num_classes,
            train.image_shape,
            config.target,
            engine.lowering,
            config.compute_dtype,
        )
    given = len(classifiers) or (ensemble.num_members(handed_over.variables) if handed_over else config.num_teachers)
    if config.aggregation == "trimmed_mean" and 2 * config.trim >= given:
        raise InputError(f"--trim {config.trim} at each end leaves none of {given} teachers' logits")
    data_key, model_key, defense_key = jax.random.split(jax.random.key(config.seed), 3)
    seeds = range(config.seeds)
    keys = [jax.random.split(jax.random.fold_in(data_key, config.seed + s), 3) for s in seeds]
    train_config, defense_train_config, defense = configurations(config)
    # Whatever can be wrong with the settings has shown by the time that the folder is opened.
    clean_sets = [clean_set(config, defense, train, key[2]) for key in keys]
    is_own_attack = not (handed_over or classifiers)
    if is_own_attack:
        outsourced = outsourcing.outsource([key[0] for key in keys], train, outsourcing_config(config))
    folder = open_folder("ta_kd", output, config, engine)
    runner = StageRunner(folder.checkpoints, train.image_shape, engine.layout, log, config.member_group or None)
    predict = partial(runner.predict, batch_size=config.evaluation_batch_size)

    # Stages 1 and 2: the clean reference and the suspect teachers.
    nets: dict[str, Nets] = {}
    triggers: Sequence[ProviderTriggers | None] = [None] * config.seeds
    if handed_over:
        count = ensemble.num_members(handed_over.variables)
        variables = ensemble.join([handed_over.variables] * config.seeds)
        nets["teachers"] = Nets(handed_over.model, variables, count, {})
        triggers = [handed_over.triggers] * config.seeds
    elif is_own_attack:
        triggers = outsourced.triggers
        clean_rows = outsourcing.split_rows([key[1] for key in keys], train.labels, config.validation_fraction)
        pool = jnp.asarray(outsourced.pool)
        for number, (name, per_seed, rows) in enumerate(
            (("clean", 1, clean_rows), ("teachers", config.num_teachers, (outsourced.train, outsourced.validation)))
        ):
            model = models[name.removesuffix("s")]
            member_keys = jax.random.split(jax.random.fold_in(model_key, number), per_seed * config.seeds)
            nets[name] = runner.from_scratch(name, model, train_config, member_keys, per_seed, pool, *rows)
        for s in seeds:
            place, own = folder.path / "teachers" / f"seed-{s}", nets["teachers"].of_seed(s)
            shape = (train.num_classes, train.image_shape)
            model_folder.write(place, config.teacher_model, config.width, *shape, own, triggers[s], config.target)

    # Stage 4: the defender asks the teachers about its clean rows, then trains the TA model and the student.
    if classifiers:
        answers = [teachers.from_classifiers(classifiers, train.num_classes)] * config.seeds
    else:
        answers = [
            teachers.from_members(partial(predict, nets["teachers"].model), nets["teachers"].of_seed(s)) for s in seeds
        ]
    with log.stage("teacher logits", detail=f"{config.seeds} × {len(clean_sets[0].labels)} clean rows"):
        told = np.stack(
            [
                aggregate_logits(answer(each.images), defense.aggregation, defense.trim)
                for answer, each in zip(answers, clean_sets, strict=True)
            ]
        )
    of_seed = np.arange(config.seeds)
    parts = {"aggregated": (models["aggregated"], ta_kd.make_pupils(None, of_seed, told, defense.alpha))}
    if "teachers" in nets:
        known = nets["teachers"]
        tuned = ta_kd.make_pupils(known.variables, np.repeat(of_seed, known.per_seed), told, 0.0)
        parts["fine-tuned"] = (known.model, tuned)
    train_parts = partial(
        ta_kd.train_parts, runner, config=defense, train_config=defense_train_config, clean_sets=clean_sets
    )
    nets |= train_parts(parts, key=jax.random.fold_in(defense_key, 0))
    told = np.concatenate(
        [predict(models["aggregated"], nets["aggregated"].of_seed(s), each.images) for s, each in enumerate(clean_sets)]
    )
    parts = {
        "student": (models["student"], ta_kd.make_pupils(None, of_seed, told, defense.alpha)),
        "alone": (models["student"], ta_kd.make_pupils(None, of_seed, told, 0.0)),
    }
    nets |= train_parts(parts, key=jax.random.fold_in(defense_key, 1))

    with log.stage("evaluation", total=config.seeds, unit="seeds") as stage:
        logits = []
        for s in seeds:
            views = outsourcing.triggered_views(test.images, triggers[s])  # [1 + T, N, H, W, C]
            flat = views.reshape(-1, *train.image_shape)
            answer = predict_groups(nets, s, lambda model, variables, flat=flat: predict(model, variables, flat))
            if classifiers:
                answer["teachers"] = answers[s](flat)
            logits.append({name: each.reshape(len(each), *views.shape[:2], -1) for name, each in answer.items()})
            stage.advance()
    sizes = {name: count_parameters(each.model, train.image_shape) for name, each in nets.items()}
    if "teachers" in nets:  # votes deploy all of them
        sizes["soft vote"] = sizes["hard vote"] = sizes["teachers"] * nets["teachers"].per_seed
    choices = {"target": config.target, "vote_space": config.vote_space, "tie": config.tie}
    results = ta_kd_results.summarise(logits, test.labels, triggers, sizes, **choices)
    folder.write_json("results.json", results)
    if not processes.is_primary():
        return results
    with log.stage("pictures"):
        recognised = np.argmax(logits[0]["student"][0, 0], axis=1) == test.labels
        shown = int(np.argmax(recognised & (test.labels != config.target)))
        pictures = ta_kd_report.draw(nets, results, triggers[0], TrainTest(train, test), shown)
    settings = {name: value for name, value in to_plain(config).items() if name not in IGNORED} | engine._asdict()
    ta_kd_report.write(folder, settings, results, pictures, log.timings, TrainTest(train, test), command(config))
    log.console.print(to_rich(ta_kd_results.defense_table(results, train.name)))
    log.console.print(f"report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    return results


def check(config: Config) -> None:
    """Refuse settings that no data could be right for.

    Raises:
        InputError: naming the flag.
    """
    counts = ("num_teachers", "width", "epochs", "batch_size", "evaluation_batch_size", "defense_epochs")
    at_least = dict.fromkeys((*counts, "defense_batch_size", "views"), 1)
    at_least |= dict.fromkeys(("trim", "plateau_patience", "plateau_threshold", "defense_weight_decay"), 0)
    rates = ("learning_rate", "defense_learning_rate", "temperature", "plateau_factor")
    fractions = ("auxiliary_fraction", "provider_fraction", "poison_rate")
    shares = ("alpha", *fractions, "similarity", "minimum_contrast", "validation_fraction")
    check_ranges(config, at_least=at_least, above_zero=(*rates, *fractions), shares=shares)
    if config.validation_fraction == 1:
        raise InputError(f"{flag('validation_fraction')} 1 leaves no row to train on")


def configurations(config: Config) -> tuple[TrainConfig, TrainConfig, ta_kd.TaKdConfig]:
    """How teachers are trained, how the defense's models are trained, and the defense."""
    shared = {
        name: getattr(config, name)
        for name in (
            "keep_last_batch",
            "evaluation_batch_size",
            "plateau_factor",
            "plateau_patience",
            "plateau_threshold",
        )
    }
    attack = TrainConfig(config.epochs, config.batch_size, learning_rate=config.learning_rate, **shared)
    defense = TrainConfig(
        config.defense_epochs,
        config.defense_batch_size,
        learning_rate=config.defense_learning_rate,
        weight_decay=config.defense_weight_decay,
        schedule=config.defense_schedule,
        **shared,
    )
    names = (field.name for field in dataclasses.fields(ta_kd.TaKdConfig))
    return attack, defense, ta_kd.TaKdConfig(**{name: getattr(config, name) for name in names})


def outsourcing_config(config: Config) -> outsourcing.OutsourcingConfig:
    """What the providers do."""
    names = {field.name for field in dataclasses.fields(outsourcing.OutsourcingConfig)} - {"num_providers"}
    return outsourcing.OutsourcingConfig(config.num_teachers, **{name: getattr(config, name) for name in names})


def clean_set(config: Config, defense: ta_kd.TaKdConfig, train: Dataset, key: Key) -> ta_kd.CleanSet:
    """The defender's rows of one seed: drawn like a provider's, never poisoned."""
    draw_key, split_key, view_key = jax.random.split(key, 3)
    rows = splits.sample_rows(draw_key, len(train), config.auxiliary_fraction)
    parts = splits.train_validation_rows(split_key, rows, config.validation_fraction)
    if not len(parts[0]):
        raise InputError(f"--auxiliary-fraction {config.auxiliary_fraction} of {len(train)} rows leaves no clean row")
    return ta_kd.make_clean_set(view_key, train.images, train.labels, *parts, defense)


def output_folder(config: Config) -> pathlib.Path:
    """`--output`, or a name that the same settings always give."""
    return run_config.output_folder("ta_kd", config, _default(config), config.preset)


def command(config: Config) -> str:
    """The command that makes this run again, wherever its data lies."""
    chosen = {"dataset": config.dataset, "preset": config.preset, "scale": config.scale}
    return run_config.command("ta_kd", config, _default(config), **chosen)


def _default(config: Config) -> Config:
    return preset(config.preset, config.dataset, config.scale)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the flags and run."""
    choosers = {"preset": None, "dataset": None, "scale": None}
    return run(command_line.parse(preset, choosers, arguments, prog="ta_kd.py", description=__doc__.splitlines()[0]))


if __name__ == "__main__":
    command_line.run(main)
