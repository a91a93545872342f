"""Images of one size that are read one by one into one array; and what the readers of a user's own files share beside that."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from bdjax.datasets.decoding import Picture
from bdjax.datasets.files import free_memory
from bdjax.datasets.scaling import FLAG, as_text
from bdjax.datasets.splits import fixed_test_split, take_part
from bdjax.datasets.validation import one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest, Unread

_USABLE_MEMORY = 0.8
_SAID_BYTES = 1 << 26
"""The memory that images take is said from here on."""
_MOST_NAMED = 10
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
}
"""a part of a dataset -> what people call its folder, in any case"""
FACTS = {
    "nested": "in folders below a class",
    "splits": "in a class's folder that is called train, test or val",
    "links": "by symbolic links",
    "shared": "whose file another row has, too",
    "copies": "with the same bytes as another row",
    "contradictions": "with the bytes of a row of another class",
}
"""facts on single files -> how `source` counts them, after a number"""
_SPLIT_OF_NAME = {name: split for split, names in SPLITS.items() for name in names}


def split_of(name: str) -> str | None:
    """The part that a folder's name stands for: "train", "test", "val", or None."""
    return _SPLIT_OF_NAME.get(name.lower())


def in_order(names: Collection[str]) -> list[str]:
    """The names of classes in the order of their labels: as numbers if all are numbers."""
    are_numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    return sorted(names, key=lambda name: (int(name) if are_numbers else 0, name))


def refusal(path: Path, unreadable: Sequence[Unread], noun: str = "files") -> InputError:
    """The error for rows that cannot be read, which names the first of them."""
    hint = f"--skip-unreadable leaves such {noun} out"
    if len(unreadable) == 1:
        return InputError(one_line(f"{path / unreadable[0].file}: {unreadable[0].reason}; {hint}"))
    named = "; ".join(f"{file} {fault(reason)}" for file, reason in unreadable[:_MOST_NAMED])
    more = f"; and {len(unreadable) - _MOST_NAMED:,} more" if len(unreadable) > _MOST_NAMED else ""
    return InputError(one_line(f"{path}: {len(unreadable):,} {noun} cannot be read ({hint}): {named}{more}"))


def fault(reason: str) -> str:
    """What is wrong, without what would be right."""
    return reason.split("; ")[0]


class Stack:
    """Images of one size in one array. It gets colours with the first image that has some, so that each file is read once."""

    def __init__(self, path: Path, capacity: int, say: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.say = say
        self.capacity = capacity
        self.is_grey = True
        self.images: np.ndarray | None = None
        self.count = 0

    def add(self, picture: Picture) -> None:
        """Adds an image.

        Raises:
            InputError: if the images will not fit into memory.
        """
        self.is_grey &= picture.header.is_grey
        form = (*picture.pixels.shape[:2], 1 if self.is_grey else 3)
        if self.images is None or self.images.shape[1:] != form:
            self._change(form)
        self.images[self.count] = picture.pixels
        self.count += 1

    def filled(self) -> np.ndarray:
        """uint8 [N, H, W, C]: the images so far."""
        return np.empty((0, 1, 1, 1), np.uint8) if self.images is None else self.images[: self.count]

    def _change(self, form: tuple[int, int, int]) -> None:
        previous, free = self.filled(), free_memory()
        num_bytes = self.capacity * math.prod(form)
        too_large = InputError(
            f"{self.path}: {self.capacity:,} images of {as_text(form[:2])} pixels and {form[2]} channel(s) take "
            f"{num_bytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of memory are free; use fewer images, or {FLAG}=N "
            "to make them smaller"
        )
        if num_bytes > _USABLE_MEMORY * free:
            raise too_large
        if self.say is not None and num_bytes >= _SAID_BYTES and not self.count:
            self.say(
                f"{self.capacity:,} images of {as_text(form[:2])} pixels and {form[2]} channel(s) take "
                f"{num_bytes / 2**30:,.2f} GiB of {free / 2**30:,.1f} GiB of free memory"
            )
        try:
            self.images = np.empty((self.capacity, *form), np.uint8)
        except MemoryError as error:
            raise too_large from error
        if self.count:
            self.images[: self.count] = previous


def split_rows(dataset: Dataset) -> TrainTest:
    """The fixed 80/20 split of data without a split.

    Raises:
        InputError: If a class is too small to have a test image.
    """
    rows_of_parts = fixed_test_split(dataset.labels)
    if len(rows_of_parts[1]) == 0:
        raise InputError(
            f"{dataset.source}: 20 % of each class, for testing, is less than one image; each class needs at least 3 images"
        )
    return TrainTest(*(take_part(dataset, *part) for part in zip(rows_of_parts, ("train", "test"), strict=True)))
