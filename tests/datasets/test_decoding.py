import io
import re

import numpy as np
import pytest
from PIL import Image

from bdjax.datasets.decoding import ImageHeader, common_size, read_header, read_pixels
from bdjax.errors import InputError


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format)
    return stream.getvalue()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.mark.parametrize("image_format", ["PNG", "PPM", "BMP"])
def test_lossless_formats_give_the_pixels(pixels, image_format):
    data = encoded(Image.fromarray(pixels), image_format)
    assert read_header(data, "file") == ImageHeader((5, 7), False)
    np.testing.assert_array_equal(read_pixels(data, "file", size=(5, 7)), pixels)
    np.testing.assert_array_equal(read_pixels(data, "file", size=None), pixels)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_lossy_formats_are_read(pixels, image_format):
    assert read_pixels(encoded(Image.fromarray(pixels), image_format), "file", size=(5, 7)).shape == (5, 7, 3)


def test_grey_and_palette_images(pixels):
    grey = encoded(Image.fromarray(pixels[..., 0]))
    assert read_header(grey, "file").is_grey
    np.testing.assert_array_equal(read_pixels(grey, "file", size=(5, 7), grey=True), pixels[..., :1])
    np.testing.assert_array_equal(read_pixels(grey, "file", size=(5, 7)), pixels[..., :1].repeat(3, axis=-1))
    palette = Image.fromarray(pixels).quantize(4)
    palette.info["transparency"] = bytes([0, 128, 255, 255])
    data = encoded(palette)
    assert not read_header(data, "file").is_grey
    assert read_pixels(data, "file", size=(5, 7)).shape == (5, 7, 3)


def test_resizing_keeps_the_whole_frame():
    halves = np.zeros((64, 48, 3), np.uint8)
    halves[:, 24:] = 200
    resized = read_pixels(encoded(Image.fromarray(halves)), "file", size=(32, 32))
    assert resized.shape == (32, 32, 3)
    assert (resized[:, :14] == 0).all() and (resized[:, 18:] == 200).all()


def test_common_size():
    assert common_size([ImageHeader((5, 7), False)] * 2) == ((5, 7), "")
    mixed = [ImageHeader((5, 7), False), ImageHeader((7, 5), False)]
    assert common_size(mixed) == ((32, 32), ", 2 sizes resized to 32x32")


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n"])
def test_what_is_no_image_is_refused(data):
    message = "^file.png: cannot be read as an image; a PNG, JPEG, PPM, BMP or WebP is needed$"
    with pytest.raises(InputError, match=message):
        read_header(data, "file.png")


@pytest.mark.parametrize("image_format", ["PNG", "PPM", "BMP", "JPEG"])
def test_a_truncated_image_is_refused(image_format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, image_format)
    with pytest.raises(InputError, match=r"^file: is damaged \(.*\); an intact image file is needed$"):
        read_pixels(data[: len(data) // 2], "file", size=(64, 64))


def test_an_image_bomb_is_refused():
    data = encoded(Image.new("1", (12_000, 12_000)))
    assert len(data) < 20_000
    with pytest.raises(InputError, match=re.escape("file: has 12000x12000 pixels; the limit is 33554432 pixels")):
        read_header(data, "file")


def test_sixteen_bits_are_refused(pixels):
    data = encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 200))
    with pytest.raises(InputError, match="^file: has Pillow's pixel mode I;16; 8 bits per channel are needed$"):
        read_header(data, "file")
