"""Saved models: the form in which a run leaves its networks, and in which they are passed on.

    FOLDER/model.safetensors   the variables, under the names of our own paths ("params/stem_conv/kernel"), float32; N networks
                               of one architecture are stacked on a leading axis [N], a single network has none
    FOLDER/model.json          what they are: architecture, width, classes, image shape, normalisation, number of networks,
                               SHA-256 of the tensors, and what made them

Both are plain data, so reading them cannot run code. `model.json` is written last: with it the folder is complete.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bdjax
from bdjax import atomic
from bdjax.choices import ComputeDtype, Lowering
from bdjax.datasets.files import read_json
from bdjax.defenses.abm import defended_model
from bdjax.errors import InputError
from bdjax.exchange import safetensors_files
from bdjax.exchange.safetensors_files import shown
from bdjax.models import MODELS, make_model, normalised
from bdjax.settings import ImageSide, Width, mistake
from bdjax.training import ensemble, processes
from bdjax.types import Architecture, Model, PyTree

TENSORS, ABOUT = safetensors_files.TENSORS, "model.json"
FORMAT, VERSION = "bdjax model", 1
_MAXIMUM_JSON = 1 << 24
_MAXIMUM_MEMBERS, _MAXIMUM_CLASSES = 10_000, 1_000_000
_SIDES = ("height", "width", "channels")


class About(NamedTuple):
    """What `model.json` says."""

    architecture: Architecture
    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()
    """of every class; () for none but their numbers"""
    members: int = 1
    made_by: Mapping[str, Any] = {}
    """"bdjax" (version), "experiment", "role", "seed" and further texts and numbers"""


class SavedModel(NamedTuple):
    about: About
    model: Model
    variables: PyTree
    """stacked [N, ...]"""
    digest: str
    """SHA-256 of model.safetensors; for two networks that correct each other, of correction.json"""


def is_saved_model(folder: pathlib.Path) -> bool:
    """Whether a folder claims to be a saved model; it may be damaged."""
    return os.path.lexists(folder / ABOUT)


@processes.by_primary
def write(folder: pathlib.Path, about: About, variables: PyTree) -> str:
    """Write networks of one architecture as a saved model.

    Args:
        folder: where to write; created if needed. A saved model in it is replaced.
        about: what they are; `made_by` is completed by the version of bdjax.
        variables: stacked [N, ...], N = about.members.

    Returns:
        The SHA-256 of model.safetensors.

    Raises:
        OSError: the files cannot be written.
    """
    tensors = {path: np.asarray(leaf, np.float32) for path, leaf in flat(jax.device_get(variables)).items()}
    if about.members == 1:
        tensors = {path: values[0] for path, values in tensors.items()}
    (folder / ABOUT).unlink(missing_ok=True)
    digest = safetensors_files.write(folder / TENSORS, tensors)
    name, width, mean, std = about.architecture
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": name,
        "width": width,
        "num_classes": about.num_classes,
        "class_names": list(about.class_names),
        "image_shape": list(about.image_shape),
        "normalisation": {"mean": list(mean), "std": list(std)} if mean else None,
        "members": about.members,
        "tensors_sha256": digest,
        "made_by": {"bdjax": bdjax.__version__, **about.made_by},
    }
    text = json.dumps(facts, indent=2, ensure_ascii=True)
    atomic.write_bytes(folder / ABOUT, f"{text}\n".encode())
    return digest


def read(folder: pathlib.Path, lowering: Lowering | None = None, compute_dtype: ComputeDtype = "float32") -> SavedModel:
    """Read a saved model.

    Args:
        folder: written by `write`.
        lowering: how to compute the convolutions; None chooses by backend.
        compute_dtype: dtype of the activations.

    Raises:
        InputError: the folder is no saved model, is damaged, or its tensors do not fit what it says of them.
    """
    about, digest = read_about(folder)
    model = build(about.architecture, about.num_classes, lowering, compute_dtype)
    like = ensemble.trained_like(model, about.image_shape, about.members, 0).variables
    wanted = {path: leaf.shape if about.members > 1 else leaf.shape[1:] for path, leaf in flat(like).items()}
    path = folder / TENSORS
    with safetensors_files.opened(path) as file:
        check_fits(
            {name: tensor.shape for name, tensor in file.tensors.items()},
            wanted,
            f"{path}: {ABOUT} says {model.description}",
        )
        if file.sha256() != digest:
            raise InputError(
                f"{path}: its content is not what {ABOUT} was written for; copy the folder again from where it came from"
            )
        tensors = {name: file.read(name) for name in wanted}
    if about.members == 1:
        tensors = {name: values[None] for name, values in tensors.items()}
    return SavedModel(about, model, filled(like, tensors), digest)


def build(
    architecture: Architecture, num_classes: int, lowering: Lowering | None, compute_dtype: ComputeDtype
) -> Model:
    """The network that an architecture names, with its normalisation."""
    model = make_model(architecture.name, num_classes, architecture.width, lowering, compute_dtype)
    return normalised(model, architecture.mean, architecture.std) if architecture.mean else model


def is_pair(model: Model) -> bool:
    """Whether a model is ABM's of two networks that files can describe."""
    return len(model.parts) == 2 and all(part.architecture for part in model.parts)


def native(model: Model) -> Model | None:
    """The same network, or pair of networks, in the native lowering and in float32; None for a model of other making."""
    if model.architecture is not None:
        return build(model.architecture, model.num_classes, "native", "float32")
    return defended_model(*map(native, model.parts)) if is_pair(model) else None


def flat(tree: PyTree) -> dict[str, Any]:
    """The leaves of variables by their paths: "params/stem_conv/kernel"."""
    return {"/".join(str(step.key) for step in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def filled(like: PyTree, leaves: Mapping[str, np.ndarray]) -> PyTree:
    """Variables of the structure of `like` with these leaves, by path, on the default device."""
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [jnp.asarray(leaves[path]) for path in flat(like)])


def check_fits(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str, hint: str = ""
) -> None:
    """Compare the shapes in a file with those of a network.

    Args:
        found: name -> shape in the file.
        wanted: name -> shape of the network, with the same names.
        where: begins the error message: the file and the network.
        hint: ends it.

    Raises:
        InputError: names the first three tensors that differ, with both shapes.
    """
    expected = sorted(wanted, key=lambda name: name.startswith("batch_stats/"))
    wrong = [name for name in [*expected, *sorted(found.keys() - wanted.keys())] if found.get(name) != wanted.get(name)]
    if not wrong:
        return

    def shape_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
        return str(list(shapes[name])) if name in shapes else "absent"

    first = "; ".join(
        f"{shown(name)} is {shape_of(found, name)}, should be {shape_of(wanted, name)}" for name in wrong[:3]
    )
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise InputError(f"{where}, which its tensors do not fit: {first}{more}{hint}")


# ---- model.json -----------------------------------------------------------------------------------------------------


def read_about(folder: pathlib.Path) -> tuple[About, str]:
    """What `model.json` says, checked, and the SHA-256 that it names of the tensors.

    Raises:
        InputError: it is missing, not JSON, of an unknown format or version, or has a fact that cannot be true.
    """
    path = folder / ABOUT
    facts, _ = read_facts(path, "the description of a saved model", FORMAT, VERSION)
    expected = {
        "architecture": (lambda value: isinstance(value, str) and value in MODELS, "a network of bdjax"),
        "width": (lambda value: type(value) is int and not mistake(Width, value), "a width from 1 to 1024"),
        "num_classes": (lambda value: _is_count(value, 2, _MAXIMUM_CLASSES), "a number of at least 2"),
        "image_shape": (_is_image_shape, "[height, width, channels]"),
        "members": (lambda value: _is_count(value, 1, _MAXIMUM_MEMBERS), f"a number from 1 to {_MAXIMUM_MEMBERS}"),
        "tensors_sha256": (
            lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value),
            f"the SHA-256 of {TENSORS}",
        ),
        "made_by": (_is_plain, "an object of texts and numbers"),
    }
    for name, (is_right, should_be) in expected.items():
        if not is_right(facts.get(name)):
            raise InputError(f"{path}: {name} is {shown(facts.get(name))}; should be {should_be}")
    if unknown := sorted(facts.keys() - expected.keys() - {"format", "version", "class_names", "normalisation"}):
        raise InputError(f"{path}: {shown(unknown[0])} is no fact of version {VERSION} of the format")
    names = facts.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) and len(name) <= 1000 for name in names):
        raise InputError(f"{path}: class_names is {shown(names)}; should be a list of texts")
    if names and len(names) != facts["num_classes"]:
        raise InputError(f"{path}: class_names has {len(names)} names for {facts['num_classes']} classes")
    mean, std = _normalisation(path, facts.get("normalisation"), facts["image_shape"][2])
    architecture = Architecture(facts["architecture"], facts["width"], mean, std)
    shape = tuple(facts["image_shape"])
    about = About(architecture, facts["num_classes"], shape, tuple(names), facts["members"], facts["made_by"])
    return about, facts["tensors_sha256"]


def read_facts(path: pathlib.Path, what: str, form: str, version: int) -> tuple[dict[str, Any], bytes]:
    """A file of facts in JSON, and its content.

    Args:
        path: the file.
        what: it should be, for messages.
        form: its "format".
        version: its "version".

    Raises:
        InputError: it is missing, not JSON, or of another format or version; its other facts are not looked at.
    """
    content, facts = read_json(path, _MAXIMUM_JSON, "descriptions of models")
    if not isinstance(facts, dict) or facts.get("format") != form:
        raise InputError(f'{path}: not {what}; "format" should be {form!r}')
    if facts.get("version") != version:
        raise InputError(
            f"{path}: version {shown(facts.get('version'))} of the format; this bdjax reads version {version}"
        )
    return facts, content


def _normalisation(path: pathlib.Path, value: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if value is None:
        return (), ()
    parts = [value.get("mean"), value.get("std")] if isinstance(value, dict) and value.keys() == {"mean", "std"} else []
    is_right = parts and all(
        isinstance(part, list) and len(part) == channels and all(map(_is_number, part)) for part in parts
    )
    if not is_right or min(parts[1]) <= 0:
        raise InputError(
            f"{path}: normalisation is {shown(value)}; should be null, or mean and std with {channels} numbers each, std "
            "positive"
        )
    return tuple(map(float, parts[0])), tuple(map(float, parts[1]))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e6


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_image_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != len(_SIDES) or not all(type(side) is int for side in value):
        return False
    return not any(mistake(ImageSide, side) for side in value[:2]) and 1 <= value[2] <= 16


def _is_plain(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > 100:
        return False
    return all(
        fact is None or (isinstance(fact, (str, int, float, bool)) and len(str(fact)) <= 10_000)
        for fact in value.values()
    )
