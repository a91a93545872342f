"""Datasets by name or path, with one module for each kind of source.

To add a dataset, add a module with a loader, and a line in `_OWN` with its traits; datasets of installed plugins are found by
themselves.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bdjax.datasets.cifar import load_cifar10, load_cifar100
from bdjax.datasets.digits import load_digits
from bdjax.datasets.flowers17 import load_flowers17
from bdjax.datasets.forms import FORMS, Form, form_of
from bdjax.datasets.gtsrb import load_gtsrb
from bdjax.datasets.locate import search_folders
from bdjax.datasets.mnist import load_fashion_mnist, load_mnist
from bdjax.datasets.scaling import scaled
from bdjax.datasets.textures import load_textures
from bdjax.datasets.tfds import PREFIX as TFDS_PREFIX
from bdjax.datasets.tfds import load_tfds
from bdjax.datasets.tiny_imagenet import load_tiny_imagenet
from bdjax.datasets.validation import STRICT, ReadOptions, check_options
from bdjax.errors import InputError
from bdjax.plugins import Registry
from bdjax.types import Dataset, TrainTest, Unread

__all__ = [
    "DATASETS",
    "FORMS",
    "TFDS_PREFIX",
    "ReadOptions",
    "Source",
    "Traits",
    "check_like",
    "load",
    "load_suspect",
    "traits",
    "unread_of",
]

Loader = Callable[..., TrainTest]
"""`loader(folders, download)` searches the folders in order, then downloads if allowed."""


class Traits(NamedTuple):
    """Properties of a dataset that determine the defaults of runs on it."""

    flips: bool = False
    """whether a mirrored image has the same class"""
    like: str | None = None
    """a similar dataset, whose sizes and schedules quick runs use; None if there is none"""


class Source(NamedTuple):
    """A named dataset."""

    loader: Loader
    traits: Traits = Traits()
    of_several_sizes: bool = False
    """whether images have several sizes; the loader then has a parameter `side` that they are scaled to, 32 by default"""


_OWN: Mapping[str, Source] = {
    "digits": Source(load_digits),
    "textures": Source(load_textures),
    "mnist": Source(load_mnist),
    "fashion_mnist": Source(load_fashion_mnist, Traits(like="mnist")),
    "cifar10": Source(load_cifar10, Traits(flips=True)),
    "cifar100": Source(load_cifar100, Traits(flips=True, like="cifar10")),
    "gtsrb": Source(load_gtsrb, Traits(like="cifar10"), of_several_sizes=True),
    "tiny_imagenet": Source(load_tiny_imagenet, Traits(flips=True)),
    "flowers17": Source(load_flowers17, Traits(flips=True), of_several_sizes=True),
}


def _mistake(name: str, entry: Any) -> str:
    """What is wrong with the entry of a plugin."""
    if not isinstance(entry, Source) or not callable(entry.loader) or not isinstance(entry.traits, Traits):
        return f"is of the type {type(entry).__name__}, not a bdjax.datasets.Source with a loader and its Traits"
    if entry.traits.like not in (None, *_OWN):
        return f"is like {entry.traits.like!r}, which is not one of {', '.join(_OWN)}"
    return ""


DATASETS: Registry[Source] = Registry("dataset", _OWN, _mistake)


def traits(name_or_path: str) -> Traits:
    """The traits of a dataset in `DATASETS`; the defaults for anything else."""
    return DATASETS[name_or_path].traits if name_or_path in DATASETS else Traits()


def check_like(like: str | None, where: str) -> str | None:
    """Check the name of a dataset whose settings to use, and return it.

    Args:
        like: a key of `DATASETS`, or None.
        where: its name in the error message: "--like".

    Raises:
        InputError: if the dataset is unknown.
    """
    if like is not None and like not in DATASETS:
        raise InputError(f"{where} {like!r} is not one of {', '.join(DATASETS)}")
    return like


def load(
    name_or_path: str,
    data_dir: str | os.PathLike | None = None,
    *,
    download: bool = True,
    options: ReadOptions = STRICT,
) -> TrainTest:
    """Loads a dataset into memory.

    Args:
        name_or_path: A name in `DATASETS`; "tfds:NAME" for a prepared set of TensorFlow Datasets; or the path of data in
            one of the `FORMS`, such as a folder of images with a sub-folder for each class. A name takes precedence over a
            folder of the same name: write "./mnist" for the folder.
        data_dir: The folder to search first for named sets; then $BDJAX_DATA_DIR and the user's cache are searched.
        download: Whether to download a named set that is not found, into the cache. Its checksum is verified.
        options: What to tolerate, and the columns of tables; its `image_size` applies to every dataset.

    Returns:
        The training and the test rows: images uint8 [N, H, W, C], labels int32 [N].

    Raises:
        InputError: If the dataset is unknown, or a file is missing or invalid. One line that says what is wrong and what
            would be right.
    """
    check_options(options)
    published = _load_published(name_or_path, data_dir, download, options)
    if published is not None:
        return published
    path, form = _existing_path(name_or_path)
    return form.load(path, options)


def load_suspect(
    name_or_path: str,
    data_dir: str | os.PathLike | None = None,
    *,
    download: bool = True,
    options: ReadOptions = STRICT,
) -> Dataset:
    """Loads every row of third-party training data, to be checked for poison.

    Where a set has no split, `load` sets a fifth of the rows aside for testing; this function returns those as well.

    Args:
        name_or_path: As for `load`.
        data_dir: As for `load`.
        download: As for `load`.
        options: As for `load`.

    Returns:
        The training part of a set by name, and of data that has one; of other data all rows, in its order. A
        `PoisonedDataset` if an .npz says which rows are poisoned.

    Raises:
        InputError: As `load`; but data may have a training part without a test part, and any number of images per class.
    """
    check_options(options)
    published = _load_published(name_or_path, data_dir, download, options)
    if published is not None:
        return published.train
    path, form = _existing_path(name_or_path)
    return form.load_suspect(path, options)


def unread_of(*parts: Dataset) -> tuple[Unread, ...]:
    """Everything that the source of these rows has and that was not read, each entry once."""
    return tuple(dict.fromkeys(entry for part in parts for entry in part.unread))


def _load_published(
    name: str, data_dir: str | os.PathLike | None, download: bool, options: ReadOptions
) -> TrainTest | None:
    folders, side = search_folders(data_dir), options.image_size
    if name in DATASETS:
        source = DATASETS[name]
        if side and source.of_several_sizes:
            return source.loader(folders, download, side=side)
        return TrainTest(*(scaled(part, side) for part in source.loader(folders, download)))
    if name.startswith(TFDS_PREFIX):
        return load_tfds(name.removeprefix(TFDS_PREFIX), folders, options)
    return None


def _existing_path(name_or_path: str) -> tuple[Path, Form]:
    """The path of a user's own data, and the form that it has."""
    path = Path(name_or_path).expanduser()
    forms = "; ".join(form.about.replace("`", "") for form in FORMS.values())
    if name_or_path and path.exists():  # "" would be the current folder
        form = form_of(path) if path.is_dir() or path.is_file() else None
        if form is None:
            raise InputError(f"{path}: is in no form that is read, which are: {forms}")
        return path, form
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"{path}: no such file or folder")
    close = difflib.get_close_matches(name_or_path.lower(), DATASETS, n=1)
    suggestion = f" (did you mean {close[0]}?)" if close else ""
    raise InputError(
        f"{name_or_path!r}: no such dataset, folder or file{suggestion}; datasets are {', '.join(DATASETS)}, "
        f"{TFDS_PREFIX}NAME, or the path of data in one of these forms: {forms}"
    )
