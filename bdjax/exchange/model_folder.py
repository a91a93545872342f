"""Model folders: stacked models in a form that can be passed on, with the attacker's triggers if they are known.

    FOLDER/about.json     architecture and number of members
    FOLDER/tree/          their variables, stacked (an Orbax checkpoint)
    FOLDER/triggers.npz   optional: mask [N, H, W, 1], pattern [N, H, W, C], opacity [N], names [N], similar_group [N],
                          target []; label_rule [N] if they are not all all_to_one; target_name [] if it is known

A folder holds arrays and JSON only, so reading it cannot run code.
"""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import atomic
from bdjax.attacks.label_rules import LABEL_RULES
from bdjax.attacks.providers import ProviderTriggers
from bdjax.choices import ComputeDtype, Lowering
from bdjax.datasets.archives import open_npz
from bdjax.datasets.scaling import size_hint
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.training import checkpoint, ensemble, processes
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Model, PyTree, class_title

TRIGGERS = "triggers.npz"
_OPTIONAL = ("label_rule", "target_name")
_MAXIMUM_TEXT_BYTES = 1 << 20


class ModelFolder(NamedTuple):
    model: Model
    variables: PyTree
    """stacked [N, ...]"""
    triggers: ProviderTriggers | None
    """triggers of N providers, entry i for model i; None if unknown"""
    label_rules: tuple[str, ...] = ()
    """keys of LABEL_RULES, one for each trigger; empty if unknown"""
    digest: str = ""
    """SHA-256 of all of it, whatever the folder's place"""
    target: int | None = None
    """the class that the triggers aim at; None if they are unknown"""


def write(
    folder: pathlib.Path,
    model_name: str,
    width: int,
    num_classes: int,
    image_shape: tuple[int, int, int],
    variables: PyTree,
    triggers: ProviderTriggers | None,
    target: int,
    label_rules: Sequence[str] = (),
    target_name: str = "",
) -> None:
    """Write the models of one seed in the form in which third-party models are read, with their triggers.

    Args:
        folder: where to write.
        model_name: a key of `bdjax.models.MODELS`.
        width: width of the network.
        num_classes: K.
        image_shape: (H, W, C).
        variables: stacked [N, ...].
        triggers: triggers of the N providers; None if there are none.
        target: the triggers' target class.
        label_rules: keys of `LABEL_RULES`, one for each trigger; empty if all are all_to_one.
        target_name: the name of the target class; "" if it has none.
    """
    if checkpoint.is_complete(folder):
        return
    if triggers is not None:
        _write_triggers(folder, triggers, target, label_rules, target_name)
    about = {
        "model_name": model_name,
        "width": width,
        "num_classes": num_classes,
        "image_shape": list(image_shape),
        "members": ensemble.num_members(variables),
    }
    checkpoint.save(folder, variables, about)


@processes.by_primary
def _write_triggers(
    folder: pathlib.Path, triggers: ProviderTriggers, target: int, label_rules: Sequence[str], target_name: str
) -> None:
    buffer = io.BytesIO()
    arrays = {name: np.asarray(leaf) for name, leaf in triggers.params._asdict().items()}
    if label_rules:
        arrays["label_rule"] = np.array(label_rules)
    if target_name:
        arrays["target_name"] = np.array(target_name)
    np.savez(buffer, **arrays, names=np.array(triggers.names), similar_group=triggers.similar_group, target=target)
    atomic.write_bytes(folder / TRIGGERS, buffer.getvalue())


def read(
    folder: pathlib.Path,
    num_classes: int,
    image_shape: tuple[int, int, int],
    target: int | None,
    lowering: Lowering | None,
    compute_dtype: ComputeDtype = "float32",
) -> ModelFolder:
    """Read third-party models.

    Args:
        folder: a folder written by `write`.
        num_classes: number of classes of the data.
        image_shape: image shape of the data.
        target: the class that ASR will be measured for; None for that of the triggers, if there are any.
        lowering: how to compute the convolutions; None chooses by backend.
        compute_dtype: dtype of the activations.

    Raises:
        InputError: the folder is not such a checkpoint, or its models are for other data.
    """
    about = checkpoint.about(folder)
    wanted = {"model_name": str, "width": int, "num_classes": int, "image_shape": list, "members": int}
    for name, kind in wanted.items():
        if not isinstance(about.get(name), kind):
            raise InputError(f"{folder / 'about.json'}: {name} should be {kind.__name__}, not {about.get(name)!r}")
    if about["num_classes"] != num_classes or about["image_shape"] != list(image_shape):
        is_shape = len(about["image_shape"]) == 3 and about["num_classes"] == num_classes
        hint = size_hint(about["image_shape"], image_shape) if is_shape else ""
        raise InputError(
            f"{folder}: the models have {about['num_classes']} classes and take images of shape {about['image_shape']}; "
            f"the data has {num_classes} classes and images of shape {list(image_shape)}{hint}"
        )
    if about["members"] < 1:
        raise InputError(f"{folder / 'about.json'}: members is {about['members']}; should be at least 1")
    model = make_model(about["model_name"], num_classes, about["width"], lowering, compute_dtype)
    like = ensemble.trained_like(model, image_shape, about["members"], 0).variables
    variables = checkpoint.load(folder, like, remedy="the folder is damaged; copy it again from where it came from")
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if not np.isfinite(np.asarray(leaf)).all():
            raise InputError(f"{folder}: {jax.tree_util.keystr(path)} has values that are not finite")
    triggers, rules, target = _read_triggers(folder / TRIGGERS, about["members"], image_shape, target)
    return ModelFolder(model, variables, triggers, rules, _digest(about, variables, triggers, rules), target)


def _digest(about: Mapping[str, Any], *parts: PyTree) -> str:
    """SHA-256 of a description and of arrays, numbers and texts."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read_triggers(
    path: pathlib.Path, count: int, image_shape: tuple[int, int, int], target: int | None
) -> tuple[ProviderTriggers | None, tuple[str, ...], int | None]:
    if not os.path.lexists(path):
        return None, (), None
    height, width, channels = image_shape
    shapes = {
        "mask": ((count, height, width, 1), np.floating),
        "pattern": ((count, height, width, channels), np.floating),
        "opacity": ((count,), np.floating),
        "names": ((count,), np.str_),
        "similar_group": ((count,), np.bool_),
        "target": ((), np.integer),
        "label_rule": ((count,), np.str_),
        "target_name": ((), np.str_),
    }
    arrays = {}
    with open_npz(path, "triggers.npz of a model folder") as file:
        for name, (shape, kind) in shapes.items():
            if name in _OPTIONAL and name not in {*file.headers, *file.problems}:
                continue
            # Before it is read: it may claim to be larger than any trigger.
            header = file.headers.get(name)
            if header is None or header.shape != shape or not np.issubdtype(header.dtype, kind):
                what = (
                    f"{header.dtype} {header.shape}"
                    if header
                    else file.problems.get(name, "missing").removeprefix("is ")
                )
                raise InputError(f"{path}: {name} is {what}; should be {kind.__name__.rstrip('_')} {shape}")
            if header.num_bytes > _MAXIMUM_TEXT_BYTES and kind is np.str_:
                raise InputError(f"{path}: {name} has {header.num_bytes} bytes; at most {_MAXIMUM_TEXT_BYTES} are read")
            arrays[name] = file.read(name)
    for name, values in arrays.items():
        kind = shapes[name][1]
        if kind is np.floating and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise InputError(f"{path}: {name} has values outside [0, 1]")
    if target is not None and int(arrays["target"]) != target:
        title = class_title(int(arrays["target"]), str(arrays.get("target_name", "")))
        raise InputError(f"{path}: these triggers aim at class {title}; use --target={int(arrays['target'])}")
    rules = tuple(map(str, arrays.get("label_rule", ["all_to_one"] * count)))
    if unknown := [rule for rule in rules if rule not in LABEL_RULES]:
        raise InputError(f"{path}: label_rule {unknown[0]!r} is not one of {', '.join(LABEL_RULES)}")
    params = MaskedBlend(*(jnp.asarray(arrays[name], jnp.float32) for name in ("mask", "pattern", "opacity")))
    return (
        ProviderTriggers(params, tuple(map(str, arrays["names"])), arrays["similar_group"]),
        rules,
        int(arrays["target"]),
    )
