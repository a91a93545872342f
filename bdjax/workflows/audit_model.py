"""An audit of suspect models: is there a backdoor, into which class, and what does its trigger look like?

The models are the user's, from anywhere that `bdjax.exchange.opening` can open; all that is needed beside them are clean rows.
Several models of one architecture are members of the same calls, and so are the control networks. A black box has no gradients:
a surrogate is distilled from its answers on the clean rows, triggers are searched on that, and only their success on the black
box itself counts. `bdjax/evaluation/model_audit.py` has the measurements, `bdjax/commands/audit_model.py` the presets.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from bdjax.defenses import teachers
from bdjax.defenses.neural_cleanse import NeuralCleanseSettings
from bdjax.evaluation import control_networks
from bdjax.evaluation.control_networks import Ask, Imitation
from bdjax.exchange.outputs import Outputs, as_logits
from bdjax.models import default_lowering, make_model
from bdjax.reporting import model_page as reporting
from bdjax.reporting.evidence.subject import Subject
from bdjax.reporting.model_verdict import commands
from bdjax.reporting.tables import to_rich
from bdjax.run.config import train_config
from bdjax.run.configs.audit_model import Config
from bdjax.run.experiment import Experiment
from bdjax.run.log import StageLog
from bdjax.training import ensemble, memory, processes
from bdjax.types import TrainTest
from bdjax.workflows import base
from bdjax.workflows.audited_models import Input, Suspects, open_suspects

ANSWERS = "answers"
"""The folder in the run's with the answers of models behind addresses."""


def run(config: Config, experiment: Experiment, given: Input, log: StageLog | None = None) -> dict[str, Any]:
    """Audit models from the data to the report.

    Args:
        config: all settings.
        experiment: its presets.
        given: what `audited_models.read` has read by the same settings; its networks may be opened again in another lowering.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: the settings do not fit the machine, or the output folder cannot be used.
    """
    log = log or StageLog()
    train, test, suspects, clean, searched, held_out = given
    open_all = partial(open_suspects, config, train)
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
        *(clean, searched, held_out, config.random_triggers),
        partial(as_shown, config.outputs, train.num_classes),
    )
    sources = [suspects.opened[source].name for source, _ in suspects.places]
    key = jax.random.key(config.seed)
    audited = control_networks.audit(
        key,
        setup,
        control_networks.Asked(suspects.titles, sources, asks, suspects.variables),
    )
    results = reporting.summarise(
        audited.numbers,
        train,
        {"clean_rows": len(clean), "search_rows": len(searched), "held_out_rows": len(held_out)},
        config.seed,
        # With --members the commands would take the other models of the folder, too.
        [] if config.members else commands(data_flags(config), config.model, len(asks), is_white, config.outputs),
        config.random_triggers,
    )
    results = base.write_results(folder, results, train, test)
    if not processes.is_primary():
        return results
    drawn = control_networks.draw_random(key, held_out, config.random_triggers)[0] if config.random_triggers else {}
    page = reporting.page(folder, results, train, held_out, audited.measured, drawn)
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


def search_settings(config: Config, rows: int) -> NeuralCleanseSettings:
    """The settings of the search."""
    batch_size = min(config.search_batch_size, rows)
    return NeuralCleanseSettings(epochs=config.search_epochs, batch_size=batch_size, patience=config.search_patience)


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
