"""Registries of attacks, defenses, datasets and networks: bdjax's own, and those of installed plugins.

A plugin is any installed distribution with an entry point in the group `bdjax.attacks`, `bdjax.defenses`, `bdjax.datasets` or
`bdjax.models`: `NAME = module:OBJECT`, where NAME is the entry's name everywhere in bdjax. What is installed is looked up when
a registry is first used, which imports nothing; a plugin is imported when its name is used, or when the registry is gone
through. bdjax's own entries always win. A plugin that cannot be used is left out with a warning of one line, and using its name
is an InputError.
"""

import functools
import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from bdjax.errors import InputError

Entry = TypeVar("Entry")

PREFIX = "bdjax."
"""Beginning of the names of the groups of entry points."""
NAME = re.compile(r"[a-z0-9_]+")
"""What an entry may be called: command lines give a meaning to most other characters."""
RESERVED = ("all", "none")
"""What no entry of a plugin may be called: every entry of a registry, and no entry."""
_LONGEST = 200


class PluginWarning(UserWarning):
    """An installed plugin is left out; the message is one line that names its distribution."""


class Found(NamedTuple):
    """An entry point of an installed distribution."""

    point: importlib.metadata.EntryPoint
    distribution: str
    """name and version: "bdjax-mark 0.1" """


@functools.cache
def installed(group: str) -> tuple[Found, ...]:
    """The entry points of a group in all installed distributions. Reads their metadata once and imports nothing.

    Args:
        group: "bdjax.attacks".
    """
    found = []
    for point in importlib.metadata.entry_points(group=group):
        of = point.dist
        found.append(Found(point, f"{of.name} {of.version}" if of else "of an unknown distribution"))
    return tuple(sorted(found, key=lambda entry: (entry.point.name, entry.distribution)))


_used: dict[str, str] = {}


def used() -> dict[str, str]:
    """The plugins that this process has imported: "attack mark" -> "bdjax-mark 0.1"."""
    return dict(sorted(_used.items()))


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name: bdjax's own in their order, then those of plugins in the order of their names.

    A plugin's name is `in` the registry even if the plugin turns out to be unusable, and looking it up then raises the
    InputError that says why. Iterating imports the plugins and leaves such names out, with a `PluginWarning` for each.

    Args:
        what: what an entry is, in messages, and in the plural with an s the group: "attack".
        own: bdjax's own entries.
        mistake: (name, what a plugin supplies) -> what is wrong with it: "is a str, not an Attack"; empty if nothing is.
    """

    def __init__(self, what: str, own: Mapping[str, Entry], mistake: Callable[[str, Any], str]) -> None:
        self._what = what
        self._own = dict(own)
        self._mistake = mistake
        self._seen: tuple[Found, ...] = ()
        self._loaded: dict[str, Entry] = {}
        self._broken: dict[str, str] = {}
        self._warned: set[str] = set()

    @property
    def own(self) -> Mapping[str, Entry]:
        """bdjax's own entries."""
        return dict(self._own)

    def __getitem__(self, name: str) -> Entry:
        plugins = self._plugins()
        if name in self._own:
            return self._own[name]
        if name not in plugins:
            raise KeyError(name)
        if name not in self._loaded and name not in self._broken:
            self._load(name, plugins[name])
        if name in self._broken:
            raise InputError(self._broken[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._plugins()

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self._working()])

    def __len__(self) -> int:
        return len(self._own) + len(self._working())

    def __repr__(self) -> str:
        return f"<{len(self)} {self._what}s: {', '.join(self)}>"

    def _working(self) -> list[str]:
        names = []
        for name, found in self._plugins().items():
            if name not in self._loaded and name not in self._broken:
                self._load(name, found)
            if name in self._broken:
                self._warn(f"{self._broken[name]}; it is left out")
            else:
                names.append(name)
        return names

    def _plugins(self) -> dict[str, tuple[Found, ...]]:
        """Name -> the entry points of that name, without the names of bdjax's own entries."""
        points = installed(f"{PREFIX}{self._what}s")
        if points is not self._seen:  # `installed.cache_clear` makes everything be looked up anew
            self._seen, self._loaded, self._broken, self._warned = points, {}, {}, set()
        names: dict[str, tuple[Found, ...]] = {}
        for found in points:
            if found.point.name in self._own:
                self._warn(
                    f"{self._what} {found.point.name} of the plugin {found.distribution} is ignored: bdjax has one of that name"
                )
            else:
                names[found.point.name] = (*names.get(found.point.name, ()), found)
        return names

    def _load(self, name: str, found: tuple[Found, ...]) -> None:
        """Import a plugin, into `_loaded` or `_broken`."""
        owners = " and ".join(entry.distribution for entry in found)
        start = f"{self._what} {name[:_LONGEST]!r} of the plugin {owners}"
        if len(found) > 1:
            self._broken[name] = f"{start}: two plugins have that name; uninstall one of them"
            return
        if name in RESERVED:
            self._broken[name] = f"{start} has a name that command lines give another meaning"
            return
        if not NAME.fullmatch(name):
            self._broken[name] = f"{start} has a name with other characters than a to z, 0 to 9 and _"
            return
        try:
            entry = found[0].point.load()
        except (Exception, SystemExit) as error:  # whatever a module of someone else raises
            text = " ".join(str(error).split())[:_LONGEST]
            self._broken[name] = f"{start} cannot be imported ({type(error).__name__}: {text}); mend or uninstall it"
            return
        if wrong := self._mistake(name, entry):
            self._broken[name] = f"{start} {wrong}"
            return
        self._loaded[name] = entry
        _used[f"{self._what} {name}"] = owners

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, PluginWarning, stacklevel=4)


def of_type(kind: type, title: str) -> Callable[[str, Any], str]:
    """For `Registry`: entries of this class whose `name` is that of the entry point.

    Args:
        kind: the class.
        title: where it is, in messages: "bdjax.attacks.contract.Attack".
    """

    def mistake(name: str, entry: Any) -> str:
        if not isinstance(entry, kind):
            return f"is of the type {type(entry).__name__}, not a {title}"
        if entry.name != name:
            return f"calls itself {str(entry.name)[:_LONGEST]!r}; its entry point must have the same name"
        return ""

    return mistake
