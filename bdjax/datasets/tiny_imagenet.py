"""Tiny ImageNet, 200 classes of ImageNet at 64x64, from the unpacked folder or the published archive.

Classes are sorted by WordNet ID and rows by file name, as in torchvision's `ImageFolder` and so in published experiments; some
loaders use the different order of `wnids.txt`. The published test images have no labels, so the 10,000 validation images
are the test rows, as is usual.

The archive's MD5 comes from other libraries' loaders.
"""

import glob
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.decoding import read_pixels
from bdjax.datasets.locate import RemoteFile, download_hint, fetch, not_found
from bdjax.datasets.validation import describe_rows, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest

_ARCHIVE = RemoteFile("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", ("http://cs231n.stanford.edu/",))
_FOLDER = "tiny-imagenet-200"
_CLASSES = "wnids.txt"
_WORDS = "words.txt"
_TEST_LABELS = "val/val_annotations.txt"
_TEST_FOLDER = "val/images"
_SIZE = (64, 64)
_NUM_CLASSES = 200
_NUM_TRAIN_ROWS, _NUM_TEST_ROWS = 100_000, 10_000
_MAXIMUM_FILE_BYTES = 8 << 20  # the largest file, words.txt, has 2.7 MB
_MAXIMUM_ARCHIVE_MEMBERS = 200_000


class _Files(NamedTuple):
    """The published files, unpacked or in the archive; names are relative to `_FOLDER`, with "/"."""

    source: Path
    names: Collection[str]
    """includes the tables and the labelled images"""
    read: Callable[[str], bytes]
    where: Callable[[str], str]
    """name -> the file, for error messages"""


def load_tiny_imagenet(folders: Sequence[Path], download: bool) -> TrainTest:
    """Loads Tiny ImageNet: [64, 64, 3], 200 classes, 100,000 and 10,000 rows. Grey images become RGB.

    A subset is accepted, with two or more classes listed in `wnids.txt` and any number of images of each.

    Args:
        folders: Where to look for `tiny-imagenet-200` or the archive `tiny-imagenet-200.zip`.
        download: Whether to download the archive if nothing is found.

    Returns:
        The published training rows, and the validation rows for testing. `source` says how many of the published rows and
        classes there are, `files` is relative to `tiny-imagenet-200`, and class names are the first names in `words.txt`.

    Raises:
        InputError: If the files are not found, incomplete or damaged, or a validation row has a class that is not listed.
    """
    for folder in folders:
        if (folder / _FOLDER).is_dir():
            return _load(_unpacked(folder / _FOLDER))
        if (folder / _ARCHIVE.file_name).is_file():
            return _load_archive(folder / _ARCHIVE.file_name)
    wanted = f"{_FOLDER} or {_ARCHIVE.file_name}"
    if not download:
        raise not_found("tiny_imagenet", wanted, folders, download_hint((_ARCHIVE,), folders[0], download))
    try:
        fetched = fetch((_ARCHIVE,), "")
    except InputError as error:
        hint = download_hint((_ARCHIVE,), folders[0], download, error)
        raise not_found("tiny_imagenet", wanted, folders, hint) from error
    return _load_archive(fetched[_ARCHIVE.file_name])


def _unpacked(root: Path) -> _Files:
    patterns = (_CLASSES, _WORDS, _TEST_LABELS, f"{_TEST_FOLDER}/*.JPEG", "train/*/images/*.JPEG")
    names = {name for pattern in patterns for name in glob.glob(pattern, root_dir=root)}
    return _Files(root, names, lambda name: _read(root / name), lambda name: str(root / name))


def _load_archive(path: Path) -> TrainTest:
    try:
        # Members are read into memory; none is written to disk.
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            return _load(
                _Files(
                    path,
                    members.keys(),
                    lambda name: archive.read(members[name]),
                    lambda name: f"{path}, member {_FOLDER}/{one_line(name)}",
                )
            )
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        # zipfile raises RuntimeError on a member that needs a password.
        raise InputError(f"{path}: is not an intact .zip ({one_line(error)}); download it again") from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MAXIMUM_ARCHIVE_MEMBERS:
        raise InputError(f"{path}: has {len(infos)} members; the published archive has fewer than 125,000")
    for info in infos:
        if info.file_size > _MAXIMUM_FILE_BYTES:
            raise InputError(
                f"{path}, member {one_line(info.filename)}: unpacks to {info.file_size} bytes; "
                f"files of Tiny ImageNet have at most {_MAXIMUM_FILE_BYTES}"
            )
    start = f"{_FOLDER}/"
    return {info.filename.removeprefix(start): info for info in infos if info.filename.startswith(start)}


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAXIMUM_FILE_BYTES:
            raise InputError(f"{path}: is too large; files of Tiny ImageNet have at most {_MAXIMUM_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from error


def _load(files: _Files) -> TrainTest:
    classes = _read_classes(files)
    class_names = _read_class_names(files, classes)
    decode = partial(_decode, files, class_names)
    train, test = _training_rows(files, classes), _test_rows(files, classes)
    return TrainTest(decode(train, _NUM_TRAIN_ROWS), decode(test, _NUM_TEST_ROWS))


def _lines(files: _Files, name: str, content: str) -> list[tuple[int, str]]:
    """[(number, line)] of a table, without empty lines."""
    if name not in files.names:
        raise InputError(f"{files.where(name)}: is missing; it contains {content}")
    # words.txt has a line for each noun in WordNet, of which 200 are used, so invalid bytes elsewhere do not matter.
    lines = files.read(name).decode(errors="replace").splitlines()
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_classes(files: _Files) -> list[str]:
    """The WordNet IDs of the classes, in the order of the labels."""
    classes = set()
    for number, line in _lines(files, _CLASSES, "the classes"):
        if not re.fullmatch(r"n[0-9]{8}", line.strip()):
            raise InputError(f"{files.where(_CLASSES)}: line {number} is {line!r}; n and 8 digits are needed")
        classes.add(line.strip())
    if len(classes) < 2:
        raise InputError(f"{files.where(_CLASSES)}: lists {len(classes)} class(es); at least 2 are needed")
    return sorted(classes)


def _read_class_names(files: _Files, classes: Sequence[str]) -> tuple[str, ...]:
    names = {}
    for _, line in _lines(files, _WORDS, "the names of the classes"):
        wnid, _, words = line.partition("\t")
        names[wnid] = words.partition(",")[0].strip()
    for wnid in classes:
        if not names.get(wnid):
            raise InputError(f"{files.where(_WORDS)}: has no name for {wnid}, which {_CLASSES} lists")
    return tuple(one_line(names[wnid]) for wnid in classes)


def _training_rows(files: _Files, classes: Sequence[str]) -> list[tuple[str, int]]:
    """[(name, label)] of the training images."""
    files_of: dict[str, list[str]] = {wnid: [] for wnid in classes}
    for name in sorted(files.names):
        match = re.fullmatch(r"train/([^/]+)/images/[^/]+\.JPEG", name)
        if match and match[1] not in files_of:
            raise InputError(f"{files.where(name)}: has a class that {_CLASSES} does not list")
        if match:
            files_of[match[1]].append(name)
    for wnid, names in files_of.items():
        if not names:
            where = files.where(f"train/{wnid}/images")
            raise InputError(f"{where}: is missing or contains no .JPEG, although {_CLASSES} lists {wnid}")
    return [(name, label) for label, wnid in enumerate(classes) for name in files_of[wnid]]


def _test_rows(files: _Files, classes: Sequence[str]) -> list[tuple[str, int]]:
    """[(name, label)] of the validation images, in the order of their table."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    rows = []
    for number, line in _lines(files, _TEST_LABELS, f"the labels of {_TEST_FOLDER}"):
        file_name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]  # then comes the bounding box
        if wnid not in labels:
            raise InputError(
                f"{files.where(_TEST_LABELS)}: line {number} has class {wnid!r}, which {_CLASSES} does not list"
            )
        name = f"{_TEST_FOLDER}/{file_name}"
        if name not in files.names:
            raise InputError(
                f"{files.where(_TEST_LABELS)}: line {number} has image {file_name!r}, which is not in {_TEST_FOLDER}"
            )
        rows.append((name, labels[wnid]))
    if not rows:
        raise InputError(f"{files.where(_TEST_LABELS)}: labels no images; at least one is needed")
    return rows


def _decode(
    files: _Files, class_names: tuple[str, ...], rows: Sequence[tuple[str, int]], num_published: int
) -> Dataset:
    images = np.empty((len(rows), *_SIZE, 3), np.uint8)
    # Sequential: an image takes 0.2 ms, mostly in Python code, where threads do not help.
    for index, (name, _) in enumerate(rows):
        where = files.where(name)
        pixels = read_pixels(files.read(name), where, size=None)
        if pixels.shape[:2] != _SIZE:
            raise InputError(
                f"{where}: has {pixels.shape[1]}x{pixels.shape[0]} pixels; {_SIZE[1]}x{_SIZE[0]} are needed"
            )
        images[index] = pixels
    described = describe_rows(len(rows), num_published)
    if len(class_names) != _NUM_CLASSES:
        described += f", {len(class_names)} of {_NUM_CLASSES} classes"
    return make_dataset(
        images,
        np.array([label for _, label in rows]),
        len(class_names),
        "tiny_imagenet",
        f"{files.source} ({described})",
        class_names,
        where=files.source,
        files=[name for name, _ in rows],
    )
