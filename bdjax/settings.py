"""Settings: documented types with ranges, reading `name=value`, changing and checking.

Settings of attacks, defenses and runs are frozen dataclasses that default to the papers' values. The range of every number is
part of its field's type (`epochs: Count = 80`), and `mistake` is the only code that checks it.
"""

import ast
import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bdjax.errors import InputError

LONGEST_LITERAL = 1000
"""Letters of a value that is read as a number or a tuple; a longer one is text."""
_SHOWN = 80
_LEAST = 1e-30
"""Smaller numbers would be 0, or their inverses infinite, in float32."""
_BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class Range:
    """The values that a number may have: finite, and within these bounds."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    limit: float | None = None
    """largest absolute value that makes sense; mentioned only where it is exceeded"""

    def bounds(self) -> dict[str, float]:
        """The bounds in words, such as "at least" -> 0; without `limit`."""
        pairs = zip(_BOUNDS, (self.at_least, self.above, self.at_most, self.below), strict=True)
        return {words: bound for words, bound in pairs if bound is not None}

    def mistake(self, value: float) -> str:
        """What is wrong with a number: "is not at least 0 and below 1"; empty if nothing is."""
        if self.limit is not None and value > self.limit:
            return f"is not at most {_plain(self.limit)}"
        if self.limit is not None and value < -self.limit and not self.bounds():
            return f"is not at least {_plain(-self.limit)}"
        if isinstance(value, float) and not math.isfinite(value) and not self.bounds():
            return "is not a finite number"
        return _outside(value, self.bounds()) or ("is too close to 0" if 0 < abs(value) < _LEAST else "")


@dataclass(frozen=True)
class Increasing:
    """The entries of a tuple increase; those of pairs by their first number."""

    or_equal: bool = False


@dataclass(frozen=True)
class NotEmpty:
    """A tuple has at least one entry."""


MOST = 1_000_000
"""Limit of counts, such as epochs and batch sizes."""
LARGEST = 1e9
"""Limit of weights, factors and thresholds."""

Count = Annotated[int, Range(at_least=1, limit=MOST)]
"""1, 2, ..."""
Amount = Annotated[int, Range(at_least=0, limit=MOST)]
"""0, 1, ..., where 0 often has a meaning of its own"""
NumRows = Annotated[int, Range(at_least=0, limit=2**31 - 1)]
"""a number of rows of a dataset, or 0"""
ImageSide = Annotated[int, Range(at_least=8, limit=4096)]
"""height and width of images in pixels; all networks take 8 and more"""
Width = Annotated[int, Range(at_least=1, limit=1024)]
"""channels of a network's first stage"""
Members = Annotated[int, Range(at_least=1, limit=1000)]
"""number of networks that are trained side by side, or of seeds"""
Seed = Annotated[int, Range(at_least=0)]
"""the first seed; with the number of seeds at most 2**31"""
Share = Annotated[float, Range(at_least=0, at_most=1)]
"""[0, 1]"""
PositiveShare = Annotated[float, Range(above=0, at_most=1)]
"""(0, 1]"""
ShareBelowOne = Annotated[float, Range(at_least=0, below=1)]
"""[0, 1)"""
InnerShare = Annotated[float, Range(above=0, below=1)]
"""(0, 1)"""
LearningRate = Annotated[float, Range(above=0, limit=1000)]
"""above 0"""
Positive = Annotated[float, Range(above=0, limit=LARGEST)]
"""above 0"""
NotNegative = Annotated[float, Range(at_least=0, limit=LARGEST)]
"""0 or above"""
Number = Annotated[float, Range(limit=LARGEST)]
"""any finite number"""
Percentile = Annotated[float, Range(at_least=0, at_most=100)]
"""[0, 100]"""
Steps = Annotated[tuple[tuple[Count, LearningRate], ...], Increasing()]
"""pairs of an epoch, from 1, and the learning rate from it on; in order"""


def mistake(kind: Any, value: Any) -> str:
    """What is wrong with a value: "is not at least 1", "is not one of sgd, adam"; empty if nothing is.

    Args:
        kind: a field's type: bool, int, float, str, a Literal, a tuple, a union of these, with a `Range` for numbers,
            `Increasing` or `NotEmpty` for tuples. Other types are not checked.
        value: the field's value; an int is accepted for a float.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        kind, *rules = arguments
        return mistake(kind, value) or next(filter(None, (_broken(rule, value) for rule in rules)), "")
    if origin in (typing.Union, types.UnionType):
        if all(typing.get_origin(option) is Literal for option in arguments):
            return mistake(Literal[tuple(name for option in arguments for name in typing.get_args(option))], value)
        wrong = [mistake(option, value) for option in arguments]
        return "" if "" in wrong else wrong[0]
    if origin is Literal:
        is_one = any(type(value) is type(option) and value == option for option in arguments)
        return "" if is_one else f"is not one of {', '.join(map(str, arguments))}{nearest(value, map(str, arguments))}"
    if origin is tuple:
        return _mistake_in_tuple(arguments, value)
    if kind is bool:
        return "" if isinstance(value, bool) else "is not True or False"
    if kind in (int, float):
        is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        return "" if is_number else f"is not a {'' if kind is float else 'whole '}number"
    if kind in (str, type(None)):
        return "" if isinstance(value, kind) else f"is not {'text' if kind is str else None}"
    return ""


def _mistake_in_tuple(kinds: tuple[Any, ...], value: Any) -> str:
    is_long = len(kinds) == 2 and kinds[1] is Ellipsis
    if not isinstance(value, tuple) or not (is_long or len(value) == len(kinds)):
        return "is not a tuple of values, such as (1, 2)" if is_long else f"is not a tuple of {len(kinds)} values"
    for entry, kind in zip(value, kinds[:1] * len(value) if is_long else kinds, strict=True):
        if wrong := mistake(kind, entry):
            return f"has the entry {shown(entry)}, which {wrong}"
    return ""


def _broken(rule: Any, value: Any) -> str:
    """What a value without other mistakes breaks of a type's rule."""
    if isinstance(rule, Range):
        return rule.mistake(value)
    if isinstance(rule, NotEmpty) and not value:
        return "is empty"
    if isinstance(rule, Increasing):
        order = [entry[0] if isinstance(entry, tuple) else entry for entry in value]
        holds = operator.le if rule.or_equal else operator.lt
        if not all(map(holds, order, order[1:])):
            return "is not in increasing order"
    return ""


def _outside(value: Any, bounds: Mapping[str, float]) -> str:
    if all(_BOUNDS[words](value, bound) for words, bound in bounds.items()):
        return ""
    return "is not " + " and ".join(f"{words} {_plain(bound)}" for words, bound in bounds.items())


def _plain(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def check_choice(owner: str, name: Any, names: Iterable[str]) -> None:
    """Refuse a name that is not one of those that there are.

    Args:
        owner: what it names, for the error message: "attack".
        name: to check.
        names: all allowed ones.

    Raises:
        InputError: with all names, and the nearest at the end.
    """
    names = names if isinstance(names, Container) else list(names)
    if not (isinstance(name, str) and name in names):
        names = list(names)
        raise InputError(f"{owner} {shown(name)} is not one of {', '.join(names)}{nearest(name, names)}")


def nearest(name: Any, names: Iterable[str]) -> str:
    """The end of an error message on a wrong name: "; did you mean sig?", or nothing if no name is near."""
    found = difflib.get_close_matches(str(name)[:100], list(names), 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


def shown(value: Any) -> str:
    """A value for an error message: on one line, at most about 80 letters."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # a tuple with an endless integer
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}…{text[-15:]}"


@functools.cache
def kinds_of(settings: type) -> dict[str, Any]:
    """The fields of a dataclass with their types, ranges included."""
    hints = typing.get_type_hints(settings, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def mistakes(settings: Any) -> dict[str, str]:
    """The fields of a dataclass instance that are out of range -> what is wrong, as `mistake` says it."""
    found = {name: mistake(kind, getattr(settings, name)) for name, kind in kinds_of(type(settings)).items()}
    return {name: wrong for name, wrong in found.items() if wrong}


def changed(owner: str, settings: Any, changes: Mapping[str, Any]) -> Any:
    """Change some fields of a settings dataclass.

    Args:
        owner: whose settings they are, for error messages: "attack sig".
        settings: a frozen dataclass.
        changes: field -> value, of the type of the field's current value (an int is accepted for a float).

    Raises:
        InputError: an unknown field, or a value of another type or out of range.
    """
    kinds = kinds_of(type(settings))
    for name, value in changes.items():
        if name not in kinds:
            raise InputError(f"{owner} has no setting {shown(name)}; it has {', '.join(kinds)}{nearest(name, kinds)}")
        default = getattr(settings, name)
        types_of_value = (int, float) if type(default) is float else type(default)
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if default is not None and (not isinstance(value, types_of_value) or (is_number and isinstance(value, bool))):
            raise InputError(f"{owner}: {name} {shown(value)} is not of the type of its default {default!r}")
        if wrong := mistake(kinds[name], value):
            raise InputError(f"{owner}: {name} {shown(value)} {wrong}")
    return dataclasses.replace(settings, **changes)


def check_values(
    owner: str,
    settings: Any,
    *,
    choices: Mapping[str, Iterable[str]] = {},
    at_least: Mapping[str, float] = {},
    above: Mapping[str, float] = {},
    at_most: Mapping[str, float] = {},
    below: Mapping[str, float] = {},
) -> None:
    """Check settings: the ranges in their types, and bounds that depend on other settings.

    Args:
        owner: whose settings they are, for error messages: "defense abl".
        settings: a dataclass.
        choices: field -> its allowed values.
        at_least, above, at_most, below: field -> a bound that its type cannot have.

    Raises:
        InputError: names the first invalid setting and the allowed values.
    """
    for name, allowed in choices.items():
        check_choice(f"{owner}: {name}", getattr(settings, name), allowed)
    for name, wrong in mistakes(settings).items():
        raise InputError(f"{owner}: {name} {shown(getattr(settings, name))} {wrong}")
    fields = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    for name in dict.fromkeys(name for bounds in fields.values() for name in bounds):
        bounds = {words: of_field[name] for words, of_field in fields.items() if name in of_field}
        if wrong := _outside(getattr(settings, name), bounds):
            raise InputError(f"{owner}: {name} {shown(getattr(settings, name))} {wrong}")


def read_value(text: str) -> Any:
    """Parse a command-line value: a Python literal such as a number, True or a tuple; anything else is a string."""
    if len(text) > LONGEST_LITERAL:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an escape sequence that Python does not know
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def split_variants(text: str) -> list[str]:
    """Split comma-separated variants and drop duplicates; a comma inside parentheses belongs to a value.

    "fkd,nad:betas=(1.0, 2.0)" -> ["fkd", "nad:betas=(1.0, 2.0)"]
    """
    variants, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            variants.append(text[start:place])
            start = place + 1
    return list(dict.fromkeys([*variants, text[start:]]))


def read_variant(text: str) -> tuple[str, dict[str, Any]]:
    """Read an attack or a defense with its settings: "lfd:alpha=0.5:beta=0" -> ("lfd", {"alpha": 0.5, "beta": 0}).

    Raises:
        InputError: if a part after the name is not name=value, or a name comes twice.
    """
    name, *parts = text.split(":")
    changes: dict[str, Any] = {}
    for part in parts:
        setting, equals, value = part.partition("=")
        if not equals or not setting or setting in changes:
            raise InputError(
                f"{shown(text)}: {shown(part)} should be setting=value, each setting once, as in name:setting=value"
            )
        changes[setting] = read_value(value)
    return name, changes
