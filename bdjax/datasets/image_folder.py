"""Any folder of image files with one sub-folder for each class."""

from pathlib import Path

import numpy as np

from bdjax.datasets.decoding import ImageHeader, common_size, read_header, read_pixels
from bdjax.datasets.splits import fixed_test_split
from bdjax.datasets.validation import make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest

_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp")
_MAXIMUM_FILE_BYTES = 1 << 28


def load_image_folder(path: Path) -> TrainTest:
    """Loads a folder of images; the classes are its sub-folders, by name.

    Args:
        path: Holds one sub-folder for each class, or `train` and one of `test` and `val` that do. Other files than
            .png, .jpg, .jpeg, .ppm, .bmp and .webp are passed over, and so are hidden folders.

    Returns:
        The folder's own split, or a fixed stratified 80/20 one. Images are [H, W, 1] if every one is grey, otherwise
        [H, W, 3]; if they differ in size, all are resized to 32x32 and `source` says so.

    Raises:
        InputError: If there are not at least two classes with images, the test classes are not among those of training,
            or an image cannot be read.
    """
    subfolders = {folder.name: folder for folder in _subfolders(path)}
    test = subfolders.get("test", subfolders.get("val"))
    if "train" in subfolders and test is None and len(subfolders) == 1:
        raise InputError(f"{path}: has train/ but neither test/ nor val/; with both, they are the split")
    if "train" not in subfolders or test is None:
        files = _class_files(path)
        class_names = _checked_class_names(path, files)
        (dataset,) = _read_parts(path, [("", path, files)], class_names)
        return _split(dataset)
    train_files, test_files = _class_files(subfolders["train"]), _class_files(test)
    class_names = _checked_class_names(subfolders["train"], train_files)
    unknown = sorted(set(test_files) - set(train_files))
    if unknown:
        raise InputError(f"{test / unknown[0]}: is a class that {subfolders['train']} does not have")
    parts = [("train/", subfolders["train"], train_files), (f"{test.name}/", test, test_files)]
    return TrainTest(*_read_parts(path, parts, class_names))


def _subfolders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _class_files(path: Path) -> dict[str, list[Path]]:
    classes = {}
    for folder in _subfolders(path):
        classes[folder.name] = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not classes[folder.name]:
            raise InputError(f"{folder}: holds no images; each sub-folder is a class and needs {', '.join(_SUFFIXES)}")
    return classes


def _checked_class_names(path: Path, files: dict[str, list[Path]]) -> tuple[str, ...]:
    if len(files) < 2:
        raise InputError(f"{path}: has {len(files)} sub-folder(s) of images; at least 2 are needed, one for each class")
    return tuple(sorted(files))


def _read_parts(
    path: Path, parts: list[tuple[str, Path, dict[str, list[Path]]]], class_names: tuple[str, ...]
) -> list[Dataset]:
    # Two passes, so that the size and the number of channels are those that suit every image of every part.
    headers: list[ImageHeader] = []
    for _, folder, files in parts:
        if not files:
            raise InputError(f"{folder}: has no sub-folders; one is needed for each class")
        headers += [read_header(_read(file), file) for class_files in files.values() for file in class_files]
    grey = all(header.is_grey for header in headers)
    size, note = common_size(headers)

    datasets = []
    for prefix, folder, files in parts:
        rows = [(file, class_names.index(name)) for name, class_files in files.items() for file in class_files]
        images = np.empty((len(rows), *size, 1 if grey else 3), np.uint8)
        for index, (file, _) in enumerate(rows):
            images[index] = read_pixels(_read(file), file, size=size, grey=grey)
        labels = np.array([label for _, label in rows])
        source = f"{path}{'/' + prefix if prefix else ''} ({len(rows):,} images{note})"
        datasets.append(
            make_dataset(images, labels, len(class_names), path.resolve().name, source, class_names, where=folder)
        )
    return datasets


def _split(dataset: Dataset) -> TrainTest:
    rows_of_parts = fixed_test_split(dataset.labels)
    if len(rows_of_parts[1]) == 0:
        raise InputError(
            f"{dataset.source}: 20 % of each class, for testing, is less than one image; give each class at least 3"
        )
    return TrainTest(
        *(
            make_dataset(
                dataset.images[rows],
                dataset.labels[rows],
                dataset.num_classes,
                dataset.name,
                f"{dataset.source}, {part} rows of a fixed 80/20 split",
                dataset.class_names,
                where=dataset.source,
            )
            for part, rows in zip(("train", "test"), rows_of_parts, strict=True)
        )
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAXIMUM_FILE_BYTES:
            raise InputError(f"{path}: is too large for an image; at most {_MAXIMUM_FILE_BYTES} bytes are read")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from error
