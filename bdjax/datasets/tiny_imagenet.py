"""Tiny ImageNet, 200 classes of ImageNet at 64x64, from the unpacked folder or the published archive.

Classes are sorted by WordNet ID and rows by file name, as in torchvision's `ImageFolder` and so in published experiments; some
loaders use the different order of `wnids.txt`. The published test images have no labels, so the 10,000 validation images
are the test rows, as is usual.

The archive's MD5 comes from other libraries' loaders.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.archives import Limits, open_zip, short
from bdjax.datasets.decoding import read_pixels
from bdjax.datasets.files import list_files, read_file
from bdjax.datasets.locate import RemoteFile, download_hint, fetch, not_found
from bdjax.datasets.validation import describe_rows, make_dataset
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest, Unread

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
_MAXIMUM_ARCHIVE_BYTES = 1 << 31
_MAXIMUM_ARCHIVE_MEMBERS = 200_000
_MAXIMUM_CLASSES = 1_000


class _Files(NamedTuple):
    """The published files, unpacked or in the archive; names are relative to `_FOLDER`, with "/"."""

    source: Path
    names: Mapping[str, str]
    """name -> why it is not a regular file, or "" """
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
        classes there are, `files` is relative to `tiny-imagenet-200`, and class names are the first names in `words.txt`. Other
        images are in `unread`.

    Raises:
        InputError: If the files are not found, incomplete or damaged, or a validation row has a class that is not listed.
    """
    for folder in folders:
        if (folder / _FOLDER).is_dir():
            return _load(_unpacked(folder / _FOLDER))
        if (folder / _ARCHIVE.file_name).exists():
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
    names = {listed.name: listed.problem for listed in list_files(root)}
    what = "files of Tiny ImageNet"
    return _Files(
        root, names, lambda name: read_file(root / name, _MAXIMUM_FILE_BYTES, what), lambda name: str(root / name)
    )


def _load_archive(path: Path) -> TrainTest:
    limits = Limits(
        "files of Tiny ImageNet",
        _MAXIMUM_FILE_BYTES,
        _MAXIMUM_ARCHIVE_BYTES,
        _MAXIMUM_ARCHIVE_MEMBERS,
        "the published archive has fewer than 125,000",
    )
    prefix = f"{_FOLDER}/"
    with open_zip(path, limits) as archive:
        inside = [name.removeprefix(prefix) for name in archive.sizes if name.startswith(prefix)]
        outside = [name for name in archive.sizes if not name.startswith(prefix)]
        train, test = _load(
            _Files(
                path,
                dict.fromkeys(inside, ""),
                lambda name: archive.read(prefix + name),
                lambda name: f"{path}, member {prefix}{short(name)}",
            )
        )
    unread = tuple(Unread(name, f"is outside {prefix}") for name in outside)
    return TrainTest(dataclasses.replace(train, unread=(*train.unread, *unread)), test)


def _load(files: _Files) -> TrainTest:
    classes = _read_classes(files)
    class_names = _read_class_names(files, classes)
    train, test = _training_rows(files, classes), _test_rows(files, classes)
    return TrainTest(
        _decode(files, class_names, train, _NUM_TRAIN_ROWS, _unread(files, "train", train)),
        _decode(files, class_names, test, _NUM_TEST_ROWS, _unread(files, "val", test)),
    )


def _unread(files: _Files, part: str, rows: Sequence[tuple[str, int]]) -> tuple[Unread, ...]:
    """The files of a part that are neither rows nor tables; for "train" also what is outside both parts."""
    read = {name for name, _ in rows}
    unread, elsewhere = [], Counter()
    for name, problem in files.names.items():
        top = name.partition("/")[0]
        if name in read or name.endswith(".txt"):
            continue
        if top == part:
            reason = f"has no line in {_TEST_LABELS}" if part == "val" else "is not in the images folder of a class"
            suffix_reason = "has a suffix that is not read; .JPEG is"
            unread.append(Unread(name, problem or (reason if name.endswith(".JPEG") else suffix_reason)))
        elif part == "train" and top != "val":
            elsewhere[top] += 1
    for top, count in elsewhere.items():
        reason = f"holds {count:,} file(s) without labels" if top == "test" else f"holds {count:,} file(s), not read"
        unread.append(Unread(top, reason))
    return tuple(unread)


def _lines(files: _Files, name: str, content: str) -> Iterator[tuple[int, str]]:
    """(number, line) of each line of a table that is not empty."""
    if name not in files.names:
        raise InputError(f"{files.where(name)}: is missing; it contains {content}")
    # words.txt has a line for each noun in WordNet, of which 200 are used, so invalid bytes elsewhere do not matter.
    lines = files.read(name).decode(errors="replace").splitlines()
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _read_classes(files: _Files) -> list[str]:
    """The WordNet IDs of the classes, in the order of the labels."""
    classes = set()
    for number, line in _lines(files, _CLASSES, "the classes"):
        if not re.fullmatch(r"n[0-9]{8}", line.strip()):
            raise InputError(f"{files.where(_CLASSES)}: line {number} is {short(line)!r}; n and 8 digits are needed")
        classes.add(line.strip())
        if len(classes) > _MAXIMUM_CLASSES:
            raise InputError(
                f"{files.where(_CLASSES)}: lists more than {_MAXIMUM_CLASSES} classes; Tiny ImageNet has {_NUM_CLASSES}"
            )
    if len(classes) < 2:
        raise InputError(f"{files.where(_CLASSES)}: lists {len(classes)} class(es); at least 2 are needed")
    return sorted(classes)


def _read_class_names(files: _Files, classes: Sequence[str]) -> tuple[str, ...]:
    names, wanted = {}, set(classes)
    for _, line in _lines(files, _WORDS, "the names of the classes"):
        wnid, _, words = line.partition("\t")
        name = words.partition(",")[0].strip()
        if name and wnid in wanted:
            names[wnid] = short(name)
    for wnid in classes:
        if wnid not in names:
            raise InputError(f"{files.where(_WORDS)}: has no name for {wnid}, which {_CLASSES} lists")
    return tuple(names[wnid] for wnid in classes)


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
    rows: dict[str, int] = {}
    for number, line in _lines(files, _TEST_LABELS, f"the labels of {_TEST_FOLDER}"):
        file_name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]  # then comes the bounding box
        if wnid not in labels:
            raise InputError(
                f"{files.where(_TEST_LABELS)}: line {number} has class {short(wnid)!r}, which {_CLASSES} does not list"
            )
        name = f"{_TEST_FOLDER}/{file_name}"
        if name not in files.names:
            raise InputError(
                f"{files.where(_TEST_LABELS)}: line {number} has image {short(file_name)!r}, which is not in "
                f"{_TEST_FOLDER}"
            )
        if name in rows:
            raise InputError(
                f"{files.where(_TEST_LABELS)}: line {number} has {short(file_name)} again; each image has one"
            )
        rows[name] = labels[wnid]
    if not rows:
        raise InputError(f"{files.where(_TEST_LABELS)}: labels no images; at least one is needed")
    return list(rows.items())


def _decode(
    files: _Files,
    class_names: tuple[str, ...],
    rows: Sequence[tuple[str, int]],
    num_published: int,
    unread: tuple[Unread, ...],
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
    dataset = make_dataset(
        images,
        np.array([label for _, label in rows]),
        len(class_names),
        "tiny_imagenet",
        f"{files.source} ({described})",
        class_names,
        where=files.source,
        files=[name for name, _ in rows],
    )
    return dataclasses.replace(dataset, unread=unread)
