"""Networks by name with fewer blocks: tracing and compiling take the time of tests, and a deep network repeats its blocks."""

from collections.abc import Iterable

from flax import linen as nn

from bdjax.models import MODELS

STAGES = ("blocks", "widths", "stages")
"""Fields of networks that hold their blocks, or the number of blocks, stage by stage."""


def shallow(name: str, num_classes: int, width: int) -> nn.Module:
    """A network by name with at most two blocks in each stage: the first and the last."""

    def cut(blocks):
        return min(blocks, 2) if isinstance(blocks, int) else (*blocks[: len(blocks) > 1], blocks[-1])

    module, fields = MODELS[name](num_classes, width, "native", "float32"), {}
    for field in STAGES:
        value = getattr(module, field, None)
        if isinstance(value, int):
            fields[field] = cut(value)
        elif value is not None and (field != "widths" or isinstance(value[0], tuple)):
            fields[field] = tuple(map(cut, value))
    return module.clone(**fields)


def distinct(names: Iterable[str], num_classes: int, width: int) -> list[str]:
    """The names without those whose network, cut short, is that of an earlier name."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(repr(shallow(name, num_classes, width)), name)
    return list(first.values())
