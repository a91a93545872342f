"""Decoding of untrusted image files with Pillow."""

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from bdjax.datasets.validation import one_line
from bdjax.errors import InputError

# Pillow detects the format from the content, and some of its other readers start external programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP")
_MAXIMUM_PIXELS = 1 << 25
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
RESIZED = (32, 32)
"""(height, width) that images are resized to if their sizes differ."""


class ImageHeader(NamedTuple):
    size: tuple[int, int]
    """(height, width)"""
    is_grey: bool


def read_header(data: bytes, where: object) -> ImageHeader:
    """Reads the size and kind of an image without decoding it.

    Args:
        data: The content of a PNG, JPEG, PPM, BMP or WebP file.
        where: The file's name for error messages.

    Returns:
        The header.

    Raises:
        InputError: If the file has another format, is too large, or has more than 8 bits per channel.
    """
    with _open(data, where) as image:
        return ImageHeader((image.height, image.width), image.mode == "L")


def read_pixels(data: bytes, where: object, *, size: tuple[int, int] | None, grey: bool = False) -> np.ndarray:
    """Decodes an image and resizes it (bilinear, without cropping) if it does not have the requested size.

    Args:
        data: The content of a PNG, JPEG, PPM, BMP or WebP file.
        where: The file's name for error messages.
        size: (height, width) of the result; None for the image's own size.
        grey: Whether to return one channel instead of three.

    Returns:
        uint8 [height, width, 1 or 3].

    Raises:
        InputError: As `read_header`, and if the pixels are damaged.
    """
    with _open(data, where) as image:
        try:
            if image.mode == "P":
                image = image.convert("RGBA")  # otherwise Pillow warns about palettes with transparency
            image = image.convert("L" if grey else "RGB")
        except Exception as error:  # Pillow's decoders raise almost any exception on a damaged file
            raise InputError(f"{where}: is damaged ({one_line(error)}); an intact image file is needed") from error
        height, width = size or (image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image, np.uint8).reshape(height, width, -1)


def common_size(headers: Sequence[ImageHeader]) -> tuple[tuple[int, int], str]:
    """Determines the common size of a set of images.

    Args:
        headers: The headers of all images, at least one.

    Returns:
        (height, width), which is 32 by 32 if the sizes differ; and a note on resizing for `source`.
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
        raise InputError(f"{where}: has {image.width}x{image.height} pixels; the limit is {_MAXIMUM_PIXELS} pixels")
    if image.mode not in _MODES:
        raise InputError(f"{where}: has Pillow's pixel mode {image.mode}; 8 bits per channel are needed")
    return image
