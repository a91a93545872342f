"""The command line of every experiment: flags from a dataclass with presets, and failures as one clear line."""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import pathlib
import shlex
import sys
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from bdjax import interruption
from bdjax.errors import InputError, ProcessError
from bdjax.plugins import PluginWarning
from bdjax.run import backend
from bdjax.run.flag_groups import GROUPS, documentation, grouped
from bdjax.run.text import printable, shortened
from bdjax.settings import kinds_of, nearest, shown
from bdjax.training import process_flags

Config = TypeVar("Config")
Result = TypeVar("Result")

FAILED = 2
"""Exit status if the input cannot be used."""
LONGEST_ERROR = 500
"""Letters of an error message on the terminal; the middle of a longer one is left out."""
LOST = 1
"""Exit status if something outside of the run fails: another process, the disk."""


def parse(
    defaults: Callable[..., Config],
    choosers: dict[str, str | None],
    arguments: Sequence[str] | None = None,
    *,
    positional: str = "",
    fixed: Sequence[str] = (),
    about_processes: str = process_flags.HELP,
    **texts: str,
) -> Config:
    """Read flags into a frozen dataclass whose defaults depend on some of the flags themselves.

    `--preset=paper --dataset=mnist` decide the defaults of all other flags, and `--help` then shows those defaults.

    Args:
        defaults: maps the choosers' values to the configuration that the flags start from; may raise InputError.
        choosers: name of a flag that decides the others' defaults -> its own default.
        arguments: the command line without the program's name; None for that of the process.
        positional: the field that a word without a flag sets; "" if every value needs its flag.
        fixed: fields that have no flag.
        about_processes: end of the help text's description, on the flags of `run`; "" for a command that is one process.
        texts: `prog` and `description` for the help text.

    Raises:
        InputError: there is no such flag, it is given twice or has a value that its type cannot have, or `defaults` raises it.
          Ranges are not checked here.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    asks_for_help = any(argument in ("-h", "--help") or argument.startswith("--tyro-") for argument in arguments)
    if positional:
        arguments = _with_flag(arguments, positional, kinds_of(type(defaults(**choosers))))
    given = list(_split(arguments, is_lenient=asks_for_help))
    default = defaults(**choosers | {name: values[0] for name, values in given if name in choosers and values})
    kinds = {name: kind for name, kind in kinds_of(type(default)).items() if name not in fixed}
    texts["description"] = "\n\n".join(filter(None, (texts.get("description"), about_processes)))
    if asks_for_help:
        shown = _in_groups(default, kinds)
        return tyro.cli(tyro.conf.OmitArgPrefixes[type(shown)], default=shown, args=arguments, **texts)
    _check(given, kinds, choosers)
    wrong = io.StringIO()
    try:
        with contextlib.redirect_stderr(wrong):
            return tyro.cli(type(default), default=default, args=arguments, **texts)
    except SystemExit as stop:
        if not stop.code:
            raise
        # The checks above have missed something; tyro's text is framed.
        words = [word for word in wrong.getvalue().split() if any(map(str.isalnum, word))]
        raise InputError(f"the flags cannot be read: {' '.join(words)}; --help lists all flags") from None


def _with_flag(arguments: Sequence[str], field: str, kinds: Mapping[str, Any]) -> list[str]:
    """The command line with a flag before each word that is no flag's value.

    Args:
        arguments: the command line.
        field: what such a word sets; several words if it is a tuple.
        kinds: field -> type.
    """
    words: list[str] = []
    waiting = 0.0  # number of values that the last flag may still have
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, _ = argument[2:].replace("-", "_").partition("=")
            kind = kinds.get(name, kinds.get(name.removeprefix("no_")))
            waiting = 0 if equals or kind is bool else 1 if kind and not _is_tuple(kind) else math.inf
        elif waiting:
            waiting -= 1
        elif argument != "-h":
            words.append("--" + field.replace("_", "-"))
            waiting = math.inf if _is_tuple(kinds[field]) else 0
        words.append(argument)
    return words


def split_words(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Split a command line into the words before its first flag, such as file names, and the rest.

    Args:
        arguments: without the program's name; None for those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return arguments[:first], arguments[first:]


def _split(arguments: Sequence[str], *, is_lenient: bool) -> Iterator[tuple[str, list[str]]]:
    """The flags of a command line in order: the name as a field, such as "no_shuffle", and the values.

    Raises:
        InputError: a value comes before the first flag, unless `is_lenient`.
    """
    name, values = None, []
    for argument in arguments:
        if argument.startswith("--"):
            if name is not None:
                yield name, values
            flag, equals, value = argument.partition("=")
            name, values = flag[2:].replace("-", "_"), [value] if equals else []
        elif name is not None:
            values.append(argument)
        elif not is_lenient:
            raise InputError(f"{shown(argument)} is not a flag; flags begin with --, and --help lists them")
    if name is not None:
        yield name, values


def _check(given: Sequence[tuple[str, list[str]]], kinds: Mapping[str, Any], choosers: Mapping[str, Any]) -> None:
    """Refuse flags that tyro would refuse in a box of many lines, or would overrule in silence.

    Args:
        given: from `_split`.
        kinds: field -> type.
        choosers: the fields that decide the others' defaults.

    Raises:
        InputError: an unknown flag, a flag that is given twice, or a value that its type cannot have.
    """
    switches = {f"no_{name}": name for name, kind in kinds.items() if kind is bool}
    counts = Counter(switches.get(name, name) for name, _ in given)
    for name, values in given:
        field = switches.get(name, name)
        flag = "--" + name.replace("_", "-")
        if field not in kinds:
            names = ["--" + known.replace("_", "-") for known in (*kinds, *switches)]
            near = nearest(flag, names) or "; --help lists all flags"
            raise InputError(f"there is no flag {shown(flag)}{near}")
        kind = kinds[field]
        if counts[field] > 1:
            several = ", followed by all its values" if _is_tuple(kind) else ""
            raise InputError(f"{flag} is given {counts[field]} times; give it once{several}")
        if kind is bool:
            if values:
                raise InputError(
                    f"{flag} takes no value, but has {shown(' '.join(values))}: --{field.replace('_', '-')} or "
                    f"--no-{field.replace('_', '-')}"
                )
            continue
        if not values:
            raise InputError(f"{flag} needs a value{_allowed(kind)}")
        if wrong := _wrong(kind, values):
            raise InputError(f"{flag} {wrong}")


def _is_tuple(kind: Any) -> bool:
    return any(typing.get_origin(option) is tuple for option in _options(kind))


def _options(kind: Any) -> list[Any]:
    """The types that a field may have, without ranges."""
    if typing.get_origin(kind) is Annotated:
        return _options(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(kind) for option in _options(part)]
    return [kind]


def _allowed(kind: Any) -> str:
    names = [
        str(name)
        for option in _options(kind)
        if typing.get_origin(option) is Literal
        for name in typing.get_args(option)
    ]
    return f": one of {', '.join(names)}" if names else ""


def _wrong(kind: Any, values: Sequence[str]) -> str:
    """What is wrong with a flag's values as written: "'abc' is not a whole number"; empty if nothing is, ranges aside."""
    options = _options(kind)
    if len(values) == 1 and values[0] == "None" and type(None) in options:
        return ""
    tuples = [typing.get_args(option) for option in options if typing.get_origin(option) is tuple]
    if not tuples:
        if len(values) > 1:
            return f"takes one value; {shown(values[1])} is a second one"
        return _wrong_value(kind, values[0])
    (parts,) = tuples
    is_long = len(parts) == 2 and parts[1] is Ellipsis
    (first,) = _options(parts[0])
    if is_long:
        parts = typing.get_args(first) if typing.get_origin(first) is tuple else parts[:1]
    if len(values) % len(parts) or not (is_long or len(values) == len(parts)):
        wanted = f"groups of {len(parts)} values" if is_long else f"{len(parts)} values"
        return f"takes {wanted}; there {'is' if len(values) == 1 else 'are'} {len(values)}"
    return next(filter(None, map(_wrong_value, itertools.cycle(parts), values)), "")


def _wrong_value(kind: Any, text: str) -> str:
    """What is wrong with a single value as written."""
    options = _options(kind)
    names = [
        str(name) for option in options if typing.get_origin(option) is Literal for name in typing.get_args(option)
    ]
    if names:
        return "" if text in names else f"{shown(text)} is not one of {', '.join(names)}{nearest(text, names)}"
    for option, name in ((int, "whole number"), (float, "number")):
        if option in options:
            try:
                option(text)
            except ValueError:
                return f"{shown(text)} is not a {name}"
    if pathlib.Path in options and not text:
        return "is empty; leave the flag out, or give it a path"
    return ""


def _in_groups(default: Any, kinds: Mapping[str, Any]) -> Any:
    """The same flags with the same defaults as a dataclass with one dataclass for each group, which tyro prints group by group.

    Args:
        default: the configuration that the flags start from.
        kinds: the fields that have a flag -> type.
    """
    texts, groups = documentation(type(default)), []
    for title, names in grouped(type(default), [name for name in kinds_of(type(default)) if name not in kinds]).items():
        fields = [
            (
                name,
                Annotated[kinds[name], tyro.conf.arg(help=texts.get(name, ""))],
                dataclasses.field(default=getattr(default, name)),
            )
            for name in names
        ]
        about = {"__doc__": GROUPS[title].about if title in GROUPS else ""}
        group = dataclasses.make_dataclass(title, fields, frozen=True, namespace=about)
        groups.append((title, group, dataclasses.field(default=group())))
    return dataclasses.make_dataclass("flags", groups, frozen=True)()


def _is_script() -> bool:
    """Whether this process was started as a script of `experiments/`."""
    return pathlib.PurePath(sys.argv[0]).parent.name == "experiments"


def program(name: str) -> str:
    """What the user has called, for the help text: "bdjax ta-kd", or "ta_kd.py" for a script.

    Args:
        name: of the experiment: "ta_kd".
    """
    return f"{name}.py" if _is_script() else f"bdjax {name.replace('_', '-')}"


def invocation(name: str, *, as_script: bool | None = None) -> str:
    """The beginning of a command that starts an experiment, as the user has started this process: by `bdjax` or by a script.

    Args:
        name: of the experiment: "ta_kd".
        as_script: whether as a script, however this process was started; None for how it was.
    """
    as_script = _is_script() if as_script is None else as_script
    return f"python experiments/{name}.py" if as_script else f"bdjax {name.replace('_', '-')}"


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


def run(
    main: Callable[[Sequence[str] | None], Result],
    arguments: Sequence[str] | None = None,
    status_of: Callable[[Result], int] = lambda result: 0,
) -> None:
    """Run an experiment's main function. What a user can mend gives one line on standard error and an exit status above 0.

    That is input that cannot be used, an interruption, a failure of the disk, and a failure of another process. The flags for
    several processes (`process_flags.HELP`), which every experiment has, are removed from the command line first.

    Args:
        main: called with the other flags.
        arguments: the command line without the program's name; None for that of the process.
        status_of: the exit status of a complete run, from what `main` returned.
    """
    with interruption.handled(), _warnings_on_plugins():
        try:
            backend.set_up()
            others, arguments = process_flags.take_flags(sys.argv[1:] if arguments is None else arguments)
            if others is not None:
                _processes().start(others)
            status = status_of(main(arguments))
            interruption.check()
            if status:
                raise SystemExit(status)
        except SystemExit:  # a status, --help, or flags that cannot be read
            raise
        except BaseException as error:
            status = _report(error)
            if status is None:
                raise
            raise SystemExit(status) from None


def _processes() -> types.ModuleType:
    from bdjax.training import processes  # imports JAX, which --help and a refused flag need not wait for

    return processes


@contextlib.contextmanager
def _warnings_on_plugins() -> Iterator[None]:
    """Within the block, a plugin that is left out is one line on standard error."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *others: Any, **more: Any) -> None:
        if issubclass(category, PluginWarning):
            _print_line(f"warning: {message}", "33")
        else:
            before(message, category, *others, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _report(error: BaseException) -> int | None:
    """Print an error that the user can mend as one line; returns the exit status, None for any other error."""
    # A library may turn the interruption into an error of its own.
    is_interrupted = isinstance(error, KeyboardInterrupt) or interruption.received()
    status = interruption.end() if is_interrupted else None
    if "bdjax.training.processes" in sys.modules:
        _processes().report_failure(error)
    if is_interrupted:
        Console(stderr=True).print(interruption.MESSAGE, style="yellow", soft_wrap=True)
    elif isinstance(error, InputError):
        status = FAILED
        _print_error(error)
    elif isinstance(error, ProcessError):
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
    _print_line(f"error: {error}", "31")


def _print_line(line: str, colour: str) -> None:
    """Print a line on standard error, in a colour of the terminal by its ANSI number."""
    # Not by rich, which takes seconds for a long line.
    text = shortened(printable(line), LONGEST_ERROR)
    colours = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[{colour}m{text}\033[0m" if colours else text, file=sys.stderr, flush=True)
