"""The command `bdjax`, also as `python -m bdjax`: `bdjax NAME FLAGS` runs a command of `bdjax.commands`."""

import sys
from collections.abc import Sequence

import bdjax
from bdjax import commands
from bdjax.commands import COMMANDS
from bdjax.run.text import printable
from bdjax.settings import nearest, shown

FAILED = 2
"""Exit status if there is no such command."""


def overview() -> str:
    """The text of `bdjax --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"bdjax {bdjax.__version__}: backdoor attacks and defenses on image classifiers",
            "",
            "usage: bdjax COMMAND [FLAGS]",
            "",
            *lines,
            "",
            "bdjax COMMAND --help lists the flags of a command. Every run ends in one folder",
            "with a report, and the same command continues an interrupted run.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first word names.

    Args:
        arguments: the command line without the program's name; None for that of the process.
    """
    name, *others = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name in ("-V", "--version"):
        print(f"bdjax {bdjax.__version__}")
    elif name.replace("_", "-") in COMMANDS:
        commands.start(name.replace("_", "-"), others)
    else:
        what = "flag" if name.startswith("-") else "command"
        near = (
            nearest(name.replace("_", "-"), [*COMMANDS, "--help", "--version"]) or "; bdjax --help lists all commands"
        )
        print(printable(f"error: there is no {what} {shown(name)}{near}"), file=sys.stderr)
        raise SystemExit(FAILED)


if __name__ == "__main__":
    main()
