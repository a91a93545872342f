"""What a command adds to a workflow: presets, studies and sections of the report; and reading its flags."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bdjax.run import command_line
from bdjax.run.checks import check_ranges
from bdjax.run.presets import Study


def no_sections(context: Any) -> Sequence[Any]:
    """For an experiment that adds no sections to its workflow's report."""
    del context
    return ()


class Experiment(NamedTuple):
    """What a command adds to a workflow."""

    name: str
    """name of its file in `bdjax/commands/`, of its script, and of its folder in runs/: "lfd" """
    title: str
    """title of the report"""
    about: tuple[str, ...]
    """registry names of the experiment's own defenses or detectors; may be empty"""
    default: Callable[..., Any]
    """(choosers by name) -> the configuration that the flags start from"""
    studies: Mapping[str, Study] = {}
    sections: Callable[[Any], Sequence[Any]] = no_sections
    """(`bdjax.workflows.base.Context` of the finished run) -> sections that the report gets in addition"""
    choosers: tuple[str, ...] = ("preset", "dataset")
    """the flags that decide the defaults of the others"""
    always_shown: tuple[str, ...] = ("dataset", "preset")
    """flags that the printed command always has"""
    positional: str = ""
    """the flag that a word without a flag sets; "" if every value needs its flag"""
    fixed: tuple[str, ...] = ()
    """fields that have no flag, and keep the value of `default`"""


def default_of(experiment: Experiment, config: Any) -> Any:
    """The configuration that the preset of `config` starts from."""
    return experiment.default(**{name: getattr(config, name) for name in experiment.choosers})


def read_flags(
    experiment: Experiment,
    about: str,
    arguments: Sequence[str] | None = None,
    check: Callable[[Any], None] = check_ranges,
) -> Any:
    """The configuration that an experiment's flags set.

    Args:
        experiment: the experiment.
        about: a line for --help, which lists the studies as well.
        arguments: the command line; None for that of the process.
        check: raises an InputError if the configuration cannot be right, whatever the data.

    Raises:
        InputError: as `command_line.parse` and `check`.
    """
    studies = "; ".join(f"{name}: {study.about}" for name, study in experiment.studies.items())
    description = about + (f" Studies: {studies}." if studies and "study" not in experiment.fixed else "")
    config = command_line.parse(
        experiment.default,
        dict.fromkeys(experiment.choosers),
        arguments,
        positional=experiment.positional,
        fixed=experiment.fixed,
        prog=command_line.program(experiment.name),
        description=description,
    )
    check(config)
    return config
