"""Leaves a network in a folder, in every form in which others can run it.

    FOLDER/model.safetensors, model.json    always: a saved model
    FOLDER/model.stablehlo                  with `--export stablehlo`
    FOLDER/model.onnx                       with `--export onnx`, which needs the extra `onnx`

ABM's network that another one corrects is left as `bdjax/exchange/corrected_model.py` has it; its further forms hold both
networks and the rule.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax

from bdjax import atomic
from bdjax.errors import InputError
from bdjax.exchange import corrected_model, saved_model, stablehlo
from bdjax.extras import Export
from bdjax.training import ensemble, processes
from bdjax.types import Model, PyTree


def leave(
    folder: pathlib.Path,
    model: Model,
    variables: PyTree,
    image_shape: tuple[int, int, int],
    *,
    class_names: Sequence[str] = (),
    made_by: Mapping[str, Any] = {},
    exports: Sequence[Export] = (),
) -> bool:
    """Write networks of one architecture as a saved model, and a single network in further forms.

    Args:
        folder: where to write; created if needed. What it was left before is replaced.
        model: their architecture.
        variables: stacked [N, ...]; other variables than "params" and "batch_stats" are not written.
        image_shape: (H, W, C).
        class_names: of every class; () for none but their numbers.
        made_by: what made them: "experiment", "role", "seed".
        exports: further forms; only of a single network.

    Returns:
        False, and nothing is written, if the model is none that a file can describe: a pruned or masked network.

    Raises:
        InputError: an export that is not known, whose extra is not installed, or of several networks.
        OSError: a file cannot be written.
    """
    count = ensemble.num_members(variables)
    if exports and count > 1:
        raise InputError(f"{folder}: {count} networks; only a single network is exported")
    corrects = saved_model.is_pair(model)
    if not corrects and model.architecture is None:
        return False
    if processes.is_primary():  # the file that makes the folder one of the other form
        (folder / (saved_model.ABOUT if corrects else corrected_model.CORRECTION)).unlink(missing_ok=True)
    if corrects:
        corrected_model.write(folder, model, variables, image_shape, class_names, made_by)
    else:
        variables = {part: variables[part] for part in ("params", "batch_stats")}
        about = saved_model.About(
            model.architecture, model.num_classes, tuple(image_shape), tuple(class_names), count, dict(made_by)
        )
        saved_model.write(folder, about, variables)
    for form in exports:
        export(folder / f"model.{form}", form, model, jax.tree.map(lambda leaf: leaf[0], variables), image_shape)
    return True


def export(
    path: pathlib.Path, form: Export, model: Model, variables: PyTree, image_shape: tuple[int, int, int]
) -> None:
    """Write a single network in a form that runs elsewhere.

    Args:
        path: the file.
        form: stablehlo or onnx.
        model: a network of `bdjax.models.make_model`, or ABM's of two; its lowering does not matter.
        variables: of a single network.
        image_shape: (H, W, C).

    Raises:
        InputError: a form that is not known, whose extra is not installed, or that has no such network.
    """
    if form not in get_args(Export):
        raise InputError(f"export {form!r} is not one of {', '.join(get_args(Export))}")
    native = saved_model.native(model)
    if native is None:
        raise InputError(f"{path}: {model.description} is no network that can be exported")
    if not processes.is_primary():
        return
    if form == "stablehlo":
        stablehlo.write(path, native, variables, image_shape)
    else:
        from bdjax.exchange import onnx_writer

        atomic.write_bytes(path, onnx_writer.to_onnx(native, variables, image_shape))
