"""Flags that cannot be right whatever the data: refused before anything that takes time is imported."""

import os
import pathlib
from typing import Any

from bdjax import extras
from bdjax.errors import InputError
from bdjax.run import clock
from bdjax.run.configs.shared import EvidenceConfig, ExperimentConfig, ExportConfig
from bdjax.settings import check_choice, mistakes, shown

PATHS = ("dataset", "clean_data", "teacher")
"""Fields of text that may be paths."""
SEVERAL_PATHS = ("teachers",)
"""Fields of texts that may be paths."""
LONGEST_PATH, LONGEST_NAME = 3000, 255
"""Bytes; the system's own limit of a path, usually 4096, is for the files in a run's folder too."""


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def check_ranges(config: Any) -> None:
    """Refuse flags whose values cannot be right, whatever the data: out of the range in the field's type, networks that do not
    exist, paths that no file can have, and evidence whose SOURCE_DATE_EPOCH is no time.

    Args:
        config: the settings of any experiment, a dataclass.

    Raises:
        InputError: naming the flag or the variable.
    """
    for name, wrong in mistakes(config).items():
        raise InputError(f"{flag(name)} {shown(getattr(config, name))} {wrong}")
    for name, value in vars(config).items():
        paths = value if name in SEVERAL_PATHS and value else (value,)
        if isinstance(value, pathlib.Path) or (name in PATHS + SEVERAL_PATHS and value):
            for path in paths:
                check_path(flag(name), path)
    if isinstance(config, ExportConfig) and config.export:
        if not getattr(config, "save_models", True):
            raise InputError("--export needs the networks that --no-save-models leaves out; leave out one of the two")
        if "onnx" in config.export:
            extras.onnx()
    if isinstance(config, EvidenceConfig) and config.evidence:
        clock.now()
    if isinstance(config, ExperimentConfig):
        if config.tensorboard:
            extras.tensorboard()
        if not config.dataset:
            raise InputError(f"{flag('dataset')} is empty; give the name or the path of a dataset")
        if config.seed + config.seeds > 2**31:
            raise InputError(f"{flag('seed')} {shown(config.seed)} with {config.seeds} seeds is not below 2**31")
    for name, value in vars(config).items():
        if (name == "model" or name.endswith("_model") or name == "student") and isinstance(value, str):
            from bdjax.models import MODELS  # imports JAX, which the other refusals need not wait for

            check_choice(flag(name), value, MODELS)


def check_path(where: str, path: str | pathlib.Path) -> None:
    """Refuse a path that no file can have; whether there is a file is not looked up.

    Args:
        where: for the error message: "--output".
        path: a path, which may start with ~.

    Raises:
        InputError: naming the flag.
    """
    text = str(path)
    try:
        encoded = os.fsencode(pathlib.Path(text).expanduser())
    except RuntimeError:
        raise InputError(
            f"{where} {shown(text)}: there is no home folder of this name; write the path in full"
        ) from None
    except UnicodeEncodeError:
        raise InputError(f"{where} {shown(text)} has characters that no file name can have") from None
    if b"\0" in encoded:
        raise InputError(f"{where} {shown(text)} has a zero byte, which no file name can have")
    longest = max(map(len, encoded.split(b"/")))
    if len(encoded) > LONGEST_PATH or longest > LONGEST_NAME:
        raise InputError(
            f"{where} {shown(text)} is too long: {len(encoded):,} bytes, the longest name in it {longest:,}; at most "
            f"{LONGEST_PATH:,} and {LONGEST_NAME} are possible"
        )


def check_output(folder: pathlib.Path) -> None:
    """Refuse a run's folder that cannot be made, without making it.

    Raises:
        InputError: a file is in its place or above it, or nothing can be written there.
    """
    path = folder.expanduser().absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
        is_folder, is_writable = there.is_dir(), os.access(there, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"{folder} cannot be used ({error.strerror or error}); choose another --output") from None
    if not is_folder:
        what = f"{folder}" if there == path else f"{folder}: {there}"
        raise InputError(f"{what} is a file, not a folder; choose another --output")
    if not is_writable:
        raise InputError(f"{folder} cannot be written to; choose another --output")
