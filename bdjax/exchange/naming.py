"""What other frameworks call a network's tensors: tables from our paths to their names, and the order of their axes.

A table's left side matches the path of one of our layers; s and b are the numbers of its stage and block, i that of the layer
within the block. Its right side is a template of theirs with these numbers, and with

- `{before}`: b - 1, `{next}`: i + 1,
- `{n}`: the block's number in the whole network, from 0,
- `{place}`: the number of a VGG's convolution in its list of layers, where normalisation, ReLU and pools count too.

`torchvision` and `timm` have the same names for ResNets. `kuangliu` stands for the usual ports to CIFAR-10: those of
github.com/kuangliu/pytorch-cifar, which BackdoorBench's own networks follow, and for wide ResNets those of
github.com/xternalz/WideResNet-pytorch.
`flax` are our own paths, "params/stem_conv/kernel".
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.errors import InputError

NAMINGS = ("torchvision", "timm", "kuangliu", "flax")

_BLOCK = r"stage(?P<s>\d+)_block(?P<b>\d+)/"
_RESNET = {"stem_conv": "conv1", "stem_norm": "bn1"}
_IN_BLOCK = {
    rf"{_BLOCK}Conv_(?P<i>\d)": "layer{s}.{before}.conv{next}",
    rf"{_BLOCK}BatchNorm_(?P<i>\d)": "layer{s}.{before}.bn{next}",
}
_TORCHVISION = {
    **_RESNET,
    **_IN_BLOCK,
    f"{_BLOCK}shortcut_conv": "layer{s}.{before}.downsample.0",
    f"{_BLOCK}shortcut_norm": "layer{s}.{before}.downsample.1",
    "classifier": "fc",
}
_KUANGLIU_SHORTCUT = {
    f"{_BLOCK}shortcut_conv": "layer{s}.{before}.shortcut.0",
    f"{_BLOCK}shortcut_norm": "layer{s}.{before}.shortcut.1",
}
_VGG_LAYER = r"stage(?P<s>\d+)_{}(?P<b>\d+)"
_MOBILENET = {
    "stem_conv": "conv1",
    "stem_norm": "bn1",
    "last_conv": "conv2",
    "last_norm": "bn2",
    **{
        f"{_BLOCK}{ours}_{kind}": f"layers.{{n}}.{theirs}{number}"
        for number, ours in enumerate(("expand", "filter", "project"), start=1)
        for kind, theirs in (("conv", "conv"), ("norm", "bn"))
    },
    f"{_BLOCK}shortcut_conv": "layers.{n}.shortcut.0",
    f"{_BLOCK}shortcut_norm": "layers.{n}.shortcut.1",
    "classifier": "linear",
}
_WIDE = {
    "stem_conv": "conv1",
    rf"{_BLOCK}Conv_(?P<i>\d)": "block{s}.layer.{before}.conv{next}",
    rf"{_BLOCK}BatchNorm_(?P<i>\d)": "block{s}.layer.{before}.bn{next}",
    f"{_BLOCK}shortcut_conv": "block{s}.layer.{before}.convShortcut",
    "last_norm": "bn1",
    "classifier": "fc",
}

TABLES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    r"resnet(\d+(_cifar|_imagenet)?|_s\d?)": {
        "torchvision": _TORCHVISION,
        "timm": _TORCHVISION,
        "kuangliu": {**_RESNET, **_IN_BLOCK, **_KUANGLIU_SHORTCUT, "classifier": "linear"},
    },
    r"preact_resnet18(_final_norm)?": {
        "kuangliu": {
            "stem_conv": "conv1",
            **_IN_BLOCK,
            **_KUANGLIU_SHORTCUT,
            "last_norm": "bn",
            "classifier": "linear",
        },
    },
    r"vgg.*": {
        "kuangliu": {
            _VGG_LAYER.format("conv"): "features.{place}",
            _VGG_LAYER.format("norm"): "features.{after}",
            "classifier": "classifier",
        }
    },
    r"mobilenet_v2.*": {"kuangliu": _MOBILENET},
    r"wrn_.*": {"kuangliu": _WIDE},
}
"""Pattern of our networks' names -> naming -> table."""

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers of torch put before every name."""


class Source(NamedTuple):
    """Where one of our tensors comes from."""

    name: str
    """of the tensor in the file"""
    axes: tuple[int, ...] | None
    """theirs in our order, for `np.transpose`; None if they are the same"""


def namings_of(architecture: str) -> tuple[str, ...]:
    """The namings in which the tensors of one of our networks may come."""
    return (*_tables(architecture), "flax")


def sources(architecture: str, naming: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Source]:
    """Where each of our tensors comes from.

    Args:
        architecture: a key of `bdjax.models.MODELS`.
        naming: one of `NAMINGS`.
        shapes: the shapes of our tensors by path, "params/stem_conv/kernel".

    Raises:
        InputError: the naming is unknown, or not known for this network.
    """
    if naming == "flax":
        return {path: Source(path, None) for path in shapes}
    if naming not in namings_of(architecture):
        known = ", ".join(namings_of(architecture))
        raise InputError(f"naming {naming!r} is not known for {architecture}; its tensors may be named as by {known}")
    table = _tables(architecture)[naming]
    layers = {path.split("/", 1)[1].rsplit("/", 1)[0] for path in shapes}
    numbers = _numbers(layers)
    names = {layer: _translated(layer, table, numbers) for layer in layers}
    found = {}
    for path, shape in shapes.items():
        layer, leaf = path.split("/", 1)[1].rsplit("/", 1)
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape))
        found[path] = Source(f"{names[layer]}.{_LEAVES[leaf]}", axes)
    return found


def detect(architecture: str, shapes: Mapping[str, Sequence[int]], names: Collection[str]) -> str:
    """The naming that has the most names in common with a file; arguments as in `sources`."""
    known = namings_of(architecture)
    shared = {
        naming: len({source.name for source in sources(architecture, naming, shapes).values()} & set(names))
        for naming in known
    }
    return max(known, key=lambda naming: shared[naming])


def without_prefix(names: Iterable[str]) -> dict[str, str]:
    """Names without the prefix of a wrapper that all of them share -> the names as they are."""
    names = {name: name for name in names}
    while names and (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), "")):
        names = {name.removeprefix(prefix): original for name, original in names.items()}
    return names


def their_shape(shape: Sequence[int], source: Source) -> tuple[int, ...]:
    """The shape that one of our tensors has in the file."""
    if source.axes is None:
        return tuple(shape)
    return tuple(shape[axis] for axis in np.argsort(source.axes))


def _tables(architecture: str) -> Mapping[str, Mapping[str, str]]:
    return next((tables for pattern, tables in TABLES.items() if re.fullmatch(pattern, architecture)), {})


def _numbers(layers: Iterable[str]) -> dict[tuple[int, int], int]:
    """(stage, block) -> the block's number in the network, from 0."""
    found = (re.match(r"stage(\d+)_(?:block|conv)(\d+)", layer) for layer in layers)
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    return {block: number for number, block in enumerate(blocks)}


def _translated(layer: str, table: Mapping[str, str], numbers: Mapping[tuple[int, int], int]) -> str:
    match, template = next((match, text) for left, text in table.items() if (match := re.fullmatch(left, layer)))
    groups: dict[str, Any] = {name: int(value) for name, value in match.groupdict().items()}
    if "b" in groups:
        groups |= {"before": groups["b"] - 1, "n": numbers[groups["s"], groups["b"]]}
        groups |= {"place": 3 * groups["n"] + groups["s"] - 1, "after": 3 * groups["n"] + groups["s"]}
    if "i" in groups:
        groups["next"] = groups["i"] + 1
    return template.format(**groups)
