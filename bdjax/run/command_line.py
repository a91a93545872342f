"""The command line of every experiment: flags from a dataclass with presets, and failures as one clear line."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console

from bdjax import interruption
from bdjax.errors import InputError
from bdjax.training import ensemble, processes

Config = TypeVar("Config")

FAILED = 2
"""Exit status if the input cannot be used."""
LOST = 1
"""Exit status if something outside of the run fails: another process, the disk."""


def parse(
    defaults: Callable[..., Config],
    choosers: dict[str, str | None],
    arguments: Sequence[str] | None = None,
    **texts: str,
) -> Config:
    """Read flags into a frozen dataclass whose defaults depend on some of the flags themselves.

    `--preset=paper --dataset=mnist` decide the defaults of all other flags, and `--help` then shows those defaults.

    Args:
        defaults: maps the choosers' values to the configuration that the flags start from; may raise InputError.
        choosers: name of a flag that decides the others' defaults -> its own default.
        arguments: the command line without the program's name; None for that of the process.
        texts: `prog` and `description` for the help text, to which the flags of `run` are added.

    Raises:
        InputError: a flag of several values is given more than once, or `defaults` raises it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = dict(choosers)
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in chosen:
            if not equals and position + 1 < len(arguments):
                value = arguments[position + 1]
            chosen[name] = value
    default = defaults(**chosen)
    for name, count in Counter(_flags(arguments)).items():
        # tyro would silently keep only the last.
        if count > 1 and isinstance(getattr(default, name, None), tuple):
            raise InputError(
                f"--{name.replace('_', '-')} is given {count} times; give it once, followed by all its values"
            )
    texts["description"] = "\n\n".join(filter(None, (texts.get("description"), processes.HELP)))
    return tyro.cli(type(default), default=default, args=arguments, **texts)


def _flags(arguments: Sequence[str]) -> list[str]:
    """The names of the fields that the flags set."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return [flag.removeprefix("--").replace("-", "_") for flag in flags]


def changed_fields(config: Any, default: Any, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a configuration that differ from the default's."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ignore and getattr(config, field.name) != getattr(default, field.name)
    }


def as_flags(fields: Mapping[str, Any]) -> str:
    """The flags that set these fields, quoted for a shell."""
    words = []
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    return shlex.join(words)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or below the user's cache folder.

    If the folder cannot be written, JAX compiles every time; nothing else changes.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "bdjax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def run(main: Callable[[Sequence[str] | None], object], arguments: Sequence[str] | None = None) -> None:
    """Run an experiment's main function. What a user can mend gives one line on standard error and an exit status above 0.

    That is input that cannot be used, an interruption, a failure of the disk, and a failure of another process. The flags for
    several processes (`processes.HELP`), which every experiment has, are removed from the command line first.
    """
    with interruption.handled():
        try:
            use_compilation_cache()
            ensemble.use_every_core()
            others, arguments = processes.take_flags(sys.argv[1:] if arguments is None else arguments)
            if others is not None:
                processes.start(others)
            main(arguments)
            interruption.check()
        except SystemExit:  # --help, or flags that cannot be read
            raise
        except BaseException as error:
            status = _report(error)
            if status is None:
                raise
            raise SystemExit(status) from None


def _report(error: BaseException) -> int | None:
    """Print an error that the user can mend as one line; returns the exit status, None for any other error."""
    # A library may turn the interruption into an error of its own.
    is_interrupted = isinstance(error, KeyboardInterrupt) or interruption.received()
    status = interruption.end() if is_interrupted else None
    processes.report_failure(error)
    if is_interrupted:
        Console(stderr=True).print(interruption.MESSAGE, style="yellow", soft_wrap=True)
    elif isinstance(error, InputError):
        status = FAILED
        _print_error(error)
    elif isinstance(error, processes.ProcessError):
        status = LOST
        _print_error(f"{error}; run the same command again to continue, with any number of processes")
    elif isinstance(error, OSError) and error.errno:
        status = LOST
        _abandon_output()
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror}; when that is mended, run the same command again to continue")
    return status


def _abandon_output() -> None:
    """If standard output cannot be written, for the disk is full or the reader is gone, do not try again at the exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(error: object) -> None:
    Console(stderr=True).print(f"error: {' '.join(str(error).split())}", style="red", markup=False, soft_wrap=True)
