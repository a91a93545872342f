"""A grid of experiments, datasets, attacks, defenses and seeds, as the fewest jobs.

A job is one run of one experiment on one dataset. Its attacks and seeds are members of the same calls, so that what is compiled
is compiled once; all defenses run on them. Only the attacks of a job that would not fit into memory are divided among several.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.registry import ATTACKS, find_attack
from bdjax.defenses.registry import DEFENSES
from bdjax.errors import InputError
from bdjax.evaluation.suspects import try_out
from bdjax.evaluation.variants import NO_ATTACK, read_attack
from bdjax.models import make_model
from bdjax.run import command_line
from bdjax.run import config as run_config
from bdjax.run.config import ALL, adapted_to
from bdjax.run.experiment import Experiment, read_flags
from bdjax.run.grid_file import Block, GridFile
from bdjax.run.log import StageLog
from bdjax.settings import kinds_of, nearest, shown, split_variants
from bdjax.training import ensemble, memory
from bdjax.training.member import Rows, TrainConfig, init_state, supervised
from bdjax.training.stages import cross_entropy_of
from bdjax.types import Dataset
from bdjax.workflows import attack, base, detection, poisoned_sets, suspect_models, ta_kd

SET_BY_BLOCK = {
    "dataset": "datasets",
    "attack": "attacks",
    "attacks": "attacks",
    "defenses": "defenses",
    "preset": "preset",
    "seeds": "seeds",
    "seed": "seed",
}
"""Flags that are not in `flags` -> the key of the block that sets them."""
OF_THE_DATA = (
    *("dataset", "data_dir", "like", "train_rows", "test_rows", "target"),
    *("image_size", "image_column", "label_column", "skip_unreadable", "allow_empty_classes"),
)
"""The settings that `run_config.load` depends on."""
MANY = 1000
"""Rows of each class that are enough for any attack."""


class Cell(NamedTuple):
    """One result of a grid."""

    experiment: str
    dataset: str
    preset: str
    attack: str
    defense: str
    seed: int


class Job(NamedTuple):
    """One run, in a folder of its own."""

    name: str
    """of its folder; made of what it runs, so the same run of another file has the same name"""
    experiment: str
    arguments: tuple[str, ...]
    """the command line, without --output"""
    cells: tuple[Cell, ...]
    partition: str


class Refused(NamedTuple):
    """A cell that no job has."""

    cell: Cell
    reason: str


class Plan(NamedTuple):
    """All jobs of a grid, and the cells that its datasets do not allow."""

    jobs: tuple[Job, ...]
    refused: tuple[Refused, ...]
    most: Mapping[str, int]
    """what is undivided, by the name that it has as one job -> most members of a job by the estimate, 0 for no limit"""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, each once."""
        return tuple(
            dict.fromkeys([cell for job in self.jobs for cell in job.cells] + [cell for cell, _ in self.refused])
        )


class Kind(NamedTuple):
    """What a grid has to know of a workflow. The functions raise InputError for what is wrong."""

    check: Callable[[Any, Experiment], object]
    attacks: Callable[[Any, Experiment], list[str]]
    defenses: Callable[[Any, Experiment], list[str]]
    check_attack: Callable[[Any, str, Dataset], object]
    """of an attack as it is written"""
    try_attack: Callable[[Any, str, Dataset], object]
    """of an attack on these rows"""
    check_defense: Callable[[Any, str], object]
    network: Callable[[Any], str] | None = None
    """the network that is trained on every suspect; None if the members of a job need not share the memory"""
    victims: Callable[[Any, str], tuple[list[str], int]] = lambda config, text: ([text], config.seeds)
    """of an attack as it is written: the attacks that the results name, and the number of their seeds"""


def _listed_attacks(config: Any, experiment: Experiment) -> list[str]:
    return base.attacks_and_defenses(config, experiment)[0]


def _listed_defenses(config: Any, experiment: Experiment) -> list[str]:
    text = experiment.studies[config.study].defenses if config.study else config.defenses
    return list(DEFENSES) if text == ALL else split_variants(text)


def _read_attack(config: Any, text: str, train: Dataset, gets: str = "training set") -> Any:
    return read_attack(text, train, config.target, like=adapted_to(config), defender_gets=gets)


def _try_attack(config: Any, text: str, train: Dataset, gets: str = "training set") -> None:
    try_out(jax.random.key(config.seed), [_read_attack(config, text, train, gets)], train)


def _try_on_detectors(config: Any, text: str, train: Dataset) -> None:
    detection.check_attacks([_read_attack(config, text, train)], train)
    _try_attack(config, text, train)


def _make_plan(config: Any, text: str, train: Dataset, *, is_tried: bool) -> None:
    key = jax.random.key(config.seed) if is_tried else None
    attack.make_plans(dataclasses.replace(config, attack=text), train, key)


def _victims(config: Any, text: str) -> tuple[list[str], int]:
    """A hybrid is measured under the trigger of each of its parts."""
    parts = text.split("+")
    names = [f"{part} in {text}" for part in dict.fromkeys(parts)] if len(parts) > 1 else parts
    return names, attack.seeds_of(config, [find_attack(part) for part in parts])


KINDS: Mapping[type, Kind] = {
    poisoned_sets.Config: Kind(
        base.check,
        _listed_attacks,
        _listed_defenses,
        _read_attack,
        _try_attack,
        lambda config, text: poisoned_sets.read_defenses(config, [text]),
        lambda config: config.model,
    ),
    detection.Config: Kind(
        detection.settle,
        _listed_attacks,
        lambda config, experiment: detection.settle(config, experiment)[1],
        _read_attack,
        _try_on_detectors,
        lambda config, text: detection.read_detectors(config, [text]),
    ),
    suspect_models.Config: Kind(
        suspect_models.check,
        _listed_attacks,
        _listed_defenses,
        partial(_read_attack, gets="model"),
        partial(_try_attack, gets="model"),
        lambda config, text: suspect_models.read_methods(config, [text]),
        lambda config: config.teacher_model,
    ),
    attack.Config: Kind(
        lambda config, experiment: attack.check(config),
        lambda config, experiment: [*ATTACKS, *attack.HYBRIDS] if config.attack == ALL else config.attack.split(","),
        lambda config, experiment: ["none"],
        partial(_make_plan, is_tried=False),
        partial(_make_plan, is_tried=True),
        lambda config, text: None,
        lambda config: config.model,
        _victims,
    ),
    ta_kd.Config: Kind(
        lambda config, experiment: ta_kd.check(config),
        lambda config, experiment: ["outsourcing"],
        lambda config, experiment: ["student"],
        lambda config, text, train: None,
        lambda config, text, train: None,
        lambda config, text: None,
    ),
}
"""A workflow's configuration -> its kind."""


def kind_of(config: Any) -> Kind | None:
    """The kind of a configuration; None for an experiment that a grid cannot have."""
    return next((kind for of, kind in KINDS.items() if isinstance(config, of)), None)


def make_plan(
    file: GridFile,
    experiments: Mapping[str, Experiment],
    limit: Callable[[Block], int | None],
    log: StageLog,
    known: Mapping[str, int] = {},
) -> Plan:
    """Divide a grid into jobs, after checking everything that is in its file.

    Args:
        file: the grid's file.
        experiments: name -> experiment.
        limit: a block -> usable bytes of the device that a job of it has; None if unknown.
        log: where reading the datasets is printed.
        known: `most` of an earlier plan, which the estimate does not change: other jobs would do the same again.

    Raises:
        InputError: with the file and the line: there is no such experiment, dataset, attack, defense, setting or flag, or a
            value cannot be right.
    """
    jobs: dict[str, Job] = {}
    refused: dict[Cell, str] = {}
    most: dict[str, int] = {}
    sets: dict[tuple[Any, ...], Dataset] = {}
    for number, block in enumerate(file.blocks):
        for name in block.experiments:
            if name not in experiments:
                near = nearest(name, experiments)
                raise file.error(
                    number,
                    f"experiment {shown(name)} is not one of {', '.join(experiments)}{near}",
                    name,
                    "experiments",
                )
            for dataset in block.datasets:
                found, impossible, of_part = _part(
                    file, number, experiments[name], dataset, limit(block), log, known, sets
                )
                jobs |= {job.name: job for job in found}
                refused |= impossible
                most |= of_part
    return Plan(tuple(jobs.values()), tuple(Refused(*entry) for entry in refused.items()), most)


def _part(
    file: GridFile,
    number: int,
    experiment: Experiment,
    dataset: str,
    limit: int | None,
    log: StageLog,
    known: Mapping[str, int],
    sets: dict[tuple[Any, ...], Dataset],
) -> tuple[list[Job], dict[Cell, str], dict[str, int]]:
    """The jobs of one experiment on one dataset, the cells that the dataset does not allow -> why, and its part of
    `Plan.most`; `sets` gets the training rows, by the values of `OF_THE_DATA`."""
    block = file.blocks[number]
    fields, config = read_config(file, number, experiment, dataset)
    kind = kind_of(config)
    attacks, defenses = names_in(file, number, experiment, config)
    settings = tuple(getattr(config, name) for name in OF_THE_DATA)
    if settings not in sets:
        with _located(file, number, dataset, "datasets"):
            sets[settings] = run_config.load(config, log).train
    train = sets[settings]
    anything = _plenty_of(train)
    for text in attacks:
        if fields.get("attack") != ALL:
            with _located(file, number, text, "attacks"):
                kind.check_attack(config, text, anything)

    def cells(of: Sequence[str]) -> tuple[Cell, ...]:
        return tuple(
            Cell(experiment.name, dataset, block.preset, attack, defense, seed)
            for names, seeds in (kind.victims(config, text) for text in of)
            for attack in names
            for defense in defenses
            for seed in range(config.seed, config.seed + seeds)
        )

    possible, impossible = [], {}
    for text in attacks:
        try:
            if fields.get("attack") != ALL:
                kind.try_attack(config, text, train)
            possible.append(text)
        except InputError as error:
            impossible |= dict.fromkeys(cells([text]), str(error))
    if impossible and getattr(config, "study", ""):
        # Its attacks cannot be chosen, so its run would refuse them all.
        first = next(iter(impossible.items()))
        reason = f"the study {config.study} has {first[0].attack}: {first[1]}"
        return [], dict.fromkeys(cells(possible), reason) | impossible, {}
    if not possible:
        return [], impossible, {}
    name_of_attacks = next((name for name in ("attacks", "attack") if name in kinds_of(type(config))), None)
    is_whole = name_of_attacks is None or getattr(config, "study", "") or fields.get("attack") == ALL
    if is_whole:
        return [_job(experiment, fields, cells(possible), block)], impossible, {}
    most, estimated = block.members_per_job, {}
    if not most and kind.network:
        name = _job(experiment, fields, (), block).name
        if name in known:
            most = known[name]
        elif limit:
            with _located(file, number):
                most = members_that_fit(config, kind.network(config), train, len(possible) * config.seeds, limit)
        estimated = {name: most}
    jobs, seen = [], set()
    for of_job in divide(possible, config.seeds, most):
        own = [text for text in of_job if text not in seen]
        seen |= set(of_job)
        changed = of_job != list(dict.fromkeys(attacks)) or name_of_attacks in fields
        these = fields | ({name_of_attacks: ",".join(of_job)} if changed else {})
        jobs.append(_job(experiment, these, cells(own), block))
    return jobs, impossible, estimated


def read_config(file: GridFile, number: int, experiment: Experiment, dataset: str) -> tuple[dict[str, Any], Any]:
    """The flags of a block on one dataset, and the configuration that they give.

    Raises:
        InputError: with the file and the line, for a flag that the experiment does not have, or a value out of range.
    """
    block = file.blocks[number]
    with _located(file, number, "preset", dataset):
        choosers = dict.fromkeys(experiment.choosers) | {"preset": block.preset, "dataset": dataset}
        kinds = kinds_of(type(experiment.default(**choosers)))
    own = {"dataset": dataset, "preset": block.preset, "seed": block.seed}
    if block.seeds is not None:
        own["seeds"] = block.seeds
    for key, values in (("attacks", block.attacks), ("defenses", block.defenses)):
        flag = next((name for name in (key, key.removesuffix("s")) if name in kinds), None)
        if values and flag is None:
            raise file.error(number, f"experiment {experiment.name} has no {key}; give it a block without them", key)
        if values:
            own[flag] = ",".join(values)
    for name, value in block.flags.items():
        if name == "output":
            raise file.error(number, "flags: every job has a folder of its own; leave out output", name)
        if name in SET_BY_BLOCK:
            raise file.error(number, f"flags: {name} is set by {SET_BY_BLOCK[name]} of the block", name)
        if name not in kinds:
            near = nearest(name, kinds) or f"; {command_line.invocation(experiment.name)} --help lists them"
            raise file.error(number, f"flags: {experiment.name} has no flag {shown(name)}{near}", name)
        if isinstance(value, dict):
            raise file.error(number, f"flags: {name} should be a value, not a table", name)
        for part in value if isinstance(value, list | tuple) else ():
            if str(part).startswith("--") or part == "-h":
                raise file.error(number, f"flags: {name} has {shown(str(part))}, which is a flag, not a value", name)
    fields = own | {name: tuple(value) if isinstance(value, list) else value for name, value in block.flags.items()}
    try:
        config = read_flags(experiment, "", shlex.split(command_line.as_flags(fields)))
        if (kind := kind_of(config)) is None:
            raise InputError(f"experiment {experiment.name} cannot be part of a grid")
        kind.check(config, experiment)
    except InputError as error:
        named = [name for name in (*block.flags, "seeds", "seed") if run_config.flag(name) in str(error).split()]
        if "--dataset" in str(error):
            named.append(dataset)
        raise file.error(number, str(error), *named, "study") from None
    return fields, config


def _plenty_of(train: Dataset) -> Dataset:
    """Black rows of the same shape, as many of each class: what cannot be done to them is wrong, whatever the data."""
    labels = np.arange(MANY * train.num_classes, dtype=np.int32) % train.num_classes
    images = np.broadcast_to(np.uint8(0), (len(labels), *train.image_shape))
    return Dataset(images, labels, train.num_classes, train.name, train.source)


def names_in(file: GridFile, number: int, experiment: Experiment, config: Any) -> tuple[list[str], list[str]]:
    """The attacks and the defenses of a configuration; the defenses are checked.

    Raises:
        InputError: with the file and the line.
    """
    kind = kind_of(config)
    with _located(file, number, "study", "attacks", "defenses"):
        attacks = list(dict.fromkeys(kind.attacks(config, experiment)))
        defenses = list(dict.fromkeys(kind.defenses(config, experiment)))
    if getattr(config, "defenses", "") != ALL:
        for text in defenses:
            with _located(file, number, text, "defenses"):
                kind.check_defense(config, text)
    return attacks, defenses


@contextlib.contextmanager
def _located(file: GridFile, number: int, *words: str) -> Iterator[None]:
    """Within the block, an InputError gets the file and the line of the first of some words that the file has."""
    try:
        yield
    except InputError as error:
        raise file.error(number, str(error), *words) from None


def _job(experiment: Experiment, fields: Mapping[str, Any], cells: tuple[Cell, ...], block: Block) -> Job:
    arguments = tuple(shlex.split(command_line.as_flags(fields)))
    identity = hashlib.sha256(json.dumps([experiment.name, *arguments]).encode()).hexdigest()[:8]
    slug = re.sub(r"[^\w.-]+", "-", fields["dataset"])[-40:].strip("-.")
    return Job(f"{experiment.name}-{slug}-{identity}", experiment.name, arguments, cells, block.partition)


def divide(attacks: Sequence[str], seeds: int, most: int) -> list[list[str]]:
    """Divide attacks into as few jobs as possible, of about the same size.

    All seeds of an attack stay in one job: a seed's numbers depend on the first seed of its run. The unattacked set is in every
    job, for it is the control of the others.

    Args:
        attacks: in order.
        seeds: members of each attack.
        most: attacks times seeds of a job; 0 for no limit. A job has at least one attack, whatever the limit.
    """
    per_job = max(1, most // seeds) if most else len(attacks)
    if len(attacks) <= per_job:
        return [list(attacks)]
    control = [NO_ATTACK] if NO_ATTACK in attacks else []
    others = [text for text in attacks if text != NO_ATTACK]
    per_job = max(1, per_job - len(control))
    count = -(-len(others) // per_job)
    sizes = [len(others) // count + (number < len(others) % count) for number in range(count)]
    starts = [sum(sizes[:number]) for number in range(count)]
    return [others[start : start + size] + control for start, size in zip(starts, sizes, strict=True)]


def members_that_fit(config: Any, network: str, train: Dataset, members: int, limit: int) -> int:
    """How many members one call can train, by `memory.estimate`; nothing is allocated.

    Args:
        config: of the run.
        network: the architecture of the members.
        train: the training rows before poisoning.
        members: of the whole part of the grid, at most so many are returned.
        limit: usable bytes of the device.

    Raises:
        InputError: not even one fits.
    """
    model = make_model(network, train.num_classes, config.width, compute_dtype=config.compute_dtype)
    recipe = TrainConfig(batch_size=config.batch_size)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), members))
    states = jax.eval_shape(jax.vmap(lambda key: init_state(key, model, train.image_shape, recipe)), keys)

    def rows(count: int) -> Rows:
        column = jax.ShapeDtypeStruct((members, count), jnp.int32)
        return Rows(column, {"labels": column})

    pool = jax.ShapeDtypeStruct(train.images.shape, train.images.dtype)
    loss = supervised(model, cross_entropy_of(recipe))
    need = memory.estimate(loss, recipe, states, pool, rows(len(train)), rows(0))
    return memory.largest_group(need, limit, members, 1, ensemble.default_layout() == "map")
