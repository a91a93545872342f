"""An audit: a detector on a user's own training set, whose ground truth is unknown.

Where nothing is found, a trigger is planted in copies of the rows, to see what would have been found.
"""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from bdjax import datasets
from bdjax.datasets import splits
from bdjax.defenses import contract
from bdjax.errors import InputError
from bdjax.evaluation import sensitivity
from bdjax.evaluation.sensitivity import Planting
from bdjax.evaluation.suspects import Suspect, make_defense_input, suspect_keys
from bdjax.evaluation.variants import NO_ATTACK, AttackVariant, DefenseVariant, facts_of, without_untestable
from bdjax.reporting import audit as reporting
from bdjax.reporting.evidence.subject import Flagged, Subject
from bdjax.run import config as run_config
from bdjax.run.config import train_config
from bdjax.run.configs.detection import Config
from bdjax.run.experiment import Experiment
from bdjax.run.log import StageLog, format_seconds
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Detection, PoisonedDataset
from bdjax.workflows import base
from bdjax.workflows.cleaned_copy import write_cleaned, write_rows
from bdjax.workflows.detection import (
    clean_rows,
    inputs_of,
    needs_clean_rows,
    network_maker,
    read_detectors,
    settle,
)


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Find the poisoned rows of a user's own training set, and the trigger.

    Args:
        config: all settings.
        experiment: its presets, its studies, its detectors.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: several detectors, one that needs more than an audit has, or data that cannot be used.
    """
    log = log or StageLog()
    _, texts = settle(config, experiment)
    variants = read_detectors(config, texts)
    if len(variants) != 1:
        raise InputError(
            f"--defenses {','.join(texts) or NO_ATTACK}: an audit of {config.dataset} takes exactly one detector"
        )
    (variant,) = variants
    with log.stage("data") as stage:
        data = datasets.load_suspect(config.dataset, config.data_dir, options=run_config.read_options(config, log))
        if 0 < config.train_rows < len(data):
            data = splits.take(data, np.sort(splits.permutation(jax.random.key(0), len(data))[: config.train_rows]))
        stage.detail = f"{data.name}: {len(data):,} rows of {data.num_classes} classes"
    run_config.note_unread(log, data.name, datasets.unread_of(data))
    suspect = as_suspect(data)
    needs = variant.defense.needs_with(variant.settings)
    check_needs(config, variant, suspect)
    clean = clean_rows(config, data, None, variants) if needs_clean_rows(variant) else None
    shared = base.find_shared(log, clean, {"the suspect set": data})
    _, left_out = without_untestable([variant], facts_of(data, clean, data.num_classes))
    run = base.begin(experiment, config, data, 1, log)
    make_network = network_maker(config, run)
    folder = run.open_folder()
    recipe = train_config(config)
    needs_network = "attacked model" in needs and not left_out

    def detect(suspects: Sequence[Suspect], runner: StageRunner) -> Detection:
        keys = suspect_keys(key, suspects)
        inputs = make_defense_input(
            suspects, keys, data, clean, make_network, recipe, runner, train_plainly=needs_network
        )
        return contract.detect(variant.defense, *inputs_of(inputs, variant, config.clean_per_class))

    key, start = jax.random.key(config.seed), time.perf_counter()
    found = detect([suspect], run.make_runner(folder.checkpoints))
    seconds = time.perf_counter() - start
    summarise = partial(reporting.summarise, suspect, found, variant, config.seed, preset=config.preset)
    results, planting = summarise(), None
    if results["outcome"] == "nothing found" and config.sensitivity:
        planting, measured = measure_sensitivity(
            data,
            results["bound"],
            partial(detect, runner=run.make_runner(folder.checkpoints / "sensitivity")),
            jax.random.fold_in(key, 1),
            seconds,
            log,
        )
        results = summarise(sensitivity=measured)
    elif results["outcome"] == "nothing found":
        results = summarise(sensitivity={"why": "--no-sensitivity"})
    if reporting.reason_of(results):  # lists of flagged and of kept rows would look like a result
        results["cleaned"] = {"kind": None, "rows": 0}
    else:
        likely = found.evidence["new_labels"][0] if "new_labels" in found.evidence else None
        write_rows(folder, data, found.flags[0], found.scores[0], likely)
        path = pathlib.Path(config.dataset).expanduser()
        source = path if config.copy_files and path.is_dir() else None
        results["cleaned"] = write_cleaned(folder, data, ~found.flags[0], source)
    results = base.write_results(folder, results, data, clean, shared=shared)
    page = reporting.page(folder, results, suspect, found, planting.suspects[-1] if planting else None)
    flagged = Flagged(variant.title, data, found.flags[0], found.scores[0])
    subject = Subject({"audited rows": data}, () if reporting.reason_of(results) else (flagged,))
    base.finish(run, folder, page, results["verdict"]["headline"], {"rows": data.source}, results, subject)
    return results


def measure_sensitivity(
    data: Dataset,
    smallest: int | None,
    detect: Callable[[Sequence[Suspect]], Detection],
    key: jax.Array,
    seconds: float,
    log: StageLog,
) -> tuple[Planting | None, Mapping[str, Any]]:
    """Plant a trigger in copies of the rows and run the detector on them.

    Args:
        data: the rows.
        smallest: the number of poisoned rows that the detector's settings ask for; None if they say nothing.
        detect: runs the detector, with the settings of the audit, on several suspects of one call.
        key: decides which rows are planted.
        seconds: what the detector took on the rows themselves.
        log: where it is printed.

    Returns:
        The copies, and what `reporting.summarise` takes; None and the reason if nothing could be planted.
    """
    try:
        planting = sensitivity.plant(key, data, smallest)
    except InputError as error:
        why = f"the trigger {error}"
        log.note("sensitivity", f"not measured: {why}")
        return None, {"why": why}
    copies, unit = planting.suspects, "files" if data.files and not data.records else "rows"
    counts = ", ".join(f"{int(copy.is_poisoned.sum()):,}" for copy in copies)
    log.note(
        "sensitivity",
        f"nothing was found; planting a {planting.title} in copies, in {counts} {unit}: roughly "
        f"{format_seconds(len(copies) * seconds)}, or twice that where the trigger is found; --no-sensitivity leaves it out",
    )
    with log.stage("sensitivity") as stage:
        sets = sensitivity.measure(planting, detect(copies))
        stage.detail = "; ".join(
            f"{entry['planted']:,} {unit}: {'found' if entry['found'] else 'not found'}" for entry in sets
        )
    target = f"class {data.class_title(planting.target)}"
    return planting, {"trigger": planting.title, "target": target, "sets": sets}


def as_suspect(data: Dataset) -> Suspect:
    """A user's own rows as a suspect without an attack of this run."""
    is_poisoned = data.is_poisoned if isinstance(data, PoisonedDataset) else None
    return Suspect(AttackVariant(NO_ATTACK, None, 0, 0.0), 0, data, (), is_poisoned)


def check_needs(config: Config, variant: DefenseVariant, suspect: Suspect) -> None:
    """Refuse a detector that needs something that an audit does not have.

    Raises:
        InputError: naming the detector and what it needs.
    """
    needs = variant.defense.needs_with(variant.settings)
    if "number of poisons" in needs and suspect.is_poisoned is None:
        raise InputError(
            f"--defenses {variant.name}: needs the number of poisoned rows, which is unknown for {config.dataset}"
        )
    if "attacker's trigger" in needs:
        raise InputError(f"--defenses {variant.name}: needs the attacker's trigger, which an audit does not have")
    if "clean rows" in needs and not (config.clean_data and config.clean_per_class):
        raise InputError(
            f"--defenses {variant.name}: needs rows that are known to be clean, and there are none; set --clean-data"
        )
