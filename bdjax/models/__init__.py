"""Networks by name. To add one, add a file here and a line in `_OWN`; networks of installed plugins are found by themselves."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from flax import linen as nn

from bdjax.choices import ComputeDtype, Lowering
from bdjax.errors import InputError
from bdjax.models import (
    lenet,
    mobilenet_v2,
    preact_resnet,
    pyramid_net,
    resnet,
    simple_cnn,
    speedrun,
    vgg,
    wide_resnet,
)
from bdjax.models.facade import (
    as_model,
    convolution_shapes,
    count_parameters,
    embedding,
    group_shapes,
    last_tap,
    normalised_convolutions,
    tap_shapes,
)
from bdjax.models.layers import default_lowering
from bdjax.models.normalisation import normalised
from bdjax.plugins import Registry
from bdjax.types import Architecture, Model

__all__ = [
    "MODELS",
    "ComputeDtype",
    "Lowering",
    "as_model",
    "convolution_shapes",
    "count_parameters",
    "default_lowering",
    "embedding",
    "group_shapes",
    "last_tap",
    "make_model",
    "normalised_convolutions",
    "normalised",
    "tap_shapes",
]

Maker = Callable[[int, int, Lowering, ComputeDtype], nn.Module]
"""(number of classes, width, lowering, dtype) -> module."""

_OWN: Mapping[str, Maker] = {
    **resnet.NETWORKS,
    **vgg.NETWORKS,
    **mobilenet_v2.NETWORKS,
    **lenet.NETWORKS,
    **wide_resnet.NETWORKS,
    **pyramid_net.NETWORKS,
    **simple_cnn.NETWORKS,
    **preact_resnet.NETWORKS,
    **speedrun.NETWORKS,
}


def _mistake(name: str, entry: Any) -> str:
    """What is wrong with the entry of a plugin."""
    return "" if callable(entry) else f"is of the type {type(entry).__name__}, not a function that makes a network"


MODELS: Registry[Maker] = Registry("model", _OWN, _mistake)
"""Every network by name."""

PREPARE = {"speedrun": speedrun.whiten}
"""Name -> `Model.prepare`, for the networks that have it."""


def make_model(
    name: str,
    num_classes: int,
    width: int = 64,
    lowering: Lowering | None = None,
    compute_dtype: ComputeDtype = "float32",
) -> Model:
    """Build a network.

    All networks take images of 8x8 pixels or more, with any number of channels. They record taps "stage1", "stage2" and so on,
    in the order of the network. The last tap, averaged over its pixels, is the input of the last layer (`embedding`), whose
    parameters are `variables["params"]["classifier"]`, a kernel [d, K] and a bias [K] (which `speedrun` has not).

    Args:
        name: a key of `MODELS`.
        num_classes: K.
        width: 64 is the papers' size of every network. A ResNet has this many channels in its first stage; any other network,
            and `resnet56` (usually 16), has width / 64 times its usual channels, rounded and at least 1. The layers that
            make a network small are not scaled: in `resnet_s1` and `resnet_s` only the stem is, in `vgg_s` only the one wide
            layer, and in `mobilenet_v2_s`, `lenet` and the networks of VBD nothing.
        lowering: how convolutions are computed; None chooses by backend (`default_lowering`).
        compute_dtype: of activations and products; parameters, statistics and logits are always float32.

    Raises:
        InputError: if the network is unknown, or the width or the number of classes is too small.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; models are {', '.join(MODELS)}")
    if width < 1 or num_classes < 2:
        raise InputError(f"model {name}: width {width} must be at least 1, and classes {num_classes} at least 2")
    return _make(MODELS[name], name, num_classes, width, lowering or default_lowering(), compute_dtype)


# Networks that are alike are one object, so what is traced and compiled for one is used for all.
@lru_cache(maxsize=64)
def _make(
    maker: Maker, name: str, num_classes: int, width: int, lowering: Lowering, compute_dtype: ComputeDtype
) -> Model:
    module = maker(num_classes, width, lowering, compute_dtype)
    model = as_model(module, num_classes, f"{name} width {width}", PREPARE.get(name))
    return model._replace(architecture=Architecture(name, width))
