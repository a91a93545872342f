"""Any folder of image files with one sub-folder for each class."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.decoding import common_size, read_header, read_pixels
from bdjax.datasets.splits import fixed_test_split, take_part
from bdjax.datasets.validation import STRICT, ReadOptions, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest

_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp")
_MAXIMUM_FILE_BYTES = 1 << 28


class _Part(NamedTuple):
    prefix: str
    """prefix of its file names: "train/", "test/", "val/", or "" for a folder without a split"""
    folder: Path
    classes: dict[str, list[Path]]
    """class name -> files"""


class _Form(NamedTuple):
    """The common form of all images."""

    size: tuple[int, int]
    """(height, width)"""
    is_grey: bool
    note: str
    """note on resizing for `source`"""


def load_image_folder(path: Path, options: ReadOptions = STRICT) -> TrainTest:
    """Loads a folder of images; the classes are its sub-folders, by name.

    Args:
        path: A folder with a sub-folder for each class; or with `train`, and `test` or `val`, which have one. Hidden folders
            and files other than .png, .jpg, .jpeg, .ppm, .bmp and .webp are ignored.

    Returns:
        The folder's own split, or a fixed stratified 80/20 split. Images are [H, W, 1] if all are grey, otherwise [H, W, 3].
        If sizes differ, all are resized to 32x32 and `source` says so. `files` is relative to `path`.

    Raises:
        InputError: If there are fewer than two classes with images, a test class is not a training class, or an image
            cannot be read.
    """
    parts = _parts(path)
    if len(parts) == 1 and parts[0].prefix:
        raise InputError(f"{path}: has train/ but neither test/ nor val/; one of them is needed for the test images")
    form = _common_form(parts)
    datasets = [_read_part(path, part, parts[0], form) for part in parts]
    return TrainTest(*datasets) if len(datasets) == 2 else _split(datasets[0])


def load_suspect_image_folder(path: Path, options: ReadOptions = STRICT) -> Dataset:
    """Loads all training images of a folder.

    Args:
        path: As for `load_image_folder`; but `train` alone is enough.

    Returns:
        The images in `train`, as from `load_image_folder`, or all images if there is no `train`: classes by name, and the
        files of each class by name.

    Raises:
        InputError: As `load_image_folder`, but one image per class is enough.
    """
    parts = _parts(path)
    return _read_part(path, parts[0], parts[0], _common_form(parts))


def _parts(path: Path) -> list[_Part]:
    """Finds the training part (or the whole folder), and the test part if there is one."""
    subfolders = {folder.name: folder for folder in _subfolders(path)}
    test = subfolders.get("test", subfolders.get("val"))
    if "train" not in subfolders or (test is None and len(subfolders) > 1):  # "train" may be a class
        return [_Part("", path, _training_classes(path))]
    train = _Part("train/", subfolders["train"], _training_classes(subfolders["train"]))
    if test is None:
        return [train]
    test_classes = _class_files(test)
    if not test_classes:
        raise InputError(f"{test}: has no sub-folders; one is needed for each class")
    unknown = sorted(set(test_classes) - set(train.classes))
    if unknown:
        raise InputError(f"{test / unknown[0]}: is not a class in {train.folder}")
    return [train, _Part(f"{test.name}/", test, test_classes)]


def _subfolders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _class_files(path: Path) -> dict[str, list[Path]]:
    classes = {}
    for folder in _subfolders(path):
        classes[folder.name] = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not classes[folder.name]:
            raise InputError(
                f"{folder}: contains no images; each sub-folder is a class and needs {', '.join(_SUFFIXES)}"
            )
    return classes


def _training_classes(path: Path) -> dict[str, list[Path]]:
    classes = _class_files(path)
    if len(classes) < 2:
        raise InputError(
            f"{path}: has {len(classes)} sub-folder(s) of images; at least 2 are needed, one for each class"
        )
    return classes


def _common_form(parts: list[_Part]) -> _Form:
    headers = [
        read_header(_read(file), file)
        for part in parts
        for class_files in part.classes.values()
        for file in class_files
    ]
    size, note = common_size(headers)
    return _Form(size, all(header.is_grey for header in headers), note)


def _read_part(path: Path, part: _Part, train: _Part, form: _Form) -> Dataset:
    class_names = tuple(train.classes)  # sorted
    rows = [(file, class_names.index(name)) for name, class_files in part.classes.items() for file in class_files]
    images = np.empty((len(rows), *form.size, 1 if form.is_grey else 3), np.uint8)
    for index, (file, _) in enumerate(rows):
        images[index] = read_pixels(_read(file), file, size=form.size, grey=form.is_grey)
    return make_dataset(
        images,
        np.array([label for _, label in rows]),
        len(class_names),
        path.resolve().name,
        f"{path}{'/' + part.prefix if part.prefix else ''} ({len(rows):,} images{form.note})",
        class_names,
        where=part.folder,
        files=[file.relative_to(path).as_posix() for file, _ in rows],
    )


def _split(dataset: Dataset) -> TrainTest:
    rows_of_parts = fixed_test_split(dataset.labels)
    if len(rows_of_parts[1]) == 0:
        raise InputError(
            f"{dataset.source}: 20 % of each class, for testing, is less than one image; each class needs at least 3 images"
        )
    return TrainTest(*(take_part(dataset, *part) for part in zip(rows_of_parts, ("train", "test"), strict=True)))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAXIMUM_FILE_BYTES:
            raise InputError(f"{path}: is too large for an image; the limit is {_MAXIMUM_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from error
