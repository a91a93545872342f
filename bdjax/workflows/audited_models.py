"""What an audit of models is given: the settings, the data and the models, read and checked.

Apart from `audit_model.py`, whose reports and statistics take seconds to import: a file that cannot be used is refused before.
"""

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from bdjax.choices import Lowering
from bdjax.datasets import splits
from bdjax.errors import InputError
from bdjax.exchange.opening import Opened, open_model
from bdjax.models import MODELS, default_lowering
from bdjax.run.config import check_recipe, load
from bdjax.run.configs.audit_model import Config
from bdjax.run.experiment import Experiment, default_of
from bdjax.run.log import StageLog
from bdjax.settings import check_choice
from bdjax.training import ensemble
from bdjax.types import Dataset, Model, PoisonedDataset, PyTree


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


class Input(NamedTuple):
    """Everything that an audit is given."""

    train: Dataset
    test: Dataset
    suspects: Suspects
    """in the lowering that is the default on this machine"""
    clean: Dataset
    """the rows of the control networks"""
    searched: Dataset
    """those of them that triggers are searched on"""
    held_out: Dataset


def read(config: Config, experiment: Experiment, log: StageLog) -> Input:
    """Read the data and the models. Every error in them and in the settings is raised here, and nothing is written.

    Args:
        config: all settings, whose ranges `bdjax.commands.audit_model.check` has checked.
        experiment: its presets.
        log: where progress is printed.

    Raises:
        InputError: a setting, the data or a model cannot be used.
    """
    check_choice("--surrogate", config.surrogate, MODELS)
    check_recipe(config, default_of(experiment, config))
    train, test = load(config, log)
    suspects = open_suspects(config, train, default_lowering())
    return Input(train, test, suspects, *take_rows(config, train, test))


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
