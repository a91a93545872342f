"""Shared by all workflows: the definition of an experiment, the start and the end of a run.

A workflow checks the settings, loads the data, checks what depends on the rows and on the network, tries out cheap triggers,
calls `begin`, which may measure, and `open_folder`, runs its stages, and passes its report to `finish`. Nothing is written
before `open_folder`, so input that cannot be used leaves no files behind.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bdjax.datasets import unread_of
from bdjax.datasets.overlap import shared_rows
from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.registry import DEFENSES
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, Measured, TriggeredViews
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.teachers import SuspectTeachers
from bdjax.exchange import leaving
from bdjax.models import make_model
from bdjax.models.operations import forward_operations
from bdjax.reporting import results as schema
from bdjax.reporting.evidence import writing as evidence
from bdjax.reporting.evidence.subject import Subject
from bdjax.reporting.report import Report, Section, Verdict, publish
from bdjax.reporting.tables import Table, to_rich
from bdjax.run import config as run_config
from bdjax.run import scalars
from bdjax.run.checks import check_output, check_ranges
from bdjax.run.config import ALL, IGNORED, IN_CONTENTS
from bdjax.run.configs.shared import ComparisonConfig, ExperimentConfig
from bdjax.run.experiment import Experiment, default_of
from bdjax.run.folder import RunFolder, check_run, to_plain
from bdjax.run.log import StageLog, format_seconds
from bdjax.run.text import csv_text
from bdjax.settings import check_choice, split_variants
from bdjax.training import ensemble, memory, probe
from bdjax.training.probe import Choice
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Model, PyTree, TrainTest

NOT_READ_FILE = "not_read.csv"
"""The list of what the data has and was not read."""

FEWER_MEMBERS = "fewer --seeds, --attacks or --num-teachers"
FEWER_ROWS = "use fewer --seeds or --attacks, or smaller --train-rows and --test-rows"


class Group(NamedTuple):
    """Suspects that are members of the same calls."""

    inputs: DefenseInput
    """the suspects as defenses get them"""
    suspects: Sequence[Suspect]
    """the same suspects with the ground truth"""
    views: TriggeredViews
    """the test images under each of their triggers"""


class Context(NamedTuple):
    """The state of a finished run, from which an experiment makes its own sections of the report."""

    config: Any
    folder: RunFolder
    data: TrainTest
    """the training rows before poisoning, and the test rows"""
    groups: Sequence[Group]
    comparisons: Sequence[Comparison]
    results: Mapping[str, Any]
    log: StageLog
    teachers: SuspectTeachers | None = None
    """only in a run on suspect models"""


class Planned(NamedTuple):
    """Networks that a run will train in one call."""

    network: str
    """name of the architecture"""
    members: int
    epochs: int
    rows: int
    """training rows of each"""


class Run(NamedTuple):
    """A run whose settings are checked; nothing is written yet."""

    experiment: Experiment
    config: ExperimentConfig
    output: pathlib.Path
    engine: Choice
    image_shape: tuple[int, int, int]
    num_classes: int
    log: StageLog

    def make_model(self, name: str, num_classes: int | None = None) -> Model:
        """A network of the run's width, for the run's images."""
        classes = num_classes or self.num_classes
        return make_model(name, classes, self.config.width, self.engine.lowering, self.config.compute_dtype)

    def open_folder(self, contents: Mapping[str, str] = {}) -> RunFolder:
        """Start the run, or continue the run in the folder.

        Args:
            contents: setting that is a path -> digest of what is there: what is moved continues, what is replaced does not.

        Raises:
            InputError: the folder cannot be used, or holds a run with other settings.
        """
        return run_config.open_folder(self.experiment.name, self.output, self.config, self.engine, contents)

    def make_runner(self, folder: pathlib.Path) -> StageRunner:
        """A runner that trains and evaluates, with its checkpoints in a folder."""
        curves = partial(scalars.curves_of, self.output.expanduser().absolute()) if self.config.tensorboard else None
        group = self.config.member_group or None
        return StageRunner(folder, self.image_shape, self.engine.layout, self.log, group, curves=curves)


def network_maker(config: Any, num_classes: int) -> Callable[..., Model]:
    """(name=None, num_classes=None) -> a network as `Run.make_model` makes it, in the default lowering: to check what depends
    on shapes before the run's own lowering is measured. Without a name, the run's network."""
    return lambda name=None, classes=None: make_model(name or config.model, classes or num_classes, config.width)


def check_networks(
    config: Any, image_shape: tuple[int, int, int], num_classes: int, members: int, networks: Sequence[str]
) -> None:
    """Refuse networks that do not fit into memory: see `begin`, which calls this.

    Raises:
        InputError: with what would fit.
    """
    for name in dict.fromkeys(networks):
        make = partial(make_model, name, num_classes)
        memory.check_networks(make, image_shape, config.width, members, FEWER_MEMBERS)


def begin(
    experiment: Experiment,
    config: Any,
    rows: Dataset,
    members: int,
    log: StageLog,
    *,
    networks: Sequence[str] = (),
    kept: int = 0,
    plan: Sequence[Planned] = (),
    beyond: str = "",
) -> Run:
    """Choose the run's folder, and the layout and lowering of its networks.

    Whatever else can be refused is to be refused before: choosing may take a minute of measurements.

    Args:
        experiment: the experiment.
        config: all settings.
        rows: the training or suspect set, whose image shape and classes the networks have.
        members: the largest number of networks that train in one call.
        log: where progress is printed.
        networks: the names of the architectures that are trained.
        kept: bytes of the training and test sets that exist at the same time.
        plan: the networks whose training the expected time is printed for.
        beyond: what else takes time: "the defenses"; empty if nothing does that takes long.

    Raises:
        InputError: the folder cannot be used, or the networks or the rows do not fit into memory.
    """
    image_shape, num_classes = rows.image_shape, rows.num_classes
    output = output_folder(experiment, config)
    check_output(output)
    check_run(output, config, experiment=experiment.name, ignore=IGNORED + IN_CONTENTS)
    memory.check_fits(f"the training and test sets of {members} networks", kept, FEWER_ROWS)
    check_networks(config, image_shape, num_classes, members, networks)
    probed = probe.probed_network([planned.network for planned in plan] or networks)
    shape = probe.Shape(image_shape, config.width, config.batch_size, members, config.compute_dtype, probed)
    engine = run_config.choose_engine(config, shape, output, log)
    if plan:
        log.note("expected time", expected_time(plan, beyond, num_classes, shape, engine))
    return Run(experiment, config, output, engine, image_shape, num_classes, log)


def expected_time(plan: Sequence[Planned], beyond: str, num_classes: int, shape: probe.Shape, engine: Choice) -> str:
    """About how long trainings will take on this machine, from the speed that the probe measured.

    A network other than the probed one is expected to take as much longer as it has more operations.

    Args:
        plan: the networks.
        beyond: as for `begin`.
        num_classes: K.
        shape: what the probe measured.
        engine: the layout and lowering.
    """
    speed = probe.measured_speed(shape, engine)
    if speed is None:
        return "not known: the probe has not timed this layout and lowering on this machine"

    def operations(network: str) -> int:
        return forward_operations(network, num_classes, shape.width, shape.image_shape)

    seconds = 0.0
    for network, members, epochs, rows in plan:
        ratio = 1.0 if network == shape.network else operations(network) / operations(shape.network)
        # All devices get the same number of networks.
        computed = members + ensemble.spread_members(members).padding
        seconds += computed * epochs * rows * ratio / speed
    count = sum(planned.members for planned in plan)
    networks = "1 network" if count == 1 else f"{count} networks"
    more = f"; {beyond} add to it" if beyond else ""
    return f"about {format_seconds(seconds)} to train {networks}, without compilation{more}"


def find_shared(log: StageLog, clean: Dataset | None, others: Mapping[str, Dataset]) -> list[dict[str, Any]]:
    """Clean rows that another set has, too, printed and for `write_results`.

    Args:
        log: where it is printed.
        clean: the rows that `--clean-data` names; None without it.
        others: "the suspect set" -> the set.

    Returns:
        An entry of results["shared_rows"] for each set with such rows.
    """
    found = []
    if clean is None:
        return found
    run_config.note_unread(log, clean.name, clean.unread)
    for name, rows in others.items():
        if count := int(shared_rows(clean, rows).sum()):
            found.append({"of": name, "count": count, "rows": len(clean)})
            log.note("clean rows", schema.shared_text(found[-1]))
    return found


def write_results(
    folder: RunFolder, results: Mapping[str, Any], *parts: Dataset | None, shared: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Write results.json, and not_read.csv if the data has files that were not read.

    Args:
        folder: the open folder of the run.
        results: all numbers of the run.
        parts: the run's datasets, the first of which names the classes; None for a part that the run does not have.
        shared: from `find_shared`.

    Returns:
        The results with what limits their conclusions; a verdict among them says it.
    """
    known = [part for part in parts if part is not None]
    unread = unread_of(*known)
    complete = {**results, **schema.class_names(known[0].class_names), "not_read": len(unread)}
    if scaled := schema.scaled(known):
        complete["scaled"] = scaled
    if shared:
        complete["shared_rows"] = list(shared)
    if "verdict" in complete:
        complete["verdict"] = dataclasses.asdict(with_limits(Verdict(**complete["verdict"]), complete))
    if unread:
        folder.write_text(NOT_READ_FILE, csv_text(("file", "reason"), unread))
    folder.write_json("results.json", complete)
    return complete


def with_limits(verdict: Verdict, results: Mapping[str, Any]) -> Verdict:
    """The verdict with sentences on what limits the results, unless its headline is such a sentence."""
    limits = [text for text in schema.reservations(results) if text != verdict.headline]
    return dataclasses.replace(verdict, text="\n\n".join(filter(None, [verdict.text, *limits])))


def leave_network(
    run: Run, folder: RunFolder, name: str, model: Model, variables: PyTree, rows: Dataset, **made_by: str | int
) -> None:
    """Write a network of the run to models/<name>, and in the further forms of `--export`.

    Nothing is written for a network that no file can describe: see `bdjax.exchange.leaving.leave`.

    Args:
        run: the run.
        folder: its open folder.
        name: of the folder in models/; may have slashes.
        model: the architecture.
        variables: stacked [1, ...].
        rows: its training rows, whose classes it has.
        made_by: "role", "seed" and so on.

    Raises:
        InputError: as `leave`.
    """
    path = folder.file(f"models/{name}/model.json").parent
    facts = {"experiment": run.experiment.name, **made_by}
    names = rows.class_names if model.num_classes == rows.num_classes else ()
    leaving.leave(path, model, variables, run.image_shape, class_names=names, made_by=facts, exports=run.config.export)


def _networks_section(folder: RunFolder) -> tuple[Section, ...]:
    """Where the run has left its networks; empty if it has left none."""
    found = sorted(path.parent.relative_to(folder.path).as_posix() for path in folder.path.glob("models/**/model.json"))
    if not found:
        return ()
    text = (
        "The first seed's networks are in these folders of the run, as model.safetensors with model.json beside it. "
        "bdjax.load_model(FOLDER) reads them, and docs/models_in_and_out.md says how others do.\n\n"
    )
    return (Section("Networks to pass on", text + ", ".join(found)),)


def finish(
    run: Run,
    folder: RunFolder,
    page: Report,
    summary: Table | str | None,
    sources: Mapping[str, str],
    results: Mapping[str, Any],
    subject: Subject | None = None,
) -> None:
    """Write the report, and with `--evidence` the evidence; print the main result, what limits it, the verdict, and the paths.

    Args:
        run: the run that ends.
        folder: its open folder.
        page: the report, without settings, timings and provenance.
        summary: the main table, or a sentence; None for nothing.
        sources: kind of rows ("training data") -> where they came from.
        results: from `write_results`.
        subject: what the evidence is about; None for a run that has none.
    """
    page = dataclasses.replace(page, sections=(*page.sections, *_networks_section(folder)))
    if "verdict" not in results:
        page = dataclasses.replace(page, verdict=with_limits(page.verdict, results))
    publish(
        folder,
        page,
        settings=settings_of(run) | {"target": schema.class_title_of(results, run.config.target)},
        timings=run.log.timings,
        reproduce=command(run.experiment, run.config),
        sources=sources,
    )
    if subject is not None and getattr(run.config, "evidence", False):
        write_evidence(run, folder, page, results, subject)
    headline = page.verdict.headline
    limits = [text for text in schema.reservations(results) if text not in (summary, headline)]
    announce(run, folder, summary, limits, headline)


def write_evidence(run: Run, folder: RunFolder, page: Report, results: Mapping[str, Any], subject: Subject) -> None:
    """Write evidence/, and print where it is."""
    path = evidence.write(
        folder,
        results,
        subject,
        page.verdict,
        experiment=run.experiment.name,
        title=page.title,
        command=command(run.experiment, run.config, as_script=False),
        settings=settings_of(run),
    )
    run.log.say(f"evidence: {path}")


def announce(run: Run, folder: RunFolder, summary: Table | str | None, limits: Sequence[str], headline: str) -> None:
    """Print the main result, sentences on what limits it, the verdict in a sentence, and the path of the report."""
    if isinstance(summary, Table):
        run.log.console.print(to_rich(summary), highlight=False)
    elif summary not in (None, headline):
        run.log.say(summary)
    for text in limits:
        run.log.say(text)
    run.log.say(headline)
    run.log.say(f"report: {folder.path / 'report.html'}")


def command(experiment: Experiment, config: Any, *, as_script: bool | None = None) -> str:
    """The command that repeats a run, wherever the data is stored; `as_script` as for `command_line.invocation`."""
    shown = {name: getattr(config, name) for name in experiment.always_shown}
    return run_config.command(experiment.name, config, default_of(experiment, config), as_script=as_script, **shown)


def output_folder(experiment: Experiment, config: Any) -> pathlib.Path:
    """`--output`, or a folder named after the settings, the same for the same settings."""
    return run_config.output_folder(experiment.name, config, default_of(experiment, config), config.preset)


def settings_of(run: Run) -> dict[str, Any]:
    """Every setting that numbers depend on, with the chosen layout and lowering."""
    plain = {name: value for name, value in to_plain(run.config).items() if name not in IGNORED}
    return plain | run.engine._asdict()


def asr_rows(suspects: Sequence[Suspect], test: Dataset) -> dict[str, int]:
    """Attack -> the test rows that its ASR is a share of: those of the trigger and the seed with the fewest."""
    fewest: dict[str, int] = {}
    for suspect in suspects:
        counts = [int(part.rule.victims(test.labels).sum()) for part in suspect.parts]
        if counts:
            fewest[suspect.attack.name] = min(fewest.get(suspect.attack.name, len(test)), *counts)
    return fewest


def sources_of(data: TrainTest) -> dict[str, str]:
    """The sources of a run's rows, for `finish`."""
    return {"training data": data.train.source, "test data": data.test.source}


def check(config: ComparisonConfig, experiment: Experiment) -> None:
    """Refuse settings out of range, whatever the data.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(config)
    run_config.check_recipe(config, default_of(experiment, config))
    if config.study:
        check_choice("--study", config.study, experiment.studies)


def attacks_and_defenses(config: ComparisonConfig, experiment: Experiment) -> tuple[list[str], list[str]]:
    """The attacks and defenses of the run, as written on the command line, without repetitions.

    Raises:
        InputError: a study together with --attacks or --defenses.
    """
    attacks, defenses = config.attacks, config.defenses
    if config.study:
        default = default_of(experiment, config)
        if (attacks, defenses) != (default.attacks, default.defenses):
            raise InputError(
                f"--study {config.study} sets attacks and defenses itself; leave out --attacks and --defenses"
            )
        attacks, defenses = experiment.studies[config.study].attacks, experiment.studies[config.study].defenses
    texts = list(DEFENSES) if defenses == ALL else split_variants(defenses)
    # "none" is the baseline of every table; it costs nothing, since the attacked network is trained anyway.
    return split_variants(attacks), list(dict.fromkeys(["none", *texts]))


def summary_line(measured: Sequence[Measured]) -> str:
    """Mean CDA and ASR over a defense's suspects, as the line of its stage."""
    text = f"CDA {np.mean([result.cda for result in measured]):.3f}"
    asr = [result.asr for result in measured if result.asr is not None]
    return text + (f", ASR {np.mean(asr):.3f}" if asr else "")
