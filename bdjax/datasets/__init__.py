"""Where images come from: one file for each kind of source, found here by name or path.

A new dataset is one new file with a loader, and one line in `DATASETS`, which also says what is true of the set.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from bdjax.datasets.cifar import load_cifar10, load_cifar100
from bdjax.datasets.digits import load_digits
from bdjax.datasets.flowers17 import load_flowers17
from bdjax.datasets.gtsrb import load_gtsrb
from bdjax.datasets.image_folder import load_image_folder, load_suspect_image_folder
from bdjax.datasets.locate import search_folders
from bdjax.datasets.mnist import load_fashion_mnist, load_mnist
from bdjax.datasets.npz import load_npz, load_suspect_npz
from bdjax.datasets.tfds import PREFIX as TFDS_PREFIX
from bdjax.datasets.tfds import load_tfds
from bdjax.datasets.tiny_imagenet import load_tiny_imagenet
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest

__all__ = ["DATASETS", "TFDS_PREFIX", "Source", "Traits", "check_like", "load", "load_suspect", "traits"]

Loader = Callable[[tuple[Path, ...], bool], TrainTest]
"""`loader(folders, download)`: looks in the folders in order, then fetches if it may."""


class Traits(NamedTuple):
    """What is true of a dataset, and decides on the defaults of runs on it."""

    flips: bool = False
    """a mirrored picture is of the same class"""
    like: str | None = None
    """another set, whose sizes and schedules of quick runs fit; None if it resembles no other"""


class Source(NamedTuple):
    """A named dataset."""

    loader: Loader
    traits: Traits = Traits()


DATASETS: Mapping[str, Source] = {
    "digits": Source(load_digits),
    "mnist": Source(load_mnist),
    "fashion_mnist": Source(load_fashion_mnist, Traits(like="mnist")),
    "cifar10": Source(load_cifar10, Traits(flips=True)),
    "cifar100": Source(load_cifar100, Traits(flips=True, like="cifar10")),
    "gtsrb": Source(load_gtsrb, Traits(like="cifar10")),
    "tiny_imagenet": Source(load_tiny_imagenet, Traits(flips=True)),
    "flowers17": Source(load_flowers17, Traits(flips=True)),
}


def traits(name_or_path: str) -> Traits:
    """What is true of a dataset: of a name in `DATASETS`, what stands there; of anything else nothing is known."""
    return DATASETS[name_or_path].traits if name_or_path in DATASETS else Traits()


def check_like(like: str | None, where: str) -> str | None:
    """A named dataset whose settings are to be adopted, as it is; None for none.

    Args:
        like: a key of `DATASETS`, or None.
        where: what the message calls it: "--like".

    Raises:
        InputError: there is no such dataset.
    """
    if like is not None and like not in DATASETS:
        raise InputError(f"{where} {like!r} is not one of {', '.join(DATASETS)}")
    return like


def load(name_or_path: str, data_dir: str | os.PathLike | None = None, *, download: bool = True) -> TrainTest:
    """Loads a dataset into memory.

    Args:
        name_or_path: A name in `DATASETS`; "tfds:NAME" for a prepared set of TensorFlow Datasets; a folder of images
            with a sub-folder for each class; or an .npz file. A name goes before a folder that is called the same:
            write "./mnist" for the folder.
        data_dir: Where named sets are looked for first; then in $BDJAX_DATA_DIR, then in the user's cache.
        download: Whether to fetch a named set that is nowhere, into the cache. Its checksum is verified then.

    Returns:
        The training and the test rows: images uint8 [N, H, W, C], labels int32 [N].

    Raises:
        InputError: If there is no such dataset, or a file is missing or not what it should be. One line that says what
            is wrong and what would be right.
    """
    published = _load_published(name_or_path, data_dir, download)
    if published is not None:
        return published
    path = _existing_path(name_or_path)
    return load_image_folder(path) if path.is_dir() else load_npz(path)


def load_suspect(name_or_path: str, data_dir: str | os.PathLike | None = None, *, download: bool = True) -> Dataset:
    """Loads every row of third-party training data, to be looked at for poison.

    `load` sets a fifth of the rows aside for testing where a set comes without a split; here those are looked at as well.

    Args:
        name_or_path: As for `load`.
        data_dir: As for `load`.
        download: As for `load`.

    Returns:
        The training part of a set by name, of a folder that has `train`, and of an .npz with `train_images`; of any other
        folder or .npz all rows, in its order. A `PoisonedDataset` where an .npz tells which rows are poisoned.

    Raises:
        InputError: As `load`; a folder may have `train` without a test part, and any number of images a class.
    """
    published = _load_published(name_or_path, data_dir, download)
    if published is not None:
        return published.train
    path = _existing_path(name_or_path)
    return load_suspect_image_folder(path) if path.is_dir() else load_suspect_npz(path)


def _load_published(name: str, data_dir: str | os.PathLike | None, download: bool) -> TrainTest | None:
    folders = search_folders(data_dir)
    if name in DATASETS:
        return DATASETS[name].loader(folders, download)
    if name.startswith(TFDS_PREFIX):
        return load_tfds(name.removeprefix(TFDS_PREFIX), folders)
    return None


def _existing_path(name_or_path: str) -> Path:
    """The path of a folder or of an .npz file."""
    path = Path(name_or_path).expanduser()
    if name_or_path and (path.is_dir() or (path.suffix == ".npz" and path.is_file())):  # "" would be the current folder
        return path
    if name_or_path and path.exists():
        raise InputError(f"{path}: is neither a folder of images nor an .npz file")
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"{path}: there is no such file or folder")
    close = difflib.get_close_matches(name_or_path.lower(), DATASETS, n=1)
    suggestion = f" (is {close[0]} meant?)" if close else ""
    raise InputError(
        f"{name_or_path!r}: there is no such dataset, folder or file{suggestion}; there are {', '.join(DATASETS)}, "
        f"{TFDS_PREFIX}NAME, a folder of images by its path, and an .npz file by its path"
    )
