"""Reads the weights of a network from safetensors, under torch's names or ours, into our modules.

The number of channels is found from the tensors' shapes; only tensors that the network has are read.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from bdjax.choices import ComputeDtype, Lowering
from bdjax.errors import InputError
from bdjax.exchange import naming as names
from bdjax.exchange import safetensors_files
from bdjax.exchange.saved_model import check_fits, filled, flat
from bdjax.models import MODELS, make_model, normalised
from bdjax.models.normalisation import per_channel
from bdjax.settings import Width, mistake
from bdjax.types import Model, PyTree

Normalisation = str | tuple[Sequence[float] | float, Sequence[float] | float] | None
"""A key of `NORMALISATIONS`; "0.5,0.5,0.5/0.25,0.25,0.25"; (mean, std) in units of [0, 1], a single number standing for all
channels; or None for none"""

NORMALISATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "kuangliu_cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "backdoorbench_cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "half": ((0.5,), (0.5,)),
}
"""Name -> (mean, std) of every channel; a single number stands for all channels."""

_USUAL_WIDTH = 64


class Weights(NamedTuple):
    model: Model
    variables: PyTree
    """stacked [1, ...]"""
    naming: str
    sha256: str
    """of the file"""


def read(
    path: pathlib.Path,
    architecture: str,
    num_classes: int | None,
    image_shape: tuple[int, int, int],
    naming: str | None = None,
    normalisation: Normalisation = None,
    *,
    lowering: Lowering | None = None,
    compute_dtype: ComputeDtype = "float32",
) -> Weights:
    """Read a network from a safetensors file.

    Args:
        path: the file.
        architecture: a key of `bdjax.models.MODELS`.
        num_classes: K of the data; None for that of the file.
        image_shape: (H, W, C) of the data.
        naming: who named the tensors, one of `bdjax.exchange.naming.NAMINGS`; None to see it from the names.
        normalisation: of pixels in [0, 1], which becomes part of the network.
        lowering: how to compute convolutions; None chooses by backend.
        compute_dtype: dtype of the activations.

    Returns:
        The network, which takes float32 [N, H, W, C] in [0, 1], and its variables.

    Raises:
        InputError: the file is no safetensors file, is damaged, or holds another network: its first three tensors that do not
            fit are named, with both shapes.
    """
    path = pathlib.Path(path)
    if architecture not in MODELS:
        raise InputError(f"{path}: unknown architecture {architecture!r}; architectures are {', '.join(MODELS)}")
    mean, std = statistics(path, normalisation, image_shape[2])
    with safetensors_files.opened(path) as file:
        originals = names.without_prefix(file.tensors)
        found = {name: file.tensors[original].shape for name, original in originals.items()}
        ours = _shapes(architecture, num_classes or 2, _USUAL_WIDTH, image_shape)
        naming = naming or names.detect(architecture, ours, found)
        sources = names.sources(architecture, naming, ours)
        classes = _num_classes(found, sources) or num_classes or 2
        if num_classes and classes != num_classes:
            raise InputError(
                f"{path}: the network has {classes} classes; the data has {num_classes}; both must be the same"
            )
        if classes < 2:
            raise InputError(f"{path}: the network has a single output; a classifier has at least 2 classes")
        num_classes, ours = classes, ours if num_classes else _shapes(architecture, classes, _USUAL_WIDTH, image_shape)
        width, ours, sources = _fitting_width(architecture, num_classes, image_shape, found, naming, ours)
        theirs = _theirs(ours, sources)
        check_fits(
            found, theirs, f"{path}: should hold {architecture} as named by {naming}", _hint(architecture, found)
        )
        tensors = {}
        for our, source in sources.items():
            values = file.read(originals[source.name])
            tensors[our] = (values if source.axes is None else np.transpose(values, source.axes))[None]
        digest = file.sha256()
    negative = next((our for our, values in tensors.items() if our.endswith("/variance") and values.min() < 0), None)
    if negative:
        raise InputError(f"{path}: {sources[negative].name} has negative variances")
    model = make_model(architecture, num_classes, width, lowering, compute_dtype)
    model = normalised(model, mean, std) if mean else model
    like = jax.eval_shape(
        lambda key: make_model(architecture, num_classes, width, "native").init(key, image_shape), _key()
    )
    return Weights(model, filled(like, tensors), naming, digest)


def _key() -> jax.Array:
    return jax.eval_shape(lambda: jax.random.key(0))


def _shapes(
    architecture: str, num_classes: int, width: int, image_shape: tuple[int, int, int]
) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's variables by path; nothing is computed. The native lowering is traced fastest."""
    model = make_model(architecture, num_classes, width, "native")
    leaves = flat(jax.eval_shape(lambda key: model.init(key, image_shape), _key()))
    in_order = sorted(leaves, key=lambda path: not path.startswith("params/"))  # messages name the kernels first
    return {path: leaves[path].shape for path in in_order}


def _num_classes(found: Mapping[str, tuple[int, ...]], sources: Mapping[str, names.Source]) -> int | None:
    """The number of classes by the shape of the file's last layer; None if it has none that fits."""
    source = sources["params/classifier/kernel"]
    shape = found.get(source.name, ())
    return shape[0 if source.axes else 1] if len(shape) == 2 else None


def _fitting_width(
    architecture: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    found: Mapping[str, tuple[int, ...]],
    naming: str,
    ours: dict[str, tuple[int, ...]],
) -> tuple[int, dict[str, tuple[int, ...]], dict[str, names.Source]]:
    """The width with which the most tensors fit; and with it the shapes of our tensors, and where each comes from."""
    sources = names.sources(architecture, naming, ours)
    fits = {_USUAL_WIDTH: (ours, sources)}
    kernels = [path for path, shape in ours.items() if len(shape) == 4]
    for path in (*kernels[:1], *kernels[-1:]):
        source = sources[path]
        shape = found.get(source.name, ())
        if len(shape) != 4:
            continue
        width = round((shape[0] if source.axes else shape[3]) * _USUAL_WIDTH / ours[path][3])
        if width not in fits and not mistake(Width, width):
            shapes = _shapes(architecture, num_classes, width, image_shape)
            fits[width] = shapes, names.sources(architecture, naming, shapes)

    def fitting(width: int) -> float:
        """The share of tensors that fit; those of the file that the network has not count too."""
        theirs = _theirs(*fits[width])
        return sum(found.get(name) == shape for name, shape in theirs.items()) / len({*theirs, *found})

    width = max(fits, key=fitting)
    return width, *fits[width]


def _theirs(shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, names.Source]) -> dict[str, tuple[int, ...]]:
    """The names and shapes that a file of our tensors has."""
    return {source.name: names.their_shape(shapes[path], source) for path, source in sources.items()}


def _hint(architecture: str, found: Mapping[str, tuple[int, ...]]) -> str:
    """For a ResNet: which of ours a file of these tensors would be."""
    stem, block = found.get("conv1.weight", ()), "layer4.0.conv1.weight"
    if not re.fullmatch(r"resnet\d+(_cifar|_imagenet)?", architecture) or len(stem) != 4 or block not in found:
        return ""
    kind = {7: "imagenet", 3: "cifar"}.get(stem[2])
    blocks = tuple(
        sum(f"layer{stage}.{number}.conv1.weight" in found for number in range(100)) for stage in range(1, 5)
    )
    is_bottleneck = "layer1.0.conv3.weight" in found
    number = {((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34, ((3, 4, 6, 3), True): 50}.get(
        (blocks, is_bottleneck)
    )
    name = f"resnet{number}_{kind}"
    return f"; it looks like {name}" if name in MODELS and name != architecture else ""


def statistics(
    path: pathlib.Path, normalisation: Normalisation, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of every channel, or two times () for no normalisation.

    Args:
        path: the file that the normalisation is for, for error messages.
        normalisation: see `Normalisation`.
        channels: of the images.

    Raises:
        InputError: it is no normalisation of such images.
    """
    if normalisation is None or normalisation == "none":
        return (), ()
    if isinstance(normalisation, str) and normalisation not in NORMALISATIONS:
        try:
            parts = [tuple(float(number) for number in part.split(",")) for part in normalisation.split("/")]
            mean, std = parts
        except ValueError:
            known = ", ".join(NORMALISATIONS)
            raise InputError(
                f"{path}: normalisation {normalisation!r} is not one of none, {known}, or numbers: MEAN,MEAN,MEAN/STD,STD,STD"
            ) from None
    else:
        mean, std = NORMALISATIONS[normalisation] if isinstance(normalisation, str) else normalisation
    try:
        return per_channel(mean, std, channels)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
