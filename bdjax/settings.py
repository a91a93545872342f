"""Settings of attacks and defenses, frozen dataclasses that default to the papers' values: reading, changing, checking."""

import ast
import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from bdjax.errors import InputError


def changed(owner: str, settings: Any, changes: Mapping[str, Any]) -> Any:
    """Change some fields of a settings dataclass.

    Args:
        owner: whose settings they are, for error messages: "attack sig".
        settings: a frozen dataclass.
        changes: field -> value, of the type of the field's current value (an int is accepted for a float).

    Raises:
        InputError: an unknown field, or a value of another type.
    """
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in changes.items():
        if name not in fields:
            raise InputError(f"{owner} has no setting {name!r}; it has {', '.join(fields)}")
        default = fields[name]
        types = (int, float) if type(default) is float else type(default)
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if default is not None and (not isinstance(value, types) or (is_number and isinstance(value, bool))):
            raise InputError(f"{owner}: {name} {value!r} is not of the type of its default {default!r}")
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
    """Check settings; a field may have both a lower and an upper bound.

    Args:
        owner: whose settings they are, for error messages: "defense abl".
        settings: a dataclass.
        choices: field -> its allowed values.
        at_least, above, at_most, below: field -> its bound.

    Raises:
        InputError: names the first invalid setting and the allowed values.
    """
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise InputError(f"{owner}: {name} {getattr(settings, name)!r} is not one of {', '.join(allowed)}")
    bounds = (
        ("at least", operator.ge, at_least),
        ("above", operator.gt, above),
        ("at most", operator.le, at_most),
        ("below", operator.lt, below),
    )
    for name in dict.fromkeys(name for _, _, fields in bounds for name in fields):
        limits = [(words, holds, fields[name]) for words, holds, fields in bounds if name in fields]
        value = getattr(settings, name)
        if not all(holds(value, bound) for _, holds, bound in limits):
            wanted = " and ".join(f"{words} {bound:g}" for words, _, bound in limits)
            raise InputError(f"{owner}: {name} {value!r} is not {wanted}")


def read_value(text: str) -> Any:
    """Parse a command-line value: a Python literal such as a number, True or a tuple; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split_variants(text: str) -> list[str]:
    """Split comma-separated variants and drop duplicates; a comma inside parentheses belongs to a value.

    "fkd,nad:betas=(1.0, 2.0)" -> ["fkd", "nad:betas=(1.0, 2.0)"]
    """
    variants, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            variants.append("")
        else:
            variants[-1] += character
    return list(dict.fromkeys(variants))


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
            raise InputError(f"{text!r}: {part!r} should be setting=value, each setting once, as in name:setting=value")
        changes[setting] = read_value(value)
    return name, changes
