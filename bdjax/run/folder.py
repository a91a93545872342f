"""One run, one folder: the settings it was started with, its results, its checkpoints.

The same command with the same folder continues the run. A command with other settings is refused, so that results always
belong to the settings beside them.
"""

import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bdjax
from bdjax import atomic, plugins
from bdjax.errors import InputError
from bdjax.run.lock import Lock, lock
from bdjax.run.text import printable
from bdjax.training import processes

CONFIG_FILE = "config.json"
_OF_EVERY_RUN = (CONFIG_FILE, "engine.json", "results.json", "table.md", "timings.json", "report.html")
LONGEST_SLUG = 200
"""Bytes of the readable part of a run's name; a file system takes 255."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """An open run. Every write is atomic: a reader finds the old file or the new one, never a partial file.

    With several processes only the primary writes. As long as the object lives, no other run can open the folder.
    """

    path: Path
    """absolute"""
    is_new: bool
    """False if the run was started before, with the same settings"""
    record: Mapping[str, Any] = field(default_factory=dict)
    """contents of config.json"""
    lock: Lock | None = field(default=None, repr=False, compare=False)

    @property
    def checkpoints(self) -> Path:
        """The folder for checkpoints, which exists."""
        return self.path / "checkpoints"

    def file(self, name: str) -> Path:
        """Returns the path of a file in this folder, which need not exist; a name that leads out of it is a ValueError.

        Raises:
            InputError: a link or a folder is in its place, or a link above it leads out of the folder.
        """
        relative = Path(os.path.normpath(name))
        if relative.is_absolute() or relative.parts[:1] in ((), ("..",)):
            raise ValueError(f"{name!r} is not the name of a file inside the run folder")
        path = self.path / relative
        if not path.parent.resolve().is_relative_to(self.path.resolve()):
            raise InputError(f"{path}: a link leads out of the run folder; remove it, or choose another --output")
        _require_plain(path)
        return path

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Writes a file atomically and returns its path."""
        path = self.file(name)
        return atomic.write_bytes(path, data) if processes.is_primary() else path

    def write_text(self, name: str, text: str) -> Path:
        """Writes a UTF-8 file atomically and returns its path."""
        return self.write_bytes(name, _encode(text))

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a JSON file atomically and returns its path.

        Args:
            name: the name of the file.
            value: mappings, sequences, dataclasses, arrays, paths and plain values; a NaN or an infinity is an error.
        """
        return self.write_text(name, _to_json(value, Path(name).stem))


def open_run(
    output: Path, config: Any, *, experiment: str, ignore: Sequence[str] = (), contents: Mapping[str, str] = {}
) -> RunFolder:
    """Starts a run in a folder, or continues the run in it.

    Args:
        output: the folder, created if it does not exist.
        config: the experiment's settings, a dataclass instance; written verbatim to `config.json`.
        experiment: the name of the experiment.
        ignore: fields that do not influence any number, such as the data folder; they may differ when a run is continued.
        contents: field that is a path -> digest of what is there. The path may differ when a run is continued, if the content
            is the same; another content at the same path may not.

    Returns:
        The open run.

    Raises:
        InputError: the folder cannot be used, is in use by another process, or holds other files, or a run with other settings;
            nothing was changed.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config must be a dataclass instance, not {type(config).__name__}")
    try:
        settings = to_plain(config, "config")
    except ValueError as error:
        raise InputError(str(error)) from error
    wanted = {"experiment": experiment, "config": settings, **({"contents": dict(contents)} if contents else {})}
    locks: list[Lock | None] = [None]
    opened = _open(output, wanted, list(ignore), locks)
    return RunFolder(Path(opened["path"]), opened["is_new"], opened["record"], locks[-1])


def check_run(output: Path, config: Any, *, experiment: str, ignore: Sequence[str] = ()) -> None:
    """Refuses a folder that `open_run` would refuse, without making or changing anything. What is at the settings' paths is not
    compared, nor whether another process uses the folder.

    Args:
        output, config, experiment, ignore: as for `open_run`.

    Raises:
        InputError: the folder holds other files, or a run with other settings.
    """
    _look(output, {"experiment": experiment, "config": to_plain(config, "config")}, list(ignore))


@processes.by_primary
def _look(output: Path, wanted: Mapping[str, Any], ignore: Sequence[str]) -> None:
    path = Path(output).expanduser().absolute()
    try:
        if not path.is_dir():
            return
        if (path / CONFIG_FILE).is_file():
            known = _read_record(path / CONFIG_FILE, output).get("contents")
            ignore = [*ignore, *(known if isinstance(known, dict) else ())]
        _existing(path, wanted, ignore, output)
    except OSError as error:
        raise InputError(f"{output} cannot be used ({error.strerror or error}); choose another --output") from error


@processes.by_primary
def _open(output: Path, wanted: Mapping[str, Any], ignore: Sequence[str], locks: list[Lock | None]) -> dict[str, Any]:
    """Creates or checks the folder, appends its lock, and returns the other fields of a `RunFolder`."""
    path = Path(output).expanduser().absolute()
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"{output} is a file, not a folder; choose another --output")
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{output} cannot be written to; choose another --output")
        _existing(path, wanted, ignore, output)  # a folder of something else gets not even a lock file
        locks.append(lock(path, output))
        atomic.remove_remains(path)
        record = _existing(path, wanted, ignore, output)  # another process may have begun the run meanwhile
        is_new = record is None
        if is_new:
            record = {**wanted, **describe_environment()}
            atomic.write_bytes(path / CONFIG_FILE, _encode(_to_json(record, "config")))
        (path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{output} cannot be used ({error.strerror or error}); choose another --output") from error
    return {"path": os.fspath(path), "is_new": is_new, "record": record}


def _existing(path: Path, wanted: Mapping[str, Any], ignore: Sequence[str], output: Path) -> dict[str, Any] | None:
    """The record of the run in a folder; None if the folder is empty."""
    for name in _OF_EVERY_RUN:
        _require_plain(path / name)
    if (path / CONFIG_FILE).exists():
        record = _read_record(path / CONFIG_FILE, output)
        _require_same(record, wanted, ignore, output)
        return record
    # Hidden files are allowed: file managers leave them, and so does our own write if it is killed.
    others = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if others:
        raise InputError(
            f"{output} has files ({_shorten(', '.join(others))}) but no {CONFIG_FILE}, so it is not the folder of a "
            "run; choose another --output"
        )
    return None


def _require_plain(path: Path) -> None:
    """Refuses to replace what is no plain file: the target of a link may be anything."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "not a plain file"
        raise InputError(f"{path} is {kind}, in the place of a file of the run; remove it, or choose another --output")


def default_name(dataset: str, preset: str, changed: Mapping[str, Any]) -> str:
    """Names a run after its settings, so that the same settings always give the same folder.

    Args:
        dataset: the name of the dataset, or its path.
        preset: the name of the preset.
        changed: the fields that differ from the preset's defaults, with their values; without the output folder and other
            fields that do not influence any number.

    Returns:
        "digits-quick", or "digits-quick-1a2b3c4d" if any field differs.

    Raises:
        InputError: a number is not finite.
    """
    name = f"{dataset}-{preset}"
    slug = re.sub(r"[^\w.-]+", "-", name)[-80:]
    while len(slug.encode()) > LONGEST_SLUG:
        slug = slug[1:]
    slug = slug.strip("-.")
    if not changed and slug == name:
        return name
    # A shortened name no longer distinguishes two datasets, so the full name goes into the digest.
    try:
        plain = to_plain(changed, "changed")
    except ValueError as error:
        raise InputError(str(error)) from None
    identity = json.dumps([name, plain], sort_keys=True)
    return f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def describe_environment() -> dict[str, Any]:
    """Returns versions, git revision and hardware of this process."""
    return {
        "versions": {
            "bdjax": bdjax.__version__,
            **{name: _version(name) for name in _PACKAGES},
            "python": platform.python_version(),
        },
        **({"plugins": used} if (used := plugins.used()) else {}),
        "git_revision": git_revision(),
        "hardware": {
            "platform": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
            "cpu_count": os.cpu_count(),
        },
    }


def git_revision() -> str | None:
    """Returns the git revision that bdjax runs from, with "-dirty" if tracked files differ; None if unknown."""
    root = Path(bdjax.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed bdjax may be in a virtual environment inside an unrelated checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("describe", "--always", "--dirty", "--exclude=*") or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def to_plain(value: Any, where: str = "value") -> Any:
    """Converts a value to JSON's types.

    Args:
        value: mappings, sequences, dataclasses, enumerations, arrays, paths and plain values, nested to any depth.
        where: the name of the value, for error messages.

    Raises:
        ValueError: a number is not finite; the message names it.
        TypeError: a value has a type that JSON cannot hold.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    elif isinstance(value, enum.Enum):
        value = value.value
    elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = np.asarray(value).tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which is not a finite number")
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def _to_json(value: Any, where: str) -> str:
    return json.dumps(to_plain(value, where), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _encode(text: str) -> bytes:
    # File names that are not UTF-8 contain lone surrogates; their escapes are valid JSON as well.
    return text.encode("utf-8", "backslashreplace")


def _read_record(path: Path, output: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
        readable = isinstance(record["config"], dict) and isinstance(record["experiment"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        readable = False
    if not readable:
        raise InputError(
            f"{path} is not the {CONFIG_FILE} of a run; choose another --output, or remove {output} to start over"
        )
    return record


def _require_same(record: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Sequence[str], output: Path) -> None:
    experiment, settings = wanted["experiment"], wanted["config"]
    if record["experiment"] != experiment:
        raise InputError(
            f"{output} holds a run of {_shorten(record['experiment'])}, not of {experiment}; choose another --output"
        )
    known = record.get("contents")
    for name, digest in wanted.get("contents", {}).items():
        if not isinstance(known, dict) or name not in known:  # a run of an older version
            continue
        if known[name] == digest:
            ignore = [*ignore, name]
        elif record["config"].get(name) == settings[name]:
            flag = f"--{name.replace('_', '-')}={settings[name]}"
            raise InputError(
                f"{output} holds a run with another content of {flag}, which has changed since the run began; choose "
                "another --output"
            )
    old, new = _flatten(record["config"]), _flatten(settings)
    differences = [
        f"{name} {_show(old, name)} -> {_show(new, name)}"
        for name in {**new, **old}
        if (name not in old or name not in new or old[name] != new[name])
        and not any(name == ignored or name.startswith(f"{ignored}.") for ignored in ignore)
    ]
    if differences:
        raise InputError(f"{output} holds a run with other settings: {'; '.join(differences)}; choose another --output")


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        is_group = isinstance(value, dict) and value
        flat.update(_flatten(value, f"{prefix}{name}.") if is_group else {prefix + name: value})
    return flat


def _show(settings: Mapping[str, Any], name: str) -> str:
    return _shorten(json.dumps(settings[name])) if name in settings else "(absent)"


def _shorten(text: str, length: int = 60) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
