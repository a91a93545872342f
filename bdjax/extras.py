"""Libraries of the extras `onnx`, `grid` and `hf`, imported when they are needed."""

import importlib
from types import ModuleType
from typing import Literal

from bdjax.errors import InputError

Export = Literal["stablehlo", "onnx"]
"""Further forms in which a run leaves its networks; the second needs the extra."""


def onnx() -> ModuleType:
    """The library `onnx`, which reads, checks and writes files; it runs nothing.

    Raises:
        InputError: it is not installed.
    """
    return _imported("onnx")


def onnxruntime() -> ModuleType:
    """The library `onnxruntime`, which runs ONNX models.

    Raises:
        InputError: it is not installed.
    """
    return _imported("onnxruntime")


def submitit() -> ModuleType:
    """The library `submitit`, which runs functions in other processes, here or under Slurm.

    Raises:
        InputError: it is not installed.
    """
    return _imported("submitit", "a grid needs", "grid")


def tensorboard() -> ModuleType:
    """The library `tensorboardX`, which writes event files.

    Raises:
        InputError: it is not installed.
    """
    return _imported("tensorboardX", "--tensorboard needs", "grid")


def pyarrow() -> ModuleType:
    """The library `pyarrow`, with `pyarrow.parquet`.

    Raises:
        InputError: it is not installed.
    """
    _imported("pyarrow.parquet", "parquet files and datasets of Hugging Face need", "hf")
    return importlib.import_module("pyarrow")


def _imported(name: str, needs: str = "ONNX models need", extra: str = "onnx") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{needs} {name.partition('.')[0]}, which is not installed: pip install 'bdjax[{extra}]'"
        ) from error
