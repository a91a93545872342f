"""Runs of detectors of poisoned rows on a grid of suspect training sets.

A grid is a list of attacks and seeds. Its suspects are processed in batches: poisoned, run through every detector, measured
and dropped, so that hundreds of suspects need the memory of a few. The outcome of each batch is written at once; a resumed run
reads it back and continues with the missing batches.

Data at a path without attacks is not a grid but an audit: `bdjax/workflows/audit.py`.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from bdjax.datasets import splits
from bdjax.defenses import contract
from bdjax.defenses.contract import DefenseInput, PoolRows
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, score_detection
from bdjax.evaluation.patterns import compare_patterns, with_true_classes
from bdjax.evaluation.suspects import Suspect, make_defense_input, make_suspect, suspect_keys, try_out
from bdjax.evaluation.variants import (
    NO_ATTACK,
    AttackVariant,
    DefenseVariant,
    facts_of,
    read_attack,
    read_defense,
    without_untestable,
)
from bdjax.reporting import detectors
from bdjax.reporting.evidence.subject import Subject
from bdjax.reporting.sections import seconds_of
from bdjax.run.config import adapted_to, load, train_config
from bdjax.run.configs.detection import Config
from bdjax.run.experiment import Experiment
from bdjax.run.log import StageLog
from bdjax.run.presets import is_registered
from bdjax.training import processes
from bdjax.types import Dataset, Model, PoisonedDataset
from bdjax.workflows import base
from bdjax.workflows.base import Run
from bdjax.workflows.outcomes import FILES, Outcome, read_outcome, write_outcome
from bdjax.workflows.poisoned_sets import load_clean_data


def settle(config: Config, experiment: Experiment) -> tuple[list[str], list[str]]:
    """Check the settings, and list the attacks and detectors of a run as written on the command line.

    Raises:
        InputError: a setting is out of range, whatever the data.
    """
    base.check(config, experiment)
    attacks, texts = base.attacks_and_defenses(config, experiment)
    return attacks, [text for text in texts if text != NO_ATTACK]  # no defense flags no rows


def is_audit(config: Config, experiment: Experiment) -> bool:
    """Whether a run is about unchanged third-party rows, at a path."""
    return not is_registered(config.dataset) and settle(config, experiment)[0] == [NO_ATTACK]


def read_detectors(config: Config, texts: Sequence[str]) -> list[DefenseVariant]:
    """The detectors of a run.

    Raises:
        InputError: a defense is not a detector.
    """
    is_small = config.preset == "strong" and jax.default_backend() == "cpu"
    preset = "quick strong" if is_small else config.preset
    variants = [read_defense(text, preset, adapted_to(config)) for text in texts]
    for variant in variants:
        if variant.defense.detect is None:
            raise InputError(f"defense {variant.defense.name} is not a detector: it does not flag rows")
    return variants


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Run every detector on every attack and seed.

    Args:
        config: all settings.
        experiment: its presets, its studies, its detectors.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: the data, an attack, a detector or the output folder cannot be used.
    """
    log = log or StageLog()
    attacks, texts = settle(config, experiment)
    variants, left_out = [], {}
    for variant in read_detectors(config, texts):
        if needs_clean_rows(variant) and not config.clean_per_class:
            left_out[variant.name] = "needs clean rows: set --clean-per-class"
        else:
            variants.append(variant)
    refuse_none(variants, texts, left_out)
    train, test = load(config, log)
    clean = clean_rows(config, train, test, variants) if any(map(needs_clean_rows, variants)) else None
    named = clean if config.clean_data else None
    shared = base.find_shared(log, named, {"the suspect set": train})
    given = None if clean is None else take_per_class(clean, config.clean_per_class)
    variants, not_testable = without_untestable(variants, facts_of(train, given, train.num_classes))
    left_out |= not_testable
    like = adapted_to(config)
    read = cache(lambda text, target: read_attack(text, train, target, like=like))
    wanted = [
        (read(text, (config.target + config.seed + seed) % train.num_classes), seed)
        for text in attacks
        for seed in range(config.seeds)
    ]
    check_attacks([attack for attack, _ in wanted], train)
    key = jax.random.fold_in(jax.random.key(config.seed), config.seed)
    try_out(key, [attack for attack, seed in wanted if not seed], train)
    refuse_none(variants, texts, left_out)
    members = min(config.suspects_at_once, len(wanted))
    kept = members * train.images.nbytes
    needs_network = any("attacked model" in variant.defense.needs for variant in variants)
    networks = [config.model] if needs_network else []
    run = base.begin(experiment, config, train, members, log, networks=networks, kept=kept)
    make_network = network_maker(config, run)
    folder = run.open_folder()
    outcomes = []
    for start in range(0, len(wanted), config.suspects_at_once):
        batch, name = wanted[start : start + config.suspects_at_once], f"suspects-{start:04d}"
        file = folder.path / FILES / f"{name}.npz"
        outcome = read_outcome(file, batch, variants, train.class_names)
        if outcome is None:
            with log.stage(f"{name}: poisoning", detail=", ".join(dict.fromkeys(attack.name for attack, _ in batch))):
                key = jax.random.key(config.seed)
                suspects = [poison(key, config, train, attack, seed) for attack, seed in batch]
            checkpoints = folder.checkpoints / name
            runner = run.make_runner(checkpoints)
            keys = suspect_keys(jax.random.fold_in(key, 1), suspects)
            recipe = train_config(config)
            inputs = make_defense_input(
                suspects, keys, train, clean, make_network, recipe, runner, train_plainly=needs_network
            )
            outcome = detect_all(inputs, suspects, variants, config.clean_per_class, log, name)
            write_outcome(folder, f"{FILES}/{name}.npz", outcome)
            if processes.is_primary():
                shutil.rmtree(checkpoints, ignore_errors=True)
        outcomes.append(outcome)
    comparisons = [comparison for outcome in outcomes for comparison in outcome.comparisons]
    measured = [result for comparison in comparisons for result in comparison.measured]
    results = detectors.summarise(measured, config.seed, left_out)
    results = base.write_results(folder, results, train, test, named, shared=shared)
    if not processes.is_primary():
        return results
    page = detectors.page(
        folder,
        results,
        comparisons,
        train,
        [pattern._replace(seed=config.seed + pattern.seed) for outcome in outcomes for pattern in outcome.found],
        seconds=seconds_of(comparisons, log.timings),
        title=f"{experiment.title} on {train.name}",
        about=[variant.name for variant in variants if variant.defense.name in experiment.about],
    )
    subject = Subject({"training data": train}, methods=experiment.about, word_of=partial(detectors.word_of, results))
    table = detectors.main_table(results, train.name)
    base.finish(run, folder, page, table, {"training data": train.source}, results, subject)
    return results


def refuse_none(variants: Sequence[DefenseVariant], texts: Sequence[str], left_out: Mapping[str, str]) -> None:
    """Refuse a run without a detector.

    Args:
        variants: the detectors that can be run.
        texts: all detectors as written on the command line.
        left_out: a detector that cannot be run -> why.

    Raises:
        InputError: there is none.
    """
    if not variants:
        reasons = "; ".join(f"{name} {why}" for name, why in left_out.items())
        raise InputError(
            f"--defenses {','.join(texts) or NO_ATTACK}: no detector can be run" + (f" ({reasons})" if reasons else "")
        )


def needs_clean_rows(variant: DefenseVariant) -> bool:
    """Whether a detector needs rows that are known to be clean."""
    return "clean rows" in variant.defense.needs_with(variant.settings)


def check_attacks(attacks: Sequence[AttackVariant], train: Dataset) -> None:
    """Refuse attacks whose training sets cannot share a call, or that need a clean network.

    Raises:
        InputError: naming the attack; or `train` has poisoned rows already.
    """
    if isinstance(train, PoisonedDataset) and train.is_poisoned.any():
        raise InputError(
            f"{train.source}: {int(train.is_poisoned.sum())} rows are poisoned already; use --attacks={NO_ATTACK}"
        )
    for attack in attacks:
        for part in attack.plan.parts if attack.plan else ():
            if part.attack.adds_rows or part.attack.needs_clean_model:
                why = "adds rows" if part.attack.adds_rows else "needs a network trained on clean rows"
                raise InputError(f"attack {attack.name} {why}; runs of detectors do not support that")


def network_maker(config: Config, run: Run) -> Callable[..., Model]:
    """`DefenseInput.make_model` of a run of detectors.

    Raises:
        InputError: `--model` does not name a network.
    """

    def make_network(name: str | None = None, num_classes: int | None = None) -> Model:
        return run.make_model(name or config.model, num_classes)

    make_network()
    return make_network


CHOICE = 5
"""A detector that chooses its clean rows chooses among this many times `--clean-per-class` of each class."""


def clean_rows(
    config: Config, train: Dataset, test: Dataset | None, variants: Sequence[DefenseVariant]
) -> Dataset | None:
    """The detectors' clean rows: from `--clean-data` if it is set, otherwise from the test set. There are more than
    `--clean-per-class` of a class if a detector chooses among them: see `inputs_of`.

    Raises:
        InputError: there are too few rows, or their shape or classes differ from the training set's.
    """
    if config.clean_data:
        test = load_clean_data(config, train)
    choice = CHOICE if any(variant.defense.chosen_clean for variant in variants) else 1
    return take_per_class(test, config.clean_per_class, choice) if test is not None else None


def inputs_of(inputs: DefenseInput, variant: DefenseVariant, count: int) -> tuple[DefenseInput, Any]:
    """The inputs and settings of one detector, which uses at most `count` clean rows of a class.

    Args:
        inputs: with the rows of `clean_rows`.
        variant: the detector.
        count: `--clean-per-class`.
    """
    settings, limit = variant.settings, variant.defense.chosen_clean
    if "clean rows" not in inputs.knowledge:
        return inputs, settings
    if limit:
        return inputs, dataclasses.replace(settings, **{limit: min(getattr(settings, limit), count)})
    index, labels = inputs.knowledge["clean rows"]
    kept = first_of_class(labels[0], count)  # the same for all suspects
    return inputs.with_knowledge({"clean rows": PoolRows(index[:, kept], labels[:, kept])}), settings


def first_of_class(labels: np.ndarray, count: int) -> np.ndarray:
    """The first `count` rows of each class, or all of a class that has fewer: int [n], in their order."""
    rows = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def take_per_class(dataset: Dataset, count: int, choice: int = 1) -> Dataset | None:
    """The first `count` rows of each class, or up to `choice` times as many; None if `count` is 0.

    Raises:
        InputError: a class has fewer than `count` rows.
    """
    if not count:
        return None
    available = np.bincount(dataset.labels, minlength=dataset.num_classes)
    fewest = int(np.argmin(available))
    if available[fewest] < count:
        raise InputError(
            f"--clean-per-class {count}: class {dataset.class_title(fewest)} of {dataset.name} has only "
            f"{available[fewest]} rows"
        )
    return splits.take(dataset, first_of_class(dataset.labels, count * choice))


def poison(key: jax.Array, config: Config, train: Dataset, attack: AttackVariant, seed: int) -> Suspect:
    """Make a suspect of the grid."""
    return make_suspect(jax.random.fold_in(key, config.seed + seed), attack, train, seed, None, True)


def detect_all(
    inputs: DefenseInput,
    suspects: Sequence[Suspect],
    variants: Sequence[DefenseVariant],
    clean_per_class: int,
    log: StageLog,
    name: str,
) -> Outcome:
    """Run every detector on a batch of suspects. The outcome keeps only the images that a report shows."""
    comparisons, found = [], []
    light = [without_images(suspect) for suspect in suspects]
    for variant in variants:
        start = time.perf_counter()
        with log.stage(f"{name}: {variant.name}") as stage:
            detected = contract.detect(variant.defense, *inputs_of(inputs, variant, clean_per_class))
            if detected.patterns:
                found += compare_patterns(detected, suspects)
                detected = with_true_classes(detected, suspects)
            seconds = (time.perf_counter() - start) / len(suspects)
            detected = detected._replace(pictures={}, patterns=(), evidence={})
            measured = score_detection(detected, light, variant, seconds)
            f1 = [result.detection.f1 for result in measured if result.detection.f1 is not None]
            stage.detail = f"mean F1 {np.mean(f1):.3f} over {len(f1)} sets" if f1 else f"{len(measured)} clean sets"
        comparisons.append(Comparison(variant, detected, measured))
    return Outcome(comparisons, found)


def without_images(suspect: Suspect) -> Suspect:
    """The same suspect with blank images that take no memory."""
    images = np.broadcast_to(np.uint8(0), suspect.dataset.images.shape)
    return suspect._replace(dataset=dataclasses.replace(suspect.dataset, images=images, files=()), params=())
