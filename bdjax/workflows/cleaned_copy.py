"""Files that an audit writes beside the report: lists of rows, and a cleaned copy of the data.

    flagged.csv, rows.csv, kept.csv       the flagged rows, all rows, the rows that are not flagged
    cleaned.npz                           the rows that are not flagged, for `bdjax.datasets.load_suspect`
    cleaned/cat/1.png                     or copies of their files, with --copy-files; with metadata.jsonl without class folders

The user's folder is only read, and links that lead out of it are not followed.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from bdjax import atomic
from bdjax.datasets.forms import FORMS, form_of
from bdjax.datasets.metadata import LISTS
from bdjax.datasets.npz import classes_as_arrays
from bdjax.datasets.stacking import split_of
from bdjax.errors import InputError
from bdjax.reporting.audit import names_of
from bdjax.reporting.sections import most_suspicious
from bdjax.run.folder import RunFolder
from bdjax.run.text import csv_text
from bdjax.types import Dataset, PoisonedDataset

_, LIST = LISTS
"""The list of copied files whose folders do not say their classes; JSON has every name, whatever is in it."""


class Copied(NamedTuple):
    """The result of `copy_files`."""

    count: int
    """number of copied files in cleaned/, without the list"""
    left_out: list[dict[str, str]]
    """a "file" and "why" it was not copied, for each file left out"""
    strangers: list[str]
    """other files in cleaned/, which are no copies of kept rows"""


def write_rows(
    folder: RunFolder, dataset: Dataset, flags: np.ndarray, scores: np.ndarray, likely: np.ndarray | None = None
) -> None:
    """Write flagged.csv, rows.csv and kept.csv.

    Args:
        folder: the open run.
        dataset: the n rows.
        flags: bool [n].
        scores: float [n].
        likely: int [n], the likely true class of each flagged row; None if the detector has none.
    """
    order = most_suspicious(flags, scores, len(dataset))
    # Six digits: the rest is noise.
    rounded = {"score": [float(f"{score:.6g}") for score in scores]}
    flagged = {"flagged": flags.astype(int).tolist()}
    likely_class = {}
    if likely is not None:
        names = names_of(dataset)
        likely_class = {"likely_class": likely.tolist(), "likely_class_name": [names[label] for label in likely]}
    files = {
        "flagged.csv": rows_csv(dataset, order[flags[order]], rounded | likely_class),
        "rows.csv": rows_csv(dataset, order, rounded | flagged),
        "kept.csv": rows_csv(dataset, np.flatnonzero(~flags), {}),
    }
    for name, text in files.items():
        # File names that are not UTF-8 contain lone surrogates.
        folder.write_bytes(name, text.encode("utf-8", "backslashreplace"))


def rows_csv(dataset: Dataset, rows: np.ndarray, columns: Mapping[str, Sequence[Any]]) -> str:
    """CSV lines for some rows: number from 0, file if there are files, class, and further columns (values for all n rows)."""
    names, files = names_of(dataset), dataset.files
    header = ["row", *(["file"] if files else []), "class", "class_name", *columns]
    labels = dataset.labels

    def cells(row: int) -> list[Any]:
        values = [column[row] for column in columns.values()]
        return [row, *([files[row]] if files else []), int(labels[row]), names[labels[row]], *values]

    return csv_text(header, (cells(row) for row in map(int, rows)))


# ---- A cleaned copy -------------------------------------------------------------------------------------------------


def write_cleaned(folder: RunFolder, dataset: Dataset, kept: np.ndarray, source_folder: Path | None) -> dict[str, Any]:
    """Write cleaned.npz for rows without files of their own, or copy files into cleaned/.

    Args:
        folder: the open run.
        dataset: the n rows.
        kept: bool [n].
        source_folder: the folder that the rows' files are copied from; None to copy no files.

    Returns:
        "kind": "npz", "folder" or None; the number of kept "rows"; for a folder also the fields of `Copied`.

    Raises:
        InputError: a file cannot be written.
    """
    rows = np.flatnonzero(kept)
    cleaned = {"kind": None, "rows": len(rows)}
    if not len(rows):
        return cleaned
    if not dataset.files or dataset.records:
        write_npz(folder, dataset, rows)
        return cleaned | {"kind": "npz"}
    if source_folder is None:
        return cleaned
    copied = copy_files(folder, dataset, rows, source_folder)
    copies = {"copied": copied.count, "left_out": copied.left_out, "strangers": copied.strangers}
    return cleaned | {"kind": "folder"} | copies


def write_npz(folder: RunFolder, dataset: Dataset, rows: np.ndarray) -> None:
    """Write cleaned.npz: images, labels, num_classes, class_names, the rows' numbers as "row", and known ground truth."""
    names = ["images", "labels"]
    if isinstance(dataset, PoisonedDataset):
        names += ["is_poisoned", "original_labels", "is_cover"]
    arrays = {name: getattr(dataset, name)[rows] for name in names}
    path = folder.file("cleaned.npz")
    try:
        with atomic.replacing(path) as file:  # not in memory: there may be gigabytes
            np.savez_compressed(file, **arrays, row=rows.astype(np.int32), **classes_as_arrays(dataset))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def copy_files(folder: RunFolder, dataset: Dataset, rows: np.ndarray, source_folder: Path) -> Copied:
    """Copy the files of some rows into cleaned/, with a folder for each class if they are in such folders.

    Otherwise they keep their names, and metadata.jsonl lists files and classes: so it is for rows from such a list, and for
    classes that are called like a part of the data ("train").

    Nothing is overwritten: a file that exists already counts as copied if it has the same content.

    Args:
        folder: the open run.
        dataset: the rows, with files.
        rows: int [k].
        source_folder: the folder that the files' names are relative to.

    Raises:
        InputError: a file cannot be written.
    """
    root = source_folder.resolve()
    is_listed = form_of(source_folder) is FORMS["metadata"] or any(map(split_of, dataset.class_names))
    copied, left_out, listed = set(), [], []
    for row in map(int, rows):
        name = dataset.files[row]
        source, why = _source_of(root, name)
        if not why:
            label = dataset.class_names[dataset.labels[row]] if dataset.class_names else ""
            place = PurePosixPath(name) if is_listed else _below_class(PurePosixPath(name), label)
            target, why = _copy(folder, source, place)
        if why:
            left_out.append({"file": name, "why": why})
        else:
            copied.add(target)
            listed.append({"file_name": str(place), "label": label})
    count = len(copied)
    if (is_listed and listed) or any(
        entry["label"] not in PurePosixPath(entry["file_name"]).parts[:-1] for entry in listed
    ):
        copied.add(folder.write_text(f"cleaned/{LIST}", "".join(f"{json.dumps(entry)}\n" for entry in listed)))
    existing = [Path(parent, name) for parent, _, files in os.walk(folder.path / "cleaned") for name in files]
    strangers = sorted(str(path.relative_to(folder.path)) for path in existing if path.resolve() not in copied)
    return Copied(count, left_out, strangers)


def _source_of(root: Path, name: str) -> tuple[Path | None, str]:
    """The file of a row, and why it cannot be copied if it cannot."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return None, "leads out of the folder"
    try:
        path = (root / relative).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return None, "no longer exists"
    if not path.is_relative_to(root):
        return None, "is a link that leads out of the folder"
    return (path, "") if path.is_file() else (None, "is not a file")


def _below_class(name: PurePosixPath, class_name: str) -> PurePosixPath:
    """ "train/cat/1.png" of the class cat -> "cat/1.png"; unchanged if no folder in the path has the class's name."""
    matches = [number for number, part in enumerate(name.parts[:-1]) if part == class_name]
    return PurePosixPath(*name.parts[matches[-1] :]) if matches else name


def _copy(folder: RunFolder, source: Path, name: PurePosixPath) -> tuple[Path, str]:
    """Copy a file to cleaned/name: the new path, and why it was not copied if it was not."""
    try:
        target = folder.file(f"cleaned/{name}")
    except ValueError:  # cleaned/ contains a link or a folder of this name, or a link that leads out
        return Path(), "would be copied over a link or a folder, or to a place outside the run folder"
    try:
        if os.path.lexists(target):
            is_same = target.is_file() and filecmp.cmp(source, target, shallow=False)
            return target, "" if is_same else "a different file of this name exists already"
        with open(source, "rb") as original, atomic.replacing(target, scratch=folder.path) as file:
            shutil.copyfileobj(original, file)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target, ""
