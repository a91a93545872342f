import numpy as np
import pytest

from bdjax.reporting.detection_plots import RED, outline

GREY = np.full((4, 5, 1), 100, np.uint8)


def is_red(image):
    return (image == RED).all(axis=-1)


def test_outline_runs_along_the_inside_of_the_mask():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    drawn = is_red(outline(GREY, mask, 6))
    assert drawn.shape == (24, 30)
    expected = np.zeros((24, 30), bool)
    expected[6:18, 6:24] = True
    expected[7:17, 7:23] = False  # the line is one pixel wide, and pixels within the mask have none between them
    np.testing.assert_array_equal(drawn, expected)
    assert (outline(GREY, mask, 6)[~expected] == 100).all()


def test_outline_is_closed_at_the_images_edge_and_in_corners():
    mask = np.zeros((4, 5), bool)
    mask[3, 4] = mask[2, 4] = mask[3, 3] = True  # an L around the pixel (2, 3)
    drawn = is_red(outline(GREY, mask, 5))
    assert drawn[19, 15:25].all() and drawn[10:20, 24].all()
    assert drawn[15, 20]  # where the two lines of the concave corner meet
    assert not drawn[10:15, 15:20].any() and not drawn[17, 22]
    np.testing.assert_array_equal(is_red(outline(GREY, mask, 16))[:, -2:].sum(axis=0), [32, 32])


def test_outline_keeps_colours_and_its_input():
    image = np.random.default_rng(0).integers(0, 200, (4, 5, 3)).astype(np.uint8)
    before = image.copy()
    np.testing.assert_array_equal(outline(image, np.zeros((4, 5), bool), 3), image.repeat(3, 0).repeat(3, 1))
    outline(image, np.ones((4, 5), bool), 1)
    np.testing.assert_array_equal(image, before)
    with pytest.raises(ValueError, match="at scale 0"):
        outline(image, np.ones((4, 5), bool), 0)
    with pytest.raises(ValueError, match=r"mask of shape \(5, 4\)"):
        outline(image, np.ones((5, 4), bool), 2)
