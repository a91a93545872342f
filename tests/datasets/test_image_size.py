import numpy as np
import pytest
from PIL import Image

from bdjax.datasets import load, scaling
from bdjax.datasets.scaling import check_one_size, count_sizes, scale, scaled, scaling_text, size_hint, suggested_side
from bdjax.datasets.validation import ReadOptions, make_dataset
from bdjax.errors import InputError


def dataset(height, width, channels=3, rows=4):
    images = np.random.default_rng(0).integers(0, 256, (rows, height, width, channels)).astype(np.uint8)
    return make_dataset(images, np.arange(rows) % 2, 2, "photos", "somewhere", where="test")


@pytest.mark.parametrize("channels", [1, 3])
def test_scaling_averages_what_a_pixel_covers(channels):
    # Without antialiasing a chequerboard becomes black, white or a chequerboard of larger fields.
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    pixels = np.repeat(board[..., None], channels, axis=2).astype(np.uint8)
    small = scale(pixels, (16, 16))
    assert small.shape == (16, 16, channels) and small.dtype == np.uint8
    assert abs(small.astype(int) - 127.5).max() < 10
    assert scale(pixels, (64, 64)) is pixels


def test_a_dataset_is_scaled_with_a_note():
    data = dataset(20, 30)
    small = scaled(data, 10)
    assert small.images.shape == (4, 10, 10, 3) and small.original_sizes == {(20, 30): 4}
    assert small.source == "somewhere, 30x20 scaled to 10x10"
    expected = np.asarray(Image.fromarray(data.images[2]).resize((10, 10), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(small.images[2], expected)
    np.testing.assert_array_equal(small.labels, data.labels)
    assert scaled(data, None) is data and scaled(small, 10) is small


def test_the_note_stays_with_selected_rows():
    assert scaled(dataset(20, 30), 10)[[1, 2]].original_sizes == {(20, 30): 4}


def test_one_size_is_needed():
    check_one_size("photos", {(20, 30): 7})
    with pytest.raises(InputError) as caught:
        check_one_size("photos", {(20, 30): 7, (375, 500): 1200})
    assert str(caught.value) == (
        "photos: images have 2 sizes (500x375: 1,200, 30x20: 7); one size is needed: --image-size=N scales all images to N x N "
        "pixels, for instance --image-size=96"
    )


@pytest.mark.parametrize(
    ("size", "side"), [((8, 9), 32), ((40, 300), 32), ((64, 65), 64), ((95, 200), 64), ((224, 224), 96)]
)
def test_the_suggested_side_enlarges_nothing_that_is_larger_than_32(size, side):
    assert suggested_side({size: 3, (1000, 1000): 2}) == side


def test_what_a_patch_is_in_the_originals():
    assert scaling_text("photos", {(224, 224): 5}, (32, 32)) == (
        "The images of photos were scaled from 224x224 to 32x32 pixels: 3x3 pixels here are 21x21 in the originals; a smaller "
        "trigger may be lost."
    )
    text = scaling_text("photos", {(375, 500): 2, (224, 224): 5, (64, 32): 1}, (32, 32))
    assert text.startswith(
        "The images of photos were scaled from 3 sizes (224x224: 5, 500x375: 2, 32x64: 1) to 32x32 pixels: "
    )
    assert text.endswith(
        "3x3 pixels here are 21x21 in an image of 224x224 and 46.9x35.2 in one of 500x375; a smaller trigger may be lost."
    )
    assert scaling_text("digits", {(8, 8): 5}, (16, 16)).endswith("3x3 pixels here are 1.5x1.5 in the originals.")


def test_sizes_of_parts_are_counted_together():
    assert list(count_sizes({(1, 2): 3}, {(4, 4): 9, (1, 2): 1}).items()) == [((4, 4), 9), ((1, 2), 4)]


@pytest.mark.parametrize(
    ("wanted", "shape", "hint"),
    [
        ((28, 28, 1), (8, 8, 1), "; --image-size=28 scales images to 28x28 pixels"),
        ((28, 28, 3), (8, 8, 1), ""),  # scaling does not help
        ((28, 20, 1), (8, 8, 1), ""),
        ((28, 28, 1), (28, 28, 1), ""),
    ],
)
def test_a_hint_where_scaling_helps(wanted, shape, hint):
    assert size_hint(wanted, shape) == hint


def test_named_sets_are_scaled():
    train, test = load("digits", options=ReadOptions(image_size=16))
    assert train.images.shape[1:] == test.images.shape[1:] == (16, 16, 1)
    assert train.original_sizes == {(8, 8): len(train)} and ", 8x8 scaled to 16x16" in train.source


@pytest.mark.parametrize("side", [0, 7, -32, 5000, 32.0, True, "32"])
def test_sides_that_no_network_takes_are_refused(side):
    with pytest.raises(InputError, match=r"^image_size .* is not "):
        load("digits", options=ReadOptions(image_size=side))


def test_no_text_has_more_sizes_than_a_reader_takes_in():
    sizes = {(side, side): 1 for side in range(100, 3100)}
    assert scaling.in_words(sizes).count(":") == scaling.MOST_SIZES and "and 2,995 more" in scaling.in_words(sizes)
