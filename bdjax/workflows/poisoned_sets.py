"""What the experiments on poisoned training sets share: one command from the data to the report.

A run has some attacks, some seeds and some defenses. Each attack and seed gives one suspect training set; every defense is
tried on each, all suspects at once. `experiments/lfd.py` and `experiments/abm.py` add their presets, their studies (a paper's
table or figure as a choice of attacks and defenses) and their own figures.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import datasets
from bdjax.attacks import outsourcing
from bdjax.attacks.contract import CleanModel
from bdjax.datasets import splits
from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.registry import DEFENSES
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, Measured, defend, make_views
from bdjax.evaluation.suspects import Suspect, group_by_size, make_defense_input, make_suspect, suspect_keys
from bdjax.evaluation.variants import (
    NO_ATTACK,
    AttackVariant,
    DefenseVariant,
    compatible_defenses,
    read_attack,
    read_defense,
)
from bdjax.models import make_model
from bdjax.reporting import defense_report, defense_results
from bdjax.reporting.report import Section
from bdjax.reporting.tables import to_rich
from bdjax.run import command_line
from bdjax.run import config as run_config
from bdjax.run.config import IGNORED, ExperimentConfig, check_ranges, choose_engine, load, open_folder
from bdjax.run.folder import RunFolder, to_plain
from bdjax.run.log import StageLog
from bdjax.settings import split_variants
from bdjax.training import checkpoint, ensemble, processes
from bdjax.training.augmentation import Augmentation
from bdjax.training.member import Optimiser, Schedule, TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Model, PoisonedDataset, TrainTest

Preset = Literal["quick", "paper", "strong"]
ALL = "all"
Settings = TypeVar("Settings", bound="SuspectConfig")
FLIPPABLE = ("cifar10", "cifar100")
"""Sets of natural images, where a mirrored picture is of the same class."""

_QUICK = {"model": "resnet10", "width": 8, "batch_size": 64, "learning_rate": 3e-3}
QUICK_SETS: dict[str, dict[str, Any]] = {
    "digits": _QUICK | {"batch_size": 32, "epochs": 20, "attacks": "badnets,blended,sig:amplitude=0.6:target=8,none"},
    "mnist": _QUICK | {"train_rows": 4000, "test_rows": 1000, "epochs": 8},
    "cifar10": _QUICK
    | {"train_rows": 6000, "test_rows": 1000, "epochs": 12, "attacks": "badnets,blended,none", "seeds": 2},
}
"""What quick runs have on two cores, by dataset."""
LIKE = {"fashion_mnist": "mnist", "cifar100": "cifar10", "gtsrb": "cifar10"}
"""Sets that quick runs treat as another."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(ExperimentConfig):
    """The settings of every run that holds defenses side by side, whatever they are handed."""

    preset: Preset = "paper"
    """quick: minutes on two cores; paper: the paper's networks and schedule, for a GPU; strong: ours, the same threat model"""
    attacks: str = "badnets,blended,sig,none"
    """attacks with commas between them, each with settings of its own after colons: badnets:poison_rate=0.05:target=4. none
    is the training set as it is. Data that somebody handed over, at a path, is not attacked by default"""
    defenses: str = "none"
    """defenses likewise: abl,lfd:alpha=0.5; or all, every one of the registry; + between two runs one after the other:
    fine_tuning+nad"""
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


@dataclass(frozen=True, kw_only=True)
class Config(SuspectConfig):
    """Every setting of a run of defenses."""

    clean_share: float = 0.05
    """share of the training rows that is held back, unpoisoned, for defenses that need clean rows"""
    clean_data: str = ""
    """clean rows for them from elsewhere: a dataset's name or path"""
    save_models: bool = True
    """write the first seed's defended networks of the experiment's own defense"""


def start_from(
    preset: str | None,
    dataset: str | None,
    always: Mapping[str, Any],
    paper: Mapping[str, Any],
    *,
    defenses_of_own_rows: str,
    kind: type[Settings] = Config,
) -> Settings:
    """The configuration that a preset starts from.

    Args:
        preset: its name; None for quick on a CPU, and paper on anything else.
        dataset: its name or path; None for the digits.
        always: field -> value, whatever the preset.
        paper: the same at the paper's size, which strong runs have as well where there is an accelerator.
        kind: the configuration's class.
        defenses_of_own_rows: for data at a path, which is not attacked, and of which no clean rows are known.

    Raises:
        InputError: if there is no such preset.
    """
    on_cpu = jax.default_backend() == "cpu"
    preset = preset or ("quick" if on_cpu else "paper")
    dataset = dataset or "digits"
    if preset not in Preset.__args__:
        raise InputError(f"--preset {preset!r} is not one of {', '.join(Preset.__args__)}")
    if preset == "paper" or (preset == "strong" and not on_cpu):
        sized = {**paper, "compute_dtype": "float32" if on_cpu else "bfloat16"}
    else:
        sized = QUICK_SETS.get(LIKE.get(dataset, dataset), QUICK_SETS["digits"] | {"attacks": NO_ATTACK})
    own = {}
    if dataset not in datasets.DATASETS and not dataset.startswith("tfds:"):
        own = {"attacks": NO_ATTACK, "seeds": 1, "defenses": defenses_of_own_rows}
    return kind(dataset=dataset, preset=preset, **{**always, **sized, **own})


class Study(NamedTuple):
    """One of a paper's tables or figures."""

    about: str  # "figure 4b: how many rows are taken for candidates"
    attacks: str
    defenses: str


class Context(NamedTuple):
    """What a run has when its results are in, for figures of an experiment's own."""

    config: Config
    folder: RunFolder
    data: TrainTest  # the training rows before poisoning, and the test rows
    givens: Sequence[DefenseInput]  # of each group of suspects
    groups: Sequence[Sequence[Suspect]]
    comparisons: Sequence[Comparison]
    results: Mapping[str, Any]
    log: StageLog


class Experiment(NamedTuple):
    """What an experiment adds."""

    name: str  # "lfd": of the script and of the folder below runs/
    title: str  # of the report
    own: str  # the defense that it is about
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
    return run(read_flags(one, about, arguments), one, log)


def read_flags(one: Experiment, about: str, arguments: Sequence[str] | None = None) -> Any:
    """The configuration that an experiment's flags ask for.

    Args:
        one: anything with a `name`, `default` and `studies`.
        about: one line on it.
        arguments: the command line; None for that of the process.

    Raises:
        InputError: as `command_line.parse`.
    """
    studies = "; ".join(f"{name}: {study.about}" for name, study in one.studies.items())
    choosers = {"preset": None, "dataset": None}
    texts = {"prog": f"{one.name}.py", "description": f"{about} Studies: {studies}."}
    return command_line.parse(one.default, choosers, arguments, **texts)


def run(config: Config, one: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Run defenses from the data to the report.

    Args:
        config: all settings.
        one: the experiment.
        log: where progress goes; by default the terminal.

    Returns:
        What results.json holds.

    Raises:
        InputError: if the data, an attack, a defense or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config, one)
    check_ranges(config, shares=("clean_share",))
    attack_texts, defense_texts = chosen(config, one)
    data, clean, is_clean = load_rows(config, attack_texts, log)
    train, test = data
    attacks = [read_attack(text, train, config.target) for text in attack_texts]
    variants, left_out = usable_defenses(config, defense_texts, clean)
    output = run_config.output_folder(one.name, config, one.default(config.preset, config.dataset), config.preset)
    members = len(attacks) * config.seeds
    engine = choose_engine(config, train.image_shape, config.width, config.batch_size, members, output, log)

    def make_network(name: str | None = None, num_classes: int | None = None) -> Model:
        classes = num_classes or train.num_classes
        return make_model(name or config.model, classes, config.width, engine.lowering, config.compute_dtype)

    variants, not_fitting = compatible_defenses(
        variants, make_network(), make_network, train.image_shape, is_all=config.defenses == ALL
    )
    left_out |= not_fitting
    folder = open_folder(one.name, output, config, engine)
    runner = StageRunner(folder.checkpoints, train.image_shape, engine.layout, log, config.member_group or None)
    clean_key, attack_key, suspect_key, view_key = jax.random.split(jax.random.key(config.seed), 4)
    recipe = train_config(config)
    suspects = make_suspects(
        config, attacks, train, is_clean, runner, make_network(), recipe, clean_key, attack_key, log
    )
    givens, groups, views = [], [], []
    sizes = list(group_by_size(suspects))
    for numbers in sizes:
        group = [suspects[number] for number in numbers]
        place = folder.checkpoints / f"sets of {len(group[0].dataset)} rows" if len(sizes) > 1 else folder.checkpoints
        own = dataclasses.replace(runner, folder=place)
        keys = suspect_keys(suspect_key, group)
        givens.append(make_defense_input(group, keys, train, clean, make_network, recipe, own))
        groups.append(group)
        with log.stage("triggered test images") as stage:
            views.append(make_views(view_key, group, test))
            stage.detail = f"{len(group)} training sets × {len(test):,} test rows"
    comparisons = []
    for variant in variants:
        for given, group, seen in zip(givens, groups, views, strict=True):
            with log.stage(f"defense {variant.name}", detail="") as stage:
                result, tried = defend(given, group, variant, seen)
                stage.detail = told(tried)
            comparisons.append(Comparison(variant, result, tried))
    tried = [each for comparison in comparisons for each in comparison.tried]
    results = defense_results.summarise(tried, len(test), config.seed, left_out)
    folder.write_json("results.json", results)
    if not processes.is_primary():
        return results
    context = Context(config, folder, data, givens, groups, comparisons, results, log)
    if config.save_models:
        save_models(folder, comparisons, one.own)
    settings = {name: value for name, value in to_plain(config).items() if name not in IGNORED} | engine._asdict()
    defense_report.write(
        folder,
        settings,
        results,
        comparisons,
        log.timings,
        data,
        command(config, one),
        title=f"{one.title} on {train.name}",
        about=[variant.name for variant in variants if variant.defense.name == one.own],
        extra_sections=one.sections(context),
    )
    log.console.print(to_rich(defense_results.main_table(results)))
    log.console.print(f"report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    return results


def check(config: ComparisonConfig, one: Experiment) -> None:
    """Refuse settings that no data could be right for.

    Raises:
        InputError: naming the flag.
    """
    counts = ("width", "epochs", "batch_size", "evaluation_batch_size")
    at_least = {**dict.fromkeys(counts, 1), "weight_decay": 0}
    check_ranges(config, at_least=at_least, above_zero=("learning_rate",))
    if config.study and config.study not in one.studies:
        raise InputError(f"--study {config.study!r} is not one of {', '.join(one.studies)}")


def chosen(config: ComparisonConfig, one: Experiment) -> tuple[list[str], list[str]]:
    """The attacks and defenses of the run, as texts, each once.

    Raises:
        InputError: a study together with attacks or defenses of one's own.
    """
    attacks, defenses = config.attacks, config.defenses
    if config.study:
        default = one.default(config.preset, config.dataset)
        if (attacks, defenses) != (default.attacks, default.defenses):
            raise InputError(f"--study {config.study} settles attacks and defenses itself; leave out the other flags")
        attacks, defenses = one.studies[config.study].attacks, one.studies[config.study].defenses
    texts = list(DEFENSES) if defenses == ALL else split_variants(defenses)
    # Tables hold everything against no defense, which costs nothing here: the attacked network is needed in any case.
    return split_variants(attacks), list(dict.fromkeys(["none", *texts]))


def load_rows(config: Config, attacks: Sequence[str], log: StageLog) -> tuple[TrainTest, Dataset | None, bool]:
    """The training set before poisoning, the test set, the defender's clean rows, and whether the training set is clean.

    A set at a path that no attack is asked for was handed over: it may be poisoned already, so no clean rows are held back
    from it.

    Raises:
        InputError: the data cannot be used, or an attack is asked for on rows that are poisoned already.
    """
    train, test = load(config, log)
    is_attacked = any(text != NO_ATTACK for text in attacks)
    knows = isinstance(train, PoisonedDataset) and bool(np.any(train.is_poisoned))
    if knows and is_attacked:
        raise InputError(
            f"{train.source}: {int(train.is_poisoned.sum())} rows are poisoned already; use --attacks=none"
        )
    is_clean = is_attacked or config.dataset in datasets.DATASETS
    if config.clean_data:
        return TrainTest(train, test), load_clean_data(config.clean_data, config.data_dir, train), is_clean
    if not is_clean or not config.clean_share:
        return TrainTest(train, test), None, is_clean
    stay, held_back = splits.stratified_split(jax.random.key(0), train.labels, config.clean_share)
    if len(held_back) < train.num_classes:
        raise InputError(f"--clean-share {config.clean_share} of {len(train)} rows is {len(held_back)}: too few")
    return TrainTest(splits.take(train, stay), test), splits.take(train, held_back), is_clean


def load_clean_data(name: str, data_dir: pathlib.Path | None, train: Dataset) -> Dataset:
    """The training rows of another set, for defenders of `train`.

    Args:
        name: of the set, or its path.
        data_dir: where sets lie.
        train: what is defended, or what it was trained on.

    Raises:
        InputError: its images or classes are others.
    """
    clean = datasets.load(name, data_dir).train
    if clean.image_shape != train.image_shape or clean.num_classes != train.num_classes:
        raise InputError(
            f"--clean-data {name}: {clean.num_classes} classes of images {clean.image_shape}; the training "
            f"set has {train.num_classes} of {train.image_shape}"
        )
    return clean


def usable_defenses(
    config: Config, texts: Sequence[str], clean: Dataset | None
) -> tuple[list[DefenseVariant], dict[str, str]]:
    """Every defense of the run, and which ones it cannot have -> why."""
    variants, left_out = [], {}
    # Without an accelerator strong runs have the small networks of quick ones.
    is_small = config.preset == "strong" and jax.default_backend() == "cpu"
    for text in texts:
        variant = read_defense(text, "quick strong" if is_small else config.preset, config.dataset)
        if clean is None and "clean rows" in variant.defense.needs_with(variant.settings):
            left_out[text] = "needs clean rows, and there are none: give --clean-data"
        else:
            variants.append(variant)
    return variants, left_out


def make_suspects(
    config: Config,
    attacks: Sequence[AttackVariant],
    train: Dataset,
    is_clean: bool,
    runner: StageRunner,
    model: Model,
    recipe: TrainConfig,
    clean_key: jax.Array,
    attack_key: jax.Array,
    log: StageLog,
) -> list[Suspect]:
    """Poison a training set for each attack and seed; attackers who need a clean network get one of each seed."""
    known: list[CleanModel | None] = [None] * config.seeds
    if any(part.attack.needs_clean_model for attack in attacks if attack.plan for part in attack.plan.parts):
        rows = outsourcing.split_rows([clean_key] * config.seeds, train.labels, 0.0)
        keys = jax.random.split(clean_key, config.seeds)
        nets = runner.from_scratch("attackers' clean network", model, recipe, keys, 1, jnp.asarray(train.images), *rows)
        known = [CleanModel(model, ensemble.members(nets.variables, seed)) for seed in range(config.seeds)]
    suspects = []
    with log.stage("poisoning", total=len(attacks) * config.seeds, unit="training sets") as stage:
        for attack in attacks:
            for seed in range(config.seeds):
                key = jax.random.fold_in(attack_key, config.seed + seed)
                suspects.append(make_suspect(key, attack, train, seed, known[seed], is_clean))
                stage.advance(1, attack.name)
    return suspects


def told(tried: Sequence[Measured]) -> str:
    """One line on what a defense did to all its suspects."""
    text = f"CDA {np.mean([one.cda for one in tried]):.3f}"
    asr = [one.asr for one in tried if one.asr is not None]
    return text + (f", ASR {np.mean(asr):.3f}" if asr else "")


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


def save_models(folder: RunFolder, comparisons: Sequence[Comparison], own: str) -> None:
    """Write models/<defense>/<attack>: the first seed's defended networks, as Orbax checkpoints with what they are."""
    for variant, result, tried in comparisons:
        if variant.defense.name != own:
            continue
        for number, one in enumerate(tried):
            if one.suspect.seed:
                continue
            names = (defense_report.file_name(each) for each in (variant.name, one.suspect.attack.name))
            about = {
                "model": result.model.description,
                "num_classes": result.model.num_classes,
                "image_shape": list(one.suspect.dataset.image_shape),
                "defense": variant.name,
                "attack": one.suspect.attack.name,
            }
            checkpoint.save(folder.path.joinpath("models", *names), ensemble.members(result.variables, number), about)


def command(config: Config, one: Experiment) -> str:
    """The command that makes this run again, wherever its data lies."""
    default = one.default(config.preset, config.dataset)
    return run_config.command(one.name, config, default, dataset=config.dataset, preset=config.preset)
