"""Libraries of the extra `onnx`, imported when they are needed."""

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


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"ONNX models need {name}, which is not installed: pip install 'bdjax[onnx]'") from error
