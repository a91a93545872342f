"""ABM's two networks as files: a network, a second one that corrects it, and the rule that combines their logits.

    FOLDER/teacher/, FOLDER/student/   two saved models, see `bdjax/exchange/saved_model.py`
    FOLDER/correction.json             the rule with its numbers, and the SHA-256 of both networks

`correction.json` is written last: with it the folder is complete. Like the networks it is plain data.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bdjax import atomic
from bdjax.choices import ComputeDtype, Lowering
from bdjax.defenses.abm import defended_model
from bdjax.errors import InputError
from bdjax.exchange import saved_model
from bdjax.exchange.safetensors_files import shown
from bdjax.exchange.saved_model import About, SavedModel
from bdjax.training import processes
from bdjax.types import Model, PyTree

CORRECTION = "correction.json"
PARTS = ("teacher", "student")
FORMAT, VERSION = "bdjax correction", 2
RULE = "teacher - delta * max(student - gamma * average, 0)"


def is_corrected_model(folder: pathlib.Path) -> bool:
    """Whether a folder claims to be two networks of which one corrects the other; it may be damaged."""
    return os.path.lexists(folder / CORRECTION)


@processes.by_primary
def write(
    folder: pathlib.Path,
    model: Model,
    variables: PyTree,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    made_by: Mapping[str, Any],
) -> None:
    """Write networks that correct each other.

    Args:
        folder: where to write; created if needed.
        model: from `bdjax.defenses.abm.defended_model`, of two networks with an architecture.
        variables: stacked [N, ...].
        image_shape: (H, W, C).
        class_names: of every class; () for none but their numbers.
        made_by: what made them.

    Raises:
        OSError: the files cannot be written.
    """
    (folder / CORRECTION).unlink(missing_ok=True)
    count, shape, digests = len(variables["gamma"]), tuple(image_shape), {}
    for part, network in zip(PARTS, model.parts, strict=True):
        about = About(network.architecture, network.num_classes, shape, tuple(class_names), count, dict(made_by))
        arrays = {name: variables[part][name] for name in ("params", "batch_stats")}
        digests[part] = saved_model.write(folder / part, about, arrays)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "logits": RULE,
        **{name: np.asarray(variables[name]).tolist() for name in ("gamma", "delta", "average")},
        "tensors_sha256": digests,
    }
    atomic.write_bytes(folder / CORRECTION, f"{json.dumps(facts, indent=2)}\n".encode())


def read(folder: pathlib.Path, lowering: Lowering | None = None, compute_dtype: ComputeDtype = "float32") -> SavedModel:
    """Read networks that correct each other.

    Args:
        folder: written by `write`.
        lowering: how to compute the convolutions; None chooses by backend.
        compute_dtype: dtype of the activations.

    Returns:
        The pair as one model, with what `model.json` says of the network that is corrected.

    Raises:
        InputError: a file is missing or damaged, or the parts are not those that the rule was written for.
    """
    numbers, digests, digest = _read_rule(folder)
    teacher, student = (saved_model.read(folder / part, lowering, compute_dtype) for part in PARTS)
    for name in ("num_classes", "image_shape", "class_names", "members"):
        first, second = getattr(teacher.about, name), getattr(student.about, name)
        if first != second:
            raise InputError(
                f"{folder}: {name} of teacher is {shown(first)}, of student {shown(second)}; should be equal"
            )
    for part, network in zip(PARTS, (teacher, student), strict=True):
        if network.digest != digests[part]:
            raise InputError(
                f"{folder / CORRECTION}: was written for another network than that in {part}/; copy the folder again from "
                "where it came from"
            )
    shapes = {"gamma": (teacher.about.members,), "delta": (teacher.about.members,)}
    shapes["average"] = (teacher.about.members, teacher.about.num_classes)
    for name, shape in shapes.items():
        if numbers[name].shape != shape:
            raise InputError(
                f"{folder / CORRECTION}: {name} has the shape {list(numbers[name].shape)}; should be {list(shape)}"
            )
    variables = {"teacher": teacher.variables, "student": student.variables, **numbers}
    return SavedModel(teacher.about, defended_model(teacher.model, student.model), variables, digest)


def _read_rule(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str], str]:
    """The numbers of the rule, float32; the SHA-256 of each part; and that of the file."""
    path = folder / CORRECTION
    facts, content = saved_model.read_facts(path, "the correction of a model", FORMAT, VERSION)
    known = ("format", "version", "logits", "gamma", "delta", "average", "tensors_sha256")
    if wrong := sorted(facts.keys() ^ set(known)):
        what = "is no fact" if wrong[0] in facts else "is missing, which is a fact"
        raise InputError(f"{path}: {shown(wrong[0])} {what} of version {VERSION} of the format")
    if facts["logits"] != RULE:
        raise InputError(f"{path}: logits is {shown(facts['logits'])}; should be {RULE!r}")
    numbers = {name: _numbers(facts[name]) for name in ("gamma", "delta", "average")}
    for name, values in numbers.items():
        if values is None:
            raise InputError(f"{path}: {name} is {shown(facts[name])}; should be a list of finite numbers")
    digests = facts["tensors_sha256"]
    is_right = isinstance(digests, dict) and digests.keys() == set(PARTS)
    if not is_right or not all(isinstance(digest, str) for digest in digests.values()):
        raise InputError(f"{path}: tensors_sha256 is {shown(digests)}; should be the SHA-256 of teacher and of student")
    return numbers, digests, hashlib.sha256(content).hexdigest()


def _numbers(value: Any) -> np.ndarray | None:
    """A list of finite numbers, or of such lists, as float32; None for anything else."""
    try:
        values = np.asarray(value)
    except ValueError:  # lists of several lengths
        return None
    if values.dtype.kind not in "if":
        return None
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return values if np.isfinite(values).all() else None
