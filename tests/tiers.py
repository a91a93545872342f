"""Which cases of a parametrised test are in the default tier."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_unless(names: Iterable[str], fast: Collection[str]) -> list[Any]:
    """Parameters of which those that are not among `fast` are in the slow tier."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
