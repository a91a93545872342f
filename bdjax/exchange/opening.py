"""Opens a network from anywhere by the text that a command line names it with.

    FOLDER                                  a saved model (model.json), a model folder (about.json), or two networks of
                                            which one corrects the other (correction.json)
    FILE.safetensors:ARCH[:NAMING[:NORM]]   tensors with torch's names or ours, see `bdjax.exchange.naming`
    FILE.onnx[:SETTING[:SETTING...]]        run by ONNX Runtime; a setting is nchw or nhwc, the order of its input's axes,
                                            output=NAME, the output that is used, or a normalisation as above
    http://HOST:PORT/PATH                   queried over HTTP, in JSON if ?format=json is added

The first two are white boxes, with weights and gradients; the others are black boxes, and so are two networks that correct each
other, which cannot be trained.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.attacks.providers import ProviderTriggers
from bdjax.choices import QUERY_BATCH, ComputeDtype, Lowering
from bdjax.datasets.scaling import size_hint
from bdjax.errors import InputError
from bdjax.exchange import corrected_model, model_folder, safetensors_files, saved_model, weights
from bdjax.exchange.safetensors_files import shown
from bdjax.models import MODELS
from bdjax.training import checkpoint, ensemble
from bdjax.training.stages import StageRunner
from bdjax.types import Classifier, Model, PyTree

FORMS = "FOLDER, FILE.safetensors:ARCHITECTURE, FILE.onnx or http://HOST:PORT/PATH"
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_ONNX = re.compile(r"(?P<path>.+?\.onnx)(?::(?P<rest>.*))?", re.IGNORECASE | re.DOTALL)


class Opened(NamedTuple):
    """A network, or N of one architecture. A white box has `model` and `variables`, a black box only `classifier`."""

    name: str
    """as the user wrote it"""
    digest: str
    """SHA-256 of what decides its answers, whatever its place; of an address, that of the address alone"""
    model: Model | None = None
    variables: PyTree | None = None
    """stacked [N, ...]"""
    classifier: Classifier | None = None
    """float32 [B, H, W, C] in [0, 1] -> logits [B, K]"""
    triggers: ProviderTriggers | None = None
    """of N providers, entry i for network i; None if unknown"""
    label_rules: tuple[str, ...] = ()
    """keys of LABEL_RULES, one for each trigger; () if unknown"""
    target: int | None = None
    """the class that the triggers aim at; None if unknown"""


def open_model(
    text: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    class_names: Sequence[str] = (),
    lowering: Lowering | None = None,
    compute_dtype: ComputeDtype = "float32",
    outputs: str = "logits",
    target: int | None = None,
    store: pathlib.Path | None = None,
) -> Opened:
    """Open the network or networks that a text names, and check that they are for the data.

    Args:
        text: one of the forms at the top of this file.
        num_classes: K of the data.
        image_shape: (H, W, C) of the data.
        class_names: of the data, to compare with those of a saved model; () if it has none.
        lowering: how to compute convolutions; None chooses by backend.
        compute_dtype: dtype of the activations.
        outputs: what a black box returns: logits, probabilities or labels; two networks that correct each other return logits.
        target: the class that ASR will be measured for, to compare with the triggers of a model folder; None for any.
        store: a folder for the answers of an address, so that no image is sent twice; None to keep them in memory.

    Raises:
        InputError: nothing can be read there, it is damaged, or for other data. Nothing in a file is ever run.
    """
    text = str(text)
    if _ADDRESS.match(text):
        from bdjax.exchange import http

        classifier = http.connect(text, num_classes, image_shape, outputs=outputs, store=store)
        return Opened(text, hashlib.sha256(f"{text} {outputs}".encode()).hexdigest(), classifier=classifier)
    path = pathlib.Path(text)
    if text and _is_folder(path):
        if not corrected_model.is_corrected_model(path):
            return _open_folder(path, num_classes, image_shape, class_names, lowering, compute_dtype, target)
        if outputs != "logits":
            raise InputError(f"{path}: two networks that correct each other return logits, not {outputs}")
        pair = corrected_model.read(path, lowering, compute_dtype)
        _check_data(path, pair.about, num_classes, image_shape, class_names)
        return _as_black_box(path, pair)
    if match := safetensors_files.NAMED.fullmatch(text):
        path, (name, naming, normalisation) = pathlib.Path(match["path"]), _parts(text, match["rest"])
        found = weights.read(
            path, name, num_classes, image_shape, naming, normalisation, lowering=lowering, compute_dtype=compute_dtype
        )
        about = {"classes": num_classes, "image_shape": list(image_shape), "description": found.model.description}
        return Opened(text, _digest(about, found.naming, found.sha256), found.model, found.variables)
    if match := _ONNX.fullmatch(text):
        from bdjax.exchange import onnx_reader

        path, settings = pathlib.Path(match["path"]), _onnx_settings(match["path"], match["rest"], image_shape[2])
        classifier = onnx_reader.read(path, num_classes, image_shape, outputs=outputs, **settings)
        with safetensors_files.open_file(path, onnx_reader.MAXIMUM_BYTES, "ONNX models") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts = {"outputs": outputs, **({"settings": settings} if settings else {})}
        return Opened(text, _digest(facts, digest), classifier=classifier)
    bare = path if _exists(path) or ":" not in text else pathlib.Path(text.split(":", 1)[0])
    if not text or not _exists(bare):
        raise InputError(f"{shown(text)} does not exist; a model is {FORMS}")
    safetensors_files.refuse_pickle(bare)
    raise InputError(f"{text}: is no form of a model that is known by its name; a model is {FORMS}")


def is_black_box(text: str) -> bool:
    """Whether a text names a model that only answers: an address, an ONNX file, or two networks that correct each other."""
    path = pathlib.Path(text)
    if _is_folder(path):
        return corrected_model.is_corrected_model(path)
    return bool(_ADDRESS.match(text) or _ONNX.fullmatch(text))


def _is_folder(path: pathlib.Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a null byte, or a name that is too long
        return False


def _exists(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _open_folder(
    folder: pathlib.Path,
    num_classes: int,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    lowering: Lowering | None,
    compute_dtype: ComputeDtype,
    target: int | None,
) -> Opened:
    has_triggers = checkpoint.is_complete(folder) and os.path.lexists(folder / model_folder.TRIGGERS)
    if saved_model.is_saved_model(folder) and not has_triggers:
        about, _ = saved_model.read_about(folder)
        _check_data(folder, about, num_classes, image_shape, class_names)
        found = saved_model.read(folder, lowering, compute_dtype)
        facts = {"classes": num_classes, "image_shape": list(image_shape), "description": found.model.description}
        return Opened(str(folder), _digest(facts, found.digest), found.model, found.variables)
    if not checkpoint.is_complete(folder) and (folder / saved_model.TENSORS).exists():
        raise InputError(
            f"{folder}: has no {saved_model.ABOUT}; name the file and its architecture: "
            f"{folder / saved_model.TENSORS}:ARCHITECTURE"
        )
    if not checkpoint.is_complete(folder):
        raise InputError(
            f"{folder}: holds no model; it should contain {saved_model.ABOUT} and {saved_model.TENSORS}, or about.json"
        )
    old = model_folder.read(folder, num_classes, image_shape, target, lowering, compute_dtype)
    aim = old.target if old.triggers else None
    return Opened(str(folder), old.digest, old.model, old.variables, None, old.triggers, old.label_rules, aim)


def _as_black_box(folder: pathlib.Path, pair: saved_model.SavedModel) -> Opened:
    shape = pair.about.image_shape
    if pair.about.members > 1:
        raise InputError(f"{folder}: holds {pair.about.members} pairs of networks; a black box is a single one")
    runner = StageRunner(None, shape, ensemble.default_layout())

    def classifier(images: np.ndarray) -> np.ndarray:
        return runner.predict(pair.model, pair.variables, images, QUERY_BATCH)[0]

    facts = {"classes": pair.about.num_classes, "image_shape": list(shape), "description": pair.model.description}
    return Opened(str(folder), _digest(facts, pair.digest), classifier=classifier)


def _check_data(
    folder: pathlib.Path,
    about: saved_model.About,
    num_classes: int,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
) -> None:
    if (about.num_classes, about.image_shape) != (num_classes, tuple(image_shape)):
        hint = size_hint(list(about.image_shape), image_shape) if about.num_classes == num_classes else ""
        raise InputError(
            f"{folder}: the model has {about.num_classes} classes and takes images of shape {list(about.image_shape)}; "
            f"the data has {num_classes} classes and images of shape {list(image_shape)}{hint}"
        )
    pairs = zip(about.class_names, class_names, strict=False)
    if different := [(number, ours, theirs) for number, (ours, theirs) in enumerate(pairs) if ours != theirs]:
        number, ours, theirs = different[0]
        raise InputError(
            f"{folder}: class {number} of the model is {shown(ours)}, of the data {shown(theirs)}; "
            "the classes must be the same, in the same order"
        )


def _parts(text: str, rest: str | None) -> tuple[str, str | None, str | None]:
    """ARCH[:NAMING[:NORM]] -> three parts."""
    parts = (rest or "").split(":")
    if not parts[0] or len(parts) > 3 or "" in parts:
        raise InputError(
            f"{text}: a file of weights needs its architecture: FILE.safetensors:ARCHITECTURE[:NAMING[:NORMALISATION]], such "
            "as model.safetensors:resnet18_cifar:timm:imagenet"
        )
    if parts[0] not in MODELS:
        raise InputError(f"{text}: unknown architecture {shown(parts[0])}; architectures are {', '.join(MODELS)}")
    return tuple((*parts, None, None)[:3])


def _onnx_settings(path: str, rest: str | None, channels: int) -> dict[str, Any]:
    """SETTING[:SETTING...] -> arguments of `onnx_reader.read`."""
    settings: dict[str, Any] = {}
    for part in (rest or "").split(":"):
        if part in ("nchw", "nhwc"):
            settings["layout"] = part
        elif part.startswith("output="):
            settings["output"] = part.removeprefix("output=")
        elif part:
            mean, std = weights.statistics(pathlib.Path(path), part, channels)
            settings |= {"mean": mean or None, "std": std or None}
    return settings


def _digest(facts: Mapping[str, Any], *texts: str) -> str:
    return hashlib.sha256(json.dumps([facts, *texts], sort_keys=True).encode()).hexdigest()
