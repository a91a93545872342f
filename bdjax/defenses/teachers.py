"""Teachers for TA-KD: anything that returns logits. What a Python callable returns is checked before it is used."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bdjax.choices import QUERY_BATCH
from bdjax.errors import InputError
from bdjax.types import Array, Classifier, PyTree

TeacherLogits = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, C] -> float32 [N, B, K], the logits of N teachers."""

_AS_NUMPY = "return a NumPy array: tensor.detach().cpu().numpy()"
ASKED_TWICE = 8
"""Images that a callable gets a second time, to see whether it answers alike."""
SAME = 0.02
"""Largest difference between two answers for the same image, as a share of the logits' range, that rounding explains."""
_LOGITS_ALONE = "return the logits alone, as an array [rows, classes]"
NEARLY = 1e-3
"""Deviation of a row's sum from 1 that still looks like probabilities."""


def from_members(predict: Callable[[PyTree, Array], Array], variables: PyTree) -> TeacherLogits:
    """Use stacked bdjax members as teachers.

    Args:
        predict: from `bdjax.training.ensemble.make_predict`.
        variables: stacked [N, ...].
    """
    return lambda images: np.asarray(predict(variables, images))


def from_classifiers(
    classifiers: Sequence[Classifier], num_classes: int, batch_size: int = QUERY_BATCH
) -> TeacherLogits:
    """Use Python callables as teachers: for example a PyTorch model, or a function that queries a remote service.

    They are called outside compiled functions and are not differentiated. A teacher whose rows all sum to 1 gives a warning,
    once: distillation needs logits, not probabilities. A teacher that answers differently when it gets the first few images a
    second time, alone, gives a warning too.

    Args:
        classifiers: each maps float32 [B, H, W, C] in [0, 1] to logits [B, K].
        num_classes: K.
        batch_size: the largest B.

    Raises:
        InputError: no classifiers, or one that cannot be called, or the batch size is below 1; later, one that raises an
            exception, or returns anything but finite numbers [B, K].
    """
    if callable(classifiers):
        raise InputError(f"the teachers are a {type(classifiers).__name__}; pass a list of callables, [teacher]")
    classifiers = list(classifiers)
    if not classifiers:
        raise InputError("no teachers: TA-KD needs at least one")
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise InputError(f"the teachers' batch size {batch_size!r} is not a whole number of at least 1")
    names = [f"teacher {number + 1} ({name_of(classifier)})" for number, classifier in enumerate(classifiers)]
    for name, classifier in zip(names, classifiers, strict=True):
        if not callable(classifier):
            raise InputError(f"{name} cannot be called; a function from images to logits is needed")
    warned: set[str] = set()
    compared: set[str] = set()

    def logits(images: np.ndarray) -> np.ndarray:
        found = np.empty((len(classifiers), len(images), num_classes), np.float32)
        for output, name, classifier in zip(found, names, classifiers, strict=True):
            output[:] = ask(classifier, images, num_classes, name, batch_size)
            if name not in compared and len(images):
                compared.add(name)
                again = ask(classifier, images[: min(ASKED_TWICE, batch_size)], num_classes, name)
                _warn_if_different(output, again, name)
            if name not in warned and _look_like_probabilities(output):
                warned.add(name)
                warnings.warn(
                    f"{name} seems to return probabilities: each row sums to 1; logits are needed, the numbers before the "
                    "softmax (their logarithms would do)",
                    stacklevel=2,
                )
        return found

    return logits


def ask(
    classifier: Classifier,
    images: np.ndarray,
    num_classes: int,
    name: str,
    batch_size: int = QUERY_BATCH,
    more_classes: bool = False,
) -> np.ndarray:
    """The logits of a Python callable, asked in batches.

    Args:
        classifier: maps float32 [B, H, W, C] in [0, 1] to logits [B, K].
        images: uint8 [N, H, W, C].
        num_classes: K.
        name: what the errors call it: "teacher 1 (resnet)".
        batch_size: the largest B.
        more_classes: whether K may be larger, as for a detector that rejects images.

    Returns:
        float32 [N, K].

    Raises:
        InputError: the callable raises an exception, whose message is kept, or returns anything but finite numbers [B, K].
    """
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].astype(np.float32) / 255
        rows = len(batch)
        try:
            output = classifier(batch)
        except InputError as error:
            raise InputError(_named(name, classifier, error)) from error
        except Exception as error:
            advice = _smaller_batch(rows) if rows > 1 and _answers(classifier, images[start : start + 1]) else ""
            raise InputError(f"{name} failed: {type(error).__name__}: {_one_line(error)}{advice}") from error
        part = as_array(output, name)
        columns = part.shape[1] if part.ndim == 2 and len(part) == rows else 0
        if columns != num_classes and not (more_classes and columns > num_classes):
            hint = "; they look like predicted classes, and logits are needed" if part.shape == (rows,) else ""
            if part.ndim == 2 and 0 < len(part) < rows and part.shape[1] == num_classes:
                hint = _smaller_batch(rows)
            raise InputError(f"{name} returned logits of shape {part.shape}; should be {(rows, num_classes)}{hint}")
        with np.errstate(over="ignore"):
            # A copy: the callable may use the same buffer for its next result.
            part = np.array(part, np.float32)
        if not np.isfinite(part).all():
            row, column = np.argwhere(~np.isfinite(part))[0]
            raise InputError(
                f"{name} returned logits that are not finite float32 numbers: {part[row, column]} for image {start + row}, "
                f"class {column}"
            )
        parts.append(part)
    if len({part.shape[1] for part in parts}) > 1:
        raise InputError(f"{name} returned a different number of classes for different images")
    return np.concatenate(parts) if parts else np.empty((0, num_classes), np.float32)


def name_of(classifier: object) -> str:
    """The name of a callable in messages: of the function, or of the object's type."""
    name = getattr(classifier, "__name__", None)
    return _one_line(name if isinstance(name, str) else type(classifier).__name__, 60)


def _named(name: str, classifier: Classifier, error: InputError) -> str:
    """An error that begins with a name; files and addresses begin theirs with their own, which is not repeated."""
    start, _, rest = str(error).partition(": ")
    is_same = start in (name, name_of(classifier)) or name.startswith(f"{start}:")
    return f"{name}: {rest if is_same else error}"


def as_array(output: Any, name: str) -> np.ndarray:
    """What a callable returned as an array of real numbers; its shape is not checked.

    Raises:
        InputError: it is anything else; the message begins with the name.
    """
    kind = _one_line(type(output).__name__, 60)
    if output is None or isinstance(output, (str, bytes)):
        raise InputError(f"{name} returned {'None' if output is None else f'a {kind}'}; {_LOGITS_ALONE}")
    if inspect.iscoroutine(output):
        output.close()
        raise InputError(f"{name} is asynchronous and returned a coroutine; pass a function that waits for the logits")
    if isinstance(output, (Mapping, tuple)):
        parts = getattr(output, "_fields", None) or (list(output) if isinstance(output, Mapping) else None)
        what = f"with {_one_line(', '.join(map(str, parts)), 100)}" if parts else f"of {len(output)}"
        raise InputError(f"{name} returned a {kind} {what}; {_LOGITS_ALONE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.asarray(output)
    except Exception as error:
        is_tensor = hasattr(output, "detach") and hasattr(output, "cpu")
        advice = _AS_NUMPY if is_tensor else _LOGITS_ALONE
        raise InputError(f"{name} returned a {kind}, which is no array ({_one_line(error)}); {advice}") from error
    is_real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.dtype == object:
        within = {_one_line(type(part).__name__, 60) for part in array.reshape(-1)[:1]}
        inner = f" of {within.pop()}" if within and array.ndim else ""
        raise InputError(f"{name} returned a {kind}{inner}, which is no array of numbers; {_LOGITS_ALONE}")
    if not is_real:
        raise InputError(f"{name} returned {array.dtype} values; logits are real numbers, such as float32")
    return array


def _answers(classifier: Classifier, images: np.ndarray) -> bool:
    """Whether a callable answers at all for images uint8 [N, H, W, C]."""
    try:
        classifier(images.astype(np.float32) / 255)
    except Exception:
        return False
    return True


def _smaller_batch(rows: int) -> str:
    return f"; it got {rows} images at a time: if it takes fewer, set a smaller teacher_batch (--teacher-batch)"


def _warn_if_different(first: np.ndarray, again: np.ndarray, name: str) -> None:
    """Warn if the first images' logits, float32 [N, K], are not those of a second call."""
    difference, extent = np.abs(first[: len(again)] - again).max(), np.ptp(first)
    if difference > SAME * extent:
        warnings.warn(
            f"{name} answers differently for the same images: by up to {difference:.3g}, of logits between "
            f"{first.min():.3g} and {first.max():.3g}; is it in training mode (dropout, statistics of the batch), or random?",
            stacklevel=3,
        )


def _look_like_probabilities(logits: np.ndarray) -> bool:
    sums = logits.sum(axis=1)
    return bool(len(logits)) and bool(np.all(logits >= 0)) and bool(np.all(np.abs(sums - 1) <= NEARLY))


def _one_line(text: object, limit: int = 300) -> str:
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
