"""Flowers-17 (Nilsback & Zisserman 2006), 17 classes of 80 images each, as published or with one folder for each class.

The published archive has the images in the order of the classes, 80 of each, without any other labels. The published splits
leave 20 images of each class for testing. RobustKD has 70 for training and 10 for testing without saying which; here the last
10 of each class are for testing.

The archive's MD5 comes from other libraries' loaders.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.archives import Limits, read_tar_gz, short
from bdjax.datasets.decoding import SMALL, read_scaled
from bdjax.datasets.files import list_files, read_file
from bdjax.datasets.locate import RemoteFile, download_hint, fetch, not_found
from bdjax.datasets.scaling import scaling_note
from bdjax.datasets.validation import describe_rows, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest, Unread

_ARCHIVE = RemoteFile(
    "17flowers.tgz", "b59a65d8d1a99cd66944d474e1289eab", ("https://www.robots.ox.ac.uk/~vgg/data/flowers/17/",)
)
_FOLDERS = ("flowers17", "17flowers")
_NUM_TRAIN_ROWS, _NUM_TEST_ROWS = 1_190, 170
_IMAGES_PER_CLASS = 80
_TEST_SHARE = 8  # one in eight images: 10 of 80
_SUFFIXES = (".jpg", ".jpeg", ".png")
_MAXIMUM_FILE_BYTES = 4 << 20
_MAXIMUM_ARCHIVE_MEMBERS = 5_000
_MAXIMUM_ARCHIVE_BYTES = 1 << 29  # the published archive has 60 MB
_KNOWN_FILES = ("files.txt", "jpg/files.txt")
_CLASS_NAMES = (
    "daffodil",
    "snowdrop",
    "lily of the valley",
    "bluebell",
    "crocus",
    "iris",
    "tiger lily",
    "tulip",
    "fritillary",
    "sunflower",
    "daisy",
    "coltsfoot",
    "dandelion",
    "cowslip",
    "buttercup",
    "windflower",
    "pansy",
)
"""In the archive's order."""
_ALIASES = {"lilyvalley": "lilyofthevalley"}


class _Files(NamedTuple):
    """The images, unpacked or in the archive; their names are relative to the folder or the archive, with "/"."""

    source: Path
    read: Mapping[str, Callable[[], bytes]]
    """name -> function that returns the content"""
    where: Callable[[str], str]
    """name -> the file, for error messages"""
    unread: tuple[Unread, ...]


def load_flowers17(folders: Sequence[Path], download: bool, *, side: int = SMALL) -> TrainTest:
    """Loads Flowers-17: 17 classes, each image scaled to [side, side, 3] without cropping, 1,190 and 170 rows.

    There are two layouts, both in a folder `flowers17` or `17flowers` or in `17flowers.tgz`: the published one,
    `jpg/image_0001.jpg` to `jpg/image_1360.jpg`; and one folder for each class. Folders with the flowers' names get the
    published labels; otherwise labels follow the order of the folder names. A subset is accepted if it has at least two
    images of each class.

    Args:
        folders: Where to look; an unpacked folder takes precedence over the archive.
        download: Whether to download the archive if nothing is found.
        side: Height and width of the images.

    Returns:
        The last images of each class, by name, for testing: 10 of 80, or of another number one in eight and at least one; the
        rest for training. Other files are in `unread`.

    Raises:
        InputError: If the files are not found or damaged, or a class has fewer than two images.
    """
    for folder in folders:
        roots = [folder / name for name in _FOLDERS if (folder / name).is_dir()]
        for root in roots:
            if not (root / _ARCHIVE.file_name).exists():
                return _load(_unpacked(root), side)
        for root in (*roots, folder):
            if (root / _ARCHIVE.file_name).exists():
                return _load(_packed(root / _ARCHIVE.file_name), side)
    wanted = f"folder {_FOLDERS[0]} or archive {_ARCHIVE.file_name}"
    if not download:
        raise not_found("flowers17", wanted, folders, download_hint((_ARCHIVE,), folders[0], download))
    try:
        fetched = fetch((_ARCHIVE,), "")
    except InputError as error:
        hint = download_hint((_ARCHIVE,), folders[0], download, error)
        raise not_found("flowers17", wanted, folders, hint) from error
    return _load(_packed(fetched[_ARCHIVE.file_name]), side)


def _unpacked(root: Path) -> _Files:
    listed = {file.name: file.problem for file in list_files(root)}
    contents = {
        name: partial(read_file, root / name, _MAXIMUM_FILE_BYTES, "files of Flowers-17")
        for name in listed
        if _is_image(name) and name.count("/") < 2
    }
    unread = _unread({name: problem for name, problem in listed.items() if name not in contents})
    return _Files(root, contents, lambda name: str(root / name), unread)


def _packed(path: Path) -> _Files:
    """The images of an archive, read into memory; nothing is written to disk."""
    limits = Limits(
        "files of Flowers-17",
        _MAXIMUM_FILE_BYTES,
        _MAXIMUM_ARCHIVE_BYTES,
        _MAXIMUM_ARCHIVE_MEMBERS,
        "the published archive has 1,363",
    )
    contents, others = read_tar_gz(path, limits, _is_image)
    return _Files(
        path,
        {name: partial(bytes, content) for name, content in contents.items()},
        lambda name: f"{path}, member {short(name)}",
        _unread(others),
    )


def _is_image(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return not folder.startswith(".") and not file.startswith(".") and file.lower().endswith(_SUFFIXES)


def _unread(others: Mapping[str, str]) -> tuple[Unread, ...]:
    """Entries for the files that are not read: name -> why it is not a regular file, or ""."""

    def reason(name: str) -> str:
        if any(part.startswith(".") for part in name.split("/")):
            return "is hidden"
        return "is in a folder below a class" if _is_image(name) else "has a suffix that is not read"

    return tuple(Unread(name, problem or reason(name)) for name, problem in others.items() if name not in _KNOWN_FILES)


def _load(files: _Files, side: int) -> TrainTest:
    class_names, classes = _find_classes(files)
    parts: tuple[list, list] = [], []
    for label, names in enumerate(classes):
        if len(names) < 2:
            raise InputError(
                f"{files.source}: has {len(names)} image(s) of class {label} ({class_names[label]}); at least 2 are needed"
            )
        first_of_test = len(names) - max(1, len(names) // _TEST_SHARE)
        for part, part_names in zip(parts, (names[:first_of_test], names[first_of_test:]), strict=True):
            part += [(name, label) for name in part_names]
    train, test = parts
    return TrainTest(
        _decode(files, class_names, train, _NUM_TRAIN_ROWS, "first", side),
        _decode(files, class_names, test, _NUM_TEST_ROWS, "last", side),
    )


def _find_classes(files: _Files) -> tuple[tuple[str, ...], list[list[str]]]:
    """The names of the classes, and the sorted image names of each class."""
    numbered = {name: re.fullmatch(r"(?:jpg/)?image_([0-9]{4})\.jpg", name) for name in sorted(files.read)}
    if any(numbered.values()):
        classes: list[list[str]] = [[] for _ in _CLASS_NAMES]
        for name, match in numbered.items():
            number = int(match[1]) if match else 0
            if not 1 <= number <= _IMAGES_PER_CLASS * len(_CLASS_NAMES):
                last = _IMAGES_PER_CLASS * len(_CLASS_NAMES)
                raise InputError(f"{files.where(name)}: is not one of image_0001.jpg to image_{last:04d}.jpg")
            classes[(number - 1) // _IMAGES_PER_CLASS].append(name)
        return _CLASS_NAMES, classes
    files_of: dict[str, list[str]] = {}
    for name in sorted(files.read):
        files_of.setdefault(name.rpartition("/")[0], []).append(name)
    if len(files_of) != len(_CLASS_NAMES):
        raise InputError(
            f"{files.source}: has {len(files_of)} folders of images; {len(_CLASS_NAMES)} are needed, one for each class, or "
            f"jpg/image_0001.jpg and so on (give any other folder of images by its path)"
        )
    published = {_letters(name): name for name in _CLASS_NAMES}
    named = {published.get(_letters(folder.rpartition("/")[2])): names for folder, names in files_of.items()}
    if set(named) == set(_CLASS_NAMES):
        return _CLASS_NAMES, [named[name] for name in _CLASS_NAMES]
    return tuple(one_line(folder.rpartition("/")[2]) for folder in files_of), list(files_of.values())


def _letters(name: str) -> str:
    """A flower's name in lower case, without spaces and punctuation: the same for LilyValley, lily_valley, Lily Valley."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    return _ALIASES.get(letters, letters)


def _decode(
    files: _Files,
    class_names: tuple[str, ...],
    rows: Sequence[tuple[str, int]],
    num_published: int,
    which: str,
    side: int,
) -> Dataset:
    images, sizes = read_scaled([(files.read[name], files.where(name)) for name, _ in rows], side)
    note = scaling_note(sizes, (side, side))
    described = describe_rows(len(rows), num_published)
    dataset = make_dataset(
        images,
        np.array([label for _, label in rows]),
        len(class_names),
        "flowers17",
        f"{files.source} ({described}, the {which} of each class{note})",
        class_names,
        where=files.source,
        files=[name for name, _ in rows],
    )
    return dataclasses.replace(dataset, unread=files.unread, original_sizes=sizes if note else {})
