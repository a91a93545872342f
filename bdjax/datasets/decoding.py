"""Image files to pixels, by Pillow, from files that nobody vouches for."""

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from bdjax.datasets.validation import one_line
from bdjax.errors import InputError

# Pillow goes by content, not by extension, and some of its other readers start external programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP")
_MAXIMUM_PIXELS = 1 << 25
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
RESIZED = (32, 32)
"""(height, width) of what is resized because its images differ in size."""


class ImageHeader(NamedTuple):
    size: tuple[int, int]
    """(height, width)"""
    is_grey: bool


def read_header(data: bytes, where: object) -> ImageHeader:
    """Reads the size and kind of an image without decoding it.

    Args:
        data: The content of a PNG, JPEG, PPM, BMP or WebP file.
        where: The file to name if something is wrong.

    Returns:
        The header.

    Raises:
        InputError: If this is not such a file, is too large, or has more than 8 bits a channel.
    """
    with _open(data, where) as image:
        return ImageHeader((image.height, image.width), image.mode == "L")


def read_pixels(data: bytes, where: object, *, size: tuple[int, int] | None, grey: bool = False) -> np.ndarray:
    """Decodes an image and resizes it (bilinear, whole frame) if it is not of the size asked for.

    Args:
        data: The content of a PNG, JPEG, PPM, BMP or WebP file.
        where: The file to name if something is wrong.
        size: (height, width) to return; None for the image's own.
        grey: One channel instead of three.

    Returns:
        uint8 [height, width, 1 or 3].

    Raises:
        InputError: As `read_header`, and if the pixels are damaged.
    """
    with _open(data, where) as image:
        try:
            if image.mode == "P":
                image = image.convert("RGBA")  # else Pillow warns of palettes that have transparency
            image = image.convert("L" if grey else "RGB")
        except Exception as error:  # Pillow's decoders raise all sorts on damaged files
            raise InputError(f"{where}: is damaged ({one_line(error)}); a whole image file is needed") from error
        height, width = size or (image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image, np.uint8).reshape(height, width, -1)


def common_size(headers: Sequence[ImageHeader]) -> tuple[tuple[int, int], str]:
    """Decides the one size of a set of images.

    Args:
        headers: Those of all images, at least one.

    Returns:
        (height, width), which is 32 by 32 if the images differ in size, and what `source` has to say of it.
    """
    sizes = {header.size for header in headers}
    if len(sizes) == 1:
        return sizes.pop(), ""
    return RESIZED, f", {len(sizes)} sizes resized to {RESIZED[0]}x{RESIZED[1]}"


def _open(data: bytes, where: object) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:
        raise InputError(f"{where}: cannot be read as an image; a PNG, JPEG, PPM, BMP or WebP is needed") from error
    if image.width * image.height > _MAXIMUM_PIXELS:
        raise InputError(f"{where}: has {image.width}x{image.height} pixels; at most {_MAXIMUM_PIXELS} are read")
    if image.mode not in _MODES:
        raise InputError(f"{where}: has pixels of Pillow's mode {image.mode}; 8 bits a channel are needed")
    return image
