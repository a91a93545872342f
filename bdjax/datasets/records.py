"""Rows that a source lists one by one, whatever its form: columns of a table, members of an archive, lines, annotations.

A module for each form finds the parts of a source and says how their images are read; this one reads them, by the same rules as
a folder of classes: decoding, one size, grey or colour, limits of memory, what cannot be read.
"""

import dataclasses
import hashlib
import os.path
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdjax.datasets.decoding import SUFFIXES, ImageHeader, Picture, decode, read_header, rules_note
from bdjax.datasets.files import list_level
from bdjax.datasets.scaling import Size, as_text, check_one_size, count_sizes, scale, scaling_note
from bdjax.datasets.stacking import FACTS, Stack, fault, in_order, refusal, split_of, split_rows
from bdjax.datasets.validation import MAXIMUM_CLASSES, ReadOptions, make_dataset
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest, Unread

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in whole pixels."""
IMAGE_COLUMNS = ("image", "img", "images", "picture", "pixels", "png", "jpg", "jpeg")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "fine_label", "cls", "y")
"""Columns that are looked for, in this order, in any case of letters."""
_MOST_NAMED = 20
_LEVELS = 3
MOST_LETTERS = 256
"""Letters that the name of a class has at most."""


class Encoded(NamedTuple):
    """The image of a row as it is stored."""

    data: bytes = b""
    box: Box | None = None
    """the part of the image that is the row; None for all of it"""
    problem: str = ""
    """why there is no image; a predicate: "has no image" """


class Part(NamedTuple):
    """The training rows of a source, or its test rows."""

    title: str
    """"train", "test", or "" for a source without a split"""
    labels: Sequence[str | int | None]
    """the class of every row: its name, or its number if the source names its classes; None for a row without one"""
    names: Sequence[str]
    """of every row: a file, or a record in one"""
    images: Callable[[], Iterator[Encoded]]
    """the images, in the same order"""


class Source(NamedTuple):
    """What a form has found at a path."""

    parts: tuple[Part, ...]
    """the training part (or all rows), and the test part if there is one"""
    class_names: tuple[str, ...] = ()
    """where the source gives numbers to classes: their names in this order"""
    unread: tuple[Unread, ...] = ()
    notes: tuple[str, ...] = ()
    """further facts for `Dataset.source`"""
    are_files: bool = False
    """whether a row is a file"""


Find = Callable[[Path, ReadOptions], Source]


def load(find: Find, path: Path, options: ReadOptions) -> TrainTest:
    """Loads training and test rows: the source's own, or a fixed stratified 80/20 split.

    Args:
        find: of the form that the path has.
        path: of the source.
        options: what to tolerate, and the columns.

    Raises:
        InputError: The source is damaged, has no such columns, or rows that cannot be used; it does not fit into memory.
    """
    source = find(path, options)
    datasets = _read(path, source, options)
    return TrainTest(*datasets) if len(datasets) == 2 else split_rows(datasets[0])


def load_suspect(find: Find, path: Path, options: ReadOptions) -> Dataset:
    """Loads the training part of a source, or all rows of one without parts; a test part counts as unread. As `load`."""
    source = find(path, options)
    tests = source.parts[1:]
    unread = [Unread(part.title, f"is the part for testing, of {len(part.labels):,} rows") for part in tests]
    alone = source._replace(parts=source.parts[:1], unread=(*source.unread, *unread))
    return _read(path, alone, options, also=tests)[0]


# ---- For the forms ---------------------------------------------------------------------------------------------------


def choose_column(where: object, names: Sequence[str], wanted: str, usual: Sequence[str], flag: str, what: str) -> str:
    """The column with the images, or with the classes.

    Args:
        where: The file's name for error messages.
        names: The columns that there are.
        wanted: The one that the user names; "" for one of the usual names.
        usual: Those, in lower case.
        flag: That names it: "--label-column".
        what: What is in it: "the classes".

    Raises:
        InputError: There is no such column; the message lists those that there are.
    """
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.lower(), name)
    if wanted in names:
        return wanted
    if not wanted and (found := [lower[name] for name in usual if name in lower]):
        return found[0]
    there = ", ".join(map(repr, names[:_MOST_NAMED])) or "none"
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    missing = (
        f"has no column {wanted!r} with {what}" if wanted else f"has no column with {what} that is called {usual[0]}"
    )
    raise InputError(f"{where}: {missing}; its columns are {there}{more}; {flag}=NAME names one")


def class_of(where: str, value: object) -> str | None:
    """The class that a value of JSON or a text names; None for an empty one.

    Raises:
        InputError: It is neither a text nor a whole number.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(
            f"{where} is {type(value).__name__}; a class is a text or a whole number; --label-column=NAME names another"
        )
    return str(value)


def class_too_long(where: object, name: str) -> InputError:
    """The error for the name of a class that is a text of another kind."""
    return InputError(
        f"{where}: has a class of {len(name):,} letters ({name[:60]!r} ...); a class has at most {MOST_LETTERS}; "
        "--label-column=NAME names another column"
    )


def files_without_images(folder: Path, endings: tuple[str, ...]) -> list[str]:
    """The files with an ending in a folder and two levels below it, sorted; none if there is an image beside them, since they
    then lie in a folder of images.

    Raises:
        InputError: Some are below a link that leads out of the folder.
    """
    found, folders, outside = [], [("", folder)], ()
    for depth in range(_LEVELS):
        inner = []
        for below, place in folders:
            into, files = list_level(place)
            for file in files:
                if os.path.splitext(file.name)[1].lower() in SUFFIXES:
                    return []
                if file.name.lower().endswith(endings) and not file.problem:
                    found.append(below + file.name)
            leading_out = [
                entry for entry in into if entry.is_link and not entry.path.resolve().is_relative_to(folder.resolve())
            ]
            outside += tuple(f"{below}{entry.name}/" for entry in leading_out)
            inner += [(f"{below}{entry.name}/", entry.path) for entry in into if not entry.name.startswith(".")]
        folders = inner if depth + 1 < _LEVELS else []
    if outside and (led := [name for name in found if name.startswith(outside)]):
        raise InputError(f"{folder / led[0]}: is below a link that leads out of the data; name its folder as the data")
    return sorted(found, key=lambda name: name.split("/"))


def check_name(where: object, name: str) -> str:
    """Returns the name of a file or member within a source.

    Raises:
        InputError: It leads out of the source.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:[\\/]", name):
        raise InputError(f"{where}: names {name[:100]!r}, which leads out of the data; names below it are needed")
    return name


def by_split(path: Path, names: Iterable[str]) -> tuple[list[tuple[str, list[str]]], list[Unread]]:
    """Divides files among the training and the test part by their names: "train-0.tar", "data/test-0.parquet", "val/0.tar".

    Args:
        path: The folder, for error messages.
        names: Files relative to it.

    Returns:
        (title, files) of the training part and of the test part, or ("", files) of all where there is no test part; and what
        is a third part.

    Raises:
        InputError: Some files are of no part, or there is no training part.
    """
    found: dict[str | None, list[str]] = {}
    for name in names:
        *folders, last = name.split("/")
        words = [*folders, *re.split(r"[-_.]", last)]
        found.setdefault(next(filter(None, map(split_of, words)), None), []).append(name)
    if None in found:
        if len(found) > 1:
            raise InputError(
                f"{path}: {found[None][0]} is neither train, test nor val by its name, as other files are; put the data into "
                "a folder of its own"
            )
        return [("", found[None])], []
    if "train" not in found:
        raise InputError(f"{path}: has {' and '.join(map(str, found))} but no part train")
    test = next((split for split in ("test", "val") if split in found), None)
    if test is None:
        return [("", found["train"])], []
    unread = [Unread(name, "is a third split") for name in found.get("val", ()) if test == "test"]
    return [(split, found[split]) for split in ("train", test)], unread


# ---- Reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, source: Source, options: ReadOptions, also: Sequence[Part] = ()) -> list[Dataset]:
    """Reads the rows of all parts in their common form; parts in `also` have a say in that form."""
    class_names, labels = _number_classes(path, source, options)
    stack = Stack(path, sum(len(part.labels) for part in source.parts), options.say)
    elsewhere: Counter[Size] = Counter()
    for part in also:
        for encoded in part.images():
            if (header := _header(encoded)) is not None:
                stack.is_grey &= header.is_grey
                elsewhere[header.size] += 1
    kept: list[list[int]] = [[] for _ in source.parts]
    sizes: list[Counter[Size]] = [Counter() for _ in source.parts]
    counts: list[Counter[str]] = [Counter() for _ in source.parts]
    unreadable: list[Unread] = []
    seen: dict[bytes, int] = {}
    # The names of rows are relative to the folder of a source that is a file.
    folder = path if path.is_dir() else path.parent
    decoder = _Decoder(folder, options.image_size)
    size = next(iter(elsewhere), None)
    are_several = not options.image_size and len(elsewhere) > 1
    for number, part in enumerate(source.parts):
        for row, encoded in enumerate(part.images()):
            name, label = part.names[row], labels[number][row]
            problem = encoded.problem or ("" if label >= 0 else "has no class")
            if are_several:  # refused below, once the number of images of each size is known
                if not problem and (header := _header(encoded)) is not None:
                    sizes[number][header.size] += 1
                continue
            try:
                if problem:
                    raise InputError(f"{decoder.where(name)}: {problem}")
                picture = decoder.decode(encoded, name)
            except InputError as error:
                unreadable.append(Unread(name, str(error).removeprefix(f"{decoder.where(name)}: ")))
                continue
            sizes[number][picture.header.size] += 1
            size = size or picture.header.size
            are_several = not options.image_size and size != picture.header.size
            if are_several:
                continue
            stack.add(picture)
            kept[number].append(row)
            counts[number].update(picture.rules)
            key = hashlib.blake2b(encoded.data + repr(encoded.box).encode(), digest_size=16).digest()
            count = len(seen)
            first = seen.setdefault(key, label)
            if len(seen) == count:
                counts[number]["copies"] += 1
                counts[number]["contradictions"] += first != label
    if not options.image_size:
        check_one_size(path, count_sizes(elsewhere, *sizes))
    if unreadable and not options.skip_unreadable:
        raise refusal(path if len(unreadable) > 1 else folder, unreadable, "rows")
    unread = (*source.unread, *(Unread(name, fault(reason)) for name, reason in unreadable))
    datasets, start, images = [], 0, stack.filled()
    for number, part in enumerate(source.parts):
        rows = kept[number]
        of_sizes = count_sizes(sizes[number])
        scaling = scaling_note(of_sizes, images.shape[1:3])
        facts = [f", {counts[number][fact]:,} {text}" for fact, text in FACTS.items() if counts[number][fact]]
        notes = [scaling, rules_note(counts[number]), *facts, *(f", {note}" for note in source.notes)]
        notes += [f", {len(unread):,} part(s) or row(s) not read"] if unread else []
        of_part = np.array([labels[number][row] for row in rows], np.int32)
        if number == 0 and not options.allow_empty_classes:
            _check_classes(path, class_names, set(of_part.tolist()))
        dataset = make_dataset(
            images[start : start + len(rows)],
            of_part,
            len(class_names),
            path.resolve().name if path.is_dir() else path.resolve().stem,
            f"{path}{', ' + part.title if part.title else ''} ({len(rows):,} images{''.join(notes)})",
            class_names,
            where=path,
            files=[part.names[row] for row in rows],
        )
        start += len(rows)
        changes = {"unread": unread, "original_sizes": of_sizes if scaling else {}, "records": not source.are_files}
        datasets.append(dataclasses.replace(dataset, **changes))
    return datasets


def _number_classes(path: Path, source: Source, options: ReadOptions) -> tuple[tuple[str, ...], list[list[int]]]:
    """The names of the classes in order, and the number of every row's class, -1 for none.

    Without names of its own, a source's classes are those of the training part in the order of their names, as numbers if all
    are numbers: the rule of a folder of classes.
    """
    train = source.parts[0]
    names = {str(label) for label in train.labels if label is not None}
    if (count := len(source.class_names or names)) > MAXIMUM_CLASSES:
        raise InputError(f"{path}: has {count:,} classes; a classifier needs 2 to {MAXIMUM_CLASSES:,}")
    if source.class_names:
        repeated = [name for name, count in Counter(source.class_names).items() if count > 1]
        if repeated:
            raise InputError(f"{path}: has two classes of the name {repeated[0][:100]!r}; names must differ")
        for part in source.parts:
            for name, label in zip(part.names, part.labels, strict=True):
                if label is not None and not 0 <= int(label) < len(source.class_names):
                    raise InputError(
                        f"{path}: {name} has class {label}; classes are 0 to {len(source.class_names) - 1}, by their names"
                    )
        numbers = [[-1 if label is None else int(label) for label in part.labels] for part in source.parts]
        return source.class_names, numbers
    if (longest := max(names, key=len, default="")) and len(longest) > MOST_LETTERS:
        raise class_too_long(path, longest)
    if len(names) < 2:
        raise InputError(f"{path}: has {len(names)} class(es); at least 2 are needed")
    order = in_order(names)
    number_of = {name: number for number, name in enumerate(order)}
    for part in source.parts[1:]:
        for name, label in zip(part.names, part.labels, strict=True):
            if label is not None and str(label) not in number_of:
                raise InputError(f"{path}: {name} has class {str(label)[:100]!r}, which no training row has")
    numbers = [[-1 if label is None else number_of[str(label)] for label in part.labels] for part in source.parts]
    return tuple(order), numbers


def _check_classes(path: Path, class_names: Sequence[str], there: set[int]) -> None:
    empty = [name for number, name in enumerate(class_names) if number not in there]
    if empty:
        named = ", ".join(map(repr, empty[:5])) + (" ..." if len(empty) > 5 else "")
        raise InputError(
            f"{path}: {len(empty)} of {len(class_names)} classes have no rows ({named}); --allow-empty-classes accepts them"
        )


def _header(encoded: Encoded) -> ImageHeader | None:
    if encoded.problem:
        return None
    try:
        header = read_header(encoded.data, "")
    except InputError:
        return None
    if encoded.box is None:
        return header
    left, top, right, bottom = encoded.box
    return header._replace(size=(bottom - top, right - left))


class _Decoder:
    """Decodes the image of a row, and cuts its box out. Neighbouring rows of one image decode it once."""

    def __init__(self, folder: Path, side: int | None) -> None:
        self.folder = folder
        self.size = (side, side) if side else None
        self._last: tuple[bytes, Picture] | None = None

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def decode(self, encoded: Encoded, name: str) -> Picture:
        if encoded.box is None:
            return decode(encoded.data, self.where(name), size=self.size)
        if self._last is None or self._last[0] is not encoded.data:
            self._last = encoded.data, decode(encoded.data, self.where(name))
        whole = self._last[1]
        height, width = whole.header.size
        left, top, right, bottom = encoded.box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(
                f"{self.where(name)}: its box from ({left}, {top}) to ({right}, {bottom}) is not inside the image of "
                f"{as_text((height, width))} pixels"
            )
        pixels = whole.pixels[top:bottom, left:right]
        header = ImageHeader((bottom - top, right - left), whole.header.is_grey)
        return Picture(scale(np.ascontiguousarray(pixels), self.size or header.size), header, whole.rules)
