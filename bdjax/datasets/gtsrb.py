"""GTSRB, the German traffic signs, in torchvision's folder layout or from the published archives."""

import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.archives import Limits, open_zip, short
from bdjax.datasets.decoding import SMALL, read_scaled
from bdjax.datasets.files import list_files, read_file
from bdjax.datasets.locate import RemoteFile, download_hint, fetch, not_found
from bdjax.datasets.scaling import scaling_note
from bdjax.datasets.validation import as_int32_labels, describe_rows, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest, Unread

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
_LIMITS = Limits("files of GTSRB", _MAXIMUM_FILE_BYTES, 1 << 31, 100_000, "GTSRB's archives have fewer than 40,000")
_TABLE_SUFFIXES = (".csv", ".txt")  # of files that come with the images
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


def load_gtsrb(folders: Sequence[Path], download: bool, *, side: int = SMALL) -> TrainTest:
    """Loads GTSRB: 43 classes, each image scaled to [side, side, 3] without cropping.

    Args:
        folders: Where to look for `gtsrb/GTSRB`, `GTSRB`, or the three archives, alone or in `gtsrb`.
        download: Whether to download the archives if nothing is found.
        side: Height and width of the images.

    Returns:
        The published split; `source` says how many of the published rows there are. Other files among the images are in
        `unread`.

    Raises:
        InputError: If the files are not found, incomplete or damaged.
    """
    for folder in folders:
        for root in (folder / "gtsrb", folder):
            if (root / "GTSRB").is_dir():
                return _load_unpacked(root, side)
            archives = [root / archive.file_name for archive in _ARCHIVES]
            if all(path.exists() for path in archives):
                return _load_archives(*archives, side)
    wanted = f"folder gtsrb/GTSRB or archives {', '.join(archive.file_name for archive in _ARCHIVES)}"
    destination = folders[0] / "gtsrb"
    if not download:
        raise not_found("gtsrb", wanted, folders, download_hint(_ARCHIVES, destination, download))
    try:
        fetched = fetch(_ARCHIVES, "gtsrb")
    except InputError as error:
        raise not_found("gtsrb", wanted, folders, download_hint(_ARCHIVES, destination, download, error)) from error
    return _load_archives(*(fetched[archive.file_name] for archive in _ARCHIVES), side)


def _load_unpacked(root: Path, side: int) -> TrainTest:
    training_folder = next((folder for folder in _TRAINING_FOLDERS if (root / folder).is_dir()), None)
    if training_folder is None:
        raise InputError(f"{root}: has no training images; {' or '.join(_TRAINING_FOLDERS)} is needed")
    names = {f"GTSRB/{listed.name}": listed.problem for listed in list_files(root / "GTSRB")}
    training_rows, unread = _training_rows(
        names, training_folder, lambda name: f"{root}/{name}", lambda name: _read(f"{root}/{name}")
    )
    table = next((path for path in (root / _TEST_LABELS, root / "GTSRB" / _TEST_LABELS) if path.exists()), None)
    if table is None:
        raise InputError(f"{root / _TEST_LABELS}: is missing; it contains the labels of {_TEST_FOLDER}")
    test_rows = []
    for file_name, label in _read_table(_read(table), table):
        name = f"{_TEST_FOLDER}/{file_name}"
        path = f"{root}/{name}"
        if name not in names:
            raise InputError(f"{path}: is missing, although {table.name} has a row for it")
        test_rows.append(_Row(path, name, label, partial(_read, path)))
    return TrainTest(
        _decode(training_rows, root / training_folder, root, _TRAINING_FOLDERS[training_folder], unread, side),
        _decode(test_rows, table, root, _NUM_TEST_ROWS, _unread_test_files(names, test_rows), side),
    )


def _training_rows(
    names: Mapping[str, str], folder: str, where: Callable[[str], str], read: Callable[[str], bytes]
) -> tuple[list[_Row], tuple[Unread, ...]]:
    """The rows among these files (name -> problem, or ""), and the files that are neither rows nor come with them."""
    rows, unread, elsewhere = [], [], Counter()
    for name, problem in names.items():
        inner = name.removeprefix(f"{folder}/")
        class_folder, _, file_name = inner.partition("/")
        if name.startswith(f"{_TEST_FOLDER}/") or name.lower().endswith(_TABLE_SUFFIXES):
            continue
        if inner == name:
            elsewhere["/".join(name.split("/")[:2])] += 1
        elif name.endswith("/"):
            unread.append(Unread(name, problem))
        elif "/" in file_name:
            unread.append(Unread(name, "is in a folder below a class"))
        elif not file_name:
            unread.append(Unread(name, problem or "is not in the folder of a class"))
        elif not file_name.endswith(".ppm"):
            unread.append(Unread(name, problem or "has a suffix that is not read; .ppm is"))
        else:
            label = _class_of_folder(class_folder, where(f"{folder}/{class_folder}"))
            rows.append(_Row(where(name), name, label, partial(read, name)))
    unread += [Unread(name, f"holds {count:,} file(s) and is not read") for name, count in elsewhere.items()]
    return rows, tuple(unread)


def _unread_test_files(names: Mapping[str, str], rows: Sequence[_Row]) -> tuple[Unread, ...]:
    read = {row.file for row in rows}
    return tuple(
        Unread(name, problem or f"has no row in {_TEST_LABELS}")
        for name, problem in names.items()
        if name.startswith(f"{_TEST_FOLDER}/") and name not in read and not name.lower().endswith(_TABLE_SUFFIXES)
    )


def _load_archives(training_path: Path, test_path: Path, table_path: Path, side: int) -> TrainTest:
    def member(path: Path, name: str) -> str:
        return f"{path}, member {short(name)}"

    with open_zip(training_path, _LIMITS) as archive:
        names = dict.fromkeys(sorted(archive.sizes), "")
        folder = next(
            (name for name in _TRAINING_FOLDERS if any(file.startswith(f"{name}/") for file in names)), "GTSRB"
        )
        rows, unread = _training_rows(names, folder, partial(member, training_path), archive.read)
        train = _decode(rows, training_path, training_path, _TRAINING_FOLDERS["GTSRB/Training"], unread, side)
    with open_zip(table_path, _LIMITS) as archive:
        if _TEST_LABELS not in archive.sizes:
            raise InputError(f"{table_path}: does not contain {_TEST_LABELS}")
        table = _read_table(archive.read(_TEST_LABELS), member(table_path, _TEST_LABELS))
    with open_zip(test_path, _LIMITS) as archive:
        rows = []
        for file_name, label in table:
            name = f"{_TEST_FOLDER}/{file_name}"
            if name not in archive.sizes:
                raise InputError(f"{test_path}: does not contain {name}, although {table_path.name} has a row for it")
            rows.append(_Row(member(test_path, name), name, label, partial(archive.read, name)))
        unread = _unread_test_files(dict.fromkeys(archive.sizes, ""), rows)
        return TrainTest(train, _decode(rows, test_path, test_path, _NUM_TEST_ROWS, unread, side))


def _read(path: str | Path) -> bytes:
    return read_file(path, _MAXIMUM_FILE_BYTES, "files of GTSRB")


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
    table: dict[str, int] = {}
    try:
        for number, row in enumerate(csv.DictReader(lines, delimiter=";"), start=2):
            file_name, label = row.get("Filename") or "", row.get("ClassId") or ""
            if not re.fullmatch(r"[\w-]+\.ppm", file_name) or not re.fullmatch(r"-?[0-9]{1,9}", label):
                raise InputError(
                    f"{where}: line {number} has Filename {short(file_name)!r} and ClassId {short(label)!r}; a .ppm file "
                    "and a number are needed, in columns separated by ;"
                )
            if file_name in table:
                raise InputError(f"{where}: line {number} has {short(file_name)} again; each file has one row")
            table[file_name] = int(label)
    except csv.Error as error:
        raise InputError(f"{where}: is not a table ({one_line(error)}); columns separated by ; are needed") from error
    as_int32_labels(np.array(list(table.values()), np.int64), len(_CLASS_NAMES), where)
    return list(table.items())


def _decode(
    rows: list[_Row], where: object, source: Path, num_published: int, unread: tuple[Unread, ...], side: int
) -> Dataset:
    if not rows:
        raise InputError(f"{where}: contains no images; .ppm files are needed")
    images, sizes = read_scaled([(row.read, row.where) for row in rows], side)
    labels = np.array([row.label for row in rows])
    note = scaling_note(sizes, (side, side))
    described = f"{source} ({describe_rows(len(rows), num_published)}{note})"
    files = [row.file for row in rows]
    dataset = make_dataset(
        images, labels, len(_CLASS_NAMES), "gtsrb", described, _CLASS_NAMES, where=where, files=files
    )
    return dataclasses.replace(dataset, unread=unread, original_sizes=sizes if note else {})
