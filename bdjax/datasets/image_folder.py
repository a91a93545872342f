"""Any folder of image files with one sub-folder for each class.

Whatever is in the folder is either a row of the dataset or listed in its `unread`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os.path
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.decoding import SUFFIXES, ImageHeader, decode, read_header, rules_note
from bdjax.datasets.files import Listed, list_files, list_level, read_file
from bdjax.datasets.scaling import Size, check_one_size, count_sizes, scaling_note
from bdjax.datasets.stacking import FACTS, SPLITS, Stack, fault, in_order, refusal, split_of, split_rows
from bdjax.datasets.validation import STRICT, ReadOptions, make_dataset
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest, Unread

_MAXIMUM_FILE_BYTES = 1 << 28


class _Part(NamedTuple):
    prefix: str
    """prefix of its file names: "train/", "Test/", "val/", or "" for a folder without a split"""
    folder: Path
    classes: dict[str, list[Listed]]
    """class name -> files, whose names are relative to the class's folder; in the order of the labels"""


class _Found(NamedTuple):
    """What a folder consists of."""

    parts: list[_Part]
    """the training part (or the whole folder), and the test part if there is one"""
    unread: list[Unread]
    num_unread: int
    """number of files in `unread`, whose folders count with all their files"""
    notes: tuple[str, ...] = ()
    """further facts for `source`"""
    also: tuple[Listed, ...] = ()
    """files that are no rows, but have a say in the form of the rows"""


class _Row(NamedTuple):
    part: int
    label: int
    name: str
    """relative to the dataset's folder"""
    file: Listed


class _Rows(NamedTuple):
    """The rows of a dataset that could be read."""

    rows: list[_Row]
    images: np.ndarray
    """uint8 [N, H, W, C]"""
    sizes: list[Counter]
    """for each part: (height, width) before scaling -> number of files"""
    counts: list[Counter]
    """for each part: key of `RULES`, or of `FACTS` -> number of files"""
    unreadable: list[Unread]


def load_image_folder(path: Path, options: ReadOptions = STRICT) -> TrainTest:
    """Loads a folder of images; the classes are its sub-folders, by name.

    Args:
        path: A folder with a sub-folder for each class, which may have folders in turn; or with `train`, and `test` or `val`,
            which have such sub-folders. These may be called `training`, `testing`, `valid`, `validation`, `eval` or
            `evaluation`, in any case.
        options: What to tolerate.

    Returns:
        The folder's own split (`test` rather than `val`), or a fixed stratified 80/20 split. Images are [H, W, 1] if all are
        grey, otherwise [H, W, 3]. Classes are in the order of their names, as numbers if all are numbers. `files` is relative
        to `path`, and `unread` lists every file that is no row.

    Raises:
        InputError: If there are fewer than two classes, a class has no images, a test class is not a training class, an image
            cannot be read, images differ in size and `options` has no `image_size`, or they do not fit into memory.
    """
    found = _find(path, options)
    if len(found.parts) == 1 and found.parts[0].prefix:
        folder = found.parts[0].prefix
        raise InputError(f"{path}: has {folder} but neither test/ nor val/; one of them is needed for the test images")
    datasets = _read(path, found, options)
    return TrainTest(*datasets) if len(datasets) == 2 else split_rows(datasets[0])


def load_suspect_image_folder(path: Path, options: ReadOptions = STRICT) -> Dataset:
    """Loads all training images of a folder.

    Args:
        path: As for `load_image_folder`; but `train` alone is enough.
        options: What to tolerate.

    Returns:
        The images in `train`, as from `load_image_folder`, or all images if there is no `train`: classes by name, and the
        files of each class by name. A test part counts as unread.

    Raises:
        InputError: As `load_image_folder`, but one image per class is enough.
    """
    return _read(path, _find(path, options, without_test=True), options)[0]


# ---- What is there ---------------------------------------------------------------------------------------------------


def _find(path: Path, options: ReadOptions, without_test: bool = False) -> _Found:
    """Tells training, test and other files apart; the test part can be left unread."""
    folders, files = list_level(path)
    unread = _LeftOut()
    for file in files:
        unread.add_file(file.name, file, "is an image beside the folders of the classes")
    folders = [folder for folder in folders if not unread.add_hidden(folder)]
    by_split = {split: [folder for folder in folders if split_of(folder.name) == split] for split in SPLITS}
    others = [folder for folder in folders if split_of(folder.name) is None]
    # A test part without labels, such as ImageNet's, is none beside a `val` with labels.
    tests = next(filter(None, sorted((by_split["test"], by_split["val"]), key=_have_no_folders)), [])
    train = by_split["train"][0] if by_split["train"] else None
    if train is None or (not tests and others and not _holds_folders_only(train)):
        return _find_classes(path, folders, others, unread, options)
    for split, alternatives in (("training", by_split["train"]), ("test", tests)):
        if len(alternatives) > 1:
            names = " and ".join(f"{folder.name}/" for folder in alternatives)
            raise InputError(f"{path}: has {names}; one folder of {split} images is needed")
    for folder in (*others, *by_split["test"], *by_split["val"]):
        if folder not in tests:
            unread.add_folder(
                folder, "is neither the training nor the test part" if folder in others else "is a third split"
            )
    parts = [_part(train, options, unread)]
    _check_number(train.path, parts[0].classes)
    if without_test:
        # The form of the rows is common to both parts, so that a row is the same whichever function read it.
        also = [file for test in tests for file in list_files(test.path) if "/" in file.name and is_image(file.name)]
        for test in tests:
            unread.add_folder(test, "is the part for testing")
        return _Found(parts, unread.entries, unread.count, also=tuple(also))
    if tests:
        parts.append(_part(tests[0], options, unread))
        if not parts[1].classes:
            raise InputError(f"{tests[0].path}: has no sub-folders; one is needed for each class")
        unknown = sorted(set(parts[1].classes) - set(parts[0].classes))
        if unknown:
            raise InputError(f"{tests[0].path / unknown[0]}: is not a class in {train.path}")
    return _Found(parts, unread.entries, unread.count)


def _find_classes(
    path: Path, folders: Sequence[Listed], others: Sequence[Listed], unread: "_LeftOut", options: ReadOptions
) -> _Found:
    """A folder without a split."""
    splits = [folder for folder in folders if split_of(folder.name) is not None]
    # Classes called "valid" and "invalid", or "car" and "train", are possible; "cat", "dog" and "test" are not.
    if any(split_of(folder.name) != "train" and (len(others) != 1 or _holds_folders_only(folder)) for folder in splits):
        names = " and ".join(f"{folder.name}/" for folder in splits)
        raise InputError(
            f"{path}: has {names}, by the name a split, but no train/; put the folders of the training classes into train/, "
            "or rename what is a class"
        )
    part = _Part("", path, _classes(folders, "", options, unread))
    _check_number(path, part.classes)
    notes = tuple(f"{folder.name}/ is read as a class" for folder in splits)
    return _Found([part], unread.entries, unread.count, notes)


def _part(folder: Listed, options: ReadOptions, unread: "_LeftOut") -> _Part:
    folders, files = list_level(folder.path)
    prefix = f"{folder.name}/"
    for file in files:
        unread.add_file(prefix + file.name, file, "is an image beside the folders of the classes")
    folders = [inner for inner in folders if not unread.add_hidden(inner, prefix)]
    folders = [inner._replace(is_link=inner.is_link or folder.is_link) for inner in folders]
    return _Part(prefix, folder.path, _classes(folders, prefix, options, unread))


def _classes(
    folders: Iterable[Listed], prefix: str, options: ReadOptions, unread: "_LeftOut"
) -> dict[str, list[Listed]]:
    """The images of each class, at any depth."""
    classes = {}
    for folder in folders:
        name, before = folder.name, unread.count
        hidden = Counter()
        classes[name] = []
        for file in list_files(folder.path):
            if "." in file.name and (hidden_in := re.match(r"(?:[^/]+/)*?\.[^/]*/", file.name)):
                hidden[hidden_in[0]] += 1
            elif not unread.add_file(f"{prefix}{name}/{file.name}", file):
                classes[name].append(file._replace(is_link=True) if folder.is_link else file)
        for inner, count in hidden.items():
            unread.add(f"{prefix}{name}/{inner}", f"is a hidden folder of {count:,} files", count)
        if not classes[name] and not options.allow_empty_classes:
            left_out = ""
            if unread.count > before:
                last = unread.entries[-1]
                left_out = f"; it has {unread.count - before:,} other file(s): {last.file} {last.reason}"
            raise InputError(
                f"{folder.path}: contains no images; each sub-folder is a class and needs .png, .jpg, .gif, .tif or other "
                f"image files{left_out}; --allow-empty-classes accepts it as an empty class"
            )
    return {name: classes[name] for name in in_order(classes)}


def _check_number(path: Path, classes: dict[str, list[Listed]]) -> None:
    if len(classes) >= 2:
        return
    hint = ""
    for name, files in classes.items():
        inner = {file.name.split("/")[0] for file in files if "/" in file.name}
        if len(inner) >= 2:
            hint = f"; the dataset may be {path / name}"
    raise InputError(
        f"{path}: has {len(classes)} sub-folder(s) of images; at least 2 are needed, one for each class{hint}"
    )


def _have_no_folders(folders: Sequence[Listed]) -> bool:
    return not any(list_level(folder.path)[0] for folder in folders)


def _holds_folders_only(folder: Listed) -> bool:
    """Whether a folder has folders but no images, as a split has and a class need not."""
    folders, files = list_level(folder.path)
    return any(not inner.name.startswith(".") for inner in folders) and not any(is_image(file.name) for file in files)


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


class _LeftOut:
    """Collects what is left out."""

    def __init__(self) -> None:
        self.entries: list[Unread] = []
        self.count = 0

    def add(self, name: str, reason: str, count: int = 1) -> None:
        self.entries.append(Unread(name, reason))
        self.count += count

    def add_file(self, name: str, file: Listed, problem: str = "") -> bool:
        """Adds a file that cannot be a row, or that is none for another reason; returns whether it did."""
        if file.problem:
            self.add(name, file.problem)
        elif os.path.basename(name).startswith("."):
            self.add(name, "is hidden")
        elif not is_image(name):
            self.add(name, "has a suffix that is not read")
        elif problem:
            self.add(name, problem)
        else:
            return False
        return True

    def add_hidden(self, folder: Listed, prefix: str = "") -> bool:
        """Adds a hidden folder; returns whether it is one."""
        if not folder.name.startswith("."):
            return False
        self.add_folder(folder, "is hidden", prefix)
        return True

    def add_folder(self, folder: Listed, what: str, prefix: str = "") -> None:
        try:
            count = len(list_files(folder.path))
        except InputError as error:
            self.add(f"{prefix}{folder.name}/", str(error).removeprefix(f"{folder.path}: "))
        else:
            if count:
                self.add(f"{prefix}{folder.name}/", f"{what}, of {count:,} files", count)


# ---- Reading ---------------------------------------------------------------------------------------------------------


def _rows_of(parts: Sequence[_Part], train: _Part) -> list[_Row]:
    labels = {name: label for label, name in enumerate(train.classes)}
    return [
        _Row(number, labels[name], f"{part.prefix}{name}/{file.name}", file)
        for number, part in enumerate(parts)
        for name, files in part.classes.items()
        for file in files
    ]


def _read(path: Path, found: _Found, options: ReadOptions) -> list[Dataset]:
    """Reads the rows of all parts in their common form."""
    train = found.parts[0]
    read = _read_rows(path, _rows_of(found.parts, train), len(found.parts), found.also, options)
    if read.unreadable and not options.skip_unreadable:
        raise refusal(path, read.unreadable)
    unread = (*found.unread, *(Unread(file, fault(reason)) for file, reason in read.unreadable))
    num_unread = found.num_unread + len(read.unreadable)
    class_names = tuple(train.classes)
    datasets = []
    start = 0
    for number, part in enumerate(found.parts):
        rows = [row for row in read.rows if row.part == number]
        images = read.images[start : start + len(rows)]
        start += len(rows)
        labels = np.array([row.label for row in rows], np.int32)
        if read.unreadable and not options.allow_empty_classes:
            _check_readable(part, {class_names[label] for label in labels})
        sizes = count_sizes(read.sizes[number])
        scaling = scaling_note(sizes, images.shape[1:3])
        notes = [scaling, rules_note(read.counts[number])]
        notes += [
            f", {read.counts[number][fact]:,} {text}" for fact, text in FACTS.items() if read.counts[number][fact]
        ]
        notes += [f", {num_unread:,} file(s) not read" if num_unread else "", *(f", {note}" for note in found.notes)]
        dataset = make_dataset(
            images,
            labels,
            len(class_names),
            path.resolve().name,
            f"{path}{'/' + part.prefix if part.prefix else ''} ({len(rows):,} images{''.join(notes)})",
            class_names,
            where=part.folder,
            files=[row.name for row in rows],
        )
        datasets.append(dataclasses.replace(dataset, unread=unread, original_sizes=sizes if scaling else {}))
    return datasets


def _check_readable(part: _Part, names: set[str]) -> None:
    for name, files in part.classes.items():
        if files and name not in names:
            raise InputError(f"{part.folder / name}: has {len(files)} image(s), none of which can be read")


def _read_rows(path: Path, rows: Sequence[_Row], num_parts: int, also: Sequence[Listed], options: ReadOptions) -> _Rows:
    """Reads each file once; of images in several sizes without `image_size`, those after the second size are only counted."""
    side = options.image_size
    stack = Stack(path, len(rows), options.say)
    elsewhere: Counter[Size] = Counter()
    for header in _headers(also):
        stack.is_grey &= header.is_grey
        elsewhere[header.size] += 1
    kept: list[_Row] = []
    unreadable: list[Unread] = []
    sizes: list[Counter] = [Counter() for _ in range(num_parts)]
    counts: list[Counter] = [Counter() for _ in range(num_parts)]
    seen: dict[bytes, _Row] = {}
    for number, row in enumerate(rows, start=1):
        try:
            data = read_file(row.file.path, _MAXIMUM_FILE_BYTES, "images")
            picture = decode(data, row.file.path, size=(side, side) if side else None)
        except InputError as error:
            unreadable.append(Unread(row.name, str(error).removeprefix(f"{row.file.path}: ")))
            continue
        sizes[row.part][picture.header.size] += 1
        if not side and len({*elsewhere, *itertools.chain(*sizes)}) > 1:
            rest = Counter(header.size for header in _headers(row.file for row in rows[number:]))
            check_one_size(path, count_sizes(elsewhere, *sizes, rest))
        stack.add(picture)
        kept.append(row)
        for key in (*picture.rules, *_facts(row, data, seen)):
            counts[row.part][key] += 1
    return _Rows(kept, stack.filled(), sizes, counts, unreadable)


def _headers(files: Iterable[Listed]) -> Iterator[ImageHeader]:
    """The headers of the files that can be read."""
    for file in files:
        with contextlib.suppress(InputError):
            yield read_header(read_file(file.path, _MAXIMUM_FILE_BYTES, "images"), file.path)


def _facts(row: _Row, data: bytes, seen: dict[bytes, _Row]) -> Iterator[str]:
    """The keys of `FACTS` that hold for a row, given the first row with each content."""
    if "/" in row.file.name:
        yield "nested"
        if split_of(row.file.name.split("/")[0]):
            yield "splits"
    if row.file.is_link:
        yield "links"
        return
    first = seen.setdefault(hashlib.blake2b(data, digest_size=16).digest(), row)
    if first is not row:
        yield "shared" if first.file.inode == row.file.inode else "copies"
        if first.label != row.label:
            yield "contradictions"
