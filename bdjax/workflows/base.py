"""What every run shares: what an experiment is, how a run starts, how it ends.

A workflow checks the settings, loads the data, calls `begin`, checks what depends on the network, calls `open_folder`, does
its stages, and hands its report to `finish`. Nothing is written before `open_folder`, so input that cannot be used leaves
nothing behind.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.defenses.contract import DefenseInput
from bdjax.defenses.registry import DEFENSES
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, Measured, TriggeredViews
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.teachers import SuspectTeachers
from bdjax.models import make_model
from bdjax.reporting.report import Report, Section, publish
from bdjax.reporting.tables import Table, to_rich
from bdjax.run import command_line
from bdjax.run import config as run_config
from bdjax.run.config import ALL, IGNORED, ComparisonConfig, ExperimentConfig, check_ranges
from bdjax.run.folder import RunFolder, to_plain
from bdjax.run.log import StageLog
from bdjax.run.presets import Study
from bdjax.settings import split_variants
from bdjax.training.probe import Choice
from bdjax.training.stages import StageRunner
from bdjax.types import Model, TrainTest


class Group(NamedTuple):
    """Suspects that are members of the same calls."""

    inputs: DefenseInput
    """as defenses get them"""
    suspects: Sequence[Suspect]
    """the same with the truth"""
    views: TriggeredViews
    """the test images under each of their triggers"""


class Context(NamedTuple):
    """What a run has when its results are in, for the sections that an experiment adds to the report."""

    config: Any
    folder: RunFolder
    data: TrainTest
    """the training rows before poisoning, and the test rows"""
    groups: Sequence[Group]
    comparisons: Sequence[Comparison]
    results: Mapping[str, Any]
    log: StageLog
    teachers: SuspectTeachers | None = None
    """of a run on suspect models"""


def no_sections(context: Context) -> Sequence[Section]:
    """For an experiment whose report has nothing beyond its workflow's."""
    del context
    return ()


class Experiment(NamedTuple):
    """What a script in `experiments/` adds to a workflow."""

    name: str
    """of the script and of the folder below runs/: "lfd" """
    title: str
    """of the report"""
    about: tuple[str, ...]
    """the defenses or detectors that it is about; empty where it is about none in particular"""
    default: Callable[..., Any]
    """(choosers by name) -> what flags start from"""
    studies: Mapping[str, Study] = {}
    sections: Callable[[Context], Sequence[Section]] = no_sections
    choosers: tuple[str, ...] = ("preset", "dataset")
    """the flags that decide on the defaults of the others"""
    always_shown: tuple[str, ...] = ("dataset", "preset")
    """flags that the printed command has in any case"""


def default_of(experiment: Experiment, config: Any) -> Any:
    """The configuration that this one's preset starts from."""
    return experiment.default(**{name: getattr(config, name) for name in experiment.choosers})


def read_flags(experiment: Experiment, about: str, arguments: Sequence[str] | None = None) -> Any:
    """The configuration that an experiment's flags ask for.

    Args:
        experiment: whose.
        about: one line on it, for --help, which lists its studies as well.
        arguments: the command line; None for that of the process.

    Raises:
        InputError: as `command_line.parse`.
    """
    studies = "; ".join(f"{name}: {study.about}" for name, study in experiment.studies.items())
    texts = {"prog": f"{experiment.name}.py", "description": about + (f" Studies: {studies}." if studies else "")}
    return command_line.parse(experiment.default, dict.fromkeys(experiment.choosers), arguments, **texts)


class Run(NamedTuple):
    """A run that may start: its settings are checked, nothing is written yet."""

    experiment: Experiment
    config: ExperimentConfig
    output: pathlib.Path
    engine: Choice
    image_shape: tuple[int, int, int]
    num_classes: int
    log: StageLog

    def make_model(self, name: str, num_classes: int | None = None) -> Model:
        """A network at the run's width, for the run's images."""
        classes = num_classes or self.num_classes
        return make_model(name, classes, self.config.width, self.engine.lowering, self.config.compute_dtype)

    def open_folder(self) -> RunFolder:
        """Start the run, or continue the one that is there.

        Raises:
            InputError: the folder cannot be used, or holds a run with other settings.
        """
        return run_config.open_folder(self.experiment.name, self.output, self.config, self.engine)

    def make_runner(self, folder: pathlib.Path) -> StageRunner:
        """What trains and evaluates, with its checkpoints in a folder."""
        return StageRunner(folder, self.image_shape, self.engine.layout, self.log, self.config.member_group or None)


def begin(
    experiment: Experiment,
    config: Any,
    image_shape: tuple[int, int, int],
    num_classes: int,
    members: int,
    log: StageLog,
) -> Run:
    """Settle where the run's folder is, and how its networks are computed.

    Args:
        experiment: whose run it is.
        config: all settings.
        image_shape: (H, W, C).
        num_classes: K.
        members: how many networks train in one call, at most.
        log: where progress goes.

    Raises:
        InputError: no such layout or lowering here.
    """
    output = output_folder(experiment, config)
    engine = run_config.choose_engine(config, image_shape, config.width, config.batch_size, members, output, log)
    return Run(experiment, config, output, engine, image_shape, num_classes, log)


def finish(run: Run, folder: RunFolder, page: Report, summary: Table | str | None, sources: Mapping[str, str]) -> None:
    """Write the report; print what came out and where the report is.

    Args:
        run: what ends.
        folder: its open folder.
        page: the report, without settings, timings and provenance.
        summary: the main table, or a sentence; None for nothing.
        sources: what -> where its rows came from: "training data".
    """
    publish(
        folder,
        page,
        settings=settings_of(run),
        timings=run.log.timings,
        reproduce=command(run.experiment, run.config),
        sources=sources,
    )
    announce(run, folder, summary)


def announce(run: Run, folder: RunFolder, summary: Table | str | None) -> None:
    """Print what came out, and where the report is."""
    if summary is not None:
        shown = to_rich(summary) if isinstance(summary, Table) else summary
        run.log.console.print(shown, highlight=False, soft_wrap=isinstance(summary, str))
    run.log.console.print(f"report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)


def command(experiment: Experiment, config: Any) -> str:
    """The command that makes a run again, wherever its data lies."""
    shown = {name: getattr(config, name) for name in experiment.always_shown}
    return run_config.command(experiment.name, config, default_of(experiment, config), **shown)


def output_folder(experiment: Experiment, config: Any) -> pathlib.Path:
    """`--output`, or a name that the same settings always give."""
    return run_config.output_folder(experiment.name, config, default_of(experiment, config), config.preset)


def settings_of(run: Run) -> dict[str, Any]:
    """Every setting that numbers depend on, with the layout and lowering that were chosen."""
    plain = {name: value for name, value in to_plain(run.config).items() if name not in IGNORED}
    return plain | run.engine._asdict()


def sources_of(data: TrainTest) -> dict[str, str]:
    """Where the rows of a run came from, for `finish`."""
    return {"training data": data.train.source, "test data": data.test.source}


def check(config: ComparisonConfig, experiment: Experiment) -> None:
    """Refuse settings that no data could be right for.

    Raises:
        InputError: naming the flag.
    """
    counts = ("width", "epochs", "batch_size", "evaluation_batch_size")
    at_least = {**dict.fromkeys(counts, 1), "weight_decay": 0}
    check_ranges(config, at_least=at_least, above_zero=("learning_rate",))
    if config.study and config.study not in experiment.studies:
        raise InputError(f"--study {config.study!r} is not one of {', '.join(experiment.studies)}")


def attacks_and_defenses(config: ComparisonConfig, experiment: Experiment) -> tuple[list[str], list[str]]:
    """The attacks and defenses of the run, as texts, each once.

    Raises:
        InputError: a study together with attacks or defenses of one's own.
    """
    attacks, defenses = config.attacks, config.defenses
    if config.study:
        default = default_of(experiment, config)
        if (attacks, defenses) != (default.attacks, default.defenses):
            raise InputError(f"--study {config.study} settles attacks and defenses itself; leave out the other flags")
        attacks, defenses = experiment.studies[config.study].attacks, experiment.studies[config.study].defenses
    texts = list(DEFENSES) if defenses == ALL else split_variants(defenses)
    # Tables hold everything against no defense, which costs nothing here: the attacked network is needed in any case.
    return split_variants(attacks), list(dict.fromkeys(["none", *texts]))


def summary_line(measured: Sequence[Measured]) -> str:
    """A line on what a defense did to all its suspects."""
    text = f"CDA {np.mean([result.cda for result in measured]):.3f}"
    asr = [result.asr for result in measured if result.asr is not None]
    return text + (f", ASR {np.mean(asr):.3f}" if asr else "")
