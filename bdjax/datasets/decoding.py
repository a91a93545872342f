"""Decoding of untrusted image files with Pillow.

A file's format is detected from its content. For what a file says about how its pixels are to be read there is one rule each,
`RULES`; a decoded picture names those that applied, for readers to count.
"""

import contextlib
import io
import logging
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from bdjax.datasets.scaling import count_sizes, scale
from bdjax.datasets.validation import one_line
from bdjax.errors import InputError

FORMATS = "PNG, JPEG, PPM, BMP, WebP, GIF, TIFF and JPEG 2000"
SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2", ".j2k")
SUFFIXES += (".jpf", ".jpx", ".pgm", ".pbm", ".pnm", ".dib", ".apng")
"""Of files that are taken for images, in lower case."""
SMALL = 32
"""Height and width that the images of published sets of several sizes are scaled to by default."""
RULES: Mapping[str, str] = {
    "orientation": "turned as EXIF says",
    "transparency": "with transparency, which is dropped",
    "palette": "with a palette",
    "depth": "with more than 8 bits per channel, of which the upper 8 are read",
    "cmyk": "converted from CMYK",
    "frames": "with several frames, of which the first is read",
}
"""What a file can say about how its pixels are to be read -> how `source` counts it, after a number."""

# Formats that Pillow decodes within the process; some of its other readers start programs (EPS: Ghostscript).
_STARTS = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "PPM": tuple(b"P%d" % number for number in range(1, 7)),
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "JPEG2000": (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
    "DIB": tuple(bytes((size, 0, 0, 0)) for size in (12, 40, 52, 56, 64, 108, 124)),
}
_BY_FIRST_BYTE = {
    first: [(name, start) for name, starts in _STARTS.items() for start in starts if start[0] == first]
    for first in {start[0] for starts in _STARTS.values() for start in starts}
}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr")
_MAXIMUM_PIXELS = 1 << 25
# Each of these bounds is on a kind of small file that would keep a decoder busy for minutes, or fill the memory.
_ALWAYS_QUICK = 1 << 16  # bytes of a file; counting the pieces of small ones would take longer than reading them
_MAXIMUM_PIECES = 10_000
_MAXIMUM_METADATA = {"TIFF": 1 << 22, "JPEG": 1 << 24}
_MAXIMUM_OTHER_METADATA = 1 << 25
_MAXIMUM_SCANNED_PIXELS = 1 << 30
_MAXIMUM_SLOW_PIXELS = 1 << 19
_SLOW_DECODERS = {"bmp_rle": 4, "ppm": 8, "ppm_plain": 24}
"""decoders of Pillow in Python -> the most bytes of a file per pixel"""
_MAXIMUM_COMMENTS = 1_000
_MAXIMUM_TILES = 50_000
_MAXIMUM_TILE_PIXELS = 1 << 22  # or four times the image
_MAXIMUM_EXIF = 1 << 18

_TILE_WIDTH, _TILE_HEIGHT, _BITS_PER_SAMPLE, _ORIENTATION = 322, 323, 258, 274  # tags of TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow logs damage that it also raises; without a handler, Python would print it.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_SAYS_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe", b"tiff:Orientation")


class ImageHeader(NamedTuple):
    size: tuple[int, int]
    """(height, width), upright"""
    is_grey: bool


class Picture(NamedTuple):
    """A decoded image."""

    pixels: np.ndarray
    """uint8 [height, width, 1 or 3]"""
    header: ImageHeader
    """of the file, so before scaling"""
    rules: tuple[str, ...]
    """the keys of `RULES` that applied"""


def read_header(data: bytes, where: object) -> ImageHeader:
    """Reads the size and kind of an image, decoding it only if it may have to be turned.

    Args:
        data: The content of an image file in one of `FORMATS`.
        where: The file's name for error messages.

    Returns:
        The header.

    Raises:
        InputError: If the file is empty, damaged, too large, not in one of these formats, or has pixels that are not of 8 or
            16 bits per channel.
    """
    with warnings.catch_warnings(action="ignore"), _open(data, where) as image:
        try:
            if image.format in ("PNG", "TIFF") and _may_be_turned(image, data):
                _load(image)  # a PNG may say so after its pixels, and a TIFF is turned by Pillow
            size = (image.height, image.width)
            is_turned = image.format != "TIFF" and _orientation(image) >= 5
            return ImageHeader(size[::-1] if is_turned else size, _is_grey(image))
        except InputError:
            raise
        except Exception as error:
            raise _damaged(where, error) from error


def decode(data: bytes, where: object, *, size: tuple[int, int] | None = None, grey: bool | None = None) -> Picture:
    """Decodes an image, upright, and scales it as `scale` does if it does not have the requested size.

    Args:
        data: The content of an image file in one of `FORMATS`.
        where: The file's name for error messages.
        size: (height, width) of the result; None for the image's own size.
        grey: Whether to return one channel instead of three; None for the image's own number.

    Returns:
        The pixels, and which of `RULES` applied.

    Raises:
        InputError: As `read_header`, and if the pixels are damaged.
    """
    with warnings.catch_warnings(action="ignore"), _open(data, where) as image:
        try:
            rules = []
            if getattr(image, "is_animated", False):
                rules.append("frames")
            if _is_deep(image, data):
                rules.append("depth")
            is_grey, is_tiff = _is_grey(image), image.format == "TIFF"
            orientation = _orientation(image) if is_tiff else 1
            _load(image)
            converted = _converted(image, "L" if (is_grey if grey is None else grey) else "RGB", rules)
            if not is_tiff:  # Pillow has turned a TIFF
                orientation = _orientation(image)
                converted = converted.transpose(_TURNS[orientation]) if orientation > 1 else converted
            if orientation > 1:
                rules.append("orientation")
            header = ImageHeader((converted.height, converted.width), is_grey)
            pixels = np.asarray(converted, np.uint8).reshape(*header.size, -1)
            return Picture(scale(pixels, size or header.size), header, tuple(rules))
        except InputError:
            raise
        except Exception as error:  # Pillow's decoders raise almost any exception on a damaged file
            raise _damaged(where, error) from error


def read_pixels(data: bytes, where: object, *, size: tuple[int, int] | None, grey: bool = False) -> np.ndarray:
    """Decodes an image as `decode` does, for readers that need nothing but its pixels.

    Returns:
        uint8 [height, width, 1 or 3].
    """
    return decode(data, where, size=size, grey=grey).pixels


def read_scaled(
    files: Sequence[tuple[Callable[[], bytes], object]], side: int
) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
    """Decodes colour images of any size and scales them to one.

    Args:
        files: a function that returns the content, and the name for error messages, of each file.
        side: height and width of the result.

    Returns:
        uint8 [N, side, side, 3]; and (height, width) of the originals -> their number.

    Raises:
        InputError: As `decode`.
    """
    images, sizes = np.empty((len(files), side, side, 3), np.uint8), Counter()
    for row, (read, where) in enumerate(files):
        picture = decode(read(), where, size=(side, side), grey=False)
        images[row] = picture.pixels
        sizes[picture.header.size] += 1
    return images, count_sizes(sizes)


def rules_note(counts: Mapping[str, int]) -> str:
    """The note in `source` on the rules that were used.

    Args:
        counts: key of `RULES` -> number of files.
    """
    return "".join(f", {counts[rule]:,} {text}" for rule, text in RULES.items() if counts.get(rule))


# ---- Opening, within bounds ------------------------------------------------------------------------------------------


class _BoundedFile(io.BytesIO):
    """A file in memory that can be read in a limited number of pieces: parsers take a microsecond or more for each."""

    def __init__(self, data: bytes, where: object, num_bytes: int) -> None:
        super().__init__(data)
        self.where = where
        self.pieces = _MAXIMUM_PIECES
        self.bytes = num_bytes

    def read(self, size: int | None = -1) -> bytes:
        data = io.BytesIO.read(self, size)
        self.pieces -= 1
        self.bytes -= len(data)
        if self.pieces < 0 or self.bytes < 0:
            raise InputError(f"{self.where}: has more metadata, or in more pieces, than images have")
        return data


def _open(data: bytes, where: object) -> Image.Image:
    if not data:
        raise InputError(f"{where}: is empty; an intact image file is needed")
    image_format = _format(data)
    if image_format is None:
        raise InputError(f"{where}: is not an image in a format that is read; {FORMATS} are")
    metadata = (
        len(data) + 64 if image_format == "WEBP" else _MAXIMUM_METADATA.get(image_format, _MAXIMUM_OTHER_METADATA)
    )
    is_bounded = len(data) > _ALWAYS_QUICK or image_format == "TIFF"
    file = _BoundedFile(data, where, metadata) if is_bounded else io.BytesIO(data)
    try:
        image = Image.open(file, formats=(image_format,))
        _check_cost(image, data, where)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{where}: has too many pixels; the limit is {_MAXIMUM_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:  # its text has an address
        raise _damaged(where, "its header cannot be read") from error
    except Exception as error:
        raise _damaged(where, error) from error
    if is_bounded:
        is_slow = image.tile and image.tile[0][0] in _SLOW_DECODERS
        file.pieces = 2 * len(data) if is_slow else _MAXIMUM_PIECES + len(data) // 64
        file.bytes = 4 * len(data) + _MAXIMUM_OTHER_METADATA
    return image


def _check_cost(image: Image.Image, data: bytes, where: object) -> None:
    """Refuses what Pillow cannot convert, or could only decode with much time or memory."""
    width, height = image.size
    num_pixels = width * height
    if num_pixels > _MAXIMUM_PIXELS:
        raise InputError(f"{where}: has {width}x{height} pixels; the limit is {_MAXIMUM_PIXELS} pixels")
    if image.mode not in _MODES and not _is_deep_grey(image):
        raise InputError(f"{where}: has Pillow's pixel mode {image.mode}; 8 or 16 bits per channel are needed")
    if len(image.tile) > _MAXIMUM_TILES:
        raise InputError(f"{where}: has {len(image.tile):,} tiles; images have at most {_MAXIMUM_TILES:,}")
    if image.format == "TIFF":
        tile = int(image.tag_v2.get(_TILE_WIDTH, 1)), int(image.tag_v2.get(_TILE_HEIGHT, 1))
        if tile[0] * tile[1] > max(_MAXIMUM_TILE_PIXELS, 4 * num_pixels):
            raise InputError(f"{where}: has tiles of {tile[0]}x{tile[1]} pixels, far larger than the image")
    decoder = image.tile[0][0] if image.tile else ""
    if decoder == "jpeg":
        scans = data.count(b"\xff\xda")
        if scans * num_pixels > _MAXIMUM_SCANNED_PIXELS:
            raise InputError(f"{where}: has {scans} scans of {width}x{height} pixels; that takes too long")
    elif decoder in _SLOW_DECODERS:
        if num_pixels > _MAXIMUM_SLOW_PIXELS or len(data) > _SLOW_DECODERS[decoder] * num_pixels + (1 << 16):
            raise InputError(f"{where}: is a {image.format} of a kind that is slow to read, and too large; use PNG")
        if decoder == "ppm_plain" and data.count(b"#") > _MAXIMUM_COMMENTS:
            raise InputError(f"{where}: has more than {_MAXIMUM_COMMENTS} comments; images have a few")


def _load(image: Image.Image) -> None:
    if image.format != "TIFF":
        image.load()
        return
    with _no_stderr():
        image.load()


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Silences what the library behind TIFF prints: it writes about damage to the process's stderr itself."""
    try:
        saved = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _format(data: bytes) -> str | None:
    """Pillow's name of the format, from the first bytes."""
    if data[:4] == b"RIFF":
        return "WEBP" if data[8:12] == b"WEBP" else None
    return next((name for name, start in _BY_FIRST_BYTE.get(data[0], ()) if data.startswith(start)), None)


def _damaged(where: object, error: object) -> InputError:
    return InputError(f"{where}: is damaged ({one_line(error)[:200]}); an intact image file is needed")


# ---- What a file says about its pixels -------------------------------------------------------------------------------


def _is_deep_grey(image: Image.Image) -> bool:
    # "I" has 32 bits, but Pillow uses it for 16 in PPM and, before its version 11, in PNG.
    return image.mode not in _MODES and (
        image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    )


def _is_grey(image: Image.Image) -> bool:
    return image.mode == "L" or _is_deep_grey(image)


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether an opened image has more than 8 bits per channel, of which Pillow or `_converted` drops the lower ones."""
    if _is_deep_grey(image):
        return True
    match image.format:
        case "PNG":
            return data[24] == 16
        case "PPM":
            args = image.tile[0][3]  # (mode, largest value), or the mode
            return isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255
        case "TIFF":
            return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
        case "JPEG2000":
            start = data.find(b"\xff\x4f\xff\x51")
            return start >= 0 and data[start + 42] & 0x7F > 7
    return False


def _converted(image: Image.Image, mode: str, rules: list[str]) -> Image.Image:
    """Converts a loaded image to "L" or "RGB", and adds the rules that this takes."""
    marked = "transparency" in image.info  # one colour is transparent
    if image.mode in ("P", "PA"):
        rules.append("palette")
        image = image.convert("RGBA")  # otherwise Pillow warns about palettes with transparency
        marked = False  # it is in the fourth channel now, if it occurs
    elif image.mode == "RGBa":
        image = image.convert("RGBA")
    elif image.mode == "CMYK":
        rules.append("cmyk")
    elif _is_deep_grey(image):
        levels = np.clip(np.asarray(image).astype(np.int32), 0, 65535)
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    if marked or (image.mode in ("LA", "RGBA") and image.getextrema()[-1][0] < 255):
        rules.append("transparency")
    return image if image.mode == mode else image.convert(mode)


def _may_be_turned(image: Image.Image, data: bytes) -> bool:
    return any(mark in data for mark in _SAYS_ORIENTATION) or (
        image.format == "TIFF" and image.tag_v2.get(_ORIENTATION, 1) != 1
    )


def _orientation(image: Image.Image) -> int:
    """The orientation, 1 (upright) to 8, from a TIFF's tags, EXIF or XMP; 1 if they cannot be read."""
    info = image.info
    if not info and image.format != "TIFF":
        return 1
    found = image.tag_v2.get(_ORIENTATION) if image.format == "TIFF" else None
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:  # as ImageMagick writes it into a PNG
        lines = str(info["Raw profile type exif"])[:_MAXIMUM_EXIF].split("\n")
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(lines[3:]))
    if found is None and isinstance(exif, bytes):
        found = _orientation_of_exif(exif)
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp")
    if found is None and isinstance(xmp, (str, bytes)):
        xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
        match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
        found = int(match[1]) if match else None
    return found if found in _TURNS else 1


def _orientation_of_exif(exif: bytes) -> int | None:
    """The orientation in the first directory; nothing else of EXIF is read, since what it describes can be huge."""
    data = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", data, entry)
            if tag == _ORIENTATION and number == 1 and kind in (3, 4):
                return struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", data, entry + 8)[0]
    except struct.error:
        pass
    return None
