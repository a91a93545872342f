"""The forms that a user's own data has, recognised by what a path holds. `FORMS` is the only list of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bdjax.datasets import coco, columns, metadata, records, tar_shards
from bdjax.datasets.image_folder import load_image_folder, load_suspect_image_folder
from bdjax.datasets.npz import load_npz, load_suspect_npz
from bdjax.datasets.validation import ReadOptions
from bdjax.types import Dataset, TrainTest


class Form(NamedTuple):
    """A form of data at a path."""

    about: str
    """what the path is"""
    holds: Callable[[Path], bool]
    """whether a file or folder that exists is of this form"""
    load: Callable[[Path, ReadOptions], TrainTest]
    load_suspect: Callable[[Path, ReadOptions], Dataset]
    classes: str
    """where the classes come from, and their order"""
    copy: str
    """what an audit leaves of the rows that are not flagged"""


_BY_NAME = "in the order of their names, as numbers if all are numbers"
_AS_NPZ = "`cleaned.npz`, and `kept.csv` with each record"


def _records(about: str, holds: Callable[[Path], bool], find: records.Find, classes: str, copy: str = _AS_NPZ) -> Form:
    return Form(about, holds, partial(records.load, find), partial(records.load_suspect, find), classes, copy)


FORMS: dict[str, Form] = {
    "npz": Form(
        "an `.npz` file of arrays",
        lambda path: path.is_file() and path.suffix == ".npz",
        load_npz,
        load_suspect_npz,
        "the numbers in `labels`, with the names in `class_names`",
        "`cleaned.npz`",
    ),
    "arrow": _records(
        "a dataset of Hugging Face on disk (`save_to_disk`)",
        columns.holds_arrow,
        columns.find_arrow,
        f"a column; of the type ClassLabel in its order, otherwise {_BY_NAME}",
    ),
    "parquet": _records(
        "a `.parquet` file, or a folder of them",
        columns.holds_parquet,
        columns.find_parquet,
        f"a column; of the type ClassLabel in its order, otherwise {_BY_NAME}",
    ),
    "tar": _records(
        "tar shards (WebDataset): a `.tar`, `.tar.gz` or `.tgz`, or a folder of them",
        tar_shards.holds,
        tar_shards.find,
        f"the text of `.cls` or `.txt`, or a field of `.json`; {_BY_NAME}",
    ),
    "metadata": _records(
        "a folder of images with `metadata.csv` or `metadata.jsonl`",
        metadata.holds,
        metadata.find,
        f"a column; {_BY_NAME}",
        "with `--copy-files` copies of the files, and their list",
    ),
    "coco": _records(
        "a `.json` of COCO's form, or a folder with one: every box is a row, cut out of its image",
        coco.holds,
        coco.find,
        "the categories, in the order of their ids",
    ),
    "folder": Form(
        "a folder of images with a sub-folder for each class",
        Path.is_dir,
        load_image_folder,
        load_suspect_image_folder,
        f"the names of the sub-folders, {_BY_NAME}",
        "with `--copy-files` copies of the files",
    ),
}
"""Name -> form; the first that holds is taken."""


def form_of(path: Path) -> Form | None:
    """The form of a file or folder that exists; None if it has none."""
    return next((form for form in FORMS.values() if form.holds(path)), None)
