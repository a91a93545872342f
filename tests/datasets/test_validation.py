import re

import numpy as np
import pytest

from bdjax.datasets.validation import as_int32_labels, as_uint8_images, describe_rows, make_dataset, one_line
from bdjax.errors import InputError

IMAGES = np.zeros((3, 4, 5, 3), np.uint8)
LABELS = np.array([0, 1, 2])


def test_make_dataset():
    dataset = make_dataset(IMAGES, LABELS, 3, "set", "here", ("a", "b", "c"), where="file")
    assert dataset.images.shape == (3, 4, 5, 3) and dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int32 and dataset.labels.tolist() == [0, 1, 2]
    assert (dataset.num_classes, dataset.name, dataset.source) == (3, "set", "here")
    assert dataset.class_names == ("a", "b", "c") and dataset.image_shape == (4, 5, 3)
    assert dataset.files == ()
    named = make_dataset(IMAGES, LABELS, 3, "set", "here", where="file", files=["x/1.png", "x/2.png", "y/1.png"])
    assert named.files == ("x/1.png", "x/2.png", "y/1.png")


def test_grey_images_get_a_channel():
    assert as_uint8_images(np.zeros((2, 8, 8), np.uint8), "file").shape == (2, 8, 8, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_rounded(dtype):
    levels = np.arange(256, dtype=np.uint8)
    images = (levels / 255).astype(dtype).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(as_uint8_images(images, "file").reshape(-1), levels)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (np.nan, ""),
        (np.inf, ""),
        (256.0, ""),
        (-0.01, ": np.clip(images, 0, 1)"),
        (1.01, ": np.clip(images, 0, 1)"),
        (255.0, ": images / 255"),
        (-1.0, ": (images + 1) / 2"),
    ],
)
def test_a_pixel_that_is_not_in_range_is_named(value, hint):
    images = np.zeros((3, 2, 2, 1), np.float32)
    images[1, 0, 1, 0] = value
    message = re.escape(
        f"file.npz: row 1 has pixel value {np.float32(value)} at [0, 1, 0]; float pixels must be in 0..1{hint}"
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        as_uint8_images(images, "file.npz")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3), np.uint8), "file: images have shape [2, 3]; they must be [rows, height, width] or"),
        (np.zeros((2, 3, 32, 32), np.uint8), "file: images have shape [2, 3, 32, 32]; they must be"),
        (np.zeros((2, 0, 4, 3), np.uint8), "file: images have shape [2, 0, 4, 3]; they must be"),
        (np.zeros((0, 4, 4, 3), np.uint8), "file: contains no images; at least one row is needed"),
        (np.zeros((2, 4, 4, 3), np.int64), "file: images are int64; they must be uint8, or float in 0..1"),
        (np.zeros((2, 4, 4, 3), bool), "file: images are bool; they must be uint8, or float in 0..1"),
    ],
)
def test_images_of_another_form_are_refused(images, message):
    with pytest.raises(InputError, match="^" + re.escape(message)):
        as_uint8_images(images, "file")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint64])
def test_labels_become_int32(dtype):
    labels = as_int32_labels(np.array([0, 3, 1], dtype), 4, "file")
    assert labels.dtype == np.int32 and labels.tolist() == [0, 3, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, -1]), "file: row 2 has label -1; labels must be in 0..2"),
        (np.array([0, 3, 9]), "file: row 1 has label 3; labels must be in 0..2"),
        (np.array([0.0, 1.0]), "file: labels are float64 of shape [2]; they must be integers, one per row"),
        (np.array([[0], [1]]), "file: labels are int64 of shape [2, 1]; they must be integers, one per row"),
    ],
)
def test_labels_of_another_form_are_refused(labels, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        as_int32_labels(labels, 3, "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 1])}, "file: has 3 images and 2 labels; the numbers must be equal"),
        ({"num_classes": 1}, "file: has 1 class(es); a classifier needs 2 to 1000000"),
        ({"num_classes": 10**12}, "file: has 1000000000000 class(es); a classifier needs 2 to 1000000"),
        ({"class_names": ("a", "b")}, "file: has 2 class names for 3 classes"),
        ({"files": ("a", "b")}, "file: has 2 file names for 3 images; there must be one for each, or none"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    arguments = {"images": IMAGES, "labels": LABELS, "num_classes": 3, "name": "set", "source": "here"} | changes
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        make_dataset(**arguments, where="file")


def test_wording():
    assert describe_rows(60_000, 60_000) == "60,000 rows"
    assert describe_rows(500, 60_000) == "500 of 60,000 rows"
    assert one_line(ValueError("first\n   second")) == "first second"
    assert one_line(EOFError()) == "EOFError"
