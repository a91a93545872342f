"""Networks by name. Adding one is a file here and a line in `MODELS`."""

from collections.abc import Callable
from functools import partial

from bdjax.errors import InputError
from bdjax.models.facade import as_model, count_parameters, embedding
from bdjax.models.layers import ComputeDtype, Lowering, default_lowering
from bdjax.models.resnet import BLOCKS, ResNet
from bdjax.types import Model

__all__ = ["MODELS", "ComputeDtype", "Lowering", "count_parameters", "default_lowering", "embedding", "make_model"]


def _resnet(name: str, num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype) -> Model:
    kind, blocks = BLOCKS[name]
    module = ResNet(kind, blocks, width, num_classes, lowering, compute_dtype)
    return as_model(module, num_classes, f"{name} width {width}")


MODELS: dict[str, Callable[[int, int, Lowering, ComputeDtype], Model]] = {
    name: partial(_resnet, name) for name in BLOCKS
}


def make_model(
    name: str,
    num_classes: int,
    width: int = 64,
    lowering: Lowering | None = None,
    compute_dtype: ComputeDtype = "float32",
) -> Model:
    """Build a network.

    Args:
        name: a key of `MODELS`.
        num_classes: K.
        width: channels of the first stage; 64 is the papers' size.
        lowering: how convolutions are computed; None chooses by backend (`default_lowering`).
        compute_dtype: of activations and products; parameters, statistics and logits are float32 in any case.

    Raises:
        InputError: if there is no such network, or the width or the number of classes cannot be.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    if width < 1 or num_classes < 2:
        raise InputError(f"model {name}: width {width} must be at least 1 and classes {num_classes} at least 2")
    return MODELS[name](num_classes, width, lowering or default_lowering(), compute_dtype)
