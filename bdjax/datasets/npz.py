"""Datasets in NumPy's .npz files, clean or poisoned."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.archives import Arrays, open_npz, short
from bdjax.datasets.scaling import scaled, size_hint
from bdjax.datasets.splits import fixed_test_split, take_part
from bdjax.datasets.validation import STRICT, ReadOptions, as_int32_labels, as_uint8_images, make_dataset
from bdjax.errors import InputError
from bdjax.types import Dataset, PoisonedDataset, TrainTest, Unread

_WHOLE = (("images", "labels"), ("data", "labels"), ("X", "y"), ("x", "y"))
_PARTS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("X_train", "y_train", "X_test", "y_test"),
)
_FURTHER_PARTS = ("val", "valid", "validation", "test", "train", "extra", "unlabeled", "unlabelled")
_POISON_NAMES = ("is_poisoned", "original_labels")
_ABOUT = ("num_classes", "class_names", "row")
"""arrays that are no rows; `row` is in a cleaned copy: the numbers that its rows had"""
_MAXIMUM_LISTED = 10
_MAXIMUM_CLASS_NAMES = 1_000_000
_MAXIMUM_NAME_LETTERS = 256


class _Names(NamedTuple):
    """The names of the arrays with the rows."""

    train_images: str
    train_labels: str
    test_images: str = ""
    """empty if the rows are not split"""
    test_labels: str = ""


class _Content(NamedTuple):
    """The arrays that are read."""

    names: _Names
    arrays: Mapping[str, np.ndarray]
    """those in `names`, and the optional ones; labels are int [N]"""
    num_classes: int
    class_names: tuple[str, ...]
    note: str
    """note on the labels for `source`"""
    unread: tuple[Unread, ...]


def load_npz(path: Path, options: ReadOptions = STRICT) -> TrainTest:
    """Loads an .npz file. Object arrays, which are pickles, are not read.

    Args:
        path: A file with `train_images`, `train_labels`, `test_images` and `test_labels` (or `x_train`, `y_train`, `x_test` and
            `y_test`); or `images` and `labels` (or `data` and `labels`, `x` and `y`), which are split 80/20 the same way
            every time. Images are [N, H, W] or [N, H, W, C], uint8, or float in [0, 1]. Labels are integers, [N] or
            [N, 1], or one-hot [N, K], and then `source` says so.
            Optional: `num_classes` (otherwise the highest label plus 1) and `class_names` (text); `is_poisoned` (bool) and
            `original_labels` (int) for each training row, or for each row of `images`, and with them `is_cover` (bool).
        options: What to tolerate.

    Returns:
        The split set; its training part is a `PoisonedDataset` if the file has `is_poisoned`. Of `images`, only rows
        that are not poisoned become test rows. Arrays under other names are in `unread`.

    Raises:
        InputError: If the file is not as described above, or its labels start at 1 although neither `num_classes` nor
            `class_names` says that there is a class 0 (unless `options` allows it).
    """
    content = _read(path, options, needs_test=True)
    train = _training_rows(content, path, options)
    if not content.names.test_images:
        return _split(train, path)
    test = _dataset(content, content.names.test_images, content.names.test_labels, path, options)
    if train.image_shape != test.image_shape:
        raise InputError(
            f"{path}: {content.names.train_images} are {list(train.image_shape)} and {content.names.test_images} "
            f"{list(test.image_shape)}; their shapes must be equal{size_hint(train.image_shape, test.image_shape)}"
        )
    return TrainTest(train, test)


def load_suspect_npz(path: Path, options: ReadOptions = STRICT) -> Dataset:
    """Loads all training rows of an .npz file.

    Args:
        path: As for `load_npz`, but the training part alone is enough.
        options: What to tolerate.

    Returns:
        `train_images`, or all of `images` in the order of the file; a `PoisonedDataset` if the file has `is_poisoned`.

    Raises:
        InputError: As `load_npz`, but a class may have any number of rows.
    """
    return _training_rows(_read(path, options, needs_test=False), path, options)


def classes_as_arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    """Returns the arrays with which `load_npz` knows the classes of a dataset again: `num_classes`, and `class_names` if any.

    Characters that do not print, and letters beyond the 256th, are not kept.
    """
    arrays = {"num_classes": np.array(dataset.num_classes)}
    if dataset.class_names:
        replaced = ("".join(map(_printable, name))[:_MAXIMUM_NAME_LETTERS] for name in dataset.class_names)
        arrays["class_names"] = np.array([name if name.strip() else "?" for name in replaced])
    return arrays


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}"


def _training_rows(content: _Content, path: Path, options: ReadOptions) -> Dataset:
    dataset = _dataset(content, content.names.train_images, content.names.train_labels, path, options)
    return _with_poison(dataset, content.arrays, path)


def _read(path: Path, options: ReadOptions, *, needs_test: bool) -> _Content:
    with open_npz(path) as file:
        names = _find_names(file, path, needs_test=needs_test)
        if len([name for name in _POISON_NAMES if name in file.headers]) == 1:
            raise InputError(f"{path}: contains only one of {' and '.join(_POISON_NAMES)}; both or neither are needed")
        optional = ["num_classes", "class_names"]
        if _POISON_NAMES[0] in file.headers:
            optional += [*_POISON_NAMES, "is_cover"]
        for name in (*filter(None, names), *optional):
            if name in file.problems:
                raise InputError(f"{path}, {name}: {file.problems[name]}")
        arrays = {name: file.read(name) for name in (*filter(None, names), *optional) if name in file.headers}
        unread = _unread(file, arrays, is_split=bool(names.test_images))
    widths = {}
    for name in (names.train_labels, names.test_labels, "original_labels"):
        if name in arrays:
            arrays[name], widths[name] = _as_numbers(arrays[name], f"{path}, {name}")
    width = max(widths.values())
    if wrong := [name for name in widths if 0 < widths[name] < width]:
        raise InputError(f"{path}, {wrong[0]}: one-hot labels have {widths[wrong[0]]} columns; others have {width}")
    class_names = _class_names(arrays, path)
    num_classes = _num_classes(arrays, names, max(width, len(class_names)), path, options)
    return _Content(names, arrays, num_classes, class_names, ", one-hot labels" if width else "", unread)


def _find_names(file: Arrays, path: Path, *, needs_test: bool) -> _Names:
    present = {*file.headers, *file.problems}
    found = [_Names(*names) for names in (*_WHOLE, *_PARTS) if present.issuperset(names)]
    if not found and not needs_test:
        found = [_Names(*names[:2]) for names in _PARTS if present.issuperset(names[:2])]
    if len(found) == 1:
        return found[0]
    held = [f"{short(name)} ({header})" for name, header in file.headers.items()]
    held += [f"{short(name)} ({problem.partition(';')[0]})" for name, problem in file.problems.items()]
    if len(held) > _MAXIMUM_LISTED:
        held = [*held[:_MAXIMUM_LISTED], f"{len(held) - _MAXIMUM_LISTED} more"]
    raise InputError(
        f"{path}: contains {', '.join(held) or 'no arrays'}; it must contain either {', '.join(_WHOLE[0])} or "
        f"{', '.join(_PARTS[0])} (or x_train, y_train, x_test, y_test)" + (", not both" if found else "")
    )


def _unread(file: Arrays, arrays: Mapping[str, np.ndarray], *, is_split: bool) -> tuple[Unread, ...]:
    unread = []
    for name, header in file.headers.items():
        if name in arrays or name in _ABOUT:
            continue
        words = name.lower().split("_")
        if header.shape and any(word in _FURTHER_PARTS for word in words):
            unread.append(Unread(name, f"is a further part of {header.shape[0]:,} rows ({header})"))
        else:
            unread.append(Unread(name, f"is an array of a name that is not read ({header})"))
    unread += [Unread(name, problem.partition(";")[0]) for name, problem in file.problems.items()]
    return tuple(unread)


def _as_numbers(labels: np.ndarray, where: str) -> tuple[np.ndarray, int]:
    """Labels as int [N] if they are [N, 1] or one-hot, and the number of columns if one-hot; otherwise unchanged."""
    if labels.dtype.kind in "US":
        raise InputError(
            f"{where}: labels are text; class_names, labels = np.unique(labels, return_inverse=True) gives numbers and names"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.size and labels.shape[1] > 1 and labels.dtype.kind in "biuf":
        is_one = labels == 1
        if not (is_one | (labels == 0)).all():
            raise InputError(
                f"{where}: labels are {labels.dtype} of shape {list(labels.shape)}; they must be integers, one per row, or "
                f"one-hot (np.argmax(labels, axis=1) gives numbers from scores)"
            )
        counts = is_one.sum(axis=1)
        if (counts != 1).any():
            row = int(np.argmax(counts != 1))
            raise InputError(f"{where}: row {row} has {counts[row]} classes; one-hot labels have one class in each row")
        return np.argmax(is_one, axis=1), labels.shape[1]
    if labels.ndim == 1 and labels.dtype == bool:
        return labels.astype(np.int32), 0
    if labels.ndim == 1 and labels.dtype.kind == "f":
        is_whole = len(labels) and (np.isfinite(labels) & (labels == np.floor(labels))).all()
        raise InputError(
            f"{where}: labels are {labels.dtype} of shape {list(labels.shape)}; they must be integers, one per row"
            + (": labels.astype(int)" if is_whole else "")
        )
    return labels, 0


def _class_names(arrays: Mapping[str, np.ndarray], path: Path) -> tuple[str, ...]:
    if "class_names" not in arrays:
        return ()
    where, values = f"{path}, class_names", arrays["class_names"]
    if values.dtype.kind != "U" or values.ndim != 1 or not 1 <= len(values) <= _MAXIMUM_CLASS_NAMES:
        raise InputError(
            f"{where}: is {values.dtype} of shape {list(values.shape)}; it must be text, one for each class"
        )
    names = tuple(map(str, values))
    for label, name in enumerate(names):
        if not name.strip() or not name.isprintable() or len(name) > _MAXIMUM_NAME_LETTERS:
            raise InputError(
                f"{where}: the name of class {label} is {short(ascii(name))}; 1 to {_MAXIMUM_NAME_LETTERS} printable "
                f"letters are needed"
            )
    return names


def _num_classes(
    arrays: Mapping[str, np.ndarray], names: _Names, declared: int, path: Path, options: ReadOptions
) -> int:
    """The number of classes: `num_classes`, or `declared` by names or one-hot labels if not 0, or from the labels."""
    if "num_classes" in arrays:
        value = arrays["num_classes"]
        if value.shape != () or not np.issubdtype(value.dtype, np.integer):
            raise InputError(f"{path}: num_classes is {value.dtype} of shape {list(value.shape)}; it must be an int")
        return int(value)
    if declared:
        return declared
    found = [arrays[name] for name in (names.train_labels, names.test_labels, "original_labels") if name in arrays]
    found = [labels for labels in found if labels.size and np.issubdtype(labels.dtype, np.integer)]
    num_classes = 1 + max((int(labels.max()) for labels in found), default=0)
    num_rows = sum(labels.size for labels in found)
    lowest = min((int(labels.min()) for labels in found), default=0)
    if num_classes > max(num_rows, 2):
        raise InputError(
            f"{path}: the highest label is {num_classes - 1} although there are only {num_rows} labels; labels start at 0; "
            "add num_classes to the file if this is intended"
        )
    if lowest > 0 and not options.allow_empty_classes:
        raise InputError(
            f"{path}: the lowest label is {lowest}, so class 0 has no rows; labels start at 0: labels - {lowest}; or add "
            "num_classes to the file, or give --allow-empty-classes, if this is intended"
        )
    return num_classes


def _dataset(content: _Content, images: str, labels: str, path: Path, options: ReadOptions) -> Dataset:
    where = f"{path}, {images}"
    pixels = as_uint8_images(content.arrays[images], where)
    checked = as_int32_labels(content.arrays[labels], content.num_classes, f"{path}, {labels}")
    source = f"{path} ({len(pixels):,} {_in_words(images, content.names)}{content.note})"
    dataset = make_dataset(pixels, checked, content.num_classes, path.stem, source, content.class_names, where=where)
    return scaled(dataclasses.replace(dataset, unread=content.unread), options.image_size)


def _in_words(images: str, names: _Names) -> str:
    part = "" if not names.test_images else "train " if images == names.train_images else "test "
    return f"{part}images"


def _with_poison(dataset: Dataset, arrays: Mapping[str, np.ndarray], path: Path) -> Dataset:
    if "is_poisoned" not in arrays:
        return dataset
    is_poisoned = arrays["is_poisoned"]
    original_labels = as_int32_labels(arrays["original_labels"], dataset.num_classes, f"{path}, original_labels")
    if is_poisoned.dtype != bool or is_poisoned.shape != (len(dataset),):
        raise InputError(
            f"{path}, is_poisoned: is {is_poisoned.dtype} of shape {list(is_poisoned.shape)}; it must be bool, one "
            f"for each of the {len(dataset)} rows"
        )
    if len(original_labels) != len(dataset):
        raise InputError(f"{path}, original_labels: has {len(original_labels)} rows; {len(dataset)} are needed")
    wrong = ~is_poisoned & (original_labels != dataset.labels)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"{path}, original_labels: row {row} is not poisoned, but its label is {dataset.labels[row]} and its "
            f"original label {original_labels[row]}; they must be equal"
        )
    is_cover = arrays.get("is_cover", np.zeros(len(dataset), bool))
    if is_cover.dtype != bool or is_cover.shape != (len(dataset),) or (is_cover & is_poisoned).any():
        raise InputError(
            f"{path}, is_cover: is {is_cover.dtype} of shape {list(is_cover.shape)}; it must be bool, one for each of "
            f"the {len(dataset)} rows, and false for every poisoned row"
        )
    return PoisonedDataset(**vars(dataset), is_poisoned=is_poisoned, original_labels=original_labels, is_cover=is_cover)


def _split(dataset: Dataset, path: Path) -> TrainTest:
    is_triggered = np.zeros(len(dataset), bool)
    if isinstance(dataset, PoisonedDataset):
        is_triggered = dataset.is_poisoned | dataset.is_cover
    # Poisoned rows in the test set would lower the clean accuracy of every model, so all stay in the training set.
    clean_rows = np.flatnonzero(~is_triggered)
    test_rows = clean_rows[fixed_test_split(dataset.labels[clean_rows])[1]] if len(clean_rows) else clean_rows
    if len(test_rows) == 0:
        raise InputError(
            f"{path}: 20 % of the clean rows of each class, for testing, is less than one row; at least 3 rows of a "
            "class are needed, or test_images and test_labels"
        )
    train_rows = np.setdiff1d(np.arange(len(dataset)), test_rows)
    test = take_part(dataset, test_rows, "test")
    return TrainTest(
        take_part(dataset, train_rows, "train"),
        Dataset(**{field.name: getattr(test, field.name) for field in dataclasses.fields(Dataset)}),
    )
