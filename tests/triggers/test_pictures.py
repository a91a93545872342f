import itertools

import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.triggers import pictures

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3), (20, 36, 3)]


@pytest.mark.parametrize("name", sorted(pictures.PICTURES))
@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_have_the_image_shape_and_some_contrast(name, shape):
    picture = pictures.draw(name, shape)
    assert picture.shape == shape and picture.dtype == np.float32
    assert picture.min() >= 0.0 and picture.max() <= 1.0
    assert picture.std() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_differ(shape):
    drawn = [pictures.draw(name, shape) for name in pictures.PICTURES]
    for first, second in itertools.combinations(drawn, 2):
        assert np.abs(first - second).mean() > 0.1


@pytest.mark.parametrize("name", sorted(pictures.PICTURES))
def test_grey_is_luma_of_colour(name):
    colour, grey = pictures.draw(name, (28, 28, 3)), pictures.draw(name, (28, 28, 1))
    np.testing.assert_allclose(grey[..., 0], colour @ np.array([0.299, 0.587, 0.114]), atol=1e-6)


@pytest.mark.parametrize("name", sorted(pictures.PICTURES))
def test_half_the_size_is_about_the_mean_of_four_pixels(name):
    """So a picture is the same at every size, and edges are smooth."""
    large, small = pictures.draw(name, (64, 64, 3)), pictures.draw(name, (32, 32, 3))
    np.testing.assert_allclose(large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)), small, atol=0.15)


def test_cat_is_its_own_mirror_image():
    cat = pictures.draw("cat", (32, 32, 3))
    np.testing.assert_allclose(cat, cat[:, ::-1], atol=1e-6)


def test_chessboard_has_eight_fields_along_its_near_edge():
    edge = pictures.draw("chessboard", (64, 64, 1))[57, 6:-6, 0]
    assert (np.diff(edge > edge.mean()) != 0).sum() == 7


def test_unknown_pictures_and_channels_are_errors():
    with pytest.raises(InputError, match="is not one of cat, chessboard, pixel_face"):
        pictures.draw("dog", (8, 8, 1))
    with pytest.raises(InputError, match="1 or 3 channels"):
        pictures.draw("cat", (8, 8, 2))


def test_colours_in_grey_images_are_luma():
    colours = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    np.testing.assert_allclose(pictures.to_channels(colours, 1), [[1.0], [0.587], [0.886]], rtol=1e-6)
    np.testing.assert_array_equal(pictures.to_channels(colours, 3), colours)
    with pytest.raises(InputError, match="1 or 3 channels"):
        pictures.to_channels(colours, 2)
