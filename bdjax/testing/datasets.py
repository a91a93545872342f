"""The contract of a dataset."""

import inspect
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from bdjax.datasets import DATASETS, Source, Traits
from bdjax.errors import InputError
from bdjax.plugins import NAME
from bdjax.testing.failure import promised, require
from bdjax.types import Dataset, TrainTest

LEAST_CLASSES, LARGEST_SIDE = 2, 4096


def check_dataset(name: str, source: Source, *, folders: Sequence[pathlib.Path] = ()) -> None:
    """Check all that bdjax relies on: the loader's form, and the training and test rows that it returns.

    Args:
        name: of the dataset.
        source: the entry.
        folders: where its files are; without any, a dataset that needs files is only checked to say so in a line.

    Raises:
        ContractError: it breaks a promise.
    """
    check_entry(name, source)
    if not folders:
        with tempfile.TemporaryDirectory() as empty:
            try:
                first = source.loader([pathlib.Path(empty)], False)
            except InputError as error:
                require("\n" not in str(error), f"dataset {name}: what is missing is said in one line")
                return
            check_rows(name, first, source.loader([pathlib.Path(empty)], False))
        return
    check_rows(name, source.loader(list(folders), False), source.loader(list(folders), False))


def check_entry(name: str, source: Source) -> None:
    """The loader's parameters, and the traits.

    Raises:
        ContractError: they are not as they should be.
    """
    title = f"dataset {name}"
    require(NAME.fullmatch(name), f"{title}: the name has only a to z, 0 to 9 and _")
    require(
        isinstance(source, Source) and isinstance(source.traits, Traits), f"{title}: it is a Source with its Traits"
    )
    wanted = ["folders", "download", *(["side"] if source.of_several_sizes else [])]
    found = list(inspect.signature(source.loader).parameters)
    require(found == wanted, f"{title}: its loader has the parameters {', '.join(wanted)}")
    require(
        source.traits.like in (None, *DATASETS.own), f"{title}: it is like one of bdjax's own datasets, or like none"
    )


def check_rows(name: str, loaded: TrainTest, again: TrainTest) -> None:
    """Shapes, dtypes and ranges of both parts, and that they are the same each time.

    Args:
        name: of the dataset.
        loaded: what its loader returns.
        again: what it returns when called once more.

    Raises:
        ContractError: they are not as they should be.
    """
    title = f"dataset {name}"
    require(isinstance(loaded, TrainTest), f"{title}: its loader returns a TrainTest")
    for kind, part, second in zip(("training", "test"), loaded, again, strict=True):
        check_part(f"{title}, {kind} rows", part)
        require(part.name == name, f"{title}, {kind} rows: they have its name")
        with promised(f"{title}, {kind} rows: they are the same each time, in the same order"):
            np.testing.assert_array_equal(part.images, second.images)
            np.testing.assert_array_equal(part.labels, second.labels)
    train, test = loaded
    is_same = train.image_shape == test.image_shape and train.num_classes == test.num_classes
    require(is_same, f"{title}: both parts have images of one shape, and the same classes")
    require(train.class_names == test.class_names, f"{title}: both parts have the same names of classes")
    require(len(np.unique(train.labels)) == train.num_classes, f"{title}: every class has training rows")


def check_part(title: str, part: Dataset) -> None:
    """Shapes, dtypes and ranges of some rows.

    Args:
        title: of the rows, for the message.
        part: the rows.

    Raises:
        ContractError: they are not as they should be.
    """
    require(isinstance(part, Dataset), f"{title}: they are a bdjax.types.Dataset")
    images, labels = part.images, part.labels
    is_right = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4 and len(images) > 0
    require(is_right, f"{title}: images are a NumPy array uint8 [N, H, W, C]")
    require(images.shape[3] in (1, 3), f"{title}: images are grey or RGB")
    require(
        min(images.shape[1:3]) >= 8 and max(images.shape[1:3]) <= LARGEST_SIDE, f"{title}: images have 8 pixels or more"
    )
    is_right = isinstance(labels, np.ndarray) and labels.dtype == np.int32 and labels.shape == (len(images),)
    require(is_right, f"{title}: labels are a NumPy array int32 [N]")
    require(part.num_classes >= LEAST_CLASSES, f"{title}: there are two classes or more")
    require(labels.min() >= 0 and labels.max() < part.num_classes, f"{title}: labels are from 0 to num_classes - 1")
    require(len(part.class_names) in (0, part.num_classes), f"{title}: every class has a name, or none has")
    require(part.source, f"{title}: they say where they came from")
