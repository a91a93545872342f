"""Images with a list beside them: metadata.csv or metadata.jsonl, the form of Hugging Face's "imagefolder".

The column file_name has the path of an image below the folder of the list; another column has the class. A folder may have a
list, or a training part and a test part with a list each.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bdjax.datasets.columns import read_below
from bdjax.datasets.files import list_files, list_level, open_file, read_file
from bdjax.datasets.image_folder import is_image
from bdjax.datasets.records import LABEL_COLUMNS, Encoded, Part, Source, by_split, choose_column, class_of
from bdjax.datasets.stacking import split_of
from bdjax.datasets.validation import ReadOptions, one_line
from bdjax.errors import InputError
from bdjax.types import Unread

LISTS = ("metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")
_MAXIMUM_LIST = 1 << 31


def holds(path: Path) -> bool:
    """Whether a folder, or a part of it, has a list."""
    if not path.is_dir():
        return False
    lists = [folder / name for folder in (path, *_parts(path)) for name in LISTS if (folder / name).is_file()]
    # A table beside class folders is a list of images only if it says so by the name of the column.
    return any("file_name" in _first_columns(file) for file in lists) or (bool(lists) and not _has_classes(path))


def _has_classes(path: Path) -> bool:
    """Whether several folders below a folder, or below a part of it, have images."""
    for folder in (path, *_parts(path)):
        with_images = sum(any(is_image(file.name) for file in list_level(inner)[1]) for inner in _folders(folder))
        if with_images > 1:
            return True
    return False


def _first_columns(file: Path) -> list[str]:
    """The columns of the first line; none if it cannot be read, which is said when all lines are."""
    try:
        with open_file(file, _MAXIMUM_LIST, "lists of images") as stream:
            line = stream.readline(1 << 16).decode("utf-8-sig")
        return list(json.loads(line)) if file.suffix == ".jsonl" else next(csv.reader([line]), [])
    except (InputError, ValueError, TypeError, RecursionError, csv.Error):
        return []


def find(path: Path, options: ReadOptions) -> Source:
    """The rows that the lists of a folder name.

    Raises:
        InputError: A list is damaged or lacks a column, or there are two of them.
    """
    places = [""] if _list_of(path) else [f"{folder.name}/" for folder in _parts(path) if _list_of(folder)]
    parts, unread = by_split(path, places) if places != [""] else ([("", [""])], [])
    found: list[Part] = []
    for title, folders in parts:
        if len(folders) > 1:
            raise InputError(f"{path}: has {' and '.join(folders)}; one folder for each part is needed")
        part, others = _part(path, folders[0], title, options)
        found.append(part)
        unread += others
    return Source(
        tuple(found), (), tuple(unread), (f"listed in {_list_of(path / parts[0][1][0]).name}",), are_files=True
    )


def _folders(path: Path) -> list[Path]:
    return [folder.path for folder in list_level(path)[0]]


def _parts(path: Path) -> list[Path]:
    """The folders that are a part for training or testing by their names."""
    return [folder for folder in _folders(path) if split_of(folder.name)]


def _list_of(folder: Path) -> Path | None:
    found = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: has {' and '.join(LISTS)}; one list is needed")
    return found[0] if found else None


def _part(path: Path, below: str, title: str, options: ReadOptions) -> tuple[Part, list[Unread]]:
    file = _list_of(path / below)
    rows = _read_csv(file) if file.suffix == ".csv" else _read_lines(file)
    if not rows:
        raise InputError(f"{file}: has no rows; a line for each image is needed")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    image = choose_column(file, columns, options.image_column, FILE_COLUMNS, "--image-column", "the names of the files")
    label = choose_column(file, columns, options.label_column, LABEL_COLUMNS, "--label-column", "the classes")
    names, labels = [], []
    for number, row in enumerate(rows, start=1):
        name = row.get(image)
        if not isinstance(name, str) or not name:
            raise InputError(f"{file}: row {number} has no name of a file in column {image!r}")
        names.append(name)
        labels.append(class_of(f"{file}: {label!r} of row {number}", row.get(label)))
    named = set(names)
    unread = [
        Unread(below + other.name, other.problem or f"is an image that {file.name} does not name")
        for other in list_files(path / below)
        if other.name not in named and (other.problem or is_image(other.name))
    ]
    return Part(title, labels, [below + name for name in names], partial(_images, path, path / below, names)), unread


def _images(data: Path, root: Path, names: Sequence[str]) -> Iterator[Encoded]:
    for name in names:
        encoded = read_below(root, name, data)
        # The row's name says which file it is.
        yield encoded._replace(problem=encoded.problem.removeprefix(f"names {name[:100]!r}, which "))


def _decoded(file: Path) -> str:
    data = read_file(file, _MAXIMUM_LIST, "lists of images")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is no text in UTF-8 (byte {error.start})") from error


def _read_csv(file: Path) -> list[Mapping[str, Any]]:
    reader = csv.reader(io.StringIO(_decoded(file), newline=""), strict=True)
    try:
        header = next(reader, [])
        rows = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{file}: line {reader.line_num} has {len(row)} fields, and the first line has {len(header)}"
                )
            rows.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise InputError(f"{file}: line {reader.line_num} is not CSV ({one_line(error)[:100]})") from error
    if len(set(header)) != len(header):
        raise InputError(f"{file}: has two columns of the same name; names must differ")
    return rows


def _read_lines(file: Path) -> list[Mapping[str, Any]]:
    rows = []
    for number, line in enumerate(_decoded(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: line {number} is not JSON ({one_line(error)[:100]})") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}: line {number} is no JSON object")
        rows.append(row)
    return rows
