"""What every experiment's command line shares: flags from a dataclass with presets, and one clear line when it fails."""

import dataclasses
import os
import pathlib
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console

from bdjax.errors import InputError
from bdjax.training import ensemble, processes

Config = TypeVar("Config")

FAILED = 2
"""Exit status when the input cannot be used."""
LOST = 1
"""Exit status when another process has failed or is gone."""


def parse(
    defaults: Callable[..., Config],
    choosers: dict[str, str | None],
    arguments: Sequence[str] | None = None,
    **texts: str,
) -> Config:
    """Read flags into a frozen dataclass whose defaults depend on some of the flags themselves.

    `--preset=paper --dataset=mnist` decide what all other flags default to, and `--help` then shows those defaults.

    Args:
        defaults: from the choosers' values to the configuration that the flags start from; raises InputError.
        choosers: name of a flag that decides on defaults -> its own default.
        arguments: the command line without the program's name; None for that of the process.
        texts: `prog` and `description` for the help text, which tells of `run`'s own flags as well.

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
        if count > 1 and isinstance(
            getattr(default, name, None), tuple
        ):  # the last would replace the others in silence
            raise InputError(f"--{name.replace('_', '-')} is given {count} times; all its values follow one flag")
    texts["description"] = "\n\n".join(filter(None, (texts.get("description"), processes.HELP)))
    return tyro.cli(type(default), default=default, args=arguments, **texts)


def _flags(arguments: Sequence[str]) -> list[str]:
    """The names of the fields that flags are given for."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return [flag.removeprefix("--").replace("-", "_") for flag in flags]


def changed_fields(config: Any, default: Any, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a configuration that differ from a preset's."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ignore and getattr(config, field.name) != getattr(default, field.name)
    }


def as_flags(fields: Mapping[str, Any]) -> str:
    """Flags that set these fields, quoted for a shell."""
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

    A folder that cannot be written is passed over: JAX compiles anew then, and nothing else changes.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "bdjax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def run(main: Callable[[Sequence[str] | None], object], arguments: Sequence[str] | None = None) -> None:
    """Run an experiment's main function; input that cannot be used is one line on standard error and exit status 2.

    Flags about processes (`processes.HELP`) are taken out of the command line first: every experiment has them.
    """
    use_compilation_cache()
    ensemble.use_every_core()
    try:
        others, arguments = processes.take_flags(sys.argv[1:] if arguments is None else arguments)
        if others is not None:
            processes.start(others)
        main(arguments)
    except InputError as error:
        processes.report_failure(error)
        _print_error(error)
        raise SystemExit(FAILED) from None
    except processes.ProcessError as error:
        _print_error(f"{error}; the same command goes on from here, with any number of processes")
        raise SystemExit(LOST) from None
    except KeyboardInterrupt as error:
        processes.report_failure(error)
        Console(stderr=True).print("interrupted: the same command goes on from here", style="yellow")
        raise SystemExit(130) from None
    except Exception as error:
        processes.report_failure(error)
        raise


def _print_error(error: object) -> None:
    Console(stderr=True).print(f"error: {' '.join(str(error).split())}", style="red", markup=False, soft_wrap=True)
