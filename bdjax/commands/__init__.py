"""The commands: one file for each, with its configuration, presets, studies and `main`; the work is in `bdjax.workflows`.

This module imports nothing that takes time, so that a mistyped name, --help and --version are answered at once.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from bdjax import interruption


class Command(NamedTuple):
    """A row of the table of commands."""

    name: str
    """as it is typed: "ta-kd" """
    about: str
    """what it is for, in a line"""

    @property
    def module(self) -> str:
        """Name of its file in this folder, and of its script in `experiments/`: "ta_kd"."""
        return self.name.replace("-", "_")


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("ta-kd", "several untrusted models, clean rows: a small clean student"),
        Command("attack", "poison a training set, train on it, measure the backdoor"),
        Command("lfd", "a poisoned training set: a clean model, by LfD or others"),
        Command("abm", "a poisoned training set: a clean model, by ABM or others"),
        Command("vbd", "a poisoned training set: its poisoned rows and the trigger"),
        Command("robust-kd", "an untrusted model, clean images: a smaller clean student"),
        Command("audit-data", "your own images: which are poisoned, and with which trigger?"),
        Command("audit-model", "an untrusted model: is there a backdoor, into which class?"),
        Command("grid", "many attacks, defenses and seeds as jobs, here or under Slurm"),
        Command("gate", "a run's verdict.json: does it pass limits on ASR and CDA?"),
    )
}
"""Name -> command. The subcommands of `bdjax` and the scripts in `experiments/` are made from it."""


def load(name: str) -> ModuleType:
    """The module of a command.

    Args:
        name: a key of `COMMANDS`.
    """
    return import_module(f"bdjax.commands.{COMMANDS[name].module}")


def start(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a command as the main program: what a user can mend, and an interruption, end it with one line.

    Args:
        name: a key of `COMMANDS`.
        arguments: the command line without the program's name; None for that of the process.
    """
    interruption.exit_at_once()  # a command imports what it runs, which takes seconds
    module = load(name)
    command_line = import_module("bdjax.run.command_line")
    command_line.run(module.main, arguments, status_of=_status)


def _status(result: Any) -> int:
    """The exit status of a command that has ended, from what its `main` returned: a status, or the results of a run."""
    if isinstance(result, int):
        return result
    return import_module("bdjax.reporting.audit_verdict").exit_status(result)
