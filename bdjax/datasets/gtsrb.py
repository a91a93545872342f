"""GTSRB, the German traffic signs, in torchvision's folder layout or from the published archives."""

import csv
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.decoding import RESIZED, read_pixels
from bdjax.datasets.locate import RemoteFile, download_hint, fetch, not_found
from bdjax.datasets.validation import as_int32_labels, describe_rows, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest

_URLS = ("https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/",)
_ARCHIVES = (
    RemoteFile("GTSRB-Training_fixed.zip", "513f3c79a4c5141765e10e952eaa2478", _URLS),
    RemoteFile("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185", _URLS),
    RemoteFile("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5", _URLS),
)
# The training set was published twice: for the online stage of the contest (which torchvision uses), and with more rows for
# the final.
_TRAINING_FOLDERS = {"GTSRB/Training": 26_640, "GTSRB/Final_Training/Images": 39_209}
_TEST_FOLDER = "GTSRB/Final_Test/Images"
_NUM_TEST_ROWS = 12_630
_TEST_LABELS = "GT-final_test.csv"
_MAXIMUM_FILE_BYTES = 4 << 20  # the largest image has 225x243 pixels, 164 KB; the table has 0.4 MB
_MAXIMUM_ARCHIVE_MEMBERS = 100_000
_CLASS_NAMES = (
    *(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no overtaking",
    "no overtaking by lorries",
    "priority at next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no lorries",
    "no entry",
    "danger",
    "curve to the left",
    "curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "ice or snow",
    "wild animals",
    "end of all limits",
    "turn right",
    "turn left",
    "straight on",
    "straight on or right",
    "straight on or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no overtaking",
    "end of no overtaking by lorries",
)


class _Row(NamedTuple):
    where: str
    file: str
    """file name relative to the folder or archive"""
    label: int
    read: Callable[[], bytes]


def load_gtsrb(folders: Sequence[Path], download: bool) -> TrainTest:
    """Loads GTSRB: 43 classes, each image resized to [32, 32, 3] without cropping.

    Args:
        folders: Where to look for `gtsrb/GTSRB`, `GTSRB`, or the three archives, alone or in `gtsrb`.
        download: Whether to download the archives if nothing is found.

    Returns:
        The published split; `source` says how many of the published rows there are.

    Raises:
        InputError: If the files are not found, incomplete or damaged.
    """
    for folder in folders:
        for root in (folder / "gtsrb", folder):
            if (root / "GTSRB").is_dir():
                return _load_unpacked(root)
            archives = [root / archive.file_name for archive in _ARCHIVES]
            if all(path.is_file() for path in archives):
                return _load_archives(*archives)
    wanted = f"folder gtsrb/GTSRB or archives {', '.join(archive.file_name for archive in _ARCHIVES)}"
    destination = folders[0] / "gtsrb"
    if not download:
        raise not_found("gtsrb", wanted, folders, download_hint(_ARCHIVES, destination, download))
    try:
        fetched = fetch(_ARCHIVES, "gtsrb")
    except InputError as error:
        raise not_found("gtsrb", wanted, folders, download_hint(_ARCHIVES, destination, download, error)) from error
    return _load_archives(*(fetched[archive.file_name] for archive in _ARCHIVES))


def _load_unpacked(root: Path) -> TrainTest:
    training_folder = next((folder for folder in _TRAINING_FOLDERS if (root / folder).is_dir()), None)
    if training_folder is None:
        raise InputError(f"{root}: has no training images; {' or '.join(_TRAINING_FOLDERS)} is needed")
    training_rows = []
    for class_folder in sorted(path for path in (root / training_folder).iterdir() if path.is_dir()):
        label = _class_of_folder(class_folder.name, class_folder)
        training_rows += [_row_of_file(path, root, label) for path in sorted(class_folder.glob("*.ppm"))]

    table = next((path for path in (root / _TEST_LABELS, root / "GTSRB" / _TEST_LABELS) if path.is_file()), None)
    if table is None:
        raise InputError(f"{root / _TEST_LABELS}: is missing; it contains the labels of {_TEST_FOLDER}")
    test_rows = []
    for file_name, label in _read_table(_read(table), table):
        path = root / _TEST_FOLDER / file_name
        if not path.is_file():
            raise InputError(f"{path}: is missing, although {table.name} has a row for it")
        test_rows.append(_row_of_file(path, root, label))
    return TrainTest(
        _decode(training_rows, root / training_folder, root, _TRAINING_FOLDERS[training_folder]),
        _decode(test_rows, table, root, _NUM_TEST_ROWS),
    )


def _row_of_file(path: Path, root: Path, label: int) -> _Row:
    return _Row(str(path), path.relative_to(root).as_posix(), label, partial(_read, path))


def _load_archives(training_path: Path, test_path: Path, table_path: Path) -> TrainTest:
    path = training_path
    try:
        with zipfile.ZipFile(training_path) as archive:
            rows = []
            for name, info in sorted(_members(archive, path).items()):
                match = re.fullmatch(r"GTSRB/(?:Training|Final_Training/Images)/(\d+)/[\w-]+\.ppm", name)
                if match:
                    where = f"{path}, member {name}"
                    rows.append(_Row(where, name, _class_of_folder(match[1], where), partial(archive.read, info)))
            train = _decode(rows, path, path, _TRAINING_FOLDERS["GTSRB/Training"])
        path = table_path
        with zipfile.ZipFile(table_path) as archive:
            members = _members(archive, path)
            if _TEST_LABELS not in members:
                raise InputError(f"{path}: does not contain {_TEST_LABELS}")
            table = _read_table(archive.read(members[_TEST_LABELS]), f"{path}, member {_TEST_LABELS}")
        path = test_path
        with zipfile.ZipFile(test_path) as archive:
            members = _members(archive, path)
            rows = []
            for file_name, label in table:
                name = f"{_TEST_FOLDER}/{file_name}"
                if name not in members:
                    raise InputError(f"{path}: does not contain {name}, although {table_path.name} has a row for it")
                rows.append(_Row(f"{path}, member {name}", name, label, partial(archive.read, members[name])))
            return TrainTest(train, _decode(rows, path, path, _NUM_TEST_ROWS))
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        # zipfile raises RuntimeError on a member that needs a password.
        raise InputError(f"{path}: is not an intact .zip ({one_line(error)}); download it again") from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    members = {info.filename: info for info in archive.infolist()}
    if len(members) > _MAXIMUM_ARCHIVE_MEMBERS:
        raise InputError(f"{path}: has {len(members)} members; GTSRB's archives have fewer than 40,000")
    for info in members.values():
        if info.file_size > _MAXIMUM_FILE_BYTES:
            raise InputError(
                f"{path}, member {one_line(info.filename)}: unpacks to {info.file_size} bytes; "
                f"files of GTSRB have at most {_MAXIMUM_FILE_BYTES}"
            )
    return members


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAXIMUM_FILE_BYTES:
            raise InputError(f"{path}: is too large; files of GTSRB have at most {_MAXIMUM_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from error


def _class_of_folder(name: str, where: object) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", name) or int(name) >= len(_CLASS_NAMES):
        raise InputError(f"{where}: is not in the folder of a class, 00000 to {len(_CLASS_NAMES) - 1:05d}")
    return int(name)


def _read_table(data: bytes, where: object) -> list[tuple[str, int]]:
    """Reads and checks the labels of the test images: [(file name, label)]."""
    try:
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not plain text ({one_line(error)})") from error
    table = []
    for number, row in enumerate(csv.DictReader(lines, delimiter=";"), start=2):
        file_name, label = row.get("Filename") or "", row.get("ClassId") or ""
        if not re.fullmatch(r"[\w-]+\.ppm", file_name) or not re.fullmatch(r"-?[0-9]{1,9}", label):
            raise InputError(
                f"{where}: line {number} has Filename {file_name!r} and ClassId {label!r}; a .ppm file and a number are "
                f"needed, in columns separated by ;"
            )
        table.append((file_name, int(label)))
    as_int32_labels(np.array([label for _, label in table], np.int64), len(_CLASS_NAMES), where)
    return table


def _decode(rows: list[_Row], where: object, source: Path, num_published: int) -> Dataset:
    if not rows:
        raise InputError(f"{where}: contains no images; .ppm files are needed")
    images = np.empty((len(rows), *RESIZED, 3), np.uint8)
    for index, row in enumerate(rows):
        images[index] = read_pixels(row.read(), row.where, size=RESIZED)
    labels = np.array([row.label for row in rows])
    described = f"{source} ({describe_rows(len(rows), num_published)})"
    files = [row.file for row in rows]
    return make_dataset(images, labels, len(_CLASS_NAMES), "gtsrb", described, _CLASS_NAMES, where=where, files=files)
