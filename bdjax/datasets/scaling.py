"""Images scaled to one size, and what that does to the small patterns in them.

A user's images are scaled only on request: a trigger of 3x3 pixels in a photograph of 224x224 is less than half a pixel at
32x32, and a run on such thumbnails would say nothing about it. Texts give sizes as width x height, as image tools do; code has
(height, width), as arrays do.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from bdjax.errors import InputError
from bdjax.types import Dataset

FLAG = "--image-size"
"""The flag of `ReadOptions.image_size`."""
MOST_SIZES = 5
"""Most sizes that a text names."""
PATCH = 3
"""Side in pixels of the patch that texts translate to the originals."""

Size = tuple[int, int]
"""(height, width)"""


def scale(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Scales an image, antialiased (bilinear over all pixels that a result covers) and without cropping.

    Args:
        pixels: uint8 [H, W, 1 or 3].
        size: of the result.

    Returns:
        uint8 [*size, 1 or 3]; the same array if it has this size.
    """
    if pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).reshape(*size, -1)


def scaled(dataset: Dataset, side: int | None) -> Dataset:
    """Scales all images of a dataset.

    Args:
        dataset: with images of one size.
        side: height and width of the result; None for the images' own.

    Returns:
        The dataset with `original_sizes` and a `source` that says so; the same if nothing changes.
    """
    size = dataset.image_shape[:2]
    if side is None or size == (side, side):
        return dataset
    images = np.empty((len(dataset), side, side, dataset.image_shape[2]), np.uint8)
    for row, pixels in enumerate(dataset.images):
        images[row] = scale(pixels, (side, side))
    sizes = {size: len(dataset)}
    source = dataset.source + scaling_note(sizes, (side, side))
    return dataclasses.replace(dataset, images=images, source=source, original_sizes=sizes)


def check_one_size(where: object, sizes: Mapping[Size, int]) -> None:
    """Refuses images of several sizes where `image_size` is not set.

    Args:
        where: The file or folder for the error message.
        sizes: (height, width) -> number of images.

    Raises:
        InputError: There is more than one size.
    """
    if len(sizes) > 1:
        raise InputError(
            f"{where}: images have {len(sizes):,} sizes ({in_words(sizes)}); one size is needed: {FLAG}=N scales all images to "
            f"N x N pixels, for instance {FLAG}={suggested_side(sizes)}"
        )


def suggested_side(sizes: Mapping[Size, int]) -> int:
    """A side that networks are quick at and that keeps most detail: 32, 64 or 96, the largest that the most frequent size has;
    32 for a smaller one."""
    (size, _), *_ = ranked(sizes)
    return max((side for side in (32, 64, 96) if side <= min(size)), default=32)


def ranked(sizes: Mapping[Size, int]) -> list[tuple[Size, int]]:
    """Sizes and their numbers of images, most frequent first, then largest."""
    return sorted(sizes.items(), key=lambda item: (-item[1], -item[0][0] * item[0][1], item[0]))


def in_words(sizes: Mapping[Size, int]) -> str:
    """ "224x224: 1,000, 500x375: 20 and 3 more", most frequent first, with the number of images of each."""
    named = [f"{as_text(size)}: {count:,}" for size, count in ranked(sizes)[:MOST_SIZES]]
    more = f" and {len(sizes) - MOST_SIZES:,} more" if len(sizes) > MOST_SIZES else ""
    return ", ".join(named) + more


def as_text(size: Sequence[float]) -> str:
    """(375, 500) -> "500x375"; at most three digits of numbers that are not whole."""
    return "x".join(f"{length:,.0f}" if length >= 100 else f"{length:.3g}" for length in reversed(size)).replace(
        ",", ""
    )


def scaling_note(sizes: Mapping[Size, int], size: Size) -> str:
    """The note in `source`; "" if no image was scaled.

    Args:
        sizes: of the originals -> number of images.
        size: of the result.
    """
    if not sizes or set(sizes) == {size}:
        return ""
    what = as_text(next(iter(sizes))) if len(sizes) == 1 else f"{len(sizes):,} sizes"
    return f", {what} scaled to {as_text(size)}"


def scaling_text(name: str, sizes: Mapping[Size, int], size: Size) -> str:
    """A sentence for reports: what the images of a dataset were scaled from, and what a small patch is in the originals.

    Args:
        name: of the dataset.
        sizes: of the originals -> number of images, at least one.
        size: of the result.
    """
    order = [original for original, _ in ranked(sizes)]
    first, largest = order[0], max(order, key=lambda original: original[0] * original[1])
    patch = f"{PATCH}x{PATCH} pixels here are {_patch_in(first, size)}"
    if len(order) == 1:
        what = f"from {as_text(first)} to {as_text(size)} pixels: {patch} in the originals"
    else:
        what = f"from {len(order):,} sizes ({in_words(sizes)}) to {as_text(size)} pixels: "
        what += f"{patch} in an image of {as_text(first)}"
        if largest != first:
            what += f" and {_patch_in(largest, size)} in one of {as_text(largest)}"
    lost = largest[0] > size[0] or largest[1] > size[1]
    return f"The images of {name} were scaled {what}{'; a smaller trigger may be lost' if lost else ''}."


def _patch_in(original: Size, size: Size) -> str:
    return as_text([PATCH * length / here for length, here in zip(original, size, strict=True)])


def count_sizes(*parts: Mapping[Size, int]) -> dict[Size, int]:
    """The sizes of several parts of a dataset together, most frequent first."""
    total: Counter[Size] = Counter()
    for part in parts:
        total.update(part)
    return dict(ranked(total))


def size_hint(wanted: Sequence[int], shape: Sequence[int], setting: str = f"{FLAG}=") -> str:
    """What an error message on images of the wrong shape adds if scaling them would be right; "" otherwise.

    Args:
        wanted: (H, W, C).
        shape: (H, W, C) of the images.
        setting: how the reader of the message sets the size.
    """
    height, width, channels = wanted
    if height != width or channels != shape[2] or tuple(wanted) == tuple(shape):
        return ""
    return f"; {setting}{height} scales images to {height}x{width} pixels"
