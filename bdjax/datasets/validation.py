"""Checks that every reader makes before its rows become a `Dataset`; errors name the file, the row and what would be right."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bdjax.errors import InputError
from bdjax.settings import ImageSide, mistake
from bdjax.types import Dataset

MAXIMUM_CLASSES = 1_000_000


class ReadOptions(NamedTuple):
    """What the readers of a user's own files tolerate."""

    skip_unreadable: bool = False
    """leave out files that cannot be read, and list them in `Dataset.unread`; by default they are an error"""
    allow_empty_classes: bool = False
    """accept classes without rows; by default labels that start at 1 are an error"""
    image_size: int | None = None
    """height and width that all images are scaled to, see `ImageSide`; by default images of several sizes are an error"""
    image_column: str = ""
    """the column with the images, in data that has columns; by default the one that is called image, img or the like"""
    label_column: str = ""
    """the column with the classes; by default the one that is called label, class or the like"""
    say: Callable[[str], None] | None = None
    """called with the memory that large data takes, before it is read"""


STRICT = ReadOptions()


def check_options(options: ReadOptions) -> None:
    """Checks the options of a reader.

    Raises:
        InputError: If `image_size` is not a size that networks take.
    """
    if options.image_size is not None and (wrong := mistake(ImageSide, options.image_size)):
        raise InputError(f"image_size {options.image_size!r} {wrong}")


def one_line(error: object) -> str:
    """Returns the text of an error on one line, to quote it in a message."""
    return " ".join(str(error).split()) or type(error).__name__


def describe_rows(num_rows: int, num_published: int) -> str:
    """Describes a number of rows for `source`, showing whether the published set is complete."""
    if num_rows == num_published:
        return f"{num_rows:,} rows"
    return f"{num_rows:,} of {num_published:,} rows"


def as_uint8_images(images: np.ndarray, where: object) -> np.ndarray:
    """Checks images and converts them to the form that `Dataset` uses.

    Args:
        images: [N, H, W] or [N, H, W, C], C being 1 or 3; uint8, or float in [0, 1].
        where: The file's name for error messages.

    Returns:
        uint8 [N, H, W, C]; floats are multiplied by 255 and rounded.

    Raises:
        InputError: On a wrong shape or dtype, no rows, or a pixel that is not finite or not in [0, 1].
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:3]:
        raise InputError(
            f"{where}: images have shape {list(images.shape)}; they must be [rows, height, width] or "
            f"[rows, height, width, channels] with 1 or 3 channels{_shape_hint(images.shape)}"
        )
    if len(images) == 0:
        raise InputError(f"{where}: contains no images; at least one row is needed")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        hint = (
            ": images.astype(np.uint8)"
            if images.dtype.kind in "iu" and images.min() >= 0 and images.max() <= 255
            else ""
        )
        raise InputError(f"{where}: images are {images.dtype}; they must be uint8, or float in 0..1{hint}")
    wrong = ~((images >= 0) & (images <= 1))  # NaN fails both comparisons, so it counts as wrong
    if wrong.any():
        row, *pixel = (int(index) for index in np.unravel_index(np.argmax(wrong), wrong.shape))
        value = images[(row, *pixel)]
        hint = _range_hint(float(images.min()), float(images.max()))
        raise InputError(f"{where}: row {row} has pixel value {value} at {pixel}; float pixels must be in 0..1{hint}")
    return np.rint(images * 255).astype(np.uint8)


def _shape_hint(shape: tuple[int, ...]) -> str:
    """The line of NumPy that gives images the right shape, if there is one."""
    if len(shape) == 4 and shape[-1] == 4:
        return ": images[..., :3] leaves out an alpha channel"
    if len(shape) == 4 and shape[-1] == 2:
        return ": images[..., :1] leaves out an alpha channel"
    if len(shape) == 4 and shape[1] in (1, 3):
        return ": np.moveaxis(images, 1, -1)"
    return ""


def _range_hint(lowest: float, highest: float) -> str:
    """The line of NumPy that brings pixels from this range to 0..1, if there is one."""
    if lowest >= -0.5 and highest <= 2:
        return ": np.clip(images, 0, 1)"
    if lowest >= 0 and highest <= 255:
        return ": images / 255"
    return ": (images + 1) / 2" if lowest >= -1 and highest <= 1 else ""


def as_int32_labels(labels: np.ndarray, num_classes: int, where: object) -> np.ndarray:
    """Checks labels and converts them to the form that `Dataset` uses.

    Args:
        labels: Integer [N], each in 0..num_classes-1.
        num_classes: The number of classes.
        where: The file's name for error messages.

    Returns:
        int32 [N].

    Raises:
        InputError: On a wrong shape or dtype, or a label out of range.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{where}: labels are {labels.dtype} of shape {list(labels.shape)}; they must be integers, one per row"
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{where}: row {row} has label {labels[row]}; labels must be in 0..{num_classes - 1}")
    return labels.astype(np.int32)


def make_dataset(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    name: str,
    source: str,
    class_names: tuple[str, ...] = (),
    *,
    where: object,
    files: Sequence[str] = (),
) -> Dataset:
    """Makes a dataset from unchecked rows.

    Args:
        images: See `as_uint8_images`.
        labels: See `as_int32_labels`; one per image.
        num_classes: The number of classes, at least 2.
        name: The name in reports.
        source: The origin of the rows, for reports.
        class_names: Empty, or one name per class.
        where: The file's name for error messages.
        files: Empty, or the file of each row.

    Returns:
        The dataset.

    Raises:
        InputError: If the rows are not as described above.
    """
    if not 2 <= num_classes <= MAXIMUM_CLASSES:
        raise InputError(f"{where}: has {num_classes} class(es); a classifier needs 2 to {MAXIMUM_CLASSES}")
    if class_names and len(class_names) != num_classes:
        raise InputError(f"{where}: has {len(class_names)} class names for {num_classes} classes")
    images = as_uint8_images(images, where)
    if labels.ndim == 1 and len(labels) != len(images):
        raise InputError(f"{where}: has {len(images)} images and {len(labels)} labels; the numbers must be equal")
    if len(files) not in (0, len(images)):
        raise InputError(
            f"{where}: has {len(files)} file names for {len(images)} images; there must be one for each, or none"
        )
    return Dataset(
        images=np.ascontiguousarray(images),
        labels=as_int32_labels(labels, num_classes, where),
        num_classes=num_classes,
        name=name,
        source=source,
        class_names=tuple(class_names),
        files=tuple(files),
    )
