"""Datasets in NumPy's .npz files, clean or poisoned."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from bdjax.datasets.splits import fixed_test_split, take_part
from bdjax.datasets.validation import STRICT, ReadOptions, as_int32_labels, as_uint8_images, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, PoisonedDataset, TrainTest

_SPLIT_NAMES = ("train_images", "train_labels", "test_images", "test_labels")
_WHOLE_NAMES = ("images", "labels")
_POISON_NAMES = ("is_poisoned", "original_labels")


def load_npz(path: Path, options: ReadOptions = STRICT) -> TrainTest:
    """Loads an .npz file. Object arrays, which are pickles, are rejected.

    Args:
        path: A file with `train_images`, `train_labels`, `test_images` and `test_labels`; or `images` and `labels`, which are
            split 80/20 the same way every time. Images are [N, H, W] or [N, H, W, C], uint8, or float in [0, 1].
            Optional: `num_classes` (otherwise the highest label plus 1); `is_poisoned` (bool) and `original_labels`
            (int) for each training row, or for each row of `images`, and with them `is_cover` (bool).

    Returns:
        The split set; its training part is a `PoisonedDataset` if the file has `is_poisoned`. Of `images`, only rows
        that are not poisoned become test rows.

    Raises:
        InputError: If the file is not as described above.
    """
    arrays, num_classes = _read_arrays(path)
    train = _training_rows(arrays, num_classes, path)
    if _is_whole(arrays):
        return _split(train, path)
    test = _dataset(arrays, "test_images", "test_labels", num_classes, path)
    if train.image_shape != test.image_shape:
        raise InputError(
            f"{path}: train_images are {list(train.image_shape)} and test_images {list(test.image_shape)}; "
            "their shapes must be equal"
        )
    return TrainTest(train, test)


def load_suspect_npz(path: Path, options: ReadOptions = STRICT) -> Dataset:
    """Loads all training rows of an .npz file.

    Args:
        path: As for `load_npz`.

    Returns:
        `train_images`, or all of `images` in the order of the file; a `PoisonedDataset` if the file has `is_poisoned`.

    Raises:
        InputError: As `load_npz`, but a class may have any number of rows.
    """
    return _training_rows(*_read_arrays(path), path)


def _training_rows(arrays: dict[str, np.ndarray], num_classes: int, path: Path) -> Dataset:
    images, labels = _WHOLE_NAMES if _is_whole(arrays) else _SPLIT_NAMES[:2]
    return _with_poison(_dataset(arrays, images, labels, num_classes, path), arrays, path)


def _is_whole(arrays: dict[str, np.ndarray]) -> bool:
    return all(name in arrays for name in _WHOLE_NAMES)


def _read_arrays(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """Reads either all of `_WHOLE_NAMES` or all of `_SPLIT_NAMES`, the optional arrays, and the number of classes."""
    # numpy.load would leave a damaged file open, and return members that are not arrays as bytes.
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            arrays = {}
            for name in (*_WHOLE_NAMES, *_SPLIT_NAMES, *_POISON_NAMES, "is_cover", "num_classes"):
                if f"{name}.npy" in members:
                    with archive.open(f"{name}.npy") as member:
                        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except Exception as error:  # zipfile, zlib and NumPy raise different exceptions on damaged files
        raise InputError(f"{path}: is not an intact .npz file of plain arrays ({one_line(error)})") from error
    if _is_whole(arrays) == all(name in arrays for name in _SPLIT_NAMES):
        raise InputError(
            f"{path}: contains {', '.join(sorted(arrays)) or 'none of the expected arrays'}; it must contain either "
            f"{', '.join(_WHOLE_NAMES)} or {', '.join(_SPLIT_NAMES)}"
        )
    if len([name for name in _POISON_NAMES if name in arrays]) == 1:
        raise InputError(f"{path}: contains only one of {' and '.join(_POISON_NAMES)}; both or neither are needed")
    return arrays, _num_classes(arrays, path)


def _num_classes(arrays: dict[str, np.ndarray], path: Path) -> int:
    if "num_classes" in arrays:
        value = arrays["num_classes"]
        if value.shape != () or not np.issubdtype(value.dtype, np.integer):
            raise InputError(f"{path}: num_classes is {value.dtype} of shape {list(value.shape)}; it must be an int")
        return int(value)
    found = [arrays[name] for name in ("labels", "train_labels", "test_labels", "original_labels") if name in arrays]
    found = [labels for labels in found if labels.size and np.issubdtype(labels.dtype, np.integer)]
    num_classes = 1 + max((int(labels.max()) for labels in found), default=0)
    num_rows = sum(labels.size for labels in found)
    if num_classes > max(num_rows, 2):
        raise InputError(
            f"{path}: the highest label is {num_classes - 1} although there are only {num_rows} labels; labels start at 0; "
            "add num_classes to the file if this is intended"
        )
    return num_classes


def _dataset(arrays: dict[str, np.ndarray], images: str, labels: str, num_classes: int, path: Path) -> Dataset:
    where = f"{path}, {images}"
    pixels = as_uint8_images(arrays[images], where)
    checked = as_int32_labels(arrays[labels], num_classes, f"{path}, {labels}")
    source = f"{path} ({len(pixels):,} {images.replace('_', ' ')})"
    return make_dataset(pixels, checked, num_classes, path.stem, source, where=where)


def _with_poison(dataset: Dataset, arrays: dict[str, np.ndarray], path: Path) -> Dataset:
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
