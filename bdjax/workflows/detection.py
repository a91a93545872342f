"""What the experiment on detectors of poisoned rows does: a grid of suspect training sets, or a user's own rows.

A grid is a list of attacks and seeds. Its suspects are taken a few at a time: poisoned, put before every detector, measured
and forgotten, so that hundreds of them need the memory of a few. What came out of a few is written at once; a run that is
repeated reads it back, and goes on with those that are missing.

An audit is one suspect of which nobody knows the truth.
"""

import dataclasses
import io
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax import datasets
from bdjax.datasets import splits
from bdjax.defenses import vbd
from bdjax.defenses.contract import DefenseInput
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, score_detection
from bdjax.evaluation.patterns import FoundPattern, compare_patterns, with_true_classes
from bdjax.evaluation.suspects import Suspect, make_defense_input, make_suspect, suspect_keys
from bdjax.evaluation.variants import NO_ATTACK, AttackVariant, DefenseVariant, read_attack, read_defense
from bdjax.models import make_model
from bdjax.reporting import audit_report, defenses, detection_report
from bdjax.reporting.tables import to_rich
from bdjax.run import config as run_config
from bdjax.run.config import IGNORED, SuspectConfig, choose_engine, load, open_folder, train_config
from bdjax.run.folder import RunFolder, to_plain
from bdjax.run.log import StageLog
from bdjax.training import processes
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Detection, Model, PoisonedDataset
from bdjax.workflows import base
from bdjax.workflows.base import Experiment

FILES = "outcomes"
"""The folder, in that of the run, with what came out of each few suspects."""


@dataclass(frozen=True, kw_only=True)
class Config(SuspectConfig):
    """Every setting of a run; `--preset` and `--dataset` decide what the others default to. Of the settings of plain training
    (model to augmentation) nothing is used unless a detector needs the attacked network."""

    target: int = 0
    """the class that attacks of the first seed aim at; those of each further seed aim at the next class"""
    defenses: str = "vbd"
    """detectors likewise: vbd,scan:threshold=10"""
    clean_per_class: int = 10
    """test rows of each class for detectors that need clean rows; 0 leaves those detectors out"""
    suspects_at_once: int = 10
    """how many training sets share a call, and memory"""
    copy_files: bool = False
    """of an audited folder, copy the image files that are not flagged"""


class Outcome(NamedTuple):
    """A few suspects before every detector."""

    comparisons: list[Comparison]  # one for each detector
    found: list[FoundPattern]


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Try detectors on a grid of suspects, or audit rows that somebody handed over.

    Args:
        config: all settings.
        experiment: its presets, its studies, what it is about.
        log: where progress goes; by default the terminal.

    Returns:
        What results.json holds.

    Raises:
        InputError: if the data, an attack, a detector or the output folder cannot be used.
    """
    log = log or StageLog()
    base.check(config, experiment)
    run_config.check_ranges(config, at_least={"suspects_at_once": 1, "clean_per_class": 0})
    attacks, texts = base.attacks_and_defenses(config, experiment)
    texts = [text for text in texts if text != NO_ATTACK]  # no detector has nothing to say
    is_own = config.dataset not in datasets.DATASETS and not config.dataset.startswith("tfds:")
    if is_own and attacks == [NO_ATTACK]:
        return audit(config, experiment, texts, log)
    return run_grid(config, experiment, attacks, texts, log)


def read_detectors(config: Config, texts: Sequence[str]) -> list[DefenseVariant]:
    """The detectors of a run.

    Raises:
        InputError: a defense that is none.
    """
    is_small = config.preset == "strong" and jax.default_backend() == "cpu"
    preset = "quick strong" if is_small else config.preset
    variants = [read_defense(text, preset, config.dataset) for text in texts]
    for variant in variants:
        if variant.defense.detect is None:
            raise InputError(f"defense {variant.defense.name} does not say which rows are poisoned")
    return variants


def run_grid(
    config: Config, experiment: Experiment, attacks: Sequence[str], texts: Sequence[str], log: StageLog
) -> dict[str, Any]:
    """Every attack and seed before every detector."""
    variants, left_out = [], {}
    for variant in read_detectors(config, texts):
        if needs_clean_rows(variant) and not config.clean_per_class:
            left_out[variant.name] = "needs clean rows: give --clean-per-class"
        else:
            variants.append(variant)
    if not variants:
        told = "; ".join(f"{name} {why}" for name, why in left_out.items())
        raise InputError(
            f"--defenses {','.join(texts) or NO_ATTACK}: no detector is left" + (f" ({told})" if told else "")
        )
    train, test = load(config, log)
    clean = take_per_class(test, config.clean_per_class) if any(map(needs_clean_rows, variants)) else None
    wanted = [
        (read_attack(text, train, (config.target + config.seed + seed) % train.num_classes), seed)
        for text in attacks
        for seed in range(config.seeds)
    ]
    check_attacks([attack for attack, _ in wanted], train)
    default = base.default_of(experiment, config)
    output = run_config.output_folder(experiment.name, config, default, config.preset)
    members = min(config.suspects_at_once, len(wanted))
    engine = choose_engine(config, train.image_shape, config.width, config.batch_size, members, output, log)
    make_network = network_maker(config, train.num_classes, engine)
    folder = open_folder(experiment.name, output, config, engine)
    outcomes = []
    for start in range(0, len(wanted), config.suspects_at_once):
        some, name = wanted[start : start + config.suspects_at_once], f"suspects-{start:04d}"
        file = folder.path / FILES / f"{name}.npz"
        outcome = read_outcome(file, some, variants)
        if outcome is None:
            with log.stage(f"{name}: poisoning", detail=", ".join(dict.fromkeys(each.name for each, _ in some))):
                key = jax.random.key(config.seed)
                suspects = [poison(key, config, train, *each) for each in some]
            place = folder.checkpoints / name
            runner = StageRunner(place, train.image_shape, engine.layout, log, config.member_group or None)
            needs_network = any("attacked model" in each.defense.needs for each in variants)
            keys = suspect_keys(jax.random.fold_in(key, 1), suspects)
            recipe = train_config(config)
            given = make_defense_input(
                suspects, keys, train, clean, make_network, recipe, runner, train_plainly=needs_network
            )
            outcome = detect_all(given, suspects, variants, log, name)
            write_outcome(folder, f"{FILES}/{name}.npz", outcome)
            if processes.is_primary():
                shutil.rmtree(place, ignore_errors=True)
        outcomes.append(outcome)
    comparisons = [each for outcome in outcomes for each in outcome.comparisons]
    tried = [each for comparison in comparisons for each in comparison.tried]
    results = defenses.summarise(tried, 0, config.seed, left_out)
    folder.write_json("results.json", results)
    if not processes.is_primary():
        return results
    settings = {name: value for name, value in to_plain(config).items() if name not in IGNORED} | engine._asdict()
    detection_report.write(
        folder,
        settings,
        results,
        comparisons,
        log.timings,
        train,
        run_config.command(experiment.name, config, default, dataset=config.dataset, preset=config.preset),
        [each._replace(seed=config.seed + each.seed) for outcome in outcomes for each in outcome.found],
        f"{experiment.title} on {train.name}",
        [variant.name for variant in variants if variant.defense.name in experiment.about],
    )
    log.console.print(to_rich(defenses.detection_table(results)))
    log.console.print(f"report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    return results


def needs_clean_rows(variant: DefenseVariant) -> bool:
    """Whether a detector cannot do without rows that are known to be clean."""
    return "clean rows" in variant.defense.needs_with(variant.settings)


def check_attacks(attacks: Sequence[AttackVariant], train: Dataset) -> None:
    """Refuse attacks whose sets cannot be members of one call, or that there is no network for.

    Raises:
        InputError: naming the attack, or the rows that are poisoned already.
    """
    if isinstance(train, PoisonedDataset) and train.is_poisoned.any():
        raise InputError(
            f"{train.source}: {int(train.is_poisoned.sum())} rows are poisoned already; use --attacks={NO_ATTACK}"
        )
    for attack in attacks:
        for part in attack.plan.parts if attack.plan else ():
            if part.attack.adds_rows or part.attack.needs_clean_model:
                why = "adds rows" if part.attack.adds_rows else "needs a network that was trained on clean rows"
                raise InputError(f"attack {attack.name} {why}, which this grid has no place for")


def network_maker(config: Config, own_classes: int, engine: Any) -> Callable[..., Model]:
    """What `DefenseInput.make_model` is for this run."""

    def make_network(name: str | None = None, num_classes: int | None = None) -> Model:
        return make_model(
            name or config.model, num_classes or own_classes, config.width, engine.lowering, config.compute_dtype
        )

    make_network()
    return make_network


def take_per_class(dataset: Dataset, count: int) -> Dataset | None:
    """The first so many rows of each class; None for none.

    Raises:
        InputError: a class has fewer.
    """
    if not count:
        return None
    rows = [np.flatnonzero(dataset.labels == label)[:count] for label in range(dataset.num_classes)]
    fewest = min(map(len, rows))
    if fewest < count:
        raise InputError(f"--clean-per-class {count}: a class of {dataset.name} has only {fewest} test rows")
    return splits.take(dataset, np.sort(np.concatenate(rows)))


def poison(key: jax.Array, config: Config, train: Dataset, attack: AttackVariant, seed: int) -> Suspect:
    """One suspect of the grid."""
    return make_suspect(jax.random.fold_in(key, config.seed + seed), attack, train, seed, None, True)


def detect_all(
    given: DefenseInput,
    suspects: Sequence[Suspect],
    variants: Sequence[DefenseVariant],
    log: StageLog,
    name: str,
) -> Outcome:
    """Put a few suspects before every detector. What comes back holds no images but those that a report shows."""
    comparisons, found = [], []
    light = [without_images(one) for one in suspects]
    for variant in variants:
        start = time.perf_counter()
        with log.stage(f"{name}: {variant.name}") as stage:
            detected = variant.defense.detect(given, variant.settings)
            if detected.patterns:
                found += compare_patterns(detected, suspects)
                detected = with_true_classes(detected, suspects)
            seconds = (time.perf_counter() - start) / len(suspects)
            detected = detected._replace(pictures={}, patterns=(), evidence={})
            tried = score_detection(detected, light, variant, seconds)
            known = [each.detection.f1 for each in tried if each.detection.f1 is not None]
            stage.detail = f"mean F1 {np.mean(known):.3f} of {len(known)}" if known else f"{len(tried)} clean sets"
        comparisons.append(Comparison(variant, detected, tried))
    return Outcome(comparisons, found)


def without_images(suspect: Suspect) -> Suspect:
    """The same with an image that all rows share, which takes no memory."""
    images = np.broadcast_to(np.uint8(0), suspect.dataset.images.shape)
    return suspect._replace(dataset=dataclasses.replace(suspect.dataset, images=images, files=()), params=())


# ---- Outcomes on disk -------------------------------------------------------------------------------------------


def write_outcome(folder: RunFolder, name: str, outcome: Outcome) -> pathlib.Path:
    """Write what came out of a few suspects, as plain arrays."""
    arrays: dict[str, np.ndarray] = {}
    for number, one in enumerate(outcome.comparisons[0].tried):
        arrays[f"labels {number}"] = one.suspect.dataset.labels
        arrays[f"is_poisoned {number}"] = one.suspect.is_poisoned
        arrays[f"is_cover {number}"] = getattr(one.suspect.dataset, "is_cover", np.zeros(0, bool))
    for number, comparison in enumerate(outcome.comparisons):
        arrays[f"flags {number}"], arrays[f"scores {number}"] = comparison.result.flags, comparison.result.scores
        arrays[f"seconds {number}"] = np.float64(comparison.tried[0].seconds)
        arrays[f"fact names {number}"] = np.array(list(comparison.result.facts), np.str_)
        facts = [np.asarray(values, np.float64) for values in comparison.result.facts.values()]
        arrays[f"facts {number}"] = np.array(facts).reshape(len(facts), len(comparison.tried))
    for number, one in enumerate(outcome.found):
        for field, value in one._asdict().items():
            if value is not None:
                arrays[f"found {number} {field}"] = np.asarray(value)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return folder.write_bytes(name, buffer.getvalue())


def read_outcome(
    file: pathlib.Path, wanted: Sequence[tuple[AttackVariant, int]], variants: Sequence[DefenseVariant]
) -> Outcome | None:
    """What `write_outcome` wrote of these suspects and detectors; None if it did not.

    Raises:
        InputError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        # From memory: of a damaged file numpy.load leaves the handle open.
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            arrays = dict(arrays)
        suspects = [_suspect(arrays, number, *each) for number, each in enumerate(wanted)]
        comparisons = [_comparison(arrays, number, variant, suspects) for number, variant in enumerate(variants)]
        return Outcome(comparisons, _found(arrays))
    except Exception as error:  # zip, zlib and NumPy each raise their own on damaged files
        raise InputError(f"{file}: is damaged ({error}); remove it, and those suspects are tried again") from error


def _suspect(arrays: Mapping[str, np.ndarray], number: int, attack: AttackVariant, seed: int) -> Suspect:
    labels, is_poisoned = arrays[f"labels {number}"], arrays[f"is_poisoned {number}"]
    images = np.broadcast_to(np.uint8(0), (len(labels), 1, 1, 1))
    num_classes = int(labels.max()) + 1
    if attack.plan is None:
        dataset = Dataset(images, labels, num_classes, "", "")
    else:
        is_cover = arrays[f"is_cover {number}"]
        dataset = PoisonedDataset(images, labels, num_classes, "", "", (), is_poisoned, labels, is_cover)
    return Suspect(attack, seed, dataset, (), is_poisoned)


def _comparison(
    arrays: Mapping[str, np.ndarray], number: int, variant: DefenseVariant, suspects: Sequence[Suspect]
) -> Comparison:
    facts = dict(zip(map(str, arrays[f"fact names {number}"]), arrays[f"facts {number}"], strict=True))
    detected = Detection(arrays[f"flags {number}"], arrays[f"scores {number}"], facts)
    return Comparison(
        variant, detected, score_detection(detected, suspects, variant, float(arrays[f"seconds {number}"]))
    )


def _found(arrays: Mapping[str, np.ndarray]) -> list[FoundPattern]:
    found, number = [], 0
    while f"found {number} label" in arrays:
        values = {field: arrays.get(f"found {number} {field}") for field in FoundPattern._fields}
        plain = {field: value.item() for field, value in values.items() if value is not None and value.ndim == 0}
        found.append(FoundPattern(**{**values, **plain}))
        number += 1
    return found


# ---- An audit ----------------------------------------------------------------------------------------------------


def audit(config: Config, experiment: Experiment, texts: Sequence[str], log: StageLog) -> dict[str, Any]:
    """Which of a user's own rows are poisoned, and by what trigger?

    Raises:
        InputError: other detectors than the experiment's own, or data that cannot be used.
    """
    variants = read_detectors(config, texts)
    if [variant.defense.name for variant in variants] != list(experiment.about):
        raise InputError(
            f"--defenses {','.join(texts)}: an audit of {config.dataset} is by {experiment.about[0]} alone"
        )
    (variant,) = variants
    with log.stage("data") as stage:
        data = datasets.load_suspect(config.dataset, config.data_dir)
        if 0 < config.train_rows < len(data):
            data = splits.take(data, np.sort(splits.permutation(jax.random.key(0), len(data))[: config.train_rows]))
        stage.detail = f"{data.name}: {len(data):,} rows of {data.num_classes} classes"
    default = base.default_of(experiment, config)
    output = run_config.output_folder(experiment.name, config, default, config.preset)
    engine = choose_engine(config, data.image_shape, config.width, config.batch_size, 1, output, log)
    make_network = network_maker(config, data.num_classes, engine)
    folder = open_folder(experiment.name, output, config, engine)
    runner = StageRunner(folder.checkpoints, data.image_shape, engine.layout, log, config.member_group or None)
    is_poisoned = data.is_poisoned if isinstance(data, PoisonedDataset) else None
    suspect = Suspect(AttackVariant(NO_ATTACK, None, 0, 0.0), 0, data, (), is_poisoned)
    keys = suspect_keys(jax.random.key(config.seed), [suspect])
    recipe = train_config(config)
    given = make_defense_input([suspect], keys, data, None, make_network, recipe, runner, train_plainly=False)
    analysis = vbd.analyse(given, variant.settings)
    settings = {name: value for name, value in to_plain(config).items() if name not in IGNORED} | engine._asdict()
    path = pathlib.Path(config.dataset).expanduser()
    results = audit_report.write(
        folder,
        settings,
        data,
        analysis,
        variant.settings,
        log.timings,
        run_config.command(experiment.name, config, default, dataset=config.dataset, preset=config.preset),
        source_folder=path if path.is_dir() else None,
        copy_files=config.copy_files,
    )
    log.console.print(results["verdict"]["headline"], highlight=False, soft_wrap=True)
    log.console.print(f"report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    return results
