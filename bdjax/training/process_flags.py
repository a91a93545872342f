"""The flags of several processes, see `bdjax/training/processes.py`; they are read before JAX is imported."""

from collections.abc import Sequence
from typing import NamedTuple

from bdjax.errors import InputError
from bdjax.settings import shown

HELP = (
    "Several processes, on one host or many: start the same command in each with --coordinator=HOST:PORT (of the first), "
    "--processes=N and --process=I, or with --distributed alone under SLURM, Open MPI and others that JAX knows."
)


class Flags(NamedTuple):
    """How this process finds the others."""

    coordinator: str | None = None
    """HOST:PORT of the first process; None to detect it from the cluster's environment"""
    processes: int | None = None
    """number of processes; None to detect it"""
    process: int | None = None
    """number of this process, from 0; None to detect it"""


def take_flags(arguments: Sequence[str]) -> tuple[Flags | None, list[str]]:
    """Split the flags about processes from a command line.

    Args:
        arguments: without the program's name.

    Returns:
        The flags, None if there are none; and the remaining arguments.

    Raises:
        InputError: if a flag is missing or invalid.
    """
    given: dict[str, str] = {}
    others: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag in given:
            raise InputError(f"{flag} is given twice; give it once")
        if flag == "--distributed" and not equals:
            given[flag] = ""
        elif flag in ("--coordinator", "--processes", "--process"):
            given[flag] = value if equals else next(waiting, "")
        else:
            others.append(argument)
    if not given:
        return None, others
    if "--distributed" in given:
        superfluous = [flag for flag in given if flag != "--distributed"]
        if superfluous:
            raise InputError(
                f"--distributed detects the processes from the cluster's environment; leave out {' '.join(superfluous)}"
            )
        return Flags(), others
    missing = [flag for flag in ("--coordinator", "--processes", "--process") if flag not in given]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} missing: several processes need all of --coordinator --processes --process"
        )
    host, _, port = given["--coordinator"].rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator {shown(given['--coordinator'])} is not HOST:PORT")
    for flag in ("--processes", "--process"):
        if not given[flag].isdecimal() or len(given[flag]) > 6:
            raise InputError(f"{flag} {shown(given[flag])} is not a whole number below a million")
    count, index = int(given["--processes"]), int(given["--process"])
    if index >= count:
        raise InputError(f"--process {index} must be below --processes {count}: processes are numbered from 0")
    return Flags(given["--coordinator"], count, index), others
