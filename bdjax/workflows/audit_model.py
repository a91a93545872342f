"""An audit of suspect models: is there a backdoor, into which class, and what does its trigger look like?

The models are the user's, from anywhere that `bdjax.exchange.opening` can open; all that is needed beside them are clean rows.
Several models of one architecture are members of the same calls, and so are the control networks. A black box has no gradients:
a surrogate is distilled from its answers on the clean rows, triggers are searched on that, and only their success on the black
box itself counts. `bdjax/evaluation/model_audit.py` has the measurements, `bdjax/commands/audit_model.py` the presets.
"""

import pathlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax.choices import Lowering
from bdjax.datasets import splits
from bdjax.defenses import teachers
from bdjax.defenses.neural_cleanse import NeuralCleanseSettings
from bdjax.errors import InputError
from bdjax.evaluation import control_networks
from bdjax.evaluation.control_networks import Ask, Imitation
from bdjax.exchange.opening import Opened, open_model
from bdjax.exchange.outputs import Outputs, as_logits
from bdjax.models import MODELS, default_lowering, make_model
from bdjax.reporting import model_page as reporting
from bdjax.reporting.evidence.subject import Subject
from bdjax.reporting.model_verdict import commands
from bdjax.reporting.tables import to_rich
from bdjax.run.checks import check_path, check_ranges
from bdjax.run.config import check_recipe, load, train_config
from bdjax.run.configs.audit_model import Config
from bdjax.run.experiment import Experiment, default_of
from bdjax.run.log import StageLog
from bdjax.settings import check_choice
from bdjax.training import ensemble, memory, processes
from bdjax.types import Dataset, Model, PoisonedDataset, PyTree, TrainTest
from bdjax.workflows import base

ANSWERS = "answers"
"""The folder in the run's with the answers of models behind addresses."""


class Suspects(NamedTuple):
    """The models that are audited."""

    opened: list[Opened]
    titles: list[str]
    """of N models"""
    places: list[tuple[int, int]]
    """of N models: which of `opened`, and which of its members"""
    model: Model | None
    """the architecture of all; None for black boxes"""
    variables: PyTree | None
    """stacked [N, ...]; None for black boxes"""


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Audit models from the data to the report.

    Args:
        config: all settings.
        experiment: its presets.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: the data, a model or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config)
    check_recipe(config, default_of(experiment, config))
    train, test = load(config, log)
    open_all = partial(open_suspects, config, train)
    suspects = open_all(default_lowering())
    # Every error in the settings and in the files is raised before the folder is opened, and before anything is measured.
    clean, searched, held_out = take_rows(config, train, test)
    if suspects.model is not None and suspects.model.architecture is not None:
        config = replace(config, width=suspects.model.architecture.width)
    memory.check_networks(
        lambda width: suspects.model or make_model(config.surrogate, train.num_classes, width),
        train.image_shape,
        config.width,
        config.controls + 1 + len(suspects.titles),
        "fewer --controls or --members",
    )
    run = base.begin(experiment, config, clean, config.controls + 1, log, kept=2 * clean.images.nbytes)
    if suspects.model is not None and run.engine.lowering != default_lowering():
        suspects = open_all(run.engine.lowering)
    folder = run.open_folder({"model": " ".join(opened.digest for opened in suspects.opened)})
    if suspects.model is None:
        suspects = open_all(run.engine.lowering, folder.path / ANSWERS)
    runner = run.make_runner(folder.checkpoints)

    predict = partial(runner.predict, batch_size=config.evaluation_batch_size)
    asks = [asker(config, suspects, number, predict, train.num_classes) for number in range(len(suspects.titles))]
    recipe, is_white = train_config(config), suspects.model is not None
    setup = control_networks.Setup(
        config.controls,
        suspects.model or run.make_model(config.surrogate),
        recipe,
        Imitation(replace(recipe, epochs=config.surrogate_epochs), config.queries),
        search_settings(config, len(searched)),
        runner,
        *(clean, searched, held_out),
        partial(as_shown, config.outputs, train.num_classes),
    )
    sources = [suspects.opened[source].name for source, _ in suspects.places]
    audited = control_networks.audit(
        jax.random.key(config.seed),
        setup,
        control_networks.Suspects(suspects.titles, sources, asks, suspects.variables),
    )
    results = reporting.summarise(
        audited.numbers,
        train,
        {"clean_rows": len(clean), "search_rows": len(searched), "held_out_rows": len(held_out)},
        config.seed,
        # With --members the commands would take the other models of the folder, too.
        [] if config.members else commands(data_flags(config), config.model, len(asks), is_white, config.outputs),
    )
    results = base.write_results(folder, results, train, test)
    if not processes.is_primary():
        return results
    page = reporting.page(folder, results, train, held_out, audited.measured)
    summary = reporting.main_table(results) if len(asks) > 1 else None
    if summary is not None:
        log.console.print(to_rich(summary), highlight=False)
    subject = Subject(
        {"clean rows": clean, "held-out rows": held_out},
        suspects={opened.name: opened.digest for opened in suspects.opened},
    )
    sources = base.sources_of(TrainTest(train, test))
    base.finish(run, folder, page, results["verdict"]["headline"], sources, results, subject)
    return results


# ---- Input ----------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Refuse settings out of range, whatever the data and the models.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(config)
    check_choice("--surrogate", config.surrogate, MODELS)
    for text in config.model:
        if not text:
            raise InputError("--model is empty; give it a folder, a file or an address")
        check_path("--model", text)
    if config.seeds != 1:
        raise InputError(f"--seeds {config.seeds} does not apply to an audit of models; set --controls instead")
    if config.target:
        raise InputError(f"--target {config.target} does not apply to an audit of models: it looks at every class")
    if config.like:
        raise InputError("--like does not apply to an audit of models, whose settings follow --dataset")


def open_suspects(config: Config, data: Dataset, lowering: Lowering, store: pathlib.Path | None = None) -> Suspects:
    """Open the models and check that they are for the data.

    Args:
        config: all settings.
        data: rows of the data that the models are for.
        lowering: how to compute convolutions of models whose weights are known.
        store: where answers of addresses are kept; None for in memory.

    Raises:
        InputError: no model, one that cannot be used, a member that is not there, or models of several architectures.
    """
    if not config.model:
        raise InputError("--model is missing: the folder, file or address of the model to audit")
    options = {
        "class_names": data.class_names,
        "lowering": lowering,
        "compute_dtype": config.compute_dtype,
        "store": store,
    }
    opened = [
        open_model(text, data.num_classes, data.image_shape, outputs=config.outputs, **options) for text in config.model
    ]
    kinds = {found.model.description if found.model else "a black box" for found in opened}
    if len(kinds) > 1:
        raise InputError(
            f"--model: {' and '.join(sorted(kinds))} cannot share control networks; audit models of one architecture at a time"
        )
    counts = [ensemble.num_members(found.variables) if found.model else 1 for found in opened]
    places = [(source, member) for source, count in enumerate(counts) for member in range(count)]
    if config.members:
        if len(opened) > 1:
            raise InputError("--members counts the models of a single folder; --model has several")
        if wrong := [member for member in config.members if member > counts[0]]:
            raise InputError(f"--members {wrong[0]}: {opened[0].name} has {counts[0]} models, counted from 1")
        places = [(0, member - 1) for member in dict.fromkeys(config.members)]
    several = sum(counts) > 1
    titles = [
        (f"model {member + 1}" if len(opened) == 1 else f"model {number}") if several else "the model"
        for number, (_, member) in enumerate(places, start=1)
    ]
    if opened[0].model is None:
        return Suspects(opened, titles, places, None, None)
    starts = np.cumsum([0, *counts])
    variables = ensemble.join([found.variables for found in opened])
    which = np.array([starts[source] + member for source, member in places])
    return Suspects(opened, titles, places, opened[0].model, ensemble.members(variables, which))


def take_rows(config: Config, train: Dataset, test: Dataset) -> tuple[Dataset, Dataset, Dataset]:
    """The clean rows of the control networks, those of them that triggers are searched on, and the held-out rows.

    Each has about the same share of every class.

    Raises:
        InputError: the data has poisoned rows.
    """
    for part in (train, test):
        if isinstance(part, PoisonedDataset) and part.is_poisoned.any():
            raise InputError(
                f"{part.source}: {int(part.is_poisoned.sum())} rows are poisoned; an audit of models needs clean rows"
            )
    clean = _part(train, config.clean_rows, 0)
    return clean, _part(clean, config.search_rows, 1), _part(test, config.held_out_rows, 2)


def _part(rows: Dataset, count: int, number: int) -> Dataset:
    if not 0 < count < len(rows):
        return rows
    _, taken = splits.stratified_split(jax.random.key(number), rows.labels, count / len(rows))
    return splits.take(rows, np.sort(taken))


def search_settings(config: Config, rows: int) -> NeuralCleanseSettings:
    """The settings of the search."""
    return NeuralCleanseSettings(epochs=config.search_epochs, batch_size=min(config.search_batch_size, rows))


def data_flags(config: Config) -> list[str]:
    """The flags that name the data of this run."""
    flags = [f"--dataset={config.dataset}"]
    flags += [f"--image-size={config.image_size}"] if config.image_size else []
    return flags + ["--skip-unreadable"] * config.skip_unreadable


# ---- Networks -------------------------------------------------------------------------------------------------------


def as_shown(outputs: Outputs, num_classes: int, logits: np.ndarray) -> np.ndarray:
    """What is left of logits, float [N, K], in outputs of this kind, as logits again."""
    if outputs == "logits":
        return logits
    if outputs == "labels":
        return as_logits(logits.argmax(axis=1), outputs, num_classes)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return as_logits(powers / powers.sum(axis=1, keepdims=True), outputs, num_classes)


def asker(config: Config, suspects: Suspects, number: int, predict: Callable[..., np.ndarray], num_classes: int) -> Ask:
    """uint8 images -> logits of one suspect."""
    if suspects.model is not None:
        member = ensemble.members(suspects.variables, np.arange(number, number + 1))
        return lambda images: predict(suspects.model, member, images)[0]
    opened = suspects.opened[suspects.places[number][0]]
    return lambda images: teachers.ask(opened.classifier, images, num_classes, opened.name, config.query_batch)
