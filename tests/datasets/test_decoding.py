import io
import re
import subprocess
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from bdjax.datasets.decoding import RULES, ImageHeader, decode, read_header, read_pixels, read_scaled, rules_note
from bdjax.errors import InputError
from tests.fixtures import images
from tests.fixtures.images import encoded


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


def test_files_of_several_sizes_are_scaled_to_one():
    files = [(lambda: encoded(Image.new("L", (9, 5), 10)), "a"), (lambda: encoded(Image.new("RGB", (20, 20))), "b")]
    pixels, sizes = read_scaled([*files, files[0]], 8)
    assert pixels.shape == (3, 8, 8, 3) and (pixels[0] == 10).all() and not pixels[1].any()
    assert sizes == {(5, 9): 2, (20, 20): 1}


@pytest.mark.parametrize("name", images.FAULTS)
def test_a_faulty_file_is_refused_in_one_line(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(subprocess, "Popen", None)  # no program is started
    path = images.FAULTS[name](tmp_path / "x.png")
    data = path.read_bytes()
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        decode(data, path)
    assert time.process_time() - start < 3
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message) < len(str(path)) + 250
    assert message.isprintable() and " at 0x" not in message
    try:
        assert read_header(data, path).size[0] > 0  # the fault may be in the pixels
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", images.SOUND)
def test_odd_metadata_does_not_matter(name, tmp_path):
    data = images.SOUND[name](tmp_path / "x.png").read_bytes()
    picture = decode(data, "x.png")
    assert picture.header == read_header(data, "x.png")
    assert np.ptp(picture.pixels) == 0 and set(picture.rules) <= {"palette"}


def test_the_message_fits_the_fault(tmp_path):
    expected = {
        "empty": "is empty; an intact image file is needed",
        "text": "is not an image in a format that is read; PNG, JPEG, PPM, BMP, WebP, GIF, TIFF and JPEG 2000 are",
        "half a JPEG": "is damaged (image file is truncated",
        "start only": "is damaged (its header cannot be read); an intact image file is needed",
        "wrong checksum": "is damaged (",
        "too many pixels": "has 12000x12000 pixels; the limit is 33554432 pixels",
        "float pixels": "has Pillow's pixel mode F; 8 or 16 bits per channel are needed",
        "JPEG of 50,000 segments": "has more metadata, or in more pieces, than images have",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match="^x: " + re.escape(message)):
            decode(images.FAULTS[name](tmp_path / "x").read_bytes(), "x")


@pytest.mark.parametrize("name", images.RULED)
def test_what_a_file_says_about_its_pixels_is_applied_and_named(name, tmp_path):
    rule, make = images.RULED[name]
    data = make(tmp_path / "x").read_bytes()
    picture = decode(data, "x")
    assert rule in picture.rules and set(picture.rules) <= {rule, "palette"}
    assert picture.header == read_header(data, "x")
    assert picture.pixels.shape == (*picture.header.size, 1 if picture.header.is_grey else 3)


def test_a_plain_file_needs_no_rule(pixels):
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels).convert("RGBA")):
        assert decode(encoded(image), "file").rules == ()
    assert rules_note({}) == "" and set(RULES) == {rule for rule, _ in images.RULED.values()}
    assert rules_note({"cmyk": 1200, "orientation": 3}) == ", 3 turned as EXIF says, 1,200 converted from CMYK"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_does(orientation, image_format):
    data = images.turned(orientation, image_format, size=(16, 8))
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    picture = decode(data, "file", grey=False)
    np.testing.assert_array_equal(picture.pixels, np.asarray(expected))
    assert read_header(data, "file").size == picture.header.size == ((16, 8) if orientation >= 5 else (8, 16))
    assert picture.rules == (("orientation",) if orientation > 1 else ())


def test_transparency_is_dropped_and_the_stored_colours_read():
    for mode in ("RGBA", "LA"):
        picture = decode(images.transparent(mode), "file")
        assert picture.rules == ("transparency",) and np.ptp(picture.pixels[..., 0]) == 0


def test_of_sixteen_bits_the_upper_eight_are_read(pixels):
    deep = pixels[..., 0].astype(np.uint16) * 256 + 255
    for image_format in ("PNG", "TIFF", "PPM", "JPEG2000"):
        data = encoded(Image.fromarray(deep), image_format)
        picture = decode(data, "file")
        assert picture.header == ImageHeader((5, 7), True) and picture.rules == ("depth",)
        np.testing.assert_array_equal(picture.pixels[..., 0], pixels[..., 0])


def test_of_several_frames_the_first_is_read():
    for image_format in ("GIF", "PNG", "WEBP", "TIFF"):
        assert (decode(images.frames(image_format), "file").pixels[..., 0] == 10).all()


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "JPEG2000"])
def test_further_formats_give_the_pixels(image_format, pixels):
    grey = pixels[..., 0]
    np.testing.assert_array_equal(
        read_pixels(encoded(Image.fromarray(grey), image_format), "file", size=None, grey=True)[..., 0], grey
    )
