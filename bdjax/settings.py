"""Settings of attacks and defenses: frozen dataclasses of the papers' values, changed by name and checked."""

import ast
import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from bdjax.errors import InputError


def changed(owner: str, settings: Any, changes: Mapping[str, Any]) -> Any:
    """Change some fields of a settings dataclass.

    Args:
        owner: whose settings they are, as a message says it: "attack sig".
        settings: a frozen dataclass.
        changes: field -> value, of the kind of the field's current value (an int will do for a float).

    Raises:
        InputError: a change of something that is not there, or to a value of another kind.
    """
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in changes.items():
        if name not in fields:
            raise InputError(f"{owner} has no setting {name!r}; it has {', '.join(fields)}")
        default = fields[name]
        kinds = (int, float) if type(default) is float else type(default)
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if default is not None and (not isinstance(value, kinds) or (is_number and isinstance(value, bool))):
            raise InputError(f"{owner}: {name} {value!r} is not of the kind of its default {default!r}")
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
    """Refuse settings that cannot be; a field may have a lower and an upper bound.

    Args:
        owner: whose settings they are, as a message says it: "defense abl".
        settings: a dataclass.
        choices: field -> the values that it may have.
        at_least, above, at_most, below: field -> its bound.

    Raises:
        InputError: one line that names the first such setting, and says what would be right.
    """
    for name, known in choices.items():
        if getattr(settings, name) not in known:
            raise InputError(f"{owner}: {name} {getattr(settings, name)!r} is not one of {', '.join(known)}")
    bounds = (
        ("at least", operator.ge, at_least),
        ("above", operator.gt, above),
        ("at most", operator.le, at_most),
        ("below", operator.lt, below),
    )
    for name in dict.fromkeys(name for _, _, fields in bounds for name in fields):
        own = [(said, holds, fields[name]) for said, holds, fields in bounds if name in fields]
        value = getattr(settings, name)
        if not all(holds(value, bound) for _, holds, bound in own):
            wanted = " and ".join(f"{said} {bound:g}" for said, _, bound in own)
            raise InputError(f"{owner}: {name} {value!r} is not {wanted}")


def read_value(text: str) -> Any:
    """A value as it is written on a command line: a number, True, a tuple; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split_variants(text: str) -> list[str]:
    """Several variants with commas between them, each once: a comma within parentheses belongs to a value.

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
    """Read an attack or a defense with settings of its own: "lfd:alpha=0.5:beta=0" -> ("lfd", {"alpha": 0.5, "beta": 0}).

    Raises:
        InputError: if a part after the name is not name=value, or a name comes twice.
    """
    name, *parts = text.split(":")
    changes: dict[str, Any] = {}
    for part in parts:
        setting, equals, value = part.partition("=")
        if not equals or not setting or setting in changes:
            raise InputError(f"{text!r}: {part!r} should be a setting and its value, as in name:setting=value, once")
        changes[setting] = read_value(value)
    return name, changes
